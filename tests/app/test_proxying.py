"""Whole runs with a large model: alpha on validation texts, scores of all four models, distillation, and speaking."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small
import tiny_lm
from fedpeft import app
from fedpeft.app.federation import build
from fedpeft.app.holding import SCORES, Holding, hold, key_of, proxy_facts
from fedpeft.app.proxying import FILE, compare, open_artefact, speak
from fedpeft.config import load_config
from fedpeft.core import records, tree
from fedpeft.core.errors import ConfigError, ModelError, RequestError, RunError
from fedpeft.core.exchange import Update
from fedpeft.methods.fedpt import Weights
from fedpeft.models.load import load_base
from fedpeft.proxy.blackbox import BackendError, CannotDo
from fedpeft.proxy.scoring import BEYOND, GRID
from fedpeft.proxy.settings import Settings
from fedpeft.runs.store import RunFolder
from said import config


@pytest.fixture(scope="module")
def distilled(models: Path) -> app.Run:
    return app.run(config(models, proxy__public=str(models / "said_public.jsonl")), out=models / "run-distilled")


# --- a run ------------------------------------------------------------------------------------------------------


def test_a_large_model_that_falls_silent_fails_the_run_which_goes_on_when_it_is_back(
    ran: app.Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def silent(held: Holding, *_: Any) -> Any:
            raise BackendError("large has died; start it again")

        patch.setattr(Holding, "scores", silent)
        with pytest.raises(RunError, match="large has died; start it again") as caught:
            app.run(config(models), out=tmp_path / "run")
    assert isinstance(caught.value.__cause__, BackendError)
    told = RunFolder.open(tmp_path / "run").manifest()
    assert (told["status"], told["error"]) == ("failed", "large has died; start it again")
    assert app.resume(tmp_path / "run").manifest["params_sha256"] == ran.manifest["params_sha256"]


def test_alpha_is_chosen_on_validation_texts_in_every_evaluation(ran: app.Run) -> None:
    lines = RunFolder.open(ran.folder).metrics()
    for line in lines:
        curve, scores = line["alpha_curve"], line["metrics"]["validation"]
        nll = dict(zip(curve["alphas"], curve["nll"], strict=True))
        assert set(nll) >= {0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0}
        best = min(nll, key=lambda alpha: (nll[alpha], alpha))
        assert curve["best"] == best == scores["proxy"]["alpha"]
        assert scores["proxy"]["loss"] == pytest.approx(nll[best], abs=1e-5)
        assert (
            scores["large"]["loss"] == pytest.approx(curve["base_large"], abs=1e-5) == pytest.approx(nll[0.0], abs=1e-5)
        )
        assert scores["global"]["loss"] == pytest.approx(curve["tuned_small"], abs=1e-5)
        assert scores["base"]["loss"] == pytest.approx(curve["base_small"], abs=1e-5)
    assert lines[0]["alpha_curve"]["best"] == 0, "an adapter that is zero changes nothing"
    by_round = {line["round"]: line["metrics"]["validation"]["proxy"]["perplexity"] for line in lines}
    assert ran.metrics["best"]["round"] == min(by_round, key=lambda r: by_round[r]), "what the run makes is the proxy"


def test_all_four_are_scored_on_test_rows(ran: app.Run, models: Path) -> None:
    scores = ran.metrics["best"]["test"]
    assert scores.keys() == {"global", "base", "proxy", "large"}
    assert all({"perplexity", "exact_match"} <= own.keys() for own in scores.values())
    told = ran.manifest["proxy"]
    assert scores["proxy"]["alpha"] == told["alpha"] == told["curve"]["best"] and told["alpha_by"] == "nll"
    samples = RunFolder.open(ran.folder).samples()
    assert len(samples) == 3 and {"global", "base", "proxy", "large"} <= samples[0].keys()
    kept = list((ran.folder / SCORES).iterdir())
    assert len(kept) == 2 and all(path.suffix == ".scores" for path in kept), "validation and test, once each"


def test_alpha_0_is_the_large_model_and_the_combination_is_the_sum(ran: app.Run, models: Path) -> None:
    """The proxy's loss from logits of transformers, added up by hand."""
    fed = build(load_config(ran.folder / "config.yaml"))
    held = hold(fed)
    assert held is not None
    params = app.running.best_params(fed, RunFolder.open(ran.folder))
    own = held.scores(params, 0.0, "test")
    assert own["proxy"]["loss"] == own["large"]["loss"]
    found = held.scores(params, 0.75, "test")["proxy"]["loss"]
    large = build(load_config(config(models, model__name=str(models / "proxy-gpt2"), method__lr=1e-3)))
    data, total, count = fed.whole("test"), 0.0, 0
    for row in range(len(data)):
        z = large.model.token_logits(None, data, [row]).double()
        change = fed.model.token_logits(params, data, [row]) - fed.model.token_logits(None, data, [row])
        said = torch.from_numpy(data.tokens[row][int(data.starts[row]) :].astype("int64"))  # type: ignore[index]
        total += float(torch.nn.functional.cross_entropy(z + 0.75 * change, said, reduction="sum"))
        count += len(said)
    assert found == pytest.approx(total / count, abs=1e-5)


