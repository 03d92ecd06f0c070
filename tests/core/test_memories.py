"""Memories in this process: versions, and what is forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fedpeft.core.errors import RecordError, StoreError
from fedpeft.core.exchange import Weights
from fedpeft.core.memories import InMemory


@dataclass(frozen=True)
class Note:
    text: str


def test_committed_and_staged_version_are_kept_and_no_other() -> None:
    memories = InMemory()
    memories.stage("a", 1, Note("one"), None)
    memories.stage("a", 2, Note("two"), 1)
    memories.stage("a", 3, Note("three"), 1)  # a second attempt: the staged one goes, the committed one stays
    assert memories.load("a", 1, Note) == Note("one") and memories.load("a", 3, Note) == Note("three")
    with pytest.raises(StoreError, match="the memory of client 'a', version 2, is missing; start the run again"):
        memories.load("a", 2, Note)
    with pytest.raises(StoreError, match="client 'b'"):
        memories.load("b", 1, Note)


def test_memory_comes_back_as_a_copy() -> None:
    memories, held = InMemory(), Weights({"w": torch.zeros(2)})
    memories.stage("a", 1, held, None)
    held.params["w"].add_(1)
    memories.load("a", 1, Weights).params["w"].add_(5)
    assert memories.load("a", 1, Weights).params["w"].tolist() == [0.0, 0.0]


def test_memory_of_another_type_is_refused() -> None:
    memories = InMemory()
    memories.stage("a", 1, Note("one"), None)
    with pytest.raises(RecordError, match="'Note' came where a 'Weights' was expected"):
        memories.load("a", 1, Weights)
