"""A planted signal for FedPT: the large model knows facts and will not say them, the small one learns to answer.

Bounds of a world with 80 private, 40 validation, 40 public and 80 test entities: base large <= .15; tuned small <= .35;
proxy at alpha 1 >= .75 and >= tuned small + .4; the alpha chosen on validation in [.5, 1.25], and there proxy >= .85;
directly tuned large >= proxy - .02; alpha 0 is the large model, token for token; serving the aggregate before
distillation costs nothing.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import facts
from fedpeft.core import tree
from fedpeft.core.rng import rng_for
from fedpeft.core.tree import Params
from fedpeft.models.sessions import Speaker
from fedpeft.proxy import trio
from fedpeft.proxy.decode import Trio

WORLDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


def large_alone(of: facts.World, params: Params | None = None) -> Trio:
    return facts.alone(of, "large", params)


@pytest.mark.parametrize("seed", WORLDS)
def test_the_small_model_makes_the_large_one_say_what_it_knows(seed: int) -> None:
    of = facts.world(seed)
    questions, validation = facts.every(of.test), facts.every(of.validation)
    params = facts.tune(of, "small", of.dealt()).served
    steered, tuned = facts.trio(of, params), facts.exact(facts.alone(of, "small", params), of, questions)

    before = facts.answers(large_alone(of), of, questions)
    assert facts.answers(steered, of, questions, 0.0) == before
    assert facts.exact(large_alone(of), of, questions) <= 0.15
    assert tuned <= 0.35

    at_one = facts.exact(steered, of, questions, 1.0)
    assert at_one >= 0.75 and at_one >= tuned + 0.4
    curve = facts.curve(of, params, validation)
    alpha = curve.best
    assert 0.5 <= alpha <= 1.25 and curve.advice is None
    proxy = facts.exact(steered, of, questions, alpha)
    assert proxy >= 0.85

    direct = facts.tune(of, "large", of.dealt()).served
    assert facts.exact(large_alone(of, direct), of, questions) >= proxy - 0.02


@pytest.mark.parametrize("seed", WORLDS)
def test_a_federation_steers_no_worse_than_its_clients_do_alone(seed: int) -> None:
    """The baseline "local proxy": each client tunes and steers by itself, with its own alpha; the mean over clients."""
    of = facts.world(seed)
    questions, validation = facts.every(of.test), facts.every(of.validation)

    def steered(clients: dict[str, list[facts.Item]]) -> tuple[float, float]:
        params = facts.tune(of, "small", clients).served
        curve = facts.curve(of, params, validation)
        return facts.exact(facts.trio(of, params), of, questions, curve.best), min(curve.nll.values())

    dealt = of.dealt()
    alone = [steered({client: list(items)}) for client, items in dealt.items()]
    score, loss = (sum(own[i] for own in alone) / len(alone) for i in range(2))
    together = steered({client: list(items) for client, items in dealt.items()})
    assert together[0] >= score - 0.02 and together[1] < loss, "a federation learns at least as much"
    assert score >= 0.8, "to answer is in every client's data"


@pytest.mark.parametrize("seed", WORLDS)
def test_serving_the_aggregate_before_distillation_costs_nothing(seed: int) -> None:
    """alpha is that of the validation questions, for each of the two."""
    of, questions = facts.world(seed), facts.every(facts.world(seed).test)
    bases = [facts.model(seed, which).base.module.state_dict() for which in facts.SIZES]
    hashes = [tree.sha256(base) for base in bases]
    held = facts.Held(of)
    state = facts.tune(of, "small", of.dealt(), held)
    assert len(held.alphas) == 6 and state.alpha == held.alphas[-1]
    assert [tree.sha256(base) for base in bases] == hashes, "distillation leaves both base models as they are"
    scores = []
    for params in (state.served, state.params):
        alpha = facts.curve(of, params, facts.every(of.validation)).best
        scores.append(facts.exact(facts.trio(of, params), of, questions, alpha))
    pre, post = scores
    assert pre >= post - 0.02 and pre >= 0.85


@pytest.mark.parametrize("seed", WORLDS)
def test_fewer_candidates_than_evasions_leave_no_room_for_the_fact(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untuned, the large model begins one of four evasions: five candidates are the first that hold the value, too."""
    monkeypatch.setattr(trio, "FEWEST_CANDIDATES", 1)
    of = facts.world(seed)
    params, questions = facts.tune(of, "small", of.dealt()).served, facts.every(of.test)
    every = facts.trio(of, params)
    whole = facts.exact(every, of, questions, 1.0)
    scores = {k: facts.exact(replace(every, candidates=k), of, questions, 1.0) for k in (1, 2, 3, 4, 5, 10, 20)}
    assert all(scores[k] <= 0.15 for k in (1, 2, 3, 4)), scores
    assert all(scores[k] >= whole - 0.02 for k in (5, 10, 20)), scores


