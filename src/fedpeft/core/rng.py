"""Randomness by place: every draw has an address, no generator is shared, no global seed is set."""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import numpy as np

Rng: TypeAlias = np.random.Generator


def key_for(seed: int, *place: str | int) -> int:
    """A 128-bit integer that depends on the seed and on every part of the place, in order.

    Parts are separated by their lengths, so ("ab", "c") and ("a", "bc") differ, and so do 1 and "1".
    """
    digest = hashlib.sha256(f"fedpeft:{seed}".encode())
    for part in place:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest()[:16], "little")


def rng_for(seed: int, purpose: str, exchange: str = "", round: int = 0, client: str = "", attempt: int = 0) -> Rng:
    """A fresh generator for one purpose at one place of the run.

    The same arguments give the same stream in any process, on any engine, resumed or not.
    """
    return np.random.Generator(np.random.PCG64(key_for(seed, purpose, exchange, round, client, attempt)))
