"""Simulated time: what a round would take on the clients' own devices, from counted bytes and operations.

A client's part of an exchange takes latency + bytes down / bandwidth + operations / speed + steps * overhead of a step
+ bytes unpacked / their speed + bytes up / bandwidth. Bytes are unpacked in steps on a base that a method asked for in
another number format (`Fit.base`), as the planner counts them; not in passes forward alone, and not where the model
itself was loaded in that format. An exchange ends when its slowest answering client is done, or at the deadline where
somebody was late; the exchanges of a round, and the rounds, follow one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from fedpeft.core.exchange import ClientId, Meter, Receipt
from fedpeft.planner.cost import Shape, forward_flops, train_flops
from fedpeft.planner.device import DEFAULT, Profile
from fedpeft.planner.prices import unpacked_bytes


class Clock:
    """Gives the seconds that one client's part of an exchange takes on its device.

    Args:
        shape: of the base model.
        profiles: device per client; a client without one has the documented default.
    """

    def __init__(self, shape: Shape, profiles: Mapping[ClientId, Profile]) -> None:
        self._shape = shape
        self._profiles = profiles

    def flops(self, meter: Meter) -> int:
        """Counted operations of one client's work."""
        trained = sum(train_flops(self._shape, *work, lowest) for lowest, work in meter.trained.items())
        trained += 2 * meter.products
        return trained + forward_flops(self._shape, meter.forward_tokens, meter.forward_pairs)

    def unpacked(self, meter: Meter) -> int:
        """Bytes of a quantised base's weights that one client's steps unpacked."""
        return sum(steps * unpacked_bytes(self._shape, *how) for how, steps in meter.packed.items())

    def __call__(self, receipt: Receipt) -> float:
        """Simulated seconds of the part that the receipt is for."""
        device = self._profiles.get(receipt.client, DEFAULT)
        return math.fsum(
            (
                device.latency_s,
                receipt.bytes_down / device.down_bytes_per_s,
                self.flops(receipt.meter) / device.flops_per_s,
                receipt.meter.steps * device.step_overhead_s,
                self.unpacked(receipt.meter) / device.dequant_bytes_per_s if device.dequant_bytes_per_s else 0.0,
                receipt.bytes_up / device.up_bytes_per_s,
            )
        )


def slowest(receipts: Iterable[Receipt]) -> float:
    """Simulated seconds of one exchange: per attempt its slowest client, attempts one after another.

    Who answered counts with its own time, who was late with the deadline that was waited for; others cost no time.
    """
    attempts: dict[int, float] = {}
    for receipt in receipts:
        waited = receipt.simulated_seconds if receipt.lost is None or receipt.lost.startswith("late") else 0.0
        attempts[receipt.attempt] = max(attempts.get(receipt.attempt, 0.0), waited)
    return math.fsum(attempts.values())
