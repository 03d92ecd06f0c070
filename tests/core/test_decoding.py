"""What the decoder refuses: everything but a record of the class that was asked for, and never with another error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.core import records
from fedpeft.core.errors import RecordError
from fedpeft.core.exchange import Update, Weights
from record_examples import Everything, example, same


@dataclass(frozen=True)
class Strict:
    x: int

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError(f"x is {self.x}")


def rewritten(data: bytes, change: Any) -> bytes:
    """The file with its header, as an object, changed."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header = change(header) or header
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + n :]


def update() -> bytes:
    return records.encode(Update({"v": torch.ones(2, 3), "w": torch.zeros(4, dtype=torch.float16)}, 5, 0.5))


def entry(**changes: Any) -> Any:
    return lambda header: header["params/v"].update(changes)


def valued(**changes: Any) -> Any:
    def change(header: dict[str, Any]) -> None:
        value = json.loads(header["__metadata__"]["value"]) | changes
        given = {k: v for k, v in value.items() if v is not ...}
        header["__metadata__"]["value"] = json.dumps(given)

    return change


LIES = {
    "offset shifted": entry(data_offsets=[4, 28]),
    "offset overlapping": entry(data_offsets=[0, 20]),
    "offset negative": entry(data_offsets=[-24, 0]),
    "offset beyond the end": entry(data_offsets=[0, 10**15]),
    "offset a bool": entry(data_offsets=[False, 24]),
    "three offsets": entry(data_offsets=[0, 24, 24]),
    "shape larger": entry(shape=[2, 4]),
    "shape huge": entry(shape=[10**12, 10**12]),
    "shape huge but empty": entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    "shape negative": entry(shape=[-2, -3]),
    "shape of floats": entry(shape=[2.0, 3]),
    "shape of no list": entry(shape={"2": 3}),
    "too many dimensions": entry(shape=[1] * 70 + [6]),
    "dtype wider": entry(dtype="F64"),
    "dtype unknown": entry(dtype="F8_E4M3"),
    "dtype not text": entry(dtype=["F32"]),
    "further key": entry(more=1),
    "entry no object": lambda header: header.update({"params/v": [1, 2, 3]}),
    "tensor renamed": lambda header: header.update({"params/u/v": header.pop("params/v")}),
    "tensor left out": lambda header: header.pop("params/w") and None,
    "tensor of no field": lambda header: header.update({"other": header.pop("params/v")}),
    "tensor with an empty path": lambda header: header.update({"/v": header.pop("params/v")}),
    "key badly escaped": lambda header: header.update({"params/%2f": header.pop("params/v")}),
    "header no object": lambda header: [header],
    "metadata missing": lambda header: header.pop("__metadata__") and None,
    "metadata no object": lambda header: header.update(__metadata__=1),
    "metadata not text": lambda header: header["__metadata__"].update(value=3),
    "metadata with more": lambda header: header["__metadata__"].update(more="x"),
    "another format": lambda header: header["__metadata__"].update(fedpeft="2"),
    "another type": lambda header: header["__metadata__"].update(type="Weights"),
    "value not JSON": lambda header: header["__metadata__"].update(value="{"),
    "value no object": lambda header: header["__metadata__"].update(value="[1]"),
    "value with too many digits": lambda header: header["__metadata__"].update(value="1" * 5000),
    "field missing": valued(loss=...),
    "field unknown": valued(colour="red"),
    "count of tensors wrong": valued(params=3),
    "count of tensors a bool": valued(params=True),
    "count of tensors null": valued(params=None),
    "int that is a float": valued(examples=5.0),
    "int that is a bool": valued(examples=True),
    "float that is text": valued(loss="0.5"),
    "float too large": valued(loss=10**400),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused(lie: Any) -> None:
    assert same(records.decode(rewritten(update(), lambda header: None), Update), records.decode(update(), Update))
    with pytest.raises(RecordError):
        records.decode(rewritten(update(), lie), Update)


WRONG: list[dict[str, Any]] = [
    {"flag": 1}, {"nothing": 0}, {"either": 1}, {"either": {"bool": True}}, {"either": {"int": 1, "str": ""}},
    {"tensor": None}, {"tensor": "two"}, {"spec": {"Inner": {}}}, {"by_name": []}, {"numbers": {}}, {"pair": ["p"]},
    {"names": ["a", "a"]}, {"names": [1]}, {"names": "ab"}, {"inner": 3}, {"moments": None}, {"layers": [0]},
    {"moments_by_name": {}}, {"inner": {"name": "", "weight": 1.0, "other": 1}}, {"inner": {"name": ""}},
]  # fmt: skip


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_types_are_checked_when_reading_too(fields: dict[str, Any]) -> None:
    data = records.encode(example())
    assert same(records.decode(rewritten(data, valued(whole=-3)), Everything), example())
    with pytest.raises(RecordError):
        records.decode(rewritten(data, valued(**fields)), Everything)


def test_a_check_of_the_record_itself_counts() -> None:
    data = rewritten(records.encode(Strict(1)), valued(x=-1))
    with pytest.raises(RecordError, match="Strict refuses its values: x is -1"):
        records.decode(data, Strict)


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [2**62, 0, 2**62], [0, 2**70], [0, 1 << 48]])
def test_an_empty_tensor_of_an_enormous_shape_is_refused(shape: list[int]) -> None:
    data = records.encode(Weights({"v": torch.ones(0, 3)}))
    with pytest.raises(RecordError, match="too large"):
        records.decode(rewritten(data, entry(shape=shape)), Weights)