@pytest.mark.slow
def test_facts_that_contradict_the_large_model_do_not_transfer() -> None:
    """Forty entities, every value shifted, asked again after long training: only whoever was tuned has learned them."""
    of = facts.world(0).contradicted()
    entities = of.private[:40]
    items = facts.every(entities)
    clients = {str(client): items[client :: facts.CLIENTS] for client in range(facts.CLIENTS)}
    params = facts.tune(of, "small", clients, rounds=15, epochs=4).served
    tuned = facts.exact(facts.alone(of, "small", params), of, items)
    assert tuned >= 0.2
    steered = facts.trio(of, params)
    assert all(facts.exact(steered, of, items, alpha) < tuned for alpha in (0.5, 1.0, 2.0, 4.0))
    direct = facts.tune(of, "large", clients, rounds=15, epochs=4).served
    assert facts.exact(large_alone(of, direct), of, items) >= 0.9
    advice = facts.curve(of, params, items).advice
    assert advice == "the tuned small model alone is better than any combination: serve it alone"


def test_the_curve_is_that_of_transformers_logits_combined_in_plain_arithmetic() -> None:
    """z_L + alpha (z_T - z_B) of whole texts in float64; T is peft-free: its factors multiplied into the weights."""
    of = facts.world(0)
    items = facts.every(of.validation)[:12]
    small, data = facts.model(0, "small"), of.examples(items)
    params = {name: t + 0.2 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for name, t in
              small.init(rng_for(0, "adapter")).items()}  # fmt: skip
    tuned = copy.deepcopy(facts.whole(0, "small"))
    for name, slot in small.slots.items():
        weight = tuned.model.get_parameter(f"{slot.path}.weight")
        with torch.no_grad():
            weight += 16 / 8 * params[f"{name}.B"] @ params[f"{name}.A"]
    ids = torch.tensor([own.tolist() for own in data.tokens])
    models = facts.whole(0, "large"), tuned, facts.whole(0, "small")
    with torch.no_grad():
        large, own, base = (each(input_ids=ids).logits[:, -4:-1].double() for each in models)
    curve = facts.curve(of, params, items)
    for alpha, found in curve.nll.items():
        chosen = (large + alpha * (own - base)).log_softmax(-1).gather(2, ids[:, -3:, None])
        assert found == pytest.approx(-float(chosen.mean()), abs=1e-5)
    assert curve.tokens == 36 and len(curve.nll) >= 8


def test_values_are_the_other_half_of_a_question() -> None:
    """The data themselves: groups apart, values within their attribute, the skew of the clients."""
    of = facts.world(0)
    groups = (of.private, of.validation, of.public, of.test)
    assert [len(group) for group in groups] == [80, 40, 40, 80] and len({e for g in groups for e in g}) == 240
    assert len(facts.WORDS) == len(set(facts.WORDS)) == 124
    assert len({tuple(name) for name in of.names.tolist()}) == 240
    dealt = of.dealt()
    assert sum(map(len, dealt.values())) == 320
    own = sum(item[1] == int(client) for client, items in dealt.items() for item in items) / 320
    assert own == pytest.approx(0.7 + 0.3 / 4, abs=0.06)
    assert of.answer((3, 1)) == [facts.NUMBER[f"v1_{of.facts[3, 1]}"], facts.NUMBER["."], facts.EOS]
    other = of.contradicted()
    assert not (other.facts == of.facts).any() and replace(other, facts=of.facts).names is of.names
    assert Speaker(facts.model(0, "small")).vocab == 124
