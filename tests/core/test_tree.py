"""Arithmetic on named tensors, against numpy and by hand."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpeft.core import records, tree
from fedpeft.core.errors import RecordError
from fedpeft.core.exchange import Weights


def some(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=rng).to(dtype) for n, shape in {"a": (3, 4), "b": (), "c": (5,)}.items()}


def close(a: tree.Params, b: tree.Params, rtol: float = 1e-12) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n].double(), b[n].double(), rtol=rtol, atol=0) for n in a)


def equal(a: tree.Params, b: tree.Params) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


# --- mean -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1000), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3))
def test_the_mean_is_numpys(weights: list[float]) -> None:
    parts = [some(i, torch.float64) for i in range(len(weights))]
    got = tree.mean(zip(parts, weights, strict=True))
    for name, t in got.items():
        want = np.average([p[name].numpy() for p in parts], axis=0, weights=weights)
        np.testing.assert_allclose(t.numpy(), want, rtol=1e-12, atol=1e-12)


def test_the_mean_by_hand() -> None:
    """(1 * 2 + 3 * 6) / 4 = 5."""
    assert tree.mean([({"w": torch.tensor(2.0)}, 1), ({"w": torch.tensor(6.0)}, 3)])["w"] == 5.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_mean_of_one_part_is_that_part_to_the_bit(dtype: torch.dtype) -> None:
    for weight in (1, 2, 0.125, 4096):
        assert equal(tree.mean([(some(0, dtype), weight)]), some(0, dtype))
    if dtype is not torch.float64:  # where the weight is no power of two, float64 has room to spare
        for weight in (3, 0.1, 1234):
            assert equal(tree.mean([(some(0, dtype), weight)]), some(0, dtype))


def test_the_mean_of_equal_parts_is_that_part() -> None:
    assert equal(tree.mean([(some(0), w) for w in (1, 5, 17, 3)]), some(0))


def test_the_mean_is_summed_in_float64() -> None:
    """In float32, 2^24 + 1 is 2^24: a float32 sum of a million ones after it would never grow."""
    parts = [({"w": torch.tensor(2.0**24)}, 1.0)] + [({"w": torch.tensor(1.0)}, 1.0)] * 999
    got = tree.mean(iter(parts))["w"]
    assert got.dtype is torch.float32 and got == torch.tensor((2**24 + 999) / 1000)


def test_the_mean_keeps_the_dtypes_and_changes_nothing() -> None:
    first, second = some(0), some(1)
    got = tree.mean([(first, 1.0), (second, 0.0)])
    assert equal(got, first) and equal(second, some(1))
    with pytest.raises(RecordError, match="where the other parts of the mean have"):
        tree.mean([(some(0), 1.0), (some(1, torch.float64), 1.0)])
    got["a"].zero_()
    assert equal(first, some(0))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "sum to 0"),
        ([({"w": torch.ones(1)}, 0.0)], "positive weight"),
        ([({"w": torch.ones(1)}, math.nan)], "sum to nan"),
        ([({"w": torch.ones(1)}, 1), ({"v": torch.ones(1)}, 1)], "differ in 2 names, first: 'v'"),
        ([({"w": torch.ones(1)}, 1), ({"w": torch.ones(2)}, 1)], r"'w' has shape \(2,\) where \(1,\) was expected"),
    ],
)
def test_a_mean_that_has_no_meaning_is_refused(parts: list[tuple[dict[str, Tensor], float]], words: str) -> None:
    with pytest.raises(RecordError, match=words):
        tree.mean(parts)


# --- the rest ---------------------------------------------------------------------------------------------------


def test_sums_differences_and_multiples() -> None:
    a, b = some(0, torch.float64), some(1, torch.float64)
    for got, want in (
        (tree.add(a, b), lambda x, y: x + y),
        (tree.sub(a, b), lambda x, y: x - y),
        (tree.axpy(-2.5, a, b), lambda x, y: -2.5 * x + y),
        (tree.scale(a, 3.0), lambda x, y: 3.0 * x),
        (tree.map2(torch.maximum, a, b), np.maximum),
        (tree.zeros_like(a), lambda x, y: 0 * x),
    ):
        for name in a:
            np.testing.assert_allclose(got[name].numpy(), want(a[name].numpy(), b[name].numpy()), rtol=1e-14)
    assert equal(a, some(0, torch.float64)) and equal(b, some(1, torch.float64))


def test_products_and_norms_are_numpys() -> None:
    a, b = some(0), some(1)
    flat = [np.concatenate([p[n].double().numpy().ravel() for n in p]) for p in (a, b)]
    assert tree.dot(a, b) == pytest.approx(np.dot(*flat), rel=1e-14)
    assert tree.norm(a) == pytest.approx(np.linalg.norm(flat[0]), rel=1e-14)
    assert tree.norm({}) == 0.0 and tree.count({}) == 0 and tree.count(a) == 12 + 1 + 5


def test_pairs_need_equal_layouts() -> None:
    for function in (tree.add, tree.sub, tree.dot):
        with pytest.raises(RecordError):
            function(some(0), {"a": torch.ones(3, 4)})


def test_overlay_and_select() -> None:
    a, b = {"x": torch.tensor(1), "y": torch.tensor(2)}, {"y": torch.tensor(3), "z": torch.tensor(4)}
    assert {n: int(t) for n, t in tree.overlay(a, b).items()} == {"x": 1, "y": 3, "z": 4}
    assert list(tree.select(tree.overlay(a, b), lambda name: name > "x")) == ["y", "z"] and list(a) == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("block.3.query.A", 3), ("block.11.value.B", 11), ("delta.block.2.key", 2), ("a.b.block.0.w", 0),
        ("head.weight", None), ("blocks.1.w", None), ("block.x.w", None), ("block.1", None), ("myblock.1.w", None),
        ("prefix.11", 11), ("prefix.1.w", None), ("prefix.x", None), ("late.6.down.weight", 6), ("late.6", None),
    ],
)  # fmt: skip
def test_the_block_of_a_name(name: str, block: int | None) -> None:
    assert tree.block_of(name) == block


def test_the_hash_is_that_of_names_and_bytes() -> None:
    """Computed by hand: sorted names, each with a zero byte and its numbers in little-endian order."""
    params = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor([3], dtype=torch.int64)}
    by_hand = b"b\0" + struct.pack("<q", 3) + b"w\0" + struct.pack("<2f", 1.0, -2.0)
    assert tree.sha256(params) == hashlib.sha256(by_hand).hexdigest()
    assert tree.sha256(dict(reversed(params.items()))) == tree.sha256(params)


def test_the_hash_sees_one_bit_and_no_layout() -> None:
    a = some(0)
    for name in a:
        changed = a | {name: torch.nextafter(a[name], torch.tensor(math.inf))}
        assert tree.sha256(changed) != tree.sha256(a)
    t = torch.arange(6.0).view(2, 3)
    assert tree.sha256({"t": t.T.contiguous().T}) == tree.sha256({"t": t})
    assert tree.sha256({"a": torch.tensor(0.0)}) != tree.sha256({"a": torch.tensor(-0.0)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int8], ids=str)
def test_raw_bytes_of_every_width(dtype: torch.dtype) -> None:
    t = torch.tensor([[1, 0], [1, 1]]).to(dtype)
    again = torch.frombuffer(bytearray(tree.raw_bytes(t)), dtype=dtype).view(2, 2)
    assert torch.equal(again, t) and tree.raw_bytes(t[:0]) == b"" and len(tree.raw_bytes(t[0, 0])) == dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_mean_of_decoded_params_has_the_bits_of_one_of_others(dtype: torch.dtype) -> None:
    """Decoded params lie in one block, whose numbers are added as one vector; mixed company is added one by one."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (16,), "c": (0, 2), "d": (2, 2, 7)}
    parts = [
        ({name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}, weight)
        for weight in (3, 0.1, 7.3e-5)
    ]
    decoded = [(records.decode(records.encode(Weights(params)), Weights).params, weight) for params, weight in parts]
    assert all(tree.vector_of(params) is not None for params, _ in decoded)
    expected = tree.mean(parts)
    for mixed in (decoded, [decoded[0], parts[1], decoded[2]], [parts[0], *decoded[1:]]):
        before = [tree.sha256(params) for params, _ in mixed]
        got = tree.mean(mixed)
        assert tree.sha256(got) == tree.sha256(expected)
        assert [tree.sha256(params) for params, _ in mixed] == before, "the parts stay as they were"
    cut = {name: decoded[0][0][name] for name in ("a", "b")}
    assert tree.sha256(tree.mean([(cut, 1)])) == tree.sha256(cut)


