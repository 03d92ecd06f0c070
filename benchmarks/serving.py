"""The endpoint against the plain decoding loop: time of one answer, streamed and whole, and 50 requests at once.

    python -m benchmarks.serving

One process decodes: with `Decoding` called in a loop, or behind the endpoint over loopback, in turns. The client is a
process of its own that does little but read. Processor time, which other work on the machine hardly moves, is that of
the decoding process, network and answers included. Models are random, in the sizes of the embedded pair by default: a
large one steered by a small one with its adapter on and off. All ways must say the same, which is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record, timing

END, BYTES = 0, 256  # tokens: an end that is never said, and one for each byte


@dataclass(frozen=True)
class Random:
    """A random steered model as an artefact."""

    trio: Any
    name: str = "random"
    alpha: float = 0.5

    @property
    def settings(self) -> Mapping[str, Any]:
        """No defaults of its own."""
        return {}

    def prompt(self, said: Sequence[Any]) -> list[int]:
        """Not asked for here."""
        raise NotImplementedError


@dataclass(frozen=True)
class InProcess:
    """A large model in this process; gives all scores, and takes nothing back."""

    speaker: Any

    @property
    def caps(self) -> Any:
        """What it can do."""
        from fedpeft.proxy.blackbox import Caps

        vocab = self.speaker.vocab
        return Caps("random", None, vocab, True, vocab, False, self.speaker.positions, 64, True)

    def open(self, prompts: Sequence[Sequence[int]], want: Any) -> Any:
        """A session."""
        return _Session(self.speaker.open(prompts))


class _Session:
    def __init__(self, inner: Any) -> None:
        self._inner, self.keep, self.close = inner, inner.keep, inner.close

    @property
    def first(self) -> Any:
        return self._scores(self._inner.first)

    def scores(self, new: Sequence[Sequence[int]]) -> Any:
        return self._scores(self._inner.logits(new))

    @staticmethod
    def _scores(logits: Any) -> Any:
        import torch

        from fedpeft.proxy.blackbox import Scores

        return Scores(logits.log_softmax(dim=-1), None, torch.ones(logits.shape[:2]), True)


def make_trio(width: int, blocks: int, context: int) -> Any:
    """A random GPT-2 of that size, and a small one of a third of its width with an adapter."""
    import torch
    import transformers

    from benchmarks.workload import lora
    from fedpeft.core.rng import rng_for
    from fedpeft.models.hf import HFModel
    from fedpeft.models.lm_head import lm_head_of
    from fedpeft.models.load import freeze
    from fedpeft.models.readouts.generate import GenerateReadout
    from fedpeft.models.sessions import Speaker
    from fedpeft.proxy.trio import Trio

    def made(name: str, width: int, blocks: int) -> HFModel:
        config = transformers.GPT2Config(
            vocab_size=1024,
            n_embd=width,
            n_layer=blocks,
            n_head=4,
            n_positions=context,
            initializer_range=0.2,
            bos_token_id=END,
            eos_token_id=END,
        )
        kind: Any = transformers.AutoModelForCausalLM
        full = kind.from_config(config).eval()
        base = freeze(full.base_model, None, f"random-{name}", torch.device("cpu"))
        return HFModel(base, lora(8), 0, 2048, GenerateReadout(lm_head_of(full, base)))

    large, small = made("large", width, blocks), made("small", max(4, width // 3 // 4 * 4), max(1, blocks - 1))
    tuned = Speaker(small, small.init(rng_for(0, "adapter")))
    return Trio(InProcess(Speaker(large)), tuned, Speaker(small), tokenizer(), BYTES + 1, frozenset({END}))


def tokenizer() -> Any:
    """An end token and one for each byte."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(["<end>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    kind: Any = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=inner, eos_token="<end>")


