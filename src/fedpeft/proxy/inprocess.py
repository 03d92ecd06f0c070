"""The backend in this process: a causal language model of transformers, asked for scores and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.adapter import HeadOnly
from fedpeft.core.errors import ModelError
from fedpeft.models.families import is_decoder
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import load_lm_head
from fedpeft.models.load import load_base
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.models.sessions import Speaker, SpeakerSession
from fedpeft.proxy import demands
from fedpeft.proxy.blackbox import Caps, Full, Labels, Scores, TopK, Want
from fedpeft.proxy.tokenizers import fingerprint, real_tokens

MAX_BATCH = 64  # rows of one session
UNBOUNDED = 1 << 20  # tokens of a context whose end the model does not tell


class InProcess:
    """A language model of this process.

    Rows are cut to the tokens of its tokenizer before they are made log-probabilities: scores that stand in the
    padding of the embedding matrix belong to no token.

    Args:
        speaker: the model, without an adapter.
        name: what it is called; None: where it came from.
        max_batch: rows of one session.
    """

    def __init__(self, speaker: Speaker, name: str | None = None, max_batch: int = MAX_BATCH) -> None:
        self.speaker = speaker
        self.tokenizer = speaker.model.base.tokenizer
        self._name, self._max_batch = name, max_batch

    @cached_property
    def caps(self) -> Caps:
        """What it can do; the weights are hashed once."""
        base, tokenizer = self.speaker.model.base, self.tokenizer
        vocab = self.speaker.vocab if tokenizer is None else min(real_tokens(tokenizer), self.speaker.vocab)
        head = tree.sha256(_head(self.speaker))
        digest = hashlib.sha256(f"{base.sha256} {head} {base.precision}".encode()).hexdigest()
        return Caps(
            identity=f"{self._name or base.source}@{digest[:16]}",
            fingerprint=None if tokenizer is None else fingerprint(tokenizer),
            vocab=vocab,
            full=True,
            top_k=vocab,
            block=True,
            max_context=self.speaker.positions or UNBOUNDED,
            max_batch=self._max_batch,
            deterministic=True,
        )

    def open(self, prompts: Sequence[Sequence[int]], want: Want) -> InProcessSession:
        """See `BlackBoxLM.open`."""
        demands.check_open(self.caps, prompts, want)
        exact = self.speaker.model.base.dtype in (torch.float32, torch.float64)
        return InProcessSession(self.caps, self.speaker.open(prompts), want, exact)


def _head(speaker: Speaker) -> dict[str, Tensor]:
    weight, bias = speaker.lm.projection(speaker.model.base.dtype)
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


class InProcessSession:
    """A speaker's session whose logits are told as log-probabilities."""

    def __init__(self, caps: Caps, inner: SpeakerSession, want: Want, exact: bool) -> None:
        self._caps, self._inner, self._want, self._exact = caps, inner, want, exact
        self.first = self._told(inner.first)

    def scores(self, new: Sequence[Sequence[int]]) -> Scores:
        """See `Session.scores`."""
        demands.check_new(self._caps, self._inner.lengths, new)
        return self._told(self._inner.logits(new))

    def rollback(self, n: int) -> None:
        """See `Session.rollback`."""
        self._inner.rollback(n)

    def keep(self, rows: Sequence[int]) -> None:
        """See `Session.keep`."""
        demands.check_rows(rows, len(self._inner.lengths))
        self._inner.keep(rows)

    def close(self) -> None:
        """See `Session.close`."""
        self._inner.close()

    def _told(self, logits: Tensor) -> Scores:
        return tell(logits[..., : self._caps.vocab], self._want, self._exact)


def tell(logits: Tensor, want: Want, exact: bool = True) -> Scores:
    """The log-probabilities that are wanted.

    Args:
        logits: (rows, positions, V) float32, of real tokens alone.
        exact: whether they are the model's own in float32.

    Returns:
        of the k likeliest: in falling order, of equal ones the lower id first; of labels: in their order.
    """
    values = logits.log_softmax(dim=-1).cpu()
    if isinstance(want, Full):
        return Scores(values, None, torch.ones(values.shape[:-1]), exact)
    if isinstance(want, Labels):
        ids = torch.tensor(want.ids).expand(*values.shape[:-1], -1).contiguous()
        values = values.gather(-1, ids)
    else:
        values, ids = _likeliest(values, want)
    return Scores(values, ids, values.exp().sum(dim=-1), exact)


def _likeliest(values: Tensor, want: TopK) -> tuple[Tensor, Tensor]:
    found, ids = values.sort(dim=-1, descending=True, stable=True)
    return found[..., : want.k].contiguous(), ids[..., : want.k].contiguous()


def load_inprocess(
    name: str, dtype: str = "float32", device: str = "auto", quantize: str = "none", max_batch: int = MAX_BATCH
) -> InProcess:
    """The backend of a model by its name.

    Args:
        name: a shipped model, a folder in Hugging Face format, or a hub name; see `models.load.load_base`.

    Raises:
        ModelError: nothing usable there, or no causal language model.
    """
    base = load_base(name, dtype, device, quantize)
    if not is_decoder(base.family):
        raise ModelError(
            f"{name} is of the family {base.family}, which does not continue texts; give a causal language model "
            "(GPT-2, Llama and their like)"
        )
    model = HFModel(base, HeadOnly(), 0, readout=GenerateReadout(load_lm_head(name, base)))
    return InProcess(Speaker(model), name, max_batch)
