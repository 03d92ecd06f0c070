"""The codec: what goes in comes out, nothing else gets in, and the bytes are a plain safetensors file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.core import layout, records
from fedpeft.core.adapter import HeadOnly
from fedpeft.core.errors import RecordError
from fedpeft.core.exchange import Nothing, Update, Weights
from fedpeft.core.fit import Moments
from record_examples import Chain, Everything, Inner, example, minilm_lora, same

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool]


# --- round trips ------------------------------------------------------------------------------------------------


def test_every_type_round_trips() -> None:
    assert same(records.decode(records.encode(example()), Everything), example())
    other = example(either=7, maybe=1, maybe_params=None, spec=HeadOnly(), real=math.nan, by_name={"x": math.inf})
    assert same(records.decode(records.encode(other), Everything), other)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
tensors = st.builds(
    lambda dtype, shape, seed: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 99).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 9),
)
params = st.dictionaries(texts, tensors, max_size=3)
everything = st.builds(
    example, flag=st.booleans(), whole=st.integers(), real=st.floats(), text=texts, maybe=st.none() | st.integers(),
    either=st.integers() | texts | st.floats(), tensor=tensors, params=params, maybe_params=st.none() | params,
    by_name=st.dictionaries(texts, st.floats(), max_size=3), layers=st.lists(params, max_size=2).map(tuple),
    moments_by_name=st.dictionaries(texts, st.builds(Moments, st.integers(), params, params), max_size=2),
    numbers=st.lists(st.integers(), max_size=3).map(tuple), names=st.frozensets(texts, max_size=3),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(everything)
def test_any_values_round_trip(record: Everything) -> None:
    data = records.encode(record)
    again = records.decode(data, Everything)
    assert same(again, record)
    assert records.encode(again) == data


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_to_the_bit_in_every_shape(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0.0, 1.0, 3.0, 250.0]).to(dtype)
    shapes = {"flat": numbers, "scalar": numbers[1], "empty": numbers[:0], "part": numbers[::2], "row": numbers[None]}
    assert same(records.decode(records.encode(Weights(shapes)), Weights), Weights(shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_are_written_in_their_own_order(dtype: torch.dtype) -> None:
    t = torch.arange(12, dtype=dtype).view(3, 4)
    views = {
        "t": t.T,
        "every other": t[:, ::2],
        "wide": t[:1].expand(2, 4),
        "flip": t.flip(0),
        "grad": t.requires_grad_(),
    }
    got = records.decode(records.encode(Weights(views)), Weights).params
    assert all(torch.equal(got[name], view) and got[name].is_contiguous() for name, view in views.items())
    assert not got["grad"].requires_grad


def test_a_bfloat16_view_of_a_wider_tensor_round_trips() -> None:
    t = torch.arange(6, dtype=torch.bfloat16).view(2, 3).T[::2]
    assert torch.equal(records.decode(records.encode(Weights({"t": t})), Weights).params["t"], t)


def test_a_record_may_hold_its_own_class() -> None:
    assert records.decode(records.encode(Chain(1, Chain(2))), Chain) == Chain(1, Chain(2))


def test_mappings_come_back_sorted_and_their_order_does_not_change_the_bytes() -> None:
    a = Weights({"x": torch.ones(2), "c/d": torch.ones(1, dtype=torch.int8), "b": torch.zeros(3, dtype=torch.float64)})
    b = Weights(dict(reversed(a.params.items())))
    assert records.encode(a) == records.encode(b)
    assert list(records.decode(records.encode(b), Weights).params) == ["b", "c/d", "x"]
    by_name = example(by_name={"z": 1.0, "a": 2.0})
    assert records.encode(by_name) == records.encode(replace(by_name, by_name={"a": 2.0, "z": 1.0}))
    assert list(records.decode(records.encode(by_name), Everything).by_name) == ["a", "z"]


def test_a_float_field_takes_whole_numbers_and_numpys_floats() -> None:
    for value, want in ((3, 3.0), (np.float64(0.25), 0.25)):
        loss = records.decode(records.encode(Update({}, 1, value)), Update).loss
        assert type(loss) is float and loss == want


# --- memory -----------------------------------------------------------------------------------------------------


def test_decoded_tensors_are_writable_aligned_and_their_own() -> None:
    data = bytearray(records.encode(Weights({"a": torch.ones(3), "b": torch.ones(6, 384), "c": torch.ones(5)})))
    before = bytes(data)
    got = records.decode(data, Weights).params
    assert all(t.data_ptr() % 64 == 0 for t in got.values())
    got["a"].mul_(7)
    assert bytes(data) == before
    data[:] = b"\0" * len(data)
    assert torch.equal(got["b"], torch.ones(6, 384)) and torch.equal(got["a"], torch.full((3,), 7.0))


def test_encoding_changes_nothing() -> None:
    record = example()
    versions = {name: t._version for name, t in record.params.items()}
    keys = list(record.params)
    data = records.encode(record)
    records.check_finite(record)
    assert list(record.params) == keys and versions == {name: t._version for name, t in record.params.items()}
    assert records.encode(record) == data


def test_the_codec_adds_less_than_two_percent_to_minilm_lora() -> None:
    update = Update(minilm_lora(), 1234, 0.123456789)
    raw = sum(t.nbytes for t in update.params.values())
    assert len(update.params) == 26 and raw == 24 * 8 * 384 * 4 + 6 * 384 * 4 + 6 * 4
    assert raw < len(records.encode(update)) < 1.02 * raw


# --- the safetensors library reads and writes the same ----------------------------------------------------------


def all_dtypes() -> dict[str, Tensor]:
    named = {f"ü {dtype}": torch.tensor([[1, 0, 3]]).to(dtype) for dtype in DTYPES}
    return named | {"scalar": torch.tensor(2.0), "empty": torch.ones(2, 0)}


def test_the_library_reads_what_is_written_here() -> None:
    data = layout.dump(all_dtypes(), {"a": '{"b": "☕"}'})
    assert same(safetensors.torch.load(data), all_dtypes())


def test_every_tensor_starts_at_a_multiple_of_its_width() -> None:
    data = layout.dump(all_dtypes(), {})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    widths = {name: t.element_size() for name, t in all_dtypes().items()}
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert all(header[name]["data_offsets"][0] % width == 0 for name, width in widths.items())


def test_the_library_reads_the_metadata(tmp_path: Path) -> None:
    (tmp_path / "r.safetensors").write_bytes(records.encode(Update({"w": torch.ones(2)}, 3, 0.5)))
    with safetensors.safe_open(tmp_path / "r.safetensors", "pt") as file:
        assert list(file.keys()) == ["params/w"]
        value = json.dumps({"params": 1, "examples": 3, "loss": 0.5}, separators=(",", ":"))
        assert file.metadata() == {"fedpeft": "1", "type": "Update", "value": value}


def test_what_the_library_writes_is_read_here() -> None:
    found, metadata = layout.parse(safetensors.torch.save(all_dtypes(), {"a": "b"}))
    assert same(found, all_dtypes()) and metadata == {"a": "b"}


# --- what is refused when writing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flag": 1}, "flag must be bool, but is a int: 1"),
        ({"whole": True}, "whole must be int"),
        ({"whole": 1.0}, "whole must be int, but is a float: 1.0"),
        ({"real": "1"}, "real must be float"),
        ({"real": 10**400}, "64 bits"),
        ({"whole": 10**5000}, "cannot be written as JSON"),
        ({"text": None}, "text must be str"),
        ({"text": "\ud800"}, "not valid Unicode"),
        ({"nothing": 0}, "nothing must be None"),
        ({"either": None}, "either must be one of int, str, float"),
        ({"tensor": 1.0}, "tensor must be a Tensor"),
        ({"tensor": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"tensor": torch.ones(2).to_sparse()}, "sparse"),
        ({"tensor": torch.ones(2, device="meta")}, "meta"),
        ({"params": {"a": 1.0}}, "params/a must be a Tensor"),
        ({"params": {1: torch.ones(1)}}, "text key"),
        ({"params": None}, "a mapping of tensors"),
        ({"spec": Inner("", 0.0)}, "spec must be one of Lora, AdaLora, HeadOnly, Prefix, .*, but is a Inner"),
        ({"by_name": {"a": "b"}}, "by_name/a must be float"),
        ({"by_name": {1: 1.0}}, "text keys"),
        ({"numbers": [1]}, "numbers must be a tuple"),
        ({"numbers": (1, "2")}, "numbers/1 must be int"),
        ({"pair": ("p",)}, "pair must be a tuple of 2 values"),
        ({"names": {"a"}}, "names must be a frozenset of texts"),
        ({"inner": Nothing()}, "inner must be Inner"),
        ({"inner": Inner("", None)}, "inner/weight must be float"),  # type: ignore[arg-type]
    ],
)
def test_a_value_of_another_type_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecordError, match=words.replace("(", r"\(")):
        records.encode(example(**changes))


@dataclass(frozen=True)
class Listed:
    numbers: list[int]


@dataclass(frozen=True)
class Twins:
    which: tuple[int, ...] | tuple[str, ...]


@dataclass
class Thawed:
    x: int = 0


def test_types_that_cannot_travel_are_refused() -> None:
    with pytest.raises(RecordError, match=r"Listed.numbers has the type list\[int\], which cannot travel"):
        records.encode(Listed([1]))
    with pytest.raises(RecordError, match="cannot be told apart"):
        records.encode(Twins((1,)))
    for thing in (Thawed(), {"a": 1}, 3, None, Weights):
        with pytest.raises(RecordError, match="frozen=True"):
            records.encode(thing)


def test_a_chain_too_deep_is_refused_both_ways() -> None:
    chain = None
    for i in range(100_000):
        chain = Chain(i, chain)
    with pytest.raises(RecordError, match="too deeply"):
        records.encode(chain)
    deep = '{"link":1,"rest":' * 100_000 + "null" + "}" * 100_000
    for text in (deep, "[" * 100_000):
        with pytest.raises(RecordError):
            records.decode(layout.dump({}, {"fedpeft": "1", "type": "Chain", "value": text}), Chain)


def test_a_header_above_the_limit_is_refused_both_ways() -> None:
    with pytest.raises(RecordError, match="keep long sequences of numbers in a tensor"):
        records.encode(example(text="x" * layout.HEADER_LIMIT))
    with pytest.raises(RecordError, match="header"):
        layout.parse((layout.HEADER_LIMIT + 8).to_bytes(8, "little") + b" " * (layout.HEADER_LIMIT + 8))


# --- finiteness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"real": math.nan}, "real of Everything is nan"),
        ({"either": math.inf}, "either/float of Everything is inf"),
        ({"by_name": {"a": 1.0, "b": -math.inf}}, "by_name/b of Everything is -inf"),
        ({"inner": Inner("", math.nan)}, "inner/weight"),
        ({"params": {"w": torch.tensor([1.0, math.inf, math.nan])}}, "params/w of Everything holds 2 .* of 3"),
        ({"params": {"w": torch.tensor([math.inf, -math.inf])}}, "holds 2"),
        ({"moments": Moments(1, {"x": torch.tensor(math.nan, dtype=torch.bfloat16)})}, "moments/first/x"),
        ({"layers": ({}, {"y": torch.tensor([math.nan], dtype=torch.float64)})}, "layers/1/y"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    record = example(**changes)
    assert same(records.decode(records.encode(record), Everything), record)
    with pytest.raises(RecordError, match=words):
        records.check_finite(record)


def test_finite_records_pass_even_where_their_sum_is_not() -> None:
    largest = torch.full((4,), torch.finfo(torch.float32).max)
    records.check_finite(Weights({"w": largest, "h": torch.full((9,), 60000.0, dtype=torch.float16)}))
    records.check_finite(example())


def test_an_int_of_more_than_64_bits_does_not_travel() -> None:
    records.check_finite(Update({}, 2**62, 0.0))
    with pytest.raises(RecordError, match="whole number of 3322 bits"):
        records.check_finite(Update({}, 10**1000, 0.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["a", "b"])
def test_numbers_of_a_decoded_record_are_checked_together(bad: float, where: str) -> None:
    """Its tensors lie in one block of memory, with zeros between them."""
    params = {"a": torch.full((3, 5), 3e38), "b": torch.ones(7), "c": torch.ones(0)}
    records.check_finite(records.decode(records.encode(Weights(params)), Weights))
    params[where].view(-1)[2] = bad
    with pytest.raises(RecordError, match=f"params/{where} of Weights holds 1 numbers that are not finite"):
        records.check_finite(records.decode(records.encode(Weights(params)), Weights))


def test_numbers_outside_the_vector_that_a_tensor_is_a_view_of_are_checked() -> None:
    numbers = torch.ones(8)
    numbers[6] = math.nan
    outside = numbers[:4].data.as_strided((4,), (1,), 4)
    with pytest.raises(RecordError, match="params/a of Weights holds 1 numbers that are not finite, of 4"):
        records.check_finite(Weights({"a": outside}))
