"""Asking llama.cpp's own server: `/completion` with token ids in and token ids out, one new token a call.

With a temperature below 0 and `post_sampling_probs` false it gives a plain softmax of the logits. `cache_prompt` keeps
a text's keys and values in a slot; a batch of another size then rounds differently, so it is not deterministic.

Reference: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import PurePath
from typing import Any

from fedpeft.proxy import demands
from fedpeft.proxy.blackbox import BackendError, CannotDo, Caps, Labels, TopK, Want
from fedpeft.proxy.candidates import CandidateSession, Found
from fedpeft.proxy.connection import Connection, Refused, as_ids, as_logprob, listed
from fedpeft.proxy.turns import waiting

TOP_K = 40
_OTHER = "use llama-server of llama.cpp from 2025 on, vllm+http:// or our own logit server (http://HOST:PORT)"


class LlamaCpp:
    """The model of a llama.cpp server.

    Rows are asked in as many requests at once as the server has slots.

    Args:
        connection: to the server.
        top_k: most candidates that it may be asked for.

    Raises:
        CannotDo: fewer candidates than make sense.
    """

    elsewhere = True  # calls wait for another machine

    def __init__(self, connection: Connection, top_k: int = TOP_K) -> None:
        self.connection, self._top_k = connection, top_k
        demands.check_candidates(f"llamacpp+{connection.url}", top_k)

    @cached_property
    def caps(self) -> Caps:
        """What it can do. Raises BackendError."""
        props = self.connection.get_json("/props")
        context, slots = listed(props, "default_generation_settings", "n_ctx"), listed(props, "total_slots")
        if not isinstance(context, int) or not isinstance(slots, int) or slots < 1:
            raise BackendError(
                f"{self.connection.url}/props does not tell n_ctx and total_slots; is it llama-server of llama.cpp?"
            )
        model = self._model()
        vocab = listed(model, "meta", "n_vocab")
        name = PurePath(str(listed(props, "model_path") or listed(model, "id") or "model")).name
        return Caps(
            identity=f"{name} at llamacpp+{self.connection.url}",
            fingerprint=None,
            vocab=vocab if isinstance(vocab, int) else 0,
            full=False,
            top_k=self._top_k,
            block=False,
            max_context=context - 1,  # it wants room for the token that it says
            max_batch=slots,
            deterministic=False,
        )

    def _model(self) -> Any:
        """What it tells of its model; None where it is too old to."""
        try:
            return listed(self.connection.get_json("/v1/models"), "data", 0)
        except Refused as error:
            if error.status != 404:
                raise
            return None

    def open(self, prompts: Sequence[Sequence[int]], want: Want) -> CandidateSession:
        """See `BlackBoxLM.open`."""
        if isinstance(want, Labels):
            raise CannotDo(self.caps.identity, "the scores of labels", "it gives the likeliest tokens alone", _OTHER)
        return CandidateSession(self, prompts, want)

    def ask(self, texts: Sequence[Sequence[int]], want: TopK | Labels) -> list[Found]:
        """See `Asked.ask`."""
        assert isinstance(want, TopK), "labels were refused"
        if len(texts) == 1:
            return [self._ask(texts[0], want.k)]
        with waiting(), ThreadPoolExecutor(len(texts) or 1) as pool:  # the pool's threads have no turn to give away
            return list(pool.map(lambda own: self._ask(own, want.k), texts))

    def tokenize(self, text: str) -> list[int]:
        """See `Tokenises.tokenize`."""
        told = self.connection.post_json("/tokenize", {"content": text, "add_special": False, "parse_special": False})
        ids = as_ids(listed(told, "tokens"))
        if ids is None:
            raise CannotDo(self.caps.identity, "tokenising", "/tokenize did not answer with token ids", _OTHER)
        return ids

    def _ask(self, text: Sequence[int], k: int) -> Found:
        body = {
            "prompt": list(text),
            "n_predict": 1,
            "n_probs": k,
            "temperature": -1.0,
            "post_sampling_probs": False,
            "cache_prompt": True,
            "stream": False,
        }
        told = self.connection.post_json("/completion", body)
        top = listed(told, "completion_probabilities", 0, "top_logprobs")
        if not isinstance(top, list) or not top:
            raise CannotDo(
                self.caps.identity, "scores", "its answer has no completion_probabilities with top_logprobs", _OTHER
            )
        found: Found = {}
        for own in top:
            token, score = listed(own, "id"), as_logprob(listed(own, "logprob"))
            if not isinstance(token, int):
                raise CannotDo(self.caps.identity, "scores by token id", "its answer names tokens as text", _OTHER)
            if score is None:
                raise BackendError(f"{self.connection.url} gave token {token} no log-probability")
            found[token] = score
        return found