def test_without_public_texts_it_is_fedavg(ran: app.Run, models: Path, tmp_path: Path) -> None:
    values = config(models)
    values["method"] |= {"name": "fedavg", "clip": 1.0}
    values["adapter"] = {"rank": 4, "targets": ["all"]}
    values["proxy"] = {}
    plain = app.run(values, out=tmp_path / "run")
    assert small.sha(plain.folder) == small.sha(ran.folder)
    assert "proxy" not in plain.manifest and not (plain.folder / SCORES).exists()
    assert json.loads((plain.folder / "adapter" / FILE).read_text())["large"] is None


# --- distillation -----------------------------------------------------------------------------------------------


def test_distillation_changes_what_is_sent_and_serves_the_aggregate(distilled: app.Run, ran: app.Run) -> None:
    state = small.checkpoint(distilled.folder, "fedpt").state
    assert tree.sha256(state.params) != tree.sha256(state.served)
    assert distilled.manifest["params_sha256"] == tree.sha256(state.served)
    assert distilled.manifest["choices"]["teacher_alpha"] == state.alpha is not None
    assert distilled.manifest["proxy"]["public_texts"] == 6
    first, other = (RunFolder.open(run.folder).metrics()[1] for run in (distilled, ran))
    assert first["metrics"]["validation"]["global"] == other["metrics"]["validation"]["global"], "round 1 is the same"
    assert small.sha(distilled.folder) != small.sha(ran.folder)
    assert len(list((distilled.folder / SCORES).iterdir())) == 3
    config = load_config(distilled.folder / "config.yaml")
    assert distilled.manifest["model_sha256"] == tree.sha256(load_base(config.model.name).module.state_dict())
    held = hold(build(config))
    assert held is not None and held.large.caps.identity == distilled.manifest["large_identity"]


def test_an_adapter_travels_and_nothing_else(distilled: app.Run) -> None:
    """To the byte downwards; upwards the loss has as many digits as it has (`test_fedpt_traffic.py` counts them)."""
    fed = build(load_config(distilled.folder / "config.yaml"))
    down = len(records.encode(Weights(fed.initial, fed.model.sha256)))
    least = len(records.encode(Update(fed.initial, 12, 0.0)))
    assert 4 * distilled.manifest["trainable_parameters"] == sum(4 * t.numel() for t in fed.initial.values())
    lines = RunFolder.open(distilled.folder).exchanges()
    assert len(lines) == 4 and {line["bytes_down"] for line in lines} == {down}
    assert all(least <= line["bytes_up"] <= least + 24 for line in lines), "a float32 has 20 digits more at most"


def test_resume_inside_a_distilling_run_gives_equal_bits(distilled: app.Run, models: Path, tmp_path: Path) -> None:
    values = config(models, proxy__public=str(models / "said_public.jsonl"), run__rounds=1)
    stopped = app.run(values, out=tmp_path / "run")
    app.resume(stopped.folder, {"run.rounds": 2})
    own, whole = (small.checkpoint(folder, "fedpt").state for folder in (stopped.folder, distilled.folder))
    assert tree.sha256(own.params) == tree.sha256(whole.params) and own.alpha == whole.alpha
    assert small.sha(stopped.folder) == small.sha(distilled.folder)