@contextlib.contextmanager
def endpoint(trio: Any, rows: int) -> Iterator[int]:
    """Serve it in a thread: the port."""
    import uvicorn

    from fedpeft.proxy.desk import Options
    from fedpeft.proxy.engine import Engine
    from fedpeft.proxy.listening import bind
    from fedpeft.proxy.serving import make_app

    engine, sock = Engine(max_batch=rows), bind("127.0.0.1", 0)
    config = uvicorn.Config(make_app(Random(trio), engine, Options()), log_config=None, access_log=False, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield int(sock.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def ask(connection: http.client.HTTPConnection, body: dict[str, Any]) -> str:
    """One answer's text."""
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read().decode()
    if response.status != 200 or '"error"' in content:
        raise RuntimeError(content[:300])
    if not body.get("stream"):
        return str(json.loads(content)["choices"][0]["text"])
    bodies = [json.loads(event[6:]) for event in content.split("\n\n") if event.startswith("data: {")]
    return "".join(choice["text"] for each in bodies for choice in each["choices"])


def client(port: int) -> None:
    """The other process: each line names the bodies of requests to be made at once; answers are their texts."""
    for line in sys.stdin:
        bodies = json.loads(line)
        if len(bodies) == 1:
            texts = [ask(http.client.HTTPConnection("127.0.0.1", port), bodies[0])]
        else:
            with ThreadPoolExecutor(len(bodies)) as pool:
                texts = list(pool.map(lambda body: ask(http.client.HTTPConnection("127.0.0.1", port), body), bodies))
        print(json.dumps(texts), flush=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = record.arguments(__doc__)
    parser.add_argument("--width", type=int, default=128, help="of the large model")
    parser.add_argument("--blocks", type=int, default=3, help="of the large model")
    parser.add_argument("--tokens", type=int, default=100, help="of an answer")
    parser.add_argument("--requests", type=int, default=50, help="that are made at once")
    parser.add_argument("--rows", type=int, default=8, help="that are decoded at once")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    result = measure(options)
    record.show([["ms per token", "median"], *result["ms_per_token"].items()])
    for name, ratio in result["ratio"].items():
        busy = result["ratio_of_processor_time"][name]["median"]
        print(
            f"{name}: {ratio['median']:.3f} times the plain loop ({ratio['min']:.3f} to {ratio['max']:.3f}), "
            f"{busy:.3f} times its processor time"
        )
    return record.keep("serving", options, result)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one comparison."""
    from fedpeft.proxy.decode import decode
    from fedpeft.proxy.settings import Settings

    trio = make_trio(options.width, options.blocks, options.tokens + 40)
    prompts = [f"{i:03d} is a prompt" for i in range(options.requests)]
    settings = Settings(max_tokens=options.tokens, alpha=0.5, bans=frozenset({END}))
    body: dict[str, Any] = {"max_tokens": options.tokens, "temperature": 0, "logit_bias": {str(END): -100}}
    ids = [trio.tokenizer(prompt)["input_ids"] for prompt in prompts]
    with endpoint(trio, options.rows) as port, _other(port) as send:
        works: dict[str, Callable[[], Any]] = {
            "plain": lambda: [decode(trio, ids[:1], [settings])[0].text],
            "whole": lambda: send([{**body, "prompt": prompts[0]}]),
            "stream": lambda: send([{**body, "prompt": prompts[0], "stream": True}]),
        }
        plain, whole, stream = (work() for work in works.values())
        assert plain == whole == stream, "the ways do not say the same"
        times, busy = in_turns(works, options.repeats)
        crowd = _crowd(trio, options, prompts, ids, settings, body, send)
    return {
        "ratio": {name: timing.ratios(times[name], times["plain"]) for name in ("whole", "stream")},
        "ratio_of_processor_time": {name: timing.ratios(busy[name], busy["plain"]) for name in ("whole", "stream")},
        "ms_per_token": {name: 1000 * statistics.median(each) / options.tokens for name, each in times.items()},
        "at_once": crowd,
    }


def in_turns(works: Mapping[str, Callable[[], object]], repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of every work as `timing.in_turns` has them, and this process's processor time of the same calls."""
    spent: dict[str, list[float]] = {name: [] for name in works}

    def counted(name: str) -> None:
        began = time.process_time()
        works[name]()
        spent[name].append(time.process_time() - began)

    times = timing.in_turns({name: partial(counted, name) for name in works}, repeats)
    return times, {name: each[1:] for name, each in spent.items()}


def _crowd(trio: Any, options: Any, prompts: Any, ids: Any, settings: Any, body: Any, send: Any) -> dict[str, Any]:
    """Many requests at once, half of them streamed, against the loop over full batches."""
    import psutil

    from fedpeft.proxy.decode import decode

    def batches() -> list[str]:
        rows = options.rows
        parts = [ids[i : i + rows] for i in range(0, len(ids), rows)]
        return [one.text for part in parts for one in decode(trio, part, [settings] * len(part))]

    bodies = [{**body, "prompt": prompt, "stream": i % 2 == 0} for i, prompt in enumerate(prompts)]
    before = psutil.Process().memory_info().rss
    works = {"plain": batches, "requests": lambda: send(bodies)}
    assert batches() == send(bodies), "the ways do not say the same"
    times, _ = in_turns(works, 3)
    n = len(prompts) * options.tokens
    return {
        "ratio": timing.ratios(times["requests"], times["plain"]),
        "tokens_per_s": {name: n / statistics.median(each) for name, each in times.items()},
        "grown_bytes": psutil.Process().memory_info().rss - before,
    }


@contextlib.contextmanager
def _other(port: int) -> Iterator[Any]:
    """The client's process: a function from bodies to texts."""
    command = [sys.executable, "-c", f"from benchmarks.serving import client; client({port})"]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as made:
        to, back = made.stdin, made.stdout
        assert to is not None and back is not None

        def send(bodies: list[dict[str, Any]]) -> list[str]:
            to.write(json.dumps(bodies) + "\n")
            to.flush()
            texts: list[str] = json.loads(back.readline())
            return texts

        try:
            yield send
        finally:
            to.close()


if __name__ == "__main__":
    main()