def test_bytes_that_are_no_bools_are_refused() -> None:
    data = bytearray(records.encode(Weights({"m": torch.tensor([True, False])})))
    data[-1] = 2
    with pytest.raises(RecordError, match="BOOL but holds the byte 2"):
        records.decode(data, Weights)


def test_every_truncation_and_every_further_byte_is_refused() -> None:
    data = update()
    for n in range(len(data)):
        with pytest.raises(RecordError):
            records.decode(data[:n], Update)
    with pytest.raises(RecordError, match=f"describes {len(data)} bytes, but {len(data) + 1} came"):
        records.decode(data + b"\0", Update)


def test_the_size_limit_comes_first() -> None:
    data = update()
    assert records.decode(data, Update, max_bytes=len(data)).examples == 5
    with pytest.raises(RecordError, match=f"at most {len(data) - 1} are allowed"):
        records.decode(data, Update, max_bytes=len(data) - 1)
    with pytest.raises(RecordError, match="at most 9"):
        records.decode(b"not JSON at all", Update, max_bytes=9)


def read_or_refuse(data: bytes, cls: type[Any]) -> None:
    """Only RecordError may come out; what is accepted is a record of the class that can be written again."""
    try:
        record = records.decode(data, cls, max_bytes=1 << 20)
    except RecordError:
        return
    assert isinstance(record, cls)
    records.decode(records.encode(record), cls)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_give_nothing_but_record_errors(data: bytes) -> None:
    read_or_refuse(data, Update)
    read_or_refuse(len(data).to_bytes(8, "little") + data, Update)


VALID = records.encode(example())


@settings(deadline=None, max_examples=500)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_bytes_give_nothing_but_record_errors(changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for place, byte in changes:
        data[place] = byte
    read_or_refuse(bytes(data), Everything)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["F32", "I64"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_headers_give_nothing_but_record_errors(data: st.DataObject) -> None:
    def put(target: Any) -> None:
        """Put a random value at a random place of a JSON tree."""
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            key = data.draw(st.sampled_from(keys))
            inner = target[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                target[key] = data.draw(json_values)
                return
            target = inner

    def change(header: dict[str, Any]) -> None:
        if data.draw(st.booleans()):
            value = json.loads(header["__metadata__"]["value"])
            put(value)
            header["__metadata__"]["value"] = json.dumps(value)
        else:
            put(header)

    read_or_refuse(rewritten(VALID, change), Everything)