def test_the_teacher_is_the_combination_and_its_kept_scores_are_those_asked_anew(distilled: app.Run) -> None:
    fed = build(load_config(distilled.folder / "config.yaml"))
    kept, anew = hold(fed), hold(fed)
    assert kept is not None and anew is not None and kept.public is not None
    kept.folder = distilled.folder
    before = sorted((distilled.folder / SCORES).iterdir())
    params = app.running.best_params(fed, RunFolder.open(distilled.folder))
    picked = [5, 0, 3]
    told, asked = (own.teacher(params, 0.5)(picked).logits for own in (kept, anew))
    near = asked > -16
    assert sorted((distilled.folder / SCORES).iterdir()) == before
    assert float((told - asked)[near].abs().max()) < 0.005
    change = fed.model.token_logits(params, kept.public, picked) - fed.model.token_logits(None, kept.public, picked)
    large = torch.cat([anew._public.forced([row]).logits for row in picked])
    torch.testing.assert_close(asked, large + 0.5 * change[:, : kept.vocab], rtol=1e-4, atol=1e-4)


def test_public_texts_are_told_to_have_no_effect_where_they_have_none(models: Path) -> None:
    public = str(models / "said_public.jsonl")
    off = build(load_config(config(models, proxy__public=public, method__distil=False)))
    assert off.warnings == ["proxy.public has no effect: method.distil is false"]
    held = hold(off)
    assert held is not None and held.public is None
    plain = config(models, proxy__public=public)
    plain["method"] = {"name": "fedavg"} | {"cohort": 2}
    assert build(load_config(plain)).warnings == ["proxy.public has no effect: fedavg does not distil"]


# --- an expert prompt -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def framed(models: Path) -> app.Run:
    changes = {"proxy__expert_prompt": "once ", "proxy__public": str(models / "said_public.jsonl")}
    return app.run(config(models, run__rounds=1, **changes), out=models / "run-framed")


def test_the_tuned_model_alone_reads_the_expert_prompt(framed: app.Run, models: Path) -> None:
    """Losses of the curve, of the scores and of the teacher from logits, with the ids put together by hand."""
    fed = build(load_config(framed.folder / "config.yaml"))
    held = hold(fed)
    assert held is not None and held.public is not None
    params = app.running.best_params(fed, RunFolder.open(framed.folder))
    front = list(fed.base.tokenizer("once ", add_special_tokens=False)["input_ids"])
    large = build(load_config(config(models, model__name=str(models / "proxy-gpt2"), method__lr=1e-3)))

    def combined(data: Any, row: int, alpha: float) -> torch.Tensor:
        tokens, start = data.tokens[row], int(data.starts[row])
        longer = dataclasses.replace(data.take([row]), tokens=(np.asarray([*front, *tokens], np.int32),))
        longer = dataclasses.replace(longer, starts=np.asarray([len(front) + start]))
        tuned = fed.model.token_logits(params, longer, [0])
        z = large.model.token_logits(None, data, [row]).double()
        return z + alpha * (tuned - fed.model.token_logits(None, data, [row]))

    def loss(data: Any, alpha: float) -> float:
        total, count = 0.0, 0
        for row in range(len(data)):
            said = torch.from_numpy(data.tokens[row][int(data.starts[row]) :].astype("int64"))
            total += float(torch.nn.functional.cross_entropy(combined(data, row, alpha), said, reduction="sum"))
            count += len(said)
        return total / count

    assert held.curve(params).nll[1.0] == pytest.approx(loss(fed.whole("validation"), 1.0), abs=1e-5)
    assert held.scores(params, 0.5, "test")["proxy"]["loss"] == pytest.approx(loss(fed.whole("test"), 0.5), abs=1e-5)
    row = 4  # one without a response
    told = held.teacher(params, 0.5)([row]).logits.double().log_softmax(dim=-1)
    own = combined(held.public, row, 0.5)[:, : held.vocab].log_softmax(dim=-1)
    near = own > -16
    assert float((told - own)[near].abs().max()) < 0.01


