"""Softened targets against the cross-entropy with the mixed target, written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from fedpeft.core.errors import FitError
from fedpeft.core.fit import SGD, Fit, Fitted, Soften


def test_the_gradient_is_that_of_the_mixed_target() -> None:
    """q = (1 - s) y + s p with p fixed, for rows above the threshold; by autograd on the head's logits."""
    model = tiny.model("bert")
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 8)
    rows = list(range(8))
    losses = model.losses(params, data, rows).double()
    threshold = float(losses.sort().values[3:5].mean())
    fit = Fit(params, data, [rows], SGD(1.0), train=frozenset({"head.weight", "head.bias"}))
    plain = model.fit(fit)
    soft = model.fit(replace(fit, soften=Soften(threshold, 0.4)))
    assert soft.losses == plain.losses, "what is told is the plain loss"
    weight, bias = (params[name].clone().requires_grad_() for name in ("head.weight", "head.bias"))
    states = model.hidden(params, data, rows)[-1].double()
    lengths = torch.from_numpy(data.lengths)[:, None]
    logits = (states.sum(dim=1) / lengths) @ weight.T + bias
    shares = logits.log_softmax(dim=1)
    own = torch.nn.functional.one_hot(torch.from_numpy(data.labels), 3).double()
    mixed = torch.where((losses > threshold)[:, None], 0.6 * own + 0.4 * shares.exp().detach(), own)
    (-(mixed * shares).sum(dim=1).mean()).backward()
    for name, leaf in (("head.weight", weight), ("head.bias", bias)):
        torch.testing.assert_close(params[name] - soft.params[name], leaf.grad, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(params[name] - plain.params[name], leaf.grad, atol=1e-4)


def test_in_company_everybody_has_his_own() -> None:
    model = tiny.model("bert")
    params, data = tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 8)
    fits = [
        Fit(params, data, [[0, 1, 2], [3, 4]], SGD(0.1), soften=s) for s in (None, Soften(0.0, 0.5), Soften(1.0, 0.9))
    ]
    for together, fit in zip(model.fit_many(fits), fits, strict=True):
        alone = model.fit(fit)
        assert isinstance(together, Fitted)
        for name, t in alone.params.items():
            torch.testing.assert_close(together.params[name], t, rtol=1e-9, atol=1e-12)


def test_impossible_ones_are_refused() -> None:
    model = tiny.model("bert")
    fit = Fit(tiny.params(model, tiny.place()), tiny.examples(tiny.place(1), 3), [[0]], SGD(0.1))
    for soften in (Soften(-1.0, 0.1), Soften(1.0, 1.0)):
        with pytest.raises(FitError, match="the share lie in"):
            model.fit(replace(fit, soften=soften))
