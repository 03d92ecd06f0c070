from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from fedpeft.core.exchange import Meter, Receipt
from fedpeft.planner.cost import shape_of
from fedpeft.planner.device import DEFAULT, Profile
from fedpeft.runs.clock import Clock, slowest

SHAPE = shape_of({"hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 6, "vocab_size": 9,
                  "num_hidden_layers": 2})  # fmt: skip
SLOW = Profile("slow", flops_per_s=1000, up_bytes_per_s=10, down_bytes_per_s=20, latency_s=0.5)


def test_a_receipt_by_hand():
    """The two-block model of test_cost: 5 tokens and 13 pairs cost 5248 to train and 2656 forward.

    0.5 s latency + 100 / 20 down + (5248 + 2656) / 1000 computing + 30 / 10 up = 0.5 + 5 + 7.904 + 3.
    """
    meter = Meter(trained={0: (5, 13)}, forward_tokens=5, forward_pairs=13)
    clock = Clock(SHAPE, {"a": SLOW})
    assert clock(Receipt("a", bytes_down=100, bytes_up=30, meter=meter)) == pytest.approx(16.404, abs=1e-12)
    # with the adapter in the upper block alone, training costs 3712; both fits together cost the sum
    assert clock.flops(Meter(trained={1: (5, 13)})) == 3712
    assert clock.flops(Meter(trained={0: (5, 13), 1: (5, 13)})) == 5248 + 3712


def test_every_step_costs_what_a_machine_says_that_it_costs_besides_its_operations():
    slow = Clock(SHAPE, {"a": dataclasses.replace(SLOW, step_overhead_s=0.25)})
    meter = Meter(steps=6, trained={1: (5, 13)})
    receipt = Receipt("a", bytes_down=100, bytes_up=30, meter=meter)
    assert slow(receipt) == pytest.approx(Clock(SHAPE, {"a": SLOW})(receipt) + 1.5)


def test_steps_on_a_quantised_base_take_the_time_of_unpacking_it():
    """Matrices of a block: 4 * 4 * 4 + 2 * 4 * 6 = 112, 448 bytes; of two blocks, from the upper one on, 3 passes of a
    block in a step, 4 with checkpointing: 448 (2 * 3 + 5 * 4) / 1000.
    """
    meter = Meter(packed=Counter({(1, False): 2, (1, True): 5}))
    fast = dataclasses.replace(SLOW, dequant_bytes_per_s=1000)
    receipt = Receipt("a", bytes_down=100, bytes_up=30, meter=meter)
    without = Clock(SHAPE, {"a": SLOW})(receipt)
    assert Clock(SHAPE, {"a": fast})(receipt) - without == pytest.approx(11.648)
    assert without == Clock(SHAPE, {"a": fast})(dataclasses.replace(receipt, meter=Meter()))


def test_a_client_without_profile_has_the_default():
    seconds = Clock(SHAPE, {})(Receipt("b", bytes_down=1_000_000, bytes_up=500_000))
    expected = DEFAULT.latency_s + 1e6 / DEFAULT.down_bytes_per_s + 5e5 / DEFAULT.up_bytes_per_s
    assert seconds == pytest.approx(expected)


def test_round_and_run():
    """The slowest answer counts, a lost client does not, a late one costs the deadline, attempts add up."""
    answered, silent = Receipt("a", simulated_seconds=1.5), Receipt("b", simulated_seconds=9.0, lost="no answer")
    assert slowest([answered, Receipt("c", simulated_seconds=1.0)]) == 1.5
    assert slowest([answered, silent]) == 1.5 and slowest([silent]) == slowest([]) == 0.0
    late = Receipt("d", simulated_seconds=4.0, lost="late: 7 s, deadline 4 s")
    assert slowest([answered, late]) == 4.0
    assert slowest([answered, late, Receipt("a", simulated_seconds=2.0, attempt=1)]) == 6.0
