"""Fingerprints of tokenizers, and the probe of servers that tell none."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

import tiny_lm
from fedpeft.core.errors import RequestError
from fedpeft.proxy.tokenizers import PROBES, check_tokenizers, fingerprint, ids_of, real_tokens
from proxy.lent import TOKENIZER, VOCAB, large

CAPS = replace(large().caps, fingerprint=None)


def edited(change: Any) -> Any:
    """The tokenizer with something changed in its file."""
    parts = json.loads(TOKENIZER.backend_tokenizer.to_str())
    change(parts)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), eos_token="<|endoftext|>"
    )


@dataclass
class Server:
    """A backend that tokenises, and tells no fingerprint."""

    tokenizer: Any
    caps: Any = CAPS
    asked: int = 0

    def open(self, prompts: Any, want: Any) -> Any:
        raise AssertionError("nobody asks for scores here")

    def tokenize(self, text: str) -> list[int]:
        self.asked += 1
        return ids_of(self.tokenizer, text)


def swap(parts: Any) -> None:
    vocab = parts["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def turn(parts: Any) -> None:
    parts["model"]["merges"][:2] = parts["model"]["merges"][1::-1]


def add(parts: Any) -> None:
    parts["added_tokens"].append({**parts["added_tokens"][0], "id": VOCAB, "content": "<more>"})


def normalise(parts: Any) -> None:
    parts["normalizer"] = {"type": "Lowercase"}


def split(parts: Any) -> None:
    parts["pre_tokenizer"]["add_prefix_space"] = True


@pytest.mark.parametrize("change", [swap, turn, add, normalise, split])
def test_whatever_changes_ids_changes_the_fingerprint(change):
    assert fingerprint(edited(change)) != fingerprint(TOKENIZER)


def test_padding_truncation_and_frames_do_not(tmp_path):
    def frame(parts: Any) -> None:
        parts["post_processor"] = None
        parts["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "<|endoftext|>"}  # fmt: skip
        parts["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}

    assert fingerprint(edited(frame)) == fingerprint(TOKENIZER)
    TOKENIZER.save_pretrained(tmp_path)
    assert fingerprint(transformers.AutoTokenizer.from_pretrained(tmp_path)) == fingerprint(TOKENIZER)


def test_the_fingerprint_by_hand():
    """Two words and one added token: the text that is hashed, written out."""
    inner = Tokenizer(models.WordLevel({"b": 1, "a": 0}, unk_token="a"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>")
    text = (
        '{"added": [{"content": "<e>", "id": 2, "lstrip": false, "normalized": false, "rstrip": false, '
        '"single_word": false, "special": true}], "merges": [], "model": "WordLevel", '
        '"normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}, "scores": null, '
        '"vocab": [["a", 0], ["b", 1]]}'
    )
    assert fingerprint(made) == hashlib.sha256(text.encode()).hexdigest()
    assert real_tokens(made) == 3


def test_a_slow_tokenizer_cannot_be_compared():
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        fingerprint(object())


def test_the_probes():
    assert len(set(PROBES)) == 64 and sum(not text.isascii() for text in PROBES) >= 20


def test_equal_tokenizers_pass_and_tell_how_many_tokens_are_real():
    assert check_tokenizers(TOKENIZER, large(), {0}) == VOCAB == large().caps.vocab
    assert check_tokenizers(TOKENIZER, None, {0}, rows=VOCAB) == VOCAB
    server = Server(TOKENIZER)
    assert check_tokenizers(TOKENIZER, server, {0}) == VOCAB and server.asked == 64


def test_others_are_refused():
    with pytest.raises(RequestError, match="one family"):
        check_tokenizers(edited(swap), large(), {0})
    with pytest.raises(RequestError, match=r"' the' is \[.*\] there and \[.*\] here"):
        check_tokenizers(TOKENIZER, Server(edited(lambda parts: parts["model"]["merges"].clear())), {0})
    with pytest.raises(RequestError, match="is not the small model's"):
        check_tokenizers(TOKENIZER, Server(tiny_lm.word_tokenizer()), {0})


def test_a_server_that_tells_nothing_is_refused():
    class Silent:
        caps = CAPS

    with pytest.raises(RequestError, match="no fingerprint"):
        check_tokenizers(TOKENIZER, Silent(), {0})  # type: ignore[arg-type]


@pytest.mark.parametrize(("ends", "rows"), [({VOCAB}, None), ({5}, 5), ({-1}, None)])
def test_an_end_token_that_the_small_model_lacks_is_refused(ends, rows):
    with pytest.raises(RequestError, match=r"end tokens \[-?\d+\]"):
        check_tokenizers(TOKENIZER, None, ends, rows)
