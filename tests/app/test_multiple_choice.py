"""Multiple choice by likelihood, in a run's scores and from Python, against mean losses that are added up here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedpeft
import small
import tiny_lm
from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.app.holding import hold
from fedpeft.app.proxying import open_artefact
from fedpeft.config import load_config
from fedpeft.core.errors import RequestError
from fedpeft.core.rng import rng_for
from fedpeft.proxy import backends, scoring
from fedpeft.proxy.blackbox import CannotDo
from fedpeft.runs.store import RunFolder

OPTIONS = [" bad .", " good ."]


def rows(n: int, place: str) -> list[dict[str, Any]]:
    """A word that decides the answer."""
    words = [str(own) for own in rng_for(0, "choosing", place).choice(["film", "time"], size=n)]
    return [{"instruction": f"a {word} ?", "response": OPTIONS[word == "film"], "choices": OPTIONS} for word in words]


@pytest.fixture(scope="module")
def ran(place: Path, tmp_path_factory: pytest.TempPathFactory) -> app.Run:
    """A small Llama that steers a GPT-2, selected by multiple choice."""
    folder = tmp_path_factory.mktemp("choosing")
    tokenizer = tiny_lm.byte_tokenizer()
    for family in ("llama", "gpt2"):
        tiny_lm.save(family, tokenizer, folder / family, len(tokenizer), positions=64)
    for name, n in (("train", 48), ("validation", 10), ("test", 12)):
        small.write_rows(folder / f"{name}.jsonl", rows(n, name))
    values = small.config(place, model__name=str(folder / "llama"), partition__kind="iid", run__rounds=1)
    values["partition"]["clients"] = 2
    values["method"] = {"name": "fedpt", "cohort": 2, "epochs": 4, "batch_size": 8, "lr": 2e-2}
    values["task"] = {
        "name": "said", "format": "generate", "template": "{instruction}", "max_length": 32, "generate_rows": 0,
        "metric": "choice_accuracy",
    }  # fmt: skip
    values["task"] |= {name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "test")}
    values["proxy"] = {"large": str(folder / "gpt2"), "alpha": 0.75}
    return app.run(values, out=folder / "run")


def test_the_proxys_choice_is_in_the_runs_scores(ran: app.Run) -> None:
    """Of each row the choice of least mean loss under z_L + alpha (z_T - z_B); of the large model alone likewise."""
    fed = build(load_config(ran.folder / "config.yaml"))
    held = hold(fed)
    assert held is not None
    params = app.running.best_params(fed, RunFolder.open(ran.folder))
    data, trio = fed.whole("test"), held.trio(params)
    assert data.choices is not None and data.starts is not None
    for who, own, alpha in (("proxy", trio, 0.75), ("large", dataclasses.replace(trio, tuned=None, base=None), None)):
        hits = []
        for row, choices in enumerate(data.choices):
            assert choices is not None
            prompt = data.tokens[row][: data.starts[row]].tolist()
            texts = [[*prompt, *option.tolist()] for option in choices.tokens]
            means = [np.mean(found.logprobs) for found in scoring.score(own, texts, [len(prompt)] * len(texts), alpha)]
            hits.append(int(np.argmax(means)) == choices.right)
        assert ran.metrics["best"]["test"][who]["choice_accuracy"] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("normalise", ["sum", "tokens", "bytes", "prior"])
@pytest.mark.parametrize("large", [None, "none"])
def test_answers_are_chosen_among_as_they_stand_behind_the_prompt(
    ran: app.Run, normalise: str, large: str | None
) -> None:
    options = [" bad .", " good .", " good"]
    found = fedpeft.choose(ran.folder, "a film ?", options, normalise=normalise, large=large)  # type: ignore[arg-type]
    artefact = open_artefact(ran.folder, large)
    tokenizer = artefact.prompting.tokenizer
    first = artefact.prompting.end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    answers = [tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]

    def totals(prompt: list[int]) -> list[float]:
        texts = [[*prompt, *own] for own in answers]
        return [own.total for own in scoring.score(artefact.trio, texts, [len(prompt)] * 3, artefact.alpha)]

    behind = totals(artefact.prompt(instruction="a film ?"))
    by = {
        "sum": behind,
        "tokens": [own / len(ids) for own, ids in zip(behind, answers, strict=True)],
        "bytes": [own / len(option) for own, option in zip(behind, options, strict=True)],
        "prior": [own - bare for own, bare in zip(behind, totals([first]), strict=True)],
    }
    assert found.scores == pytest.approx(by[normalise], abs=1e-4)
    assert found.best == int(np.argmax(by[normalise]))


def test_single_tokens_can_be_asked_of_a_server_of_few_candidates(
    ran: app.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fedpeft.choose(ran.folder, "a film ?", ["a", "b", "c"])
    held = hold(build(load_config(ran.folder / "config.yaml")))
    assert held is not None
    large: Any = held.large

    class Few:
        caps = dataclasses.replace(large.caps, full=False, top_k=5, block=False)
        open = staticmethod(large.open)

    monkeypatch.setattr(backends, "open_backend", lambda *given, **named: Few())
    few = fedpeft.choose(ran.folder, "a film ?", ["a", "b", "c"])
    assert few.best == whole.best and few.scores == pytest.approx(whole.scores, abs=1e-5)
    with pytest.raises(CannotDo, match="gives the 5 likeliest tokens"):
        fedpeft.choose(ran.folder, "a film ?", OPTIONS)


def test_options_that_are_none_are_refused(ran: app.Run) -> None:
    for options in ([], ["a", ""]):
        with pytest.raises(RequestError, match=f"{len(options)} options, some without tokens"):
            fedpeft.choose(ran.folder, "a film ?", options)


def test_the_tuned_model_alone_reads_an_expert_prompt(ran: app.Run) -> None:
    """Single tokens, asked by themselves, against whole texts: both read it."""
    options, asked = ["a", "b", "c"], {"alpha": 1.5, "expert_prompt": "once "}
    plain = fedpeft.choose(ran.folder, "a film ?", options, alpha=1.5)
    framed = fedpeft.choose(ran.folder, "a film ?", options, **asked)  # type: ignore[arg-type]
    whole = fedpeft.choose(ran.folder, "a film ?", options, normalise="bytes", **asked)  # type: ignore[arg-type]
    assert np.diff(framed.scores) == pytest.approx(np.diff(whole.scores), abs=1e-4)
    assert np.diff(framed.scores) != pytest.approx(np.diff(plain.scores), abs=1e-2)
