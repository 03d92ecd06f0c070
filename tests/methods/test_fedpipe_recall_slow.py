"""Planted importance: of the 28 matrices of a small Llama four are changed, and the warm-up is asked which ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from fedpeft.core import pairs
from fedpeft.core.adapter import Lora
from fedpeft.core.examples import Examples
from fedpeft.core.exchange import ClientEnv
from fedpeft.methods.fedpipe import FedPipe, Memory, Warmup
from fedpeft.models.families import KINDS
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import lm_head_of
from fedpeft.models.load import freeze
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.planner.warmup import WarmUp

PLANTED, STEPS, BATCH, ROWS, LENGTH, VOCABULARY = 4, 150, 48, 2048, 16, 64


def world(seed: int) -> tuple[HFModel, Examples, set[str]]:
    """The unchanged model, texts that the changed one says, and the paths of what was changed."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = transformers.LlamaForCausalLM(config).eval()
        paths = [path for path, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in path]
        planted = [paths[i] for i in np.random.default_rng(seed).choice(len(paths), PLANTED, replace=False)]
        before = {path: lm.get_submodule(path).weight.detach().clone() for path in planted}
        for path in planted:
            weight = lm.get_submodule(path).weight.data
            change = torch.randn(len(weight), 4) @ torch.randn(4, weight.shape[1])
            weight.add_(change * (weight.norm() / change.norm()))
        ids = torch.randint(0, VOCABULARY, (ROWS, 1))
        with torch.no_grad():
            for _ in range(LENGTH - 1):
                shares = (4.0 * lm(ids).logits[:, -1]).softmax(dim=-1)
                ids = torch.cat([ids, torch.multinomial(shares, 1)], dim=1)
        for path, weight in before.items():
            lm.get_submodule(path).weight.data.copy_(weight)
    base = freeze(lm.base_model, None, f"planted-{seed}", torch.device("cpu"))
    model = HFModel(base, Lora(8, 16.0, targets=tuple(KINDS)), 0, 2048, GenerateReadout(lm_head_of(lm, base)))
    rows = tuple(row.numpy().astype(np.int32) for row in ids)
    data = Examples(rows, np.zeros(ROWS, np.int64), starts=np.ones(ROWS, np.int64))
    return model, data, {path.removeprefix("model.") for path in planted}


def recall(seed: int, score: str) -> float:
    """The share of the planted matrices among the four that score highest; by chance .14."""
    model, data, planted = world(seed)
    env = ClientEnv("c0", model, {"train": data}, seed, 1)
    own = FedPipe(score=score)  # type: ignore[arg-type]
    work = own.warm_up(Warmup(WarmUp("full", BATCH, 1, STEPS), 28, {}, {}), Memory(), env)
    fit = next(work)
    try:
        while True:
            fit = work.send(model.fit(fit))
    except StopIteration as stop:
        up, _ = stop.value
    stems = pairs.stems(env.initial())
    best = np.argsort(-up.scores.numpy())[:PLANTED]
    return len({model.slots[stems[i]].path for i in best} & planted) / PLANTED


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("score", ["sensitivity", "sum_lambda"])
def test_most_of_what_was_planted_is_found(score: str) -> None:
    """Seen: .50 and .56 over these seeds; with 128 rows and batches of 16 it was .42 and .25."""
    assert np.mean([recall(seed, score) for seed in range(4)]) >= 0.4