BASE = torch.arange(16.0)
VIEWS = {  # pairs of params that are views of longer vectors, none as a decoded record's
    "one tensor under two names": ({"a": BASE[:4], "b": BASE[:4]}, {"a": BASE[:4], "b": BASE[4:8]}),
    "overlapping": ({"a": BASE[:9], "b": BASE[7:]}, {"a": BASE[:9], "b": BASE[7:]}),
    "vectors that begin elsewhere": ({"a": BASE[:8].data[4:8]}, {"a": BASE[4:12].data[:4]}),
    "outside their vector": ({"a": BASE[:4].data.as_strided((4,), (1,), 8)}, {"a": BASE[:4].data[:]}),
    "swapped": ({"a": BASE[:8], "b": BASE[8:]}, {"a": BASE[8:], "b": BASE[:8]}),
    "a small piece": ({"a": BASE[3:5]}, {"a": BASE[4:6]}),
}


@pytest.mark.parametrize("case", VIEWS)
def test_a_mean_of_views_is_one_of_their_values(case: str) -> None:
    first, second = VIEWS[case]
    for a, b in ((first, second), (second, first), (first, first)):
        got = tree.mean([(a, 3), (b, 1)])
        for name, t in got.items():
            np.testing.assert_array_equal(t.numpy(), (3 * a[name].numpy() + b[name].numpy()) / 4)
    assert torch.equal(BASE, torch.arange(16.0))


def test_a_mean_of_views_of_a_trained_vector_takes_part_in_its_gradient() -> None:
    leaf = torch.arange(4.0).requires_grad_()
    tree.mean([({"a": leaf[:3]}, 1), ({"a": leaf[1:]}, 3)])["a"].sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [0.25, 1.0, 1.0, 0.75]
    with torch.no_grad():
        part = leaf[1:]
        assert tree.mean([({"a": part}, 2)])["a"].tolist() == [1, 2, 3]