def test_an_artefact_has_its_expert_prompt(framed: app.Run) -> None:
    assert json.loads((framed.folder / "adapter" / FILE).read_text())["expert_prompt"] == "once "
    opened = open_artefact(framed.folder)
    once = opened.prompting.tokenizer("once ", add_special_tokens=False)["input_ids"]
    assert opened.trio.tuned_prompts([[7]]) == [[*once, 7]] and opened.voices["base_small"].expert is None
    for sample in RunFolder.open(framed.folder).samples():
        ids = opened.prompt(instruction=sample["instruction"])
        found = compare(opened, ids, Settings(max_tokens=4, **opened.settings))
        assert {who: found[who].text.strip() for who in ("proxy", "large", "base_small")} == {
            "proxy": sample["proxy"], "large": sample["large"], "base_small": sample["base"],
        }  # fmt: skip
    with pytest.raises(
        RequestError, match=r"alpha was chosen with the expert prompt 'once ', and now speaks without an .*--alpha"
    ):
        open_artefact(framed.folder, expert_prompt="")
    assert open_artefact(framed.folder, alpha=0.5, expert_prompt="").trio.expert is None
    other = open_artefact(framed.folder, alpha=0.5, expert_prompt="{prompt} once")
    assert other.trio.tuned_prompts([[7]]) != [[7]] and other.trio.tuned_prompts([[7]])[0][0] == 7


# --- choosing alpha by what is said -----------------------------------------------------------------------------


def test_alpha_by_exact_match_is_the_best_of_three(ran: app.Run, models: Path) -> None:
    fed = build(load_config(config(models, proxy__select="exact_match")))
    held = hold(fed)
    assert held is not None
    params = app.running.best_params(fed, RunFolder.open(ran.folder))
    chosen = held.chosen(params)
    said = held.text_scores(params)
    assert set(said) == set(held.curve(params).best_of(3))
    assert chosen == min(alpha for alpha, value in said.items() if value == max(said.values()))


