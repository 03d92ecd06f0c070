"""Adapter specifications from plain data."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fedpeft.core.adapter import ADAPTERS, Lora, MixedPrompt, spec_of


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_specification_survives_json(kind: str) -> None:
    spec = ADAPTERS[kind]()
    told = json.dumps({"kind": kind, **dataclasses.asdict(spec)})
    assert spec_of(json.loads(told)) == spec == spec_of({"kind": kind})


def test_lists_become_tuples_and_what_is_left_out_has_its_default() -> None:
    made = spec_of({"kind": "lora", "targets": ["key"], "blocks": [0, 2]})
    assert made == Lora(targets=("key",), blocks=(0, 2)) and hash(made)
    assert spec_of({"kind": "attempt", "sources": ["a"]}) == MixedPrompt(sources=("a",))
