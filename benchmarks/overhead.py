"""A whole sequential round of the engine against the bare training steps in a plain PyTorch loop on the same batches.

    python -m benchmarks.overhead

The engine's round is `federate` over `InProcess` with one client at a time: codec both ways, checks, memories,
training, aggregation. The plain loop is what one would write without fedpeft: a copy of the base with two extra
matrices in each adapted projection, batches padded to their longest row, `torch.optim.AdamW`, no federation around it.
Both start from the same adapter, see the same batches, and must end with the same parameters; the relative difference
is kept.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import record, timing, workload
from fedpeft.core import tree
from fedpeft.core.examples import Examples
from fedpeft.core.federate import federate
from fedpeft.core.rng import rng_for
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.fedavg import FedAvg
from fedpeft.models.hf import HFModel

SEED = 0


class LoraLinear(nn.Module):
    """A frozen projection with a low-rank addition."""

    def __init__(self, inner: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner = inner
        self.scale = scale
        self.down = nn.Parameter(torch.empty(0))
        self.up = nn.Parameter(torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        """W x + scale B A x."""
        y: Tensor = self.inner(x)
        change = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return y + self.scale * change


class PlainLoop:
    """Ordinary fine-tuning of a copy of the base."""

    def __init__(self, model: HFModel) -> None:
        self.module = copy.deepcopy(model.base.module)
        for inner in self.module.modules():
            inner._forward_hooks.clear()
        self.layers: dict[str, LoraLinear] = {}
        for name, slot in model.slots.items():
            parent, _, attribute = slot.path.rpartition(".")
            layer = LoraLinear(self.module.get_submodule(slot.path), model.scale)
            setattr(self.module.get_submodule(parent), attribute, layer)
            self.layers[name] = layer
        self.device = model.device
        self.head = nn.Linear(model.width, model.classes).to(self.device)

    def _parameters(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {"head.weight": self.head.weight, "head.bias": self.head.bias}
        for name, layer in self.layers.items():
            named |= {f"{name}.A": layer.down, f"{name}.B": layer.up}
        return named

    def train(
        self, start: tree.Params, data: Examples, batches: Sequence[Sequence[int]], lr: float
    ) -> dict[str, Tensor]:
        """Train from `start` on the batches; the trained parameters."""
        named = self._parameters()
        for name, parameter in named.items():
            parameter.data = start[name].to(self.device, copy=True)
        optimizer = torch.optim.AdamW(named.values(), lr=lr, weight_decay=0.0)
        for rows in batches:
            ids, mask, labels = self._collate(data, rows)
            hidden = self.module(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[:, :, None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
            loss = F.cross_entropy(self.head(pooled.to(self.head.weight.dtype)), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {name: parameter.detach().cpu().clone() for name, parameter in named.items()}

    def _collate(self, data: Examples, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = [data.tokens[row] for row in rows]
        longest = max(map(len, tokens))
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, own in enumerate(tokens):
            ids[i, : len(own)] = own
            mask[i, : len(own)] = 1
        arrays = (ids, mask, data.labels[list(rows)])
        return tuple(torch.from_numpy(a).to(self.device) for a in arrays)  # type: ignore[return-value]


def engine_round(model: HFModel, data: Mapping[str, Examples], method: FedAvg) -> tree.Params:
    """One round, one client after another; the new global parameters."""
    transport = InProcess(lambda: method, model, {c: {"train": own} for c, own in data.items()}, SEED, batch=1)
    (done,) = federate(method, transport, model, rounds=1, seed=SEED)
    assert len(done.answered) == len(data), [receipt.lost for receipt in done.receipts]
    return method.result(done.state)


def plain_round(loop: PlainLoop, model: HFModel, data: Mapping[str, Examples], method: FedAvg) -> list[tree.Params]:
    """The bare training steps of the same round; every client's parameters."""
    start = model.init(rng_for(SEED, "adapter"))
    trained: list[tree.Params] = []
    for client, own in data.items():
        batches = own.epochs(1, method.batch_size, rng_for(SEED, "batches", "train", 1, client))[: method.steps]
        trained.append(loop.train(start, own, batches, method.lr))
    return trained


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    workload.add_options(parser, clients=10)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    workload.use_threads(options.threads)
    result = measure(options)
    ratio = result["ratio"]
    record.show([["", "seconds"], *result["seconds"].items()])
    print(f"the engine's round takes {ratio['median']:.3f} times as long ({ratio['min']:.3f} to {ratio['max']:.3f})")
    return record.keep("overhead", options, result)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one comparison."""
    base = workload.make_base(options.model, options.dtype, options.device)
    data, classes = workload.make_data(options, base)
    model = HFModel(base, workload.lora(options.rank), classes, options.token_budget)
    method = FedAvg(cohort=0, batch_size=options.batch, steps=options.steps)
    loop = PlainLoop(model)
    works = {
        "engine": lambda: engine_round(model, data, method),
        "plain": lambda: plain_round(loop, model, data, method),
    }
    times = timing.in_turns(works, options.repeats)
    sizes = [len(own) for own in data.values()]
    plain = tree.mean(zip(plain_round(loop, model, data, method), sizes, strict=True))
    engine = engine_round(model, data, method)
    return {
        "ratio": timing.ratios(times["engine"], times["plain"]),
        "seconds": {name: statistics.median(each) for name, each in times.items()},
        "rows": sizes,
        "relative_difference": tree.norm(tree.sub(engine, plain)) / tree.norm(plain),
    }


if __name__ == "__main__":
    main()
