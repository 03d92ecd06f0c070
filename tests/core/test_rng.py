"""Randomness by place: stable for ever, and different wherever anything of the place differs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import torch

from fedpeft.core.exchange import ClientEnv, ServerEnv
from fedpeft.core.rng import key_for, rng_for

PLACE = (7, "batches", "train", 3, "client-12", 1)
KEY = 20856999889344662785682207330469397166
INTEGERS = [229886971492, 111691303223, 559270665763, 150014655893]
PERMUTATION = [0, 4, 3, 2, 7, 5, 6, 1]


def test_the_stream_of_one_place_never_changes() -> None:
    """Golden: whoever changes these numbers changes every recorded run."""
    assert key_for(*PLACE) == KEY
    assert rng_for(*PLACE).integers(1 << 40, size=4).tolist() == INTEGERS
    assert rng_for(*PLACE).permutation(8).tolist() == PERMUTATION


def test_another_process_draws_the_same() -> None:
    code = f"from fedpeft.core.rng import rng_for; print(rng_for(*{PLACE!r}).integers(1 << 40, size=4).tolist())"
    env = os.environ | {"PYTHONHASHSEED": "123"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(INTEGERS)


def test_every_part_of_the_place_matters() -> None:
    other = (8, "dropout", "score", 4, "client-13", 2)
    places = list(itertools.product(*zip(PLACE, other, strict=True)))
    assert len({key_for(*p) for p in places}) == 2**6
    draws = np.array([rng_for(*p).random(1000) for p in places])
    assert np.abs(np.corrcoef(draws) - np.eye(len(places))).max() < 0.2  # six standard deviations


def test_parts_do_not_run_into_each_other() -> None:
    places = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"), (1,), ("1",), ("str:1",), (1, 1), (11,)]
    assert len({key_for(0, *p) for p in places}) == len(places)
    assert key_for(1, 2) != key_for(12) != key_for(1, "2")


def test_drawing_in_one_place_moves_no_other() -> None:
    first = rng_for(*PLACE)
    first.random(100)
    torch.rand(3)
    assert rng_for(*PLACE).integers(1 << 40, size=4).tolist() == INTEGERS


def test_environments_draw_from_their_own_place() -> None:
    server = ServerEnv(None, (), 7, 9, 3, "train", 1)  # type: ignore[arg-type]
    client = ClientEnv("client-12", None, {}, 7, 9, 3, "train", 1)  # type: ignore[arg-type]
    assert client.rng("batches").random() == rng_for(*PLACE).random()
    assert server.rng("batches").random() == rng_for(7, "batches", "train", 3, "", 1).random()
    seed = client.seed_for("dropout")
    assert seed == client.seed_for("dropout") != client.seed_for("other") and 0 <= seed < 1 << 63
