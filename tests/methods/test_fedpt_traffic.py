"""What FedPT's clients are sent and answer: the adapter's numbers, a header with their names, and no byte more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import facts
from fedpeft.core import records
from fedpeft.core.adapter import Lora
from fedpeft.core.examples import Examples
from fedpeft.core.federate import federate
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.fedpt import FedPT, Weights
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import load_lm_head
from fedpeft.models.load import load_base
from fedpeft.models.readouts.generate import GenerateReadout

# 4 sum r (d_in + d_out) bytes, of r 8 on all linear layers of the blocks: by block q k v o, and two of 4 d.
# Toy: one block of d 24, 4 * 8 * (4 * 48 + 2 * 120), and two of d 96. The embedded pair: two of d 40, three of d 128.
BYTES = {"small": 13_824, "large": 110_592, "demo-small": 46_080, "demo-large": 221_184}


def model(which: str) -> HFModel:
    if which in facts.SIZES:
        return facts.model(0, which)
    base = load_base(which, device="cpu")
    return HFModel(base, Lora(8, 16.0, ("all",)), 0, 2048, GenerateReadout(load_lm_head(which, base)))


def header(kind: str, params: Mapping[str, Tensor], **rest: Any) -> dict[str, Any]:
    """Of the safetensors file that holds these tensors and values."""
    told: dict[str, Any] = {}
    begin = 0
    for name, t in sorted(params.items()):
        end = begin + 4 * t.numel()
        told[f"params/{name}"] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [begin, end]}
        begin = end
    value = json.dumps({"params": len(params), **rest}, separators=(",", ":"))
    return {"__metadata__": {"fedpeft": "1", "type": kind, "value": value}, **told}


def size(told: Mapping[str, Any], numbers_bytes: int) -> int:
    """Of the file: the header's length in 8 bytes, the header filled up to a multiple of 8, the numbers."""
    n = len(json.dumps(told, separators=(",", ":")))
    return 8 + n + -n % 8 + numbers_bytes


@pytest.mark.parametrize("which", BYTES)
def test_an_adapter_and_its_header_travel_and_nothing_else(which: str) -> None:
    of, answers = model(which), list[bytes]()
    rows = tuple(np.arange(3, 12, dtype=np.int32) for _ in range(5))
    data = Examples(rows, np.zeros(5, np.int64), starts=np.full(5, 4, np.int64))
    method = FedPT(cohort=0, epochs=1, batch_size=4)

    def carry(client: str, call: Any, up: bytes) -> bytes:
        answers.append(up)
        return up

    engine = InProcess(lambda: method, of, {client: {"train": data} for client in "ab"}, 5, carry=carry)
    (done,) = federate(method, engine, of, rounds=1, seed=5)
    params = method.result(done.state)
    assert 4 * sum(t.numel() for t in params.values()) == BYTES[which]
    down = size(header("Weights", params, base=of.sha256), BYTES[which])
    assert [receipt.bytes_down for receipt in done.receipts] == [down] * 2
    assert len(records.encode(Weights(dict(params), of.sha256))) == down
    assert [receipt.bytes_up for receipt in done.receipts] == list(map(len, answers)) and len(answers) == 2
    for up in answers:
        n = int.from_bytes(up[:8], "little")
        told = json.loads(up[8 : 8 + n])
        loss = json.loads(told["__metadata__"]["value"])["loss"]
        assert told == header("Update", params, examples=5, loss=loss)
        assert len(up) == size(told, BYTES[which])
