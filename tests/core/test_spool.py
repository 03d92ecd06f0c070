"""Answers beyond the limit wait on disk and come back as they were."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.core import records, tree
from fedpeft.core.errors import StoreError
from fedpeft.core.exchange import Update
from fedpeft.core.spool import Spool

CLIENTS = [f"c{i}" for i in range(8)]


def update(i: int) -> Update:
    return Update({"w": torch.arange(100.0) * (i + 1), "b": torch.tensor([1, i])}, i, i / 3)


def filled(limit: int) -> Spool:
    spool = Spool(Update, limit)
    for i, client in enumerate(CLIENTS):
        spool.add(client, update(i), records.encode(update(i)))
    return spool


SIZE = len(records.encode(update(0)))


@pytest.mark.parametrize("limit", [0, SIZE, 3 * SIZE + 10, 10**9])
def test_records_are_equal_wherever_they_waited(limit: int) -> None:
    spool = filled(limit)
    assert list(spool) == CLIENTS and len(spool) == 8
    for i, client in enumerate(CLIENTS):
        assert client in spool and records.encode(spool[client]) == records.encode(update(i))
    assert "c9" not in spool
    with pytest.raises(KeyError):
        spool["c9"]


def test_fold_over_the_spool_equals_the_fold_in_memory() -> None:
    means = [tree.mean((up.params, up.examples) for up in filled(limit).values()) for limit in (0, 10**9)]
    assert tree.sha256(means[0]) == tree.sha256(means[1])


def test_what_is_beyond_the_limit_is_decoded_only_when_it_is_asked_for(monkeypatch: Any) -> None:
    decoded: list[int] = []
    decode = records.decode

    def counted(data: bytes, cls: Any) -> Any:
        decoded.append(len(data))
        return decode(data, cls)

    monkeypatch.setattr(records, "decode", counted)
    spool = filled(2 * SIZE + 10)
    assert "c7" in spool and len(list(spool)) == 8 and decoded == []
    assert spool["c0"] is spool["c0"] and decoded == []
    assert spool["c7"] is not spool["c7"] and len(decoded) == 2


def test_file_has_no_name_and_goes_with_the_spool(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    spool = filled(0)
    assert list(tmp_path.iterdir()) == []
    del spool
    gc.collect()
    if before:
        assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_disk_that_is_full_is_an_error_with_a_remedy(monkeypatch: Any) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match=r"cannot keep the answers .*No space left on device; free space there or set"):
        filled(2 * SIZE)


def test_write_that_takes_only_a_part_goes_on(monkeypatch: Any) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data)[:7], at))
    spool = filled(0)
    assert records.encode(spool["c5"]) == records.encode(update(5))
