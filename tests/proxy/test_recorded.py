"""What a large model said is kept on disk, and comes back as it was asked for."""

from __future__ import annotations

import dataclasses
import fcntl
import resource
from pathlib import Path

import pytest
import torch

import trios
from fedpeft.core.errors import StoreError
from fedpeft.proxy.blackbox import CannotDo, Full
from fedpeft.proxy.recorded import Recorded, ask
from fedpeft.proxy.scoring import alpha_curve, score

TEXTS = trios.prompts(3, 9, 10)
TEXTS = [[5, *own, 7] for own in TEXTS]
STARTS = [1 + i % len(own) for i, own in enumerate(TEXTS)]


def plain(row: int) -> torch.Tensor:
    """By transformers, one text alone."""
    whole = trios.plain_logits(trios.whole("llama", 2, 3), TEXTS[row]).log_softmax(dim=1)
    return whole[STARTS[row] - 1 : max(STARTS[row], len(TEXTS[row]) - 1)]


def recorded(folder: Path | None = None, **more: object) -> Recorded:
    large = trios.trio().large
    assert large is not None
    return Recorded(large, TEXTS, STARTS, trios.VOCABULARY, folder, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", [True, False])
def test_scores_are_those_of_single_texts(kept: bool, tmp_path: Path) -> None:
    own = recorded(tmp_path if kept else None)
    rows = [4, 0, 8, 2]
    found = own.forced(rows)
    assert found.ids is None
    torch.testing.assert_close(found.logits, torch.cat([plain(row) for row in rows]), rtol=1e-4, atol=1e-4)
    for row in range(len(TEXTS)):
        assert len(own.forced([row]).logits) == max(1, len(TEXTS[row]) - STARTS[row])


def test_a_model_is_asked_once(tmp_path: Path) -> None:
    """The file outlives the process; other texts, another model or another form have a file of their own."""
    first = recorded(tmp_path)
    before = first.forced(range(len(TEXTS))).logits
    again = recorded(tmp_path)
    asked = len(again.large.calls)  # type: ignore[attr-defined]
    assert torch.equal(again.forced(range(len(TEXTS))).logits, before)
    assert len(again.large.calls) == asked == 0  # type: ignore[attr-defined]
    others = [
        dataclasses.replace(again, sequences=[*TEXTS[1:], TEXTS[0]]),
        dataclasses.replace(again, starts=[1] * len(STARTS)),
        dataclasses.replace(again, bits=16),
        dataclasses.replace(again, vocab=50),
    ]
    assert len({again.key, *(other.key for other in others)}) == 5
    files = list(tmp_path.iterdir())
    assert [path.suffix for path in files] == [".scores"] and files[0].stat().st_mode & 0o077 == 0
    assert files[0].stat().st_size == again.size_bytes


def test_half_precision_is_within_its_bound(tmp_path: Path) -> None:
    whole = range(len(TEXTS))
    exact, half = recorded(tmp_path).forced(whole).logits, recorded(tmp_path, bits=16).forced(whole).logits
    near = exact > -16
    assert near.any() and float((exact - half)[near].abs().max()) <= 0.004


def test_what_is_too_large_keeps_the_likeliest(tmp_path: Path) -> None:
    """Above the bound 128 candidates are kept, here all 60; they are the whole rows, sorted."""
    few = recorded(tmp_path, most_bytes=100, whole=False)
    assert few.candidates == trios.VOCABULARY
    found, whole = few.forced([3, 1]), recorded().forced([3, 1]).logits
    assert found.ids is not None and torch.equal(found.logits, whole.sort(dim=1, descending=True).values)
    assert torch.equal(whole.gather(1, found.ids), found.logits)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".ids", ".scores"]
    live = recorded(tmp_path / "none", most_bytes=100)  # whole rows are needed, and nothing keeps them
    assert torch.equal(live.forced([3, 1]).logits, whole) and not (tmp_path / "none").exists()


