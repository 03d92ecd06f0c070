"""Delta-LoRA: a turn against the paper's loop, in which the weights are really changed at every step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from fedpeft.core import changes, pairs, tree
from fedpeft.core.adapter import Lora, Prefix
from fedpeft.core.errors import ConfigError, RecordError
from fedpeft.core.exchange import ClientEnv, ServerEnv
from fedpeft.core.fit import AdamW, Fit
from fedpeft.core.method import local_batches
from fedpeft.core.tree import Params
from fedpeft.methods.deltalora import Answer, Broadcast, DeltaLora, fits, path
from fedpeft.models.hf import HFModel
from turns import turn

SPEC = Lora(rank=2, alpha=3.0, targets=("query", "value"), blocks=(0, 1))
C = 1.5


@pytest.mark.parametrize("first", [0, 2])
def test_a_turn_is_the_papers_loop(first: int) -> None:
    """One step at a time on a copy of the base whose weights move by lambda c (B⁺A⁺ - B A) after each."""
    model = tiny.model("bert", SPEC)
    data = tiny.examples(tiny.place(1), 10)
    here = ClientEnv("a", model, {"train": data}, 0, 3, 1, "train")
    method = DeltaLora(lr=0.05, batch_size=3, epochs=1, weight=0.7, start_steps=first)
    params = {name: t.double() for name, t in tiny.params(model, tiny.place()).items()}
    up = turn(method, Broadcast(params, changes.news_for(changes.Changed(), "a")), here).up

    body = copy.deepcopy(tiny.module("bert"))
    moving = HFModel(tiny.freeze(body, None, "moving", tiny.CPU), SPEC, 3)
    now, moments, losses = dict(params), None, []
    for step, batch in enumerate(local_batches(method, here)):
        fitted = moving.fit(Fit(now, data, [batch], AdamW(0.05), moments=moments))
        if step >= first:
            with torch.no_grad():
                for stem in pairs.stems(now):
                    moved = product(fitted.params, stem) - product(now, stem)
                    body.get_submodule(moving.places[stem].path).weight += 0.7 * C * moved
        now, moments = fitted.params, fitted.moments
        losses.append(fitted.loss)
    for name, t in now.items():
        torch.testing.assert_close(up.params[name], t, rtol=1e-5, atol=1e-7)
    assert up.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    plain = tiny.module("bert")
    for stem in pairs.stems(now):
        weight = (m.get_submodule(moving.places[stem].path).weight for m in (body, plain))
        after, before = weight
        torch.testing.assert_close(0.7 * C * product(up.ends, stem), (after - before).detach(), rtol=1e-5, atol=1e-8)


def product(params: Params, stem: str) -> Tensor:
    return params[f"{stem}.B"] @ params[f"{stem}.A"]


def test_without_weight_it_is_lora() -> None:
    model = tiny.model("bert", SPEC)
    here = ClientEnv("a", model, {"train": tiny.examples(tiny.place(1), 10)}, 0, 3, 1, "train")
    params = {name: t.double() for name, t in tiny.params(model, tiny.place()).items()}
    down = Broadcast(params, changes.news_for(changes.Changed(), "a"))
    method = DeltaLora(lr=0.05, batch_size=3, weight=0.0)
    plain = model.fit(Fit(params, here.data, local_batches(method, here), AdamW(0.05)))
    up = turn(method, down, here).up
    for name, t in plain.params.items():
        torch.testing.assert_close(up.params[name], t, rtol=1e-9, atol=1e-12)


def test_the_server_adds_the_mean_path_of_the_weights() -> None:
    model = tiny.model("bert", SPEC)
    method, env = DeltaLora(weight=0.5), ServerEnv(model, ("a", "b"), 0, 3)
    params = {name: t.double() for name, t in tiny.params(model, tiny.place()).items()}
    ups: dict[str, Any] = {}
    for i, n in enumerate((1, 3)):
        drawn = {name: t.double() for name, t in tiny.params(model, tiny.place(5 + i)).items()}
        ups["ab"[i]] = Answer(drawn, path(drawn, pairs.factors(params)), n, 1.0)
    state = method.average(method.init(env), ups, env)
    result = method.result(state)
    for stem in pairs.stems(params):
        mean = sum(p * product(ups[c].params, stem) for c, p in (("a", 0.25), ("b", 0.75)))
        wanted = 0.5 * C * (mean - product(params, stem))
        got = result[f"delta.{stem}.left"] @ result[f"delta.{stem}.right"]
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    same = tree.mean((up.params, up.examples) for up in ups.values())
    assert tree.sha256({n: t for n, t in result.items() if not n.startswith("delta")}) == tree.sha256(same)


@pytest.mark.parametrize("first", [0, 1])
def test_a_turn_acts_over_what_the_weights_have_moved(first: int) -> None:
    """W's change of earlier rounds lies under every step; from step K on there is also what takes away c B_K A_K."""
    model = tiny.model("bert", SPEC)
    here = ClientEnv("a", model, {"train": tiny.examples(tiny.place(1), 6)}, 0, 3, 2, "train")
    params = {name: t.double() for name, t in tiny.params(model, tiny.place()).items()}
    moved = changes.as_delta({name: t.double() for name, t in tiny.params(model, tiny.place(7)).items()}, 1.0)
    changed = changes.advanced(changes.Changed(), moved, ())
    method = DeltaLora(batch_size=3, weight=0.5, start_steps=first)
    fits, _, memory = turn(method, Broadcast(params, changes.news_for(changed, "a")), here)
    assert tree.sha256(memory.total) == tree.sha256(changed.total) and memory.version == 1
    assert len(fits) == 1 + first and {fit.steps for fit in fits} == {2 - first}
    assert [len(fit.also) for fit in fits] == [1] * first + [2]
    assert all(tree.sha256(fit.also[0]) == tree.sha256(changed.total) for fit in fits)
    start = pairs.factors(fits[-1].params)
    assert tree.sha256(fits[-1].also[1]) == tree.sha256(changes.as_delta(start, -0.5 * C))
    again = turn(method, Broadcast(params, changes.news_for(replace(changed, known={"a": 1}), "a")), here, memory)
    assert tree.sha256(again.fits[-1].also[0]) == tree.sha256(changed.total), "it is remembered, not sent again"


