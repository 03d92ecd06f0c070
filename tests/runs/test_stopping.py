from __future__ import annotations

import json
import random

import pytest

from fedpeft.runs.stopping import Limits, Standing, look


def run(limits, scores, standing=None, start=0):
    """(round that ended the run or None, standing) for one score per round; a round costs 10 bytes and 2 seconds."""
    standing = standing or Standing()
    for r in range(start, len(scores)):
        standing, why = look(limits, standing, score=scores[r], bytes=10 * (r + 1), seconds=2.0 * (r + 1))
        if why:
            return r, standing, why
    return None, standing, None


@pytest.mark.parametrize(
    ("limits", "end", "says"),
    [
        (Limits(), None, ""),
        (Limits(score=0.6), 3, "0.6 reached run.stop.score 0.6"),
        (Limits(bytes=25), 2, "30 bytes sent reached run.stop.bytes 25"),
        (Limits(seconds=4), 1, "4.0 s reached run.stop.seconds 4"),
        (Limits(patience=2), 5, "2 evaluations without a better score"),
    ],
)
def test_each_limit(limits, end, says):
    """Scores .1 - .5 .6 .6 .6: round 1 is not evaluated, an equal score is not better."""
    found, _, why = run(limits, [0.1, None, 0.5, 0.6, 0.6, 0.6])
    assert found == end
    assert says in (why or "")


def test_a_lower_perplexity_is_better():
    """9 8 8.5 8.2: the bound of 8.6 is reached in the second round; without it two evaluations are no better than 8."""
    limits = Limits(score=8.6, metric="perplexity")
    assert run(limits, [9.0, 8.0])[0] == 1 and run(limits, [9.0, 8.7, float("nan")])[0] is None
    found, standing, _ = run(Limits(patience=2, metric="perplexity"), [9.0, 8.0, 8.5, 8.2])
    assert (found, standing) == (3, Standing(8.0, 2))


def test_nan_is_never_better_and_waits():
    found, standing, _ = run(Limits(patience=2), [0.5, float("nan"), float("nan"), 0.6])
    assert (found, standing) == (2, Standing(0.5, 2))
    assert run(Limits(patience=1), [float("nan")])[0] == 0


def test_a_round_without_evaluation_does_not_use_up_patience():
    standing, why = look(Limits(patience=1), Standing(0.5, 0), score=None, bytes=0, seconds=0)
    assert (standing, why) == (Standing(0.5, 0), None)


def test_resumed_equals_uninterrupted():
    rng = random.Random(0)
    for _ in range(50):
        scores = [rng.choice([None, rng.random()]) for _ in range(12)]
        whole = run(Limits(patience=3, score=0.97), scores)
        cut = rng.randrange(12)
        first = run(Limits(patience=3, score=0.97), scores[:cut])
        if first[0] is None:
            stored = Standing.of(json.loads(json.dumps(first[1].plain())))
            first = run(Limits(patience=3, score=0.97), scores, stored, start=cut)
        assert first == whole
    assert Standing.of({}) == Standing()