def test_a_killed_recording_is_made_again(tmp_path: Path) -> None:
    large = dataclasses.replace(trios.trio().large, dies_after=0)  # type: ignore[type-var]
    own = dataclasses.replace(recorded(tmp_path), large=large)
    with pytest.raises(Exception, match="has died"):
        own.forced([0])
    assert not list(tmp_path.glob("*.scores"))
    torch.testing.assert_close(recorded(tmp_path).forced([0]).logits, recorded().forced([0]).logits, rtol=0, atol=1e-4)


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    """Who comes second is refused, and takes nothing from the first; what a killed one left is written anew."""
    own = recorded(tmp_path)
    draft = tmp_path / f"{own.key[:32]}.scores.tmp"
    draft.write_bytes(b"left by a killed process")
    with draft.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"another process is writing .*scores\.tmp now; wait until it is done"):
            own.forced([0])
    assert draft.read_bytes() == b"left by a killed process"
    torch.testing.assert_close(own.forced([0]).logits, recorded().forced([0]).logits, rtol=0, atol=1e-4)
    assert not draft.exists()


@pytest.mark.parametrize("few", [False, True])
def test_a_full_disk_is_an_error_that_names_it_and_leaves_nothing(tmp_path: Path, few: bool) -> None:
    """The file may have half of its bytes: the first rows are written, and what follows is refused."""
    own = recorded(tmp_path / "kept", most_bytes=100, whole=False) if few else recorded(tmp_path / "kept")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (own.size_bytes // 2, before[1]))
    try:
        with pytest.raises(StoreError, match=r"large model said in .*kept: File too large; free space there .* resume"):
            own.forced([0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "kept").iterdir())
    assert len(own.forced([0]).logits) == max(1, len(TEXTS[0]) - STARTS[0])
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot keep .*file: File exists"):
        recorded(tmp_path / "file").forced([0])


def test_curves_and_scores_take_what_is_remembered(tmp_path: Path) -> None:
    trio = trios.trio()
    texts = [(own, start) for own, start in zip(TEXTS, STARTS, strict=True) if start < len(own)]
    sequences, starts = [own for own, _ in texts], [start for _, start in texts]
    assert trio.large is not None
    own = Recorded(trio.large, sequences, starts, trio.vocab, tmp_path)
    own.forced([0])
    asked = len(trio.large.calls)  # type: ignore[attr-defined]
    with_memory = dataclasses.replace(trio, large=own)
    curve = alpha_curve(with_memory, sequences, starts)
    found = score(with_memory, sequences, starts, 0.75)
    assert len(trio.large.calls) == asked  # type: ignore[attr-defined]
    assert curve.nll == pytest.approx(alpha_curve(trio, sequences, starts).nll, abs=1e-5)
    for one, other in zip(found, score(trio, sequences, starts, 0.75), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    unknown = [[9, 9, 9]]
    assert score(with_memory, unknown, [1], 1.0)[0].total == pytest.approx(score(trio, unknown, [1], 1.0)[0].total)
    assert with_memory.large is own and own.caps == trio.large.caps
    session = own.open([[5, 6]], Full())
    assert session.first.values.shape == (1, 1, trios.VOCABULARY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"full": False, "top_k": 20}, "gives the 20 likeliest tokens"), ({"block": False}, "scores one position a call")],
)
def test_what_cannot_be_scored_is_told(changes: dict[str, object], message: str) -> None:
    large = trios.trio().large
    weak = dataclasses.replace(large, caps=dataclasses.replace(large.caps, **changes))  # type: ignore[type-var,union-attr]
    with pytest.raises(CannotDo, match=rf"{message}; use a model in this process or a logit server"):
        Recorded(weak, TEXTS, STARTS, trios.VOCABULARY)
    if "block" in changes:  # one position a text is possible without
        Recorded(weak, TEXTS, list(map(len, TEXTS)), trios.VOCABULARY)


def test_batches_are_within_what_the_model_takes() -> None:
    large = trios.trio().large
    small = dataclasses.replace(large, caps=dataclasses.replace(large.caps, max_batch=2, max_context=13))  # type: ignore[type-var,union-attr]
    found = dict(ask(small, TEXTS, STARTS, trios.VOCABULARY))
    assert sorted(found) == list(range(len(TEXTS)))
    for row, scores in found.items():
        torch.testing.assert_close(scores, plain(row), rtol=1e-4, atol=1e-4)
