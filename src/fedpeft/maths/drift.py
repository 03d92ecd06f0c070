"""Server optimisers: what a server makes of the parameters that came back, with state that never travels.

Notation: w the parameters that were sent, w_i those that came from device i with n_i examples and K_i steps,
p_i = n_i / sum n over the answers that came, wbar = sum p_i w_i, delta_i = w - w_i, delta = w - wbar. Devices are given
in cohort order; only `reference` depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.tree import Params


@dataclass(frozen=True)
class Step:
    """What one device made of the parameters."""

    params: Params  # w_i
    examples: int  # n_i
    steps: int = 1  # K_i, at least 1; control variates alone need it


@dataclass(frozen=True)
class Control:
    """A device's control variate as the server keeps it."""

    params: Params  # c_i
    weight: float  # a_i = n_i K_i


Controls = Mapping[str, Control]  # by device, of every device seen so far


@dataclass(frozen=True)
class Momentum:
    """The server's own state; an empty mapping stands for zeros in every layout."""

    v: Params = field(default_factory=dict)  # momentum
    control: Params = field(default_factory=dict)  # c
    previous: Params = field(default_factory=dict)  # the pseudo-gradient of the round before
    rate: float = 1.0  # eta_s


LOWEST_RATE = 1e-4
DECAY = 0.99


def average(steps: Mapping[str, Step]) -> dict[str, Tensor]:
    """wbar."""
    return tree.mean((step.params, step.examples) for step in steps.values())


def damped_momentum(w: Params, steps: Mapping[str, Step], m: Momentum, beta: float) -> tuple[Params, Momentum]:
    """v <- beta v + (1 - beta) delta; w <- w - eta_s v, at a constant rate.

    After Hsu et al. 2019 (arXiv 1909.06335), whose momentum is not damped; without damping it diverges where clients
    take few long steps.
    """
    v = _blend(m.v, tree.sub(w, average(steps)), beta)
    return tree.axpy(-m.rate, v, w), Momentum(v, rate=m.rate)


def peptao(
    w: Params,
    steps: Mapping[str, Step],
    m: Momentum,
    controls: Controls,
    *,
    beta: float,
    drift_weight: float,
    difference: bool = False,
    keep_controls: bool = True,
) -> tuple[Params, Momentum, dict[str, Control]]:
    """Momentum of the pseudo-gradient and a correction by control variates, in an order-free form (ours).

        q = sum over answering i that have a c_i:  p_i K_i (c - c_i)
        v <- beta v + (1 - beta) g;  g = delta, or the change of delta since the last round
        w <- wbar - eta_s v - drift_weight q
        eta_s <- max(.99 eta_s, min(1e-4, first rate))
        c_i <- delta_i / K_i;  a_i <- n_i K_i;  c <- sum_j a_j c_j / sum_j a_j over all devices seen so far

    c_i is the device's mean step, so q is in units of the parameters and needs no rate. With eta_s = 0 and
    drift_weight = 0 this is federated averaging, with drift_weight = 1 SAGA over devices (FedVARP, arXiv 2207.14130).

    Args:
        keep_controls: False keeps no state per device, and q is 0.
    """
    wbar = average(steps)
    delta = tree.sub(w, wbar)
    g = tree.sub(m.previous or delta, delta) if difference else delta
    v = _blend(m.v, g, beta)
    new = tree.axpy(-m.rate, v, wbar)
    total = sum(step.examples for step in steps.values())
    for device, step in steps.items():
        if keep_controls and device in controls and drift_weight:
            share = step.examples / total * step.steps * drift_weight
            new = tree.axpy(-share, tree.sub(m.control, controls[device].params), new)
    kept = dict(controls)
    if keep_controls:
        for device, step in steps.items():
            mean_step = tree.scale(tree.sub(w, step.params), 1 / step.steps)
            kept[device] = Control(mean_step, float(step.examples * step.steps))
    control = tree.mean((own.params, own.weight) for own in kept.values()) if kept else {}
    rate = max(DECAY * m.rate, min(LOWEST_RATE, m.rate))
    return new, Momentum(v, control, delta if difference else {}, rate), kept


def reference(
    w: Params,
    steps: Mapping[str, Step],
    m: Momentum,
    controls: Controls,
    *,
    lr: float,
    share: float,
    keep_controls: bool = True,
) -> tuple[Params, Momentum, dict[str, Control]]:
    """The arithmetic of the authors' code as it is written (llm-eff/FedPepTAO, commit 84311d5).

    Its loop visits the devices one after another with one shared momentum and one running result, so that the order of
    visits matters and momentum decays once per device:

        c_i' = c_i - c + delta_i / (K_i lr);  c <- c + share sum K_i (c_i' - c_i) / sum K_i;  c_i <- c_i'
        first round: previous = delta, w = wbar and nothing else
        later: dg = previous - delta; previous = delta; eta_s = max(.99 eta_s, 1e-4); x = wbar; u = v;
          for each device j: u = .9 u + .1 dg + c - c_j;  x = x - eta_s u;  w_j = x;  v_j = u
          w <- sum p_j w_j;  v <- sum p_j v_j

    Args:
        lr: the device's learning rate.
        share: participating devices over all devices.
        keep_controls: False leaves the terms with c out.
    """
    wbar = average(steps)
    delta = tree.sub(w, wbar)
    zero = tree.zeros_like(w)
    c, kept = m.control or zero, dict(controls)
    if keep_controls:
        change, total = zero, sum(step.steps for step in steps.values())
        for device, step in steps.items():
            own = kept[device].params if device in kept else zero
            new = tree.axpy(1 / (step.steps * lr), tree.sub(w, step.params), tree.sub(own, c))
            change = tree.axpy(step.steps / total, tree.sub(new, own), change)
            kept[device] = Control(new, float(step.examples * step.steps))
        c = tree.axpy(share, change, c)
    if not m.previous:
        return wbar, Momentum(m.v, c, delta, m.rate), kept
    difference, rate = tree.sub(m.previous, delta), max(DECAY * m.rate, LOWEST_RATE)
    prompts, v = visit(wbar, m.v or zero, difference, rate, _against(c, kept, steps, keep_controls))
    return prompts, Momentum(v, c, delta, rate), kept


def visit(
    wbar: Params, v: Params, dg: Params, rate: float, devices: list[tuple[float, Params]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The chained loop of `reference`: (w, v) after visits to devices given as (n_j, c - c_j)."""
    x, u = dict(wbar), dict(v)
    results, momenta = [], []
    for examples, push in devices:
        u = tree.add(tree.add(tree.scale(u, 0.9), tree.scale(dg, 0.1)), push)
        x = tree.axpy(-rate, u, x)
        results.append((x, examples))
        momenta.append((u, examples))
    return tree.mean(results), tree.mean(momenta)


def _against(c: Params, controls: Controls, steps: Mapping[str, Step], keep: bool) -> list[tuple[float, Params]]:
    zero = tree.zeros_like(c)
    return [(step.examples, tree.sub(c, controls[device].params) if keep else zero) for device, step in steps.items()]


def _blend(v: Params, g: Params, beta: float) -> dict[str, Tensor]:
    """beta v + (1 - beta) g, where no v yet is zero."""
    fresh = tree.scale(g, 1 - beta)
    return tree.axpy(beta, v, fresh) if v else fresh