def test_what_is_told_of_parameters_is_theirs_whatever_was_chosen_since(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = hold(build(load_config(config(models, proxy__select="exact_match"))))
    assert held is not None
    first = held.fed.initial
    second = {name: t + 0.5 for name, t in first.items()}
    monkeypatch.setattr(Holding, "_said_well", lambda self, params, alpha: 1.0 if params is first else 0.0)
    assert set(held.text_scores(first).values()) == {1.0} and set(held.text_scores(second).values()) == {0.0}
    held.chosen(second)
    assert set(proxy_facts(held, first)["proxy"]["text_scores"].values()) == {1.0}


def test_equal_answers_are_a_tie_for_the_smaller_alpha(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = build(load_config(config(models, proxy__select="exact_match")))
    held = hold(fed)
    assert held is not None
    monkeypatch.setattr(Holding, "_said_well", lambda self, params, alpha: 0.5)
    assert held.chosen(fed.initial) == min(held.curve(fed.initial).best_of(3))


def test_a_large_model_of_few_candidates_is_chosen_for_by_what_it_says(models: Path, tmp_path: Path) -> None:
    fed = build(load_config(config(models, proxy__select="exact_match")))
    held = hold(fed)
    assert held is not None
    weak = _weak(held)
    assert weak.chosen(fed.initial) in weak.text_scores(fed.initial) and len(weak.text_scores(fed.initial)) == 8
    assert weak.scores(fed.initial, 1.0, "test") == {}
    assert weak.trio(fed.initial).candidates == 20


@pytest.mark.parametrize(
    ("best", "beyond"), [(1.5, False), (2.0, True), (4.0, True)], ids=["within", "at the end", "beyond"]
)
def test_where_the_end_of_the_grid_says_best_more_is_tried(
    models: Path, monkeypatch: pytest.MonkeyPatch, best: float, beyond: bool
) -> None:
    held = hold(build(load_config(config(models, proxy__select="exact_match"))))
    assert held is not None
    weak = _weak(held)
    monkeypatch.setattr(Holding, "_said_well", lambda self, params, alpha: -abs(alpha - best))
    assert weak.chosen(weak.fed.initial) == best
    assert set(weak.text_scores(weak.fed.initial)) == {*GRID, *(BEYOND if beyond else ())}


def _weak(held: Holding) -> Holding:
    """The same large model that tells 20 candidates, one position a call."""
    large: Any = held.large
    caps = dataclasses.replace(large.caps, full=False, top_k=20, block=False)

    class Weak:
        def __init__(self) -> None:
            self.caps = caps

        def open(self, prompts: Any, want: Any) -> Any:
            return large.open(prompts, want)

    return Holding(held.fed, Weak(), held.vocab)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task__validation": None}, ConfigError, r"proxy.alpha: auto is chosen on texts that the server has"),
        ({"proxy__large": None, "proxy__public": "said_public.jsonl"}, ConfigError, "proxy.public: what is distilled"),
        ({"proxy__alpha": float("nan")}, ConfigError, "proxy.alpha: nan cannot be used; give 'auto', or a number from"),
        (
            {"proxy__alpha": 101},
            ConfigError,
            "proxy.alpha: 101 cannot be used; give 'auto', or a number from -100 to 100",
        ),
        ({"proxy__top_k": 4}, ConfigError, "proxy.top_k"),
        ({"proxy__public": "nowhere.jsonl"}, ConfigError, "proxy.public: there is no"),
        ({"proxy__token_env": "FEDPEFT_NO_SUCH_KEY"}, RequestError, "variable FEDPEFT_NO_SUCH_KEY, which is not set"),
        ({"proxy__large": "tiny"}, RequestError, "family bert"),
        ({"proxy__large": "proxy-other"}, RequestError, "the tokenizer of .* is not the small model's"),
        ({"task__max_length": 96}, ModelError, "task.max_length is 96"),
        (
            {"proxy__expert_prompt": "{prompt}{prompt}"},
            ConfigError,
            r"give a text with \{prompt\} at most once, or chat",
        ),
        ({"proxy__expert_prompt": "chat"}, RequestError, "the tokenizer has no chat template"),
        ({"proxy__expert_prompt": "once " * 60}, RequestError, "the small model reads 64; shorten the expert prompt"),
    ],
)
def test_mistakes_are_told_before_the_first_round(
    changes: dict[str, Any], error: type[Exception], message: str, models: Path, tmp_path: Path
) -> None:
    if changes.get("proxy__large") == "proxy-other" and not (models / "proxy-other").exists():
        tokenizer = tiny_lm.byte_tokenizer("roberta")
        tiny_lm.save("gpt2", tokenizer, models / "proxy-other", len(tokenizer), positions=64)
    for key in ("proxy__large", "proxy__public"):
        if changes.get(key):
            changes = {**changes, key: str(models / changes[key])}
    with pytest.raises(error, match=message):
        app.run(config(models, **changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_key_is_what_a_variable_holds_without_the_blanks_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_A_KEY", " secret\n")
    assert key_of("FEDPEFT_A_KEY") == "secret" and key_of(None) is None
    monkeypatch.setenv("FEDPEFT_A_KEY", " ")
    with pytest.raises(RequestError, match="--token-env names the variable FEDPEFT_A_KEY, which is not set or empty"):
        key_of("FEDPEFT_A_KEY", "--token-env")


def test_rouge_l_that_is_not_installed_is_told_before_the_first_round(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)  # as if it were not there
    with pytest.raises(RequestError, match=r"proxy\.select is rouge_l.*pip install 'fedpeft\[generate\]'"):
        app.run(config(models, proxy__select="rouge_l"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert hold(build(load_config(config(models, proxy__select="rouge_l", proxy__alpha=1.0)))) is not None


def test_labels_have_no_large_model(models: Path) -> None:
    values = small.config(models)
    values["proxy"] = {"large": str(models / "proxy-gpt2"), "alpha": 1.0}
    with pytest.raises(ConfigError, match=r"proxy\.large: a large model says texts, and task.format is head"):
        load_config(values)
    values = small.config(models, method__name="fedpt")
    assert "tunes a classifier here" in build(load_config(values)).warnings[0]


def test_few_candidates_are_refused_for_likelihoods_and_distillation(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpeft.proxy import backends

    fed = build(load_config(config(models)))
    held = hold(fed)
    assert held is not None
    weak = _weak(held).large
    monkeypatch.setattr(backends, "open_backend", lambda *given, **named: weak)
    with pytest.raises(CannotDo, match=r"alpha by likelihood .*use proxy.select exact_match"):
        hold(fed)
    for changes, message in (
        ({"proxy__select": "exact_match", "proxy__speculate": 2}, "speculation: it scores one position"),
        ({"proxy__public": str(models / "said_public.jsonl"), "proxy__alpha": 1.0}, "scores of given texts"),
    ):
        with pytest.raises(CannotDo, match=message):
            hold(build(load_config(config(models, **changes))))
    assert hold(build(load_config(config(models, proxy__alpha=1.0)))) is not None


def test_a_given_alpha_needs_no_validation_texts(models: Path) -> None:
    held = hold(build(load_config(config(models, proxy__alpha=0.5, task__validation=None))))
    assert held is not None and held.chosen({}) == 0.5 == held.best_alpha({})


# --- speaking ---------------------------------------------------------------------------------------------------


def test_an_artefact_speaks_as_the_run_did(ran: app.Run, models: Path) -> None:
    artefact = open_artefact(ran.folder)
    assert artefact.alpha == ran.manifest["proxy"]["alpha"] and artefact.template == "{instruction}"
    sample = RunFolder.open(ran.folder).samples()[0]
    ids = artefact.prompt(instruction=sample["instruction"])
    found = compare(artefact, ids, Settings(max_tokens=4, **artefact.settings))
    assert {who: own.text.strip() for who, own in found.items()} == {
        "proxy": sample["proxy"], "large": sample["large"], "tuned_small": sample["global"],
        "base_small": sample["base"],
    }  # fmt: skip
    emitted = list(speak(artefact, ids, Settings(max_tokens=4, **artefact.settings)))
    assert "".join(one.text for one in emitted) == found["proxy"].text and emitted[-1].finish is not None


def test_prompts(ran: app.Run) -> None:
    artefact = open_artefact(ran.folder)
    tokenizer = artefact.prompting.tokenizer

    def said(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    assert said(artefact.prompt("it was")) == "it was" and said(artefact.prompt(instruction="a film ?")) == "a film ?"
    talk = [{"role": "system", "content": "once"}, {"role": "user", "content": "a time ?"}]
    assert said(artefact.prompt(talk)) == "oncea time ?", "this tokenizer has no line break"
    template = "{context}|{instruction}"
    prompting = dataclasses.replace(artefact.prompting, template=template)
    wide = dataclasses.replace(artefact, template=template, prompting=prompting)
    more = [talk[0], {"role": "user", "content": "a"}, {"role": "assistant", "content": "good"}, talk[1]]
    assert said(wide.prompt(more)) == "onceuser: aassistant: good|a time ?"
    for said, instruction in ((None, None), ("", None), ("a", "b"), ([], None), (None, "")):
        with pytest.raises(RequestError, match="the prompt is empty, or given twice"):
            artefact.prompt(said, instruction=instruction)
    with pytest.raises(RequestError, match="the last message is by 'system'"):
        artefact.prompt(talk[:1])
    with pytest.raises(RequestError, match="message 1 needs a role and a content"):
        artefact.prompt([{"role": "user"}])


def test_another_large_model_needs_an_alpha(ran: app.Run, models: Path) -> None:
    other = str(models / "proxy-llama")
    with pytest.raises(RequestError, match=r"alpha was chosen with .*proxy-gpt2.*--alpha"):
        open_artefact(ran.folder, other)
    assert open_artefact(ran.folder, other, alpha=0.25).alpha == 0.25
    assert open_artefact(ran.folder, alpha=0.25).alpha == 0.25
    alone = open_artefact(ran.folder, "none")
    assert alone.alpha is None and alone.trio.large is None and set(alone.voices) == {"tuned_small", "base_small"}
    with pytest.raises(RequestError, match=r"alpha is nan; give a number from -100 to 100 \(--alpha\)"):
        open_artefact(ran.folder, alpha=float("nan"))
    with pytest.raises(RequestError, match=r"alpha is 1\.0, and there is no large model to steer"):
        open_artefact(ran.folder, "none", alpha=1.0)


def test_a_run_without_a_large_model_can_be_given_one_later(models: Path, tmp_path: Path) -> None:
    values = config(models, run__rounds=1, task__validation=None)
    values["proxy"] = {}
    done = app.run(values, out=tmp_path / "run")
    assert done.metrics["best"]["test"].keys() == {"global", "base"}
    assert open_artefact(done.folder).trio.large is None
    with pytest.raises(RequestError, match=r"no alpha was chosen with .*; give one with --alpha"):
        open_artefact(done.folder, str(models / "proxy-gpt2"))
    assert open_artefact(done.folder, str(models / "proxy-gpt2"), 1.0).trio.steered
    exported = app.export(done.folder, tmp_path / "exported")
    assert open_artefact(exported).facts == open_artefact(done.folder).facts


def test_another_small_model_or_tokenizer_is_refused(ran: app.Run, models: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "adapter"
    shutil.copytree(ran.folder / "adapter", folder)
    facts = json.loads((folder / FILE).read_text())

    def changed(**more: Any) -> None:
        (folder / FILE).write_text(json.dumps({**facts, **more}))

    changed(small={**facts["small"], "sha256": "0" * 64})
    with pytest.raises(RequestError, match=r"has sha256 .*, and the adapter is for 000000000000"):
        open_artefact(folder)
    changed(fingerprint="0" * 64)
    with pytest.raises(RequestError, match=r"the tokenizer of .* has changed"):
        open_artefact(folder)
    changed(params_sha256="0" * 64)
    with pytest.raises(RequestError, match="belongs to other parameters"):
        open_artefact(folder)
    changed(format=7)
    with pytest.raises(RequestError, match="has the format 7"):
        open_artefact(folder)
    (folder / FILE).unlink()
    with pytest.raises(RequestError, match=r"has no proxy\.json"):
        open_artefact(folder)
    with pytest.raises(RequestError, match="is no folder"):
        open_artefact(tmp_path / "nowhere")


# --- what people see --------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_its_own_large_model_alone(models: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(models / "proxy-gpt2", tmp_path / "large")
    done = app.run(config(models, run__rounds=1, proxy__large=str(tmp_path / "large")), out=tmp_path / "run")
    shutil.rmtree(tmp_path / "large")
    shutil.copytree(models / "proxy-llama", tmp_path / "large")
    load_base.__globals__["_load"].cache_clear()
    with pytest.raises(RequestError, match=r"the large model of .* was .*large@.* when the run began, and is .*large@"):
        app.resume(done.folder, {"run.rounds": 2})


def test_a_run_may_start_from_another_ones_adapter(ran: app.Run, models: Path) -> None:
    """B stays the model as it was before any tuning, so the first curve is that of the adapter."""
    fed = build(load_config(config(models, run__init_from=str(ran.folder))))
    held = hold(fed)
    assert (
        held is not None
        and tree.sha256(fed.initial) == json.loads((ran.folder / "adapter" / FILE).read_text())["params_sha256"]
    )
    assert held.curve(fed.initial).best == ran.manifest["proxy"]["alpha"]


def test_pooled_and_local_training_can_steer_too(models: Path, tmp_path: Path) -> None:
    """Proxy-tuning without a federation, and every client for itself."""
    for name in ("centralized", "local"):
        values = config(models, run__rounds=1)
        values["method"] = {"name": name, "lr": 2e-2} | ({"cohort": 2} if name == "local" else {})
        done = app.run(values, out=tmp_path / name)
        assert {"proxy", "large", "global", "base"} <= done.metrics["final"]["test"].keys()


def test_the_page_shows_the_curve_and_all_models(ran: app.Run, distilled: app.Run) -> None:
    page = (ran.folder / "report.html").read_text()
    for text in (
        "The large model",
        "against alpha",
        "large model, steered",
        "small model, untrained",
        "no public texts",
    ):
        assert text in page
    assert "6 public texts were shown to it" in (distilled.folder / "report.html").read_text()


def test_check_tells_of_the_large_model(models: Path) -> None:
    found = app.check(config(models, proxy__public=str(models / "said_public.jsonl")))["proxy"]
    fed = build(load_config(config(models)))
    assert "proxy-gpt2" in found["large"] and found["scores"] == "of all tokens" and found["max_context"] == 64
    tokens = int((fed.whole("test").lengths - fed.whole("test").starts).sum())  # type: ignore[operator]
    assert found["kept_test_bytes"] == tokens * found["vocab"] * 4
    assert "kept_public_bytes" in found and "proxy" not in app.check(config(models, proxy__large=None))


def test_studies_have_the_steered_models_score(models: Path, tmp_path: Path) -> None:
    base = config(models, run__rounds=1)
    entries = [{"label": "FedPT", "name": "fedpt"}, {"label": "Central", "name": "centralized", "lr": 2e-2}]
    found = app.compare({"base": base, "methods": entries, "seeds": [0]}, out=tmp_path / "study")
    assert not found.failures
    for row in found.table:
        assert row["of"] == "proxy" and row["mean"] == row["proxy"] and row["large"] > 0 and row["base"] > 0
