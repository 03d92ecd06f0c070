"""Asking a vLLM server: `/v1/completions` with token ids in and token ids out, one new token a call.

It gives the likeliest tokens, at most `--max-logprobs` (20 unless the server was started otherwise), in
`--logprobs-mode raw_logprobs`. `echo` and `prompt_logprobs` would score whole texts, but bypass its prefix cache.

Reference: https://docs.vllm.ai/en/v0.28.0/serving/online_serving/openai_compatible_server/ ;
`logprob_token_ids` since https://github.com/vllm-project/vllm/pull/43463.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from fedpeft.proxy import demands
from fedpeft.proxy.blackbox import BackendError, CannotDo, Caps, Labels, TopK, Want
from fedpeft.proxy.candidates import CandidateSession, Found
from fedpeft.proxy.connection import Connection, Refused, as_ids, as_logprob, listed

TOP_K = 20
MAX_LABELS = 128
MAX_BATCH = 64
PREFIX = "token_id:"
_OLDER = "use a newer vLLM server, llamacpp+http:// or our own logit server (http://HOST:PORT)"


class Vllm:
    """A model of a vLLM server.

    Args:
        connection: to the server, without `/v1`.
        top_k: most candidates that it may be asked for.
        model: its name there; None: the first that the server names.

    Raises:
        CannotDo: fewer candidates than make sense.
    """

    elsewhere = True  # calls wait for another machine

    def __init__(self, connection: Connection, top_k: int = TOP_K, model: str | None = None) -> None:
        self.connection, self._top_k, self._model = connection, top_k, model
        demands.check_candidates(f"vllm+{connection.url}", top_k)

    @cached_property
    def caps(self) -> Caps:
        """What it can do. Raises BackendError."""
        listing = listed(self.connection.get_json("/v1/models"), "data")
        found = [own for own in listing or [] if self._model in (None, listed(own, "id"))]
        if not found:
            names = ", ".join(str(listed(own, "id")) for own in listing or []) or "none"
            raise BackendError(f"{self.connection.url} has not the model {self._model!r}; it has {names}")
        name, context = str(listed(found[0], "id")), listed(found[0], "max_model_len")
        if not isinstance(context, int):
            raise BackendError(f"{self.connection.url} does not tell max_model_len in /v1/models; is it a vLLM server?")
        return Caps(
            identity=f"{name} at vllm+{self.connection.url}",
            fingerprint=None,
            vocab=0,
            full=False,
            top_k=self._top_k,
            block=False,
            max_context=context - 1,  # it wants room for the token that it says
            max_batch=MAX_BATCH,
            deterministic=False,
        )

    @property
    def _name(self) -> str:
        return self.caps.identity.rpartition(" at ")[0]

    def open(self, prompts: Sequence[Sequence[int]], want: Want) -> CandidateSession:
        """See `BlackBoxLM.open`."""
        if isinstance(want, Labels) and len(want.ids) > MAX_LABELS:
            text = f"the scores of {len(want.ids)} labels"
            raise CannotDo(self.caps.identity, text, f"it gives {MAX_LABELS}", "take fewer, or another backend")
        return CandidateSession(self, prompts, want)

    def ask(self, texts: Sequence[Sequence[int]], want: TopK | Labels) -> list[Found]:
        """See `Asked.ask`."""
        body: dict[str, Any] = {
            "model": self._name,
            "prompt": [list(own) for own in texts],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": want.k if isinstance(want, TopK) else len(want.ids),
            "return_tokens_as_token_ids": True,
        }
        if isinstance(want, Labels):
            body["logprob_token_ids"] = list(want.ids)
        try:
            choices = listed(self.connection.post_json("/v1/completions", body), "choices")
        except Refused as error:
            if "valid string" in str(error):  # how servers on FastAPI refuse lists of ids
                raise CannotDo(self.caps.identity, "scores by token id", "it takes texts alone", _OLDER) from error
            if error.status != 400:
                raise
            hint = "see --max-logprobs and --max-model-len of the server, and proxy.top_k"
            raise Refused(f"{error}; {hint}", error.status) from error
        if not isinstance(choices, list) or len(choices) != len(texts):
            raise BackendError(f"{self.connection.url} did not answer each of {len(texts)} prompts")
        found: list[Found] = [{} for _ in texts]
        for place, choice in enumerate(choices):
            row = listed(choice, "index")
            found[row if isinstance(row, int) and 0 <= row < len(texts) else place] = self._read(choice)
        if isinstance(want, Labels) and any(not set(want.ids) <= own.keys() for own in found):
            raise CannotDo(self.caps.identity, "the scores of labels", "it does not know logprob_token_ids", _OLDER)
        return found

    def tokenize(self, text: str) -> list[int]:
        """See `Tokenises.tokenize`."""
        body = {"model": self._name, "prompt": text, "add_special_tokens": False}
        ids = as_ids(listed(self.connection.post_json("/tokenize", body), "tokens"))
        if ids is None:
            raise BackendError(f"{self.connection.url}/tokenize did not answer with token ids")
        return ids

    def _read(self, choice: Any) -> Found:
        told = listed(choice, "logprobs", "top_logprobs", 0)
        if not isinstance(told, dict) or not told:
            raise CannotDo(self.caps.identity, "scores", "its answer has no logprobs.top_logprobs", _OLDER)
        found: Found = {}
        for name, value in told.items():
            number, score = name.removeprefix(PREFIX), as_logprob(value)
            if not name.startswith(PREFIX) or not number.isdecimal():
                raise CannotDo(
                    self.caps.identity,
                    "scores by token id",
                    "its answer names tokens as text and ignores return_tokens_as_token_ids",
                    _OLDER,
                )
            if score is None:
                raise BackendError(f"{self.connection.url} gave token {number} the score {str(value)[:40]}")
            found[int(number)] = score
        return found
