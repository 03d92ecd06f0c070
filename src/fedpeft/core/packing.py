"""Number formats of a quantised base: what their names say, and what a weight takes in them.

| format | codes | scales | bytes a weight |
|---|---|---|---|
| `nf{k}`, k = 2 to 8 | k bits, a level of NormalFloat | absmax of 64 weights, float32 | (k + .5) / 8 |
| `nf{k}dq` | the same | 8 bits, in blocks of 256 after their mean is taken away | nf4dq: .515869 |
| `int8` | 8 bits, equal steps | absmax of a row, float32 | 1, and 4 a row |

`:simulated` behind a name rounds the weights and keeps them in the base's own format: no memory is saved.
`:bitsandbytes` behind nf4 and nf4dq is the same format, unpacked by bitsandbytes.

What packs and unpacks is in `models/quantize.py`.

Reference: NormalFloat and double quantisation Dettmers et al. 2023, arXiv 2305.14314.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BLOCK = 64  # weights that share a scale
OUTER = 256  # scales that share a scale of their own
KERNEL = "bitsandbytes"
KNOWN = "int8, nf4, nf4dq (nf2 to nf8 likewise), each with :simulated, nf4 and nf4dq with :bitsandbytes"


@dataclass(frozen=True)
class Format:
    """A quantised number format.

    Attributes:
        name: as it was asked for.
        bits: of a code.
        normal: NormalFloat in blocks; otherwise equal steps by row.
        double: whether the scales are quantised too.
        simulated: rounded weights in the base's own format.
        kernel: "torch" or "bitsandbytes", what turns codes into weights.
    """

    name: str
    bits: int
    normal: bool
    double: bool = False
    simulated: bool = False
    kernel: str = "torch"

    @property
    def bytes_per_weight(self) -> float:
        """Without what is paid by row or by tensor; as if packed where the format is simulated."""
        if not self.normal:
            return self.bits / 8
        scale = 8 / BLOCK + 32 / (BLOCK * OUTER) if self.double else 32 / BLOCK
        return (self.bits + scale) / 8


def format_of(name: str) -> Format | None:
    """The format of this name, or None where there is none."""
    found = re.fullmatch(r"(?:(int8)|nf([2-8])(dq)?)(?::(simulated|bitsandbytes))?", name)
    if found is None:
        return None
    whole, bits, double, way = found.groups()
    if way == KERNEL and bits != "4":
        return None
    kernel = KERNEL if way == KERNEL else "torch"
    return Format(name, 8 if whole else int(bits), not whole, double is not None, way == "simulated", kernel)
