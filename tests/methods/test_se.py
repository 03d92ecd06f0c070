"""SE: which Fit a client asks for, and what is refused."""

from __future__ import annotations

import pytest

import toy
from fedpeft.core import tree
from fedpeft.core.errors import ConfigError
from fedpeft.core.exchange import ClientEnv, ServerEnv
from fedpeft.core.fit import SGD, Fit, Soften
from fedpeft.methods.fedavg import FedAvg
from fedpeft.methods.se import SE
from turns import turn

SAME = {"batch_size": 2, "lr": 0.05}


def place() -> tuple[ServerEnv, ClientEnv]:
    model, data = toy.ToyModel((0.0, 0.0, 0.0)), toy.points((4, 0, 0), (1, 0, 0), (0, 0, 5))
    return ServerEnv(model, ("a",), 0, 3), ClientEnv("a", model, {"train": data}, 0, 3, 1, "train")


def test_a_turn_is_that_of_fedavg_with_softened_targets() -> None:
    server, here = place()
    method = SE(**SAME, threshold=2.0, share=0.3)
    down = method.send(method.init(server), "a")
    (fit,), up, _ = turn(method, down, here)
    (plain,), unsoftened, _ = turn(FedAvg(**SAME), down, here)
    assert fit.soften == Soften(threshold=2.0, share=0.3) and plain.soften is None
    assert fit.batches == plain.batches and fit.optimizer == plain.optimizer and up.examples == 3
    assert tree.sha256(up.params) != tree.sha256(unsoftened.params)


def test_a_hard_row_moves_the_model_less() -> None:
    """Points 4 and 1 from w = 0 have losses 8 and .5; above 2 with share .25 a step of 1 goes (3 + 1) / 2, not 2.5."""
    _, here = place()
    for soften, wanted in ((None, 2.5), (Soften(2.0, 0.25), 2.0), (Soften(0.0, 0.25), 1.875)):
        fit = Fit(toy.params(0, 0, 0), here.data, [[0, 1]], SGD(1.0), soften=soften)
        assert toy.vector(here.model.fit(fit).params) == [wanted, 0, 0]


def test_without_a_share_it_is_fedavg() -> None:
    server, here = place()
    method = SE(**SAME, share=0.0)
    down = method.send(method.init(server), "a")
    assert tree.sha256(turn(method, down, here).up.params) == tree.sha256(turn(FedAvg(**SAME), down, here).up.params)
    with pytest.raises(ConfigError, match=r"method\.share is 1"):
        SE(share=1.0)
