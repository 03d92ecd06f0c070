"""An error of one row ends that row's request; the others of its batch go on as if it had never been there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import trios
from black_boxes import Box, BoxSession
from fedpeft.core.errors import RequestError
from fedpeft.proxy.batch import Row
from fedpeft.proxy.blackbox import BackendError, Scores, Want
from fedpeft.proxy.decode import Decoding, Settings, Trio, decode
from fedpeft.proxy.engine import Engine
from proxy.served import until
from proxy.test_engine import Inbox, held

SANE = Settings(alpha=1.0, max_tokens=8)
BANNED = replace(SANE, bans=frozenset(range(trios.VOCABULARY)))
PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]


class Mad(Box):
    """A large model that says NaN behind the texts that begin with token 6."""

    def open(self, prompts: Sequence[Sequence[int]], want: Want) -> BoxSession:
        session = super().open(prompts, want)
        rows = torch.tensor([prompt[0] == 6 for prompt in prompts])
        say: Any = session._scores

        def scores(logits: torch.Tensor) -> Scores:
            found: Scores = say(logits)
            if len(rows) == len(logits):  # while nobody has left
                found.values[rows] = torch.nan
            return found

        session._scores = scores  # type: ignore[method-assign]
        return session


def trio(kind: type[Box] = Box) -> Trio:
    made = trios.trio(ends=frozenset())
    assert isinstance(made.large, Box)
    return replace(made, large=kind(made.large.speaker, made.large.caps))


CASES = [
    ("banned", Box, BANNED, RequestError, "all candidates of a row are banned"),
    ("banned, drawn", Box, replace(BANNED, temperature=1.0), RequestError, "all candidates of a row are banned"),
    ("mad", Mad, SANE, BackendError, "gave scores that are not finite"),
    ("mad, biased", Mad, replace(SANE, logit_bias={5: 1.0}), BackendError, "gave scores that are not finite"),
]


@pytest.mark.parametrize("speculate", [0, 2], ids=["together", "one by one"])
@pytest.mark.parametrize(("kind", "settings", "error", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_others_go_on(kind: type[Box], settings: Settings, error: Any, words: str, speculate: int) -> None:
    rows, of = [SANE, settings, replace(SANE, temperature=1.0)], trio(kind)
    alone = [decode(of, [PROMPTS[i]], [rows[i]], speculate)[0].tokens for i in (0, 2)]
    with Decoding(of, PROMPTS, rows, speculate) as decoding:
        while decoding.advance():
            pass
        assert [decoding.completions()[i].tokens for i in (0, 2)] == alone and decoding.completions()[1].tokens == ()
        assert list(decoding.errors) == [1] and isinstance(decoding.errors[1], error)
    with pytest.raises(error, match=words):
        decode(of, PROMPTS, rows, speculate)


@pytest.mark.parametrize("speculate", [0, 2])
def test_the_request_is_told_and_those_beside_it_are_answered(speculate: int) -> None:
    engine, of = Engine(speculate=speculate), trio()
    good, wrong, late = Inbox(2), Inbox(2), Inbox()
    try:
        with held(engine):
            engine.submit(of, [Row(PROMPTS[1], SANE), Row(PROMPTS[0], BANNED)], wrong)
            engine.submit(of, [Row(PROMPTS[0], SANE), Row(PROMPTS[2], SANE)], good)
        assert good.wait().error is None and good.finishes == ["length", "length"]
        assert "all candidates of a row are banned" in str(wrong.wait().error)
        engine.submit(of, [Row(PROMPTS[0], SANE)], late)
        assert late.wait().error is None
        until(lambda: engine.running == 0)
        assert of.large.open_sessions == 0  # type: ignore[union-attr]
    finally:
        engine.close()
