"""Whether models read the same tokens: a fingerprint of tokenizers, or a probe where a server tells none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedpeft.core.errors import RequestError
from fedpeft.proxy.blackbox import BlackBoxLM

PROBES: tuple[str, ...] = tuple(json.loads((Path(__file__).parent / "probes.json").read_text(encoding="utf-8")))


@runtime_checkable
class Tokenises(Protocol):
    """A backend whose server turns texts into its own token ids."""

    def tokenize(self, text: str) -> list[int]:
        """Ids without beginning- or end-of-text tokens."""
        ...


def fingerprint(tokenizer: Any) -> str:
    """sha256 of what decides which ids a text gets: tokens with ids, merges, added tokens, normaliser, pre-tokeniser.

    Padding, truncation, templates and the frame of beginning and end tokens are left out: ids mean the same without.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Raises:
        RequestError: a slow tokenizer, which does not tell its parts.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise RequestError(
            f"the tokenizer {type(tokenizer).__name__} is not a fast one, so it cannot be compared; give a model with "
            "a tokenizer.json"
        )
    parts = json.loads(inner.to_str())
    model = parts["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    scores = [score for _, score in model["vocab"]] if isinstance(model["vocab"], list) else None  # of a unigram model
    told = {
        "model": model.get("type"),
        "vocab": sorted(inner.get_vocab(with_added_tokens=False).items()),
        "scores": scores,
        "merges": merges,
        "added": sorted(parts.get("added_tokens") or (), key=lambda token: int(token["id"])),
        "normalizer": parts.get("normalizer"),
        "pre_tokenizer": parts.get("pre_tokenizer"),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def real_tokens(tokenizer: Any) -> int:
    """V_eff: ids that a tokenizer can give are below this; rows of scores are cut to it."""
    return int(max(tokenizer.get_vocab().values())) + 1


def check_tokenizers(tokenizer: Any, large: BlackBoxLM | None, ends: Collection[int], rows: int | None = None) -> int:
    """Refuse models that do not read the same tokens.

    Args:
        tokenizer: of the small model.
        large: the backend; None: the small model answers alone.
        ends: tokens that end an answer.
        rows: of the small model's embedding matrix; None: not checked.

    Returns:
        V_eff, the number of real tokens.

    Raises:
        RequestError: tokenizers that differ, a server that neither tells a fingerprint nor tokenises, an end token
            that the small model does not have.
    """
    vocab = real_tokens(tokenizer)
    known = vocab if rows is None else min(vocab, rows)
    if missing := sorted(end for end in ends if not 0 <= end < known):
        raise RequestError(
            f"the end tokens {missing} are not among the {known} tokens of the small model; it could never end an "
            "answer: give a small model that has them"
        )
    if large is None:
        return vocab
    theirs = large.caps.fingerprint
    if theirs is None:
        _probe(tokenizer, large)
    elif theirs != (ours := fingerprint(tokenizer)):
        raise RequestError(
            f"the tokenizer of {large.caps.identity} ({theirs[:12]}..) is not the small model's ({ours[:12]}..); both "
            "need the same one: take a small and a large model of one family"
        )
    return vocab


def _probe(tokenizer: Any, large: BlackBoxLM) -> None:
    name = large.caps.identity
    if not isinstance(large, Tokenises):
        raise RequestError(f"{name} tells no fingerprint of its tokenizer and cannot tokenise; use another backend")
    for text in PROBES:
        ours, theirs = ids_of(tokenizer, text), large.tokenize(text)
        if ours != theirs:
            raise RequestError(
                f"the tokenizer of {name} is not the small model's: {text!r} is {_short(theirs)} there and "
                f"{_short(ours)} here; take a small and a large model of one family"
            )


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """A text's ids, without beginning- or end-of-text tokens."""
    return list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"]))


def _short(ids: Sequence[int]) -> str:
    return str(list(ids[:8]))[:-1] + (", ..]" if len(ids) > 8 else "]")
