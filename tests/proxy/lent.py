"""What tests of backends share: tiny models with a tokenizer, and the logit server in a thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tiny
import tiny_lm
import trios
from fedpeft.core.adapter import HeadOnly
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import lm_head_of
from fedpeft.models.load import freeze
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.models.sessions import Speaker
from fedpeft.proxy.inprocess import InProcess
from fedpeft.proxy.logit_server import LogitServer
from fedpeft.proxy.logit_sessions import Limits, LogitSessions
from fedpeft.proxy.tokenizers import real_tokens
from proxy.served import until

TOKENIZER = tiny_lm.byte_tokenizer()
VOCAB = real_tokens(TOKENIZER)
PADDED = VOCAB + 7  # rows of the embedding matrix
CONTEXT = trios.POSITIONS


@cache
def whole(family: str = "llama", seed: int = 2) -> Any:
    """The language model of transformers, whose head's padding has large weights."""
    made = trios.whole(family, seed, 2, PADDED)
    with torch.no_grad():
        made.get_output_embeddings().weight[VOCAB:] *= 3
    return made


@cache
def large(family: str = "llama", seed: int = 2) -> InProcess:
    """It as a backend."""
    full = whole(family, seed)
    base = freeze(full.base_model, TOKENIZER, f"{family}-{seed}", tiny.CPU)
    return InProcess(Speaker(HFModel(base, HeadOnly(), 0, 2048, GenerateReadout(lm_head_of(full, base)))))


def reference(ids: Sequence[int], family: str = "llama", seed: int = 2) -> Tensor:
    """(tokens, V) log-probabilities over real tokens of one text alone, by transformers and NumPy in float64."""
    logits = trios.plain_logits(whole(family, seed), list(ids)).double().numpy()[:, :VOCAB]
    shifted = logits - logits.max(axis=1, keepdims=True)
    return torch.from_numpy(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def prompts(seed: int = 0, n: int = 3, longest: int = 9) -> list[list[int]]:
    """Of unequal lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, size=int(k)).tolist() for k in [longest, *rng.integers(1, longest, size=n - 1)]]


@contextlib.contextmanager
def lending(model: Any = None, limits: Limits | None = None, key: str | None = None, **more: Any) -> Iterator[Any]:
    """The logit server at a free port of this machine: its URL, and its sessions."""
    import uvicorn

    from fedpeft.proxy.listening import bind, reached

    sessions = LogitSessions(model or large(), limits or Limits(), **more)
    app = LogitServer(sessions, key).app()
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws="none"))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        until(lambda: server.started)
        yield reached(sock), sessions
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()
        assert not thread.is_alive()