def test_in_company_every_client_has_its_own_echo() -> None:
    model = tiny.model("bert", SPEC)
    made = []
    for i, weight in enumerate((0.0, 0.5, 2.0)):
        params = {name: t.double() for name, t in tiny.params(model, tiny.place(i)).items()}
        echo = {f"{stem}.echo": torch.tensor([weight]).double() for stem in pairs.stems(params)}
        data = tiny.examples(tiny.place(i), 6)
        made.append(Fit({**params, **echo}, data, [[0, 1], [2, 3, 4]], AdamW(0.01, eps=1e-6), train=frozenset(params)))
    for together, fit in zip(model.fit_many(made), made, strict=True):
        alone = model.fit(fit)
        for name, t in alone.params.items():
            torch.testing.assert_close(together.params[name], t, rtol=1e-9, atol=1e-9)  # type: ignore[union-attr]


def test_what_is_refused() -> None:
    model = tiny.model("bert", SPEC)
    here = ClientEnv("a", model, {"train": tiny.examples(tiny.place(1), 6)}, 0, 3, 1, "train")
    down = Broadcast(here.initial(), changes.news_for(changes.Changed(), "a"))
    up = turn(DeltaLora(), down, here).up
    fits(down, up)
    with pytest.raises(RecordError):
        fits(down, Answer(up.params, pairs.factors(up.params), up.examples, up.loss))
    with pytest.raises(ConfigError, match=r"method\.weight is -1"):
        DeltaLora(weight=-1.0)
    assert "not prefix" in str(DeltaLora().accepts(Prefix()))
