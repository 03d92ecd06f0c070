"""How fast three models decode together, against the time of the models alone; and what drafts of the small one save.

    python -m benchmarks.decoding
    python -m benchmarks.decoding --small demo-small --large demo-large --adapter RUN_DIR/adapter --text FILE

One repetition is so many tokens behind prompts that are in the caches already. Alone, a model is fed one token after
another through its session, nothing combined and nothing drawn. The loop's goal is at least 0.9 of the rate
1 / (t_large + 2 t_small). With both small models in one pass it may beat that rate.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import record, timing, workload
from fedpeft.core.adapter import Lora
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params
from fedpeft.models.export import import_adapter
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import lm_head_of, load_lm_head
from fedpeft.models.load import freeze, load_base, resolve_device
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.models.sessions import Speaker, SpeakerSession
from fedpeft.proxy.decode import Decoding, Settings, Trio
from fedpeft.proxy.inprocess import InProcess, InProcessSession

VOCABULARY, POSITIONS = 1000, 512  # of random models
RANDOM = {"small": (64, 2), "large": (256, 6)}  # width and blocks
SPECULATIVE, PLAIN = "with drafts", "proxy"

Steps = Callable[[], float]  # seconds of the tokens behind prompts that were read before


class Apart(Speaker):
    """A speaker that never shares a pass."""

    def beside(self, other: Speaker) -> bool:
        """No."""
        return False


def make_model(name: str, size: str, options: argparse.Namespace) -> HFModel:
    """A model by its name, or a random one of the Llama family."""
    spec = Lora(options.rank, 2.0 * options.rank, targets=("all",))
    if name != "random":
        base = load_base(name, device=options.device)
        return HFModel(base, spec, 0, readout=GenerateReadout(load_lm_head(name, base)))
    from transformers import LlamaConfig, LlamaForCausalLM

    width, blocks = RANDOM[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks,
        num_attention_heads=4, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    with torch.random.fork_rng():
        whole: Any = LlamaForCausalLM(config)
    base = freeze(whole.eval().base_model, None, f"random-{size}", resolve_device(options.device))
    return HFModel(base, spec, 0, readout=GenerateReadout(lm_head_of(whole, base)))


def make_adapter(model: HFModel, folder: Path | None) -> Params:
    """From a folder, or random with a small effect."""
    if folder is not None:
        return import_adapter(folder, model)
    rng = rng_for(0, "benchmark")
    return {
        name: t + torch.from_numpy(rng.normal(0, 0.02, size=tuple(t.shape))).float()
        for name, t in model.init(rng_for(0, "adapter")).items()
    }


def make_prompts(options: argparse.Namespace, model: HFModel, vocab: int) -> list[list[int]]:
    """Of equal length: consecutive pieces of a text's middle, or random tokens."""
    if options.text is None:
        rng = rng_for(0, "benchmark", client="prompts")
        drawn: list[list[int]] = rng.integers(3, vocab, size=(options.rows, options.prompt)).tolist()
        return drawn
    ids = model.base.tokenizer.encode(options.text.read_text(encoding="utf-8"))
    ids = ids[len(ids) // 2 :]
    return [ids[row * options.prompt : (row + 1) * options.prompt] for row in range(options.rows)]


def feed(open_session: Callable[[], SpeakerSession | InProcessSession], rows: int, tokens: int) -> float:
    """Seconds of one model alone."""
    session = open_session()
    say = session.scores if isinstance(session, InProcessSession) else session.logits
    return timing.seconds(lambda: [say([[7]] * rows) for _ in range(tokens)])


def decoded(trio: Trio, prompts: list[list[int]], settings: list[Settings], speculate: int) -> Decoding:
    """A decoding that has read its prompts and said its first token."""
    decoding = Decoding(trio, prompts, settings, speculate)
    decoding.step()
    return decoding


def finish(decoding: Decoding) -> None:
    """All that is left to say."""
    while decoding.step():
        pass


def together(trio: Trio, prompts: list[list[int]], settings: list[Settings], speculate: int) -> float:
    """Seconds of the loop behind the first token."""
    with decoded(trio, prompts, settings, speculate) as decoding:
        return timing.seconds(lambda: finish(decoding))


def in_turns(ways: Mapping[str, Steps], repeats: int) -> dict[str, list[float]]:
    """Seconds of every way, the order turned round each time, after a round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-1, repeats):
        for name in list(ways) if repeat % 2 else list(ways)[::-1]:
            seconds = ways[name]()
            if repeat >= 0:
                times[name].append(seconds)
    return times


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one comparison."""
    small, large = (make_model(getattr(options, size), size, options) for size in ("small", "large"))
    box, params = InProcess(Speaker(large), options.large), make_adapter(small, options.adapter)
    vocab = min(box.caps.vocab, Speaker(small).vocab)
    trio = Trio(box, Speaker(small, params), Speaker(small), None, vocab, frozenset())
    apart = replace(trio, tuned=Apart(small, params))
    prompts = make_prompts(options, small, vocab)
    settings = [
        Settings(alpha=options.alpha, max_tokens=options.tokens + 1, temperature=options.temperature, seed=row)
        for row in range(options.rows)
    ]
    alone: dict[str, Callable[[], SpeakerSession | InProcessSession]] = {
        "large": lambda: box.open(prompts, trio.want),
        "tuned small": lambda: Speaker(small, params).open(prompts),
        "base small": lambda: Speaker(small).open(prompts),
    }
    ways: dict[str, Steps] = {
        name: partial(feed, opened, options.rows, options.tokens) for name, opened in alone.items()
    }
    ways[PLAIN] = partial(together, trio, prompts, settings, 0)
    ways["proxy, small models apart"] = partial(together, apart, prompts, settings, 0)
    ways[SPECULATIVE] = partial(together, trio, prompts, settings, options.speculate)
    times = in_turns(ways, options.repeats)
    with decoded(trio, prompts, settings, options.speculate) as drafted, decoded(trio, prompts, settings, 0) as plain:
        finish(drafted)
        finish(plain)
    tally, said = drafted.drafting, [[own.tokens for own in each.completions()] for each in (drafted, plain)]
    sums = [sum(each) for each in zip(*(times[name] for name in alone), strict=True)]
    per_token = options.tokens * options.rows
    return {
        "ms_per_token": {name: 1e3 * statistics.median(each) / per_token for name, each in times.items()},
        "share_of_rate": {name: timing.ratios(sums, times[name]) for name in ways if name.startswith(PLAIN)},
        "drafts": {
            "speed-up": timing.ratios(times[PLAIN], times[SPECULATIVE]),
            "accepted": tally.accepted / max(1, tally.drafted),
            "tokens_per_call": per_token / tally.calls,
            "same_tokens": None if options.temperature else said[0] == said[1],
        },
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    parser.add_argument("--small", default="random", help="random, demo-small, a folder or a hub name")
    parser.add_argument("--large", default="random", help="random, demo-large, a folder or a hub name")
    parser.add_argument("--adapter", type=Path, help="folder of the small model's adapter; default: a random one")
    parser.add_argument("--text", type=Path, help="the prompts are pieces of this file; default: random tokens")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter, LoRA on all linear layers")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--speculate", type=int, default=4, help="drafts")
    parser.add_argument("--rows", type=int, default=1, help="texts side by side")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the timing begins")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a repetition")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(arguments)
    workload.use_threads(options.threads)
    result = measure(options)
    rows: list[list[Any]] = [["", "ms per token", "share of the rate of the models alone", "least", "greatest"]]
    for name, each in result["ms_per_token"].items():
        rows.append([name, each, *result["share_of_rate"].get(name, {}).values()])
    record.show([[*row, *[""] * (5 - len(row))] for row in rows])
    for name in ("adapter", "text"):
        path: Path | None = getattr(options, name)
        setattr(options, name, None if path is None else path.name)
    return record.keep("decoding", options, result)


if __name__ == "__main__":
    main()
