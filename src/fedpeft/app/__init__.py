"""The composition root: builds a federation from a configuration, runs it, and uses what came out.

Its names are looked up late, so that a part of it that needs no model (`planning`) starts without one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpeft.app.checking import check
    from fedpeft.app.choosing import choose
    from fedpeft.app.running import Run, resume, run
    from fedpeft.app.studies import Comparison, compare, demo
    from fedpeft.app.using import evaluate, export, predict

__all__ = ["Comparison", "Run", "check", "choose", "compare", "demo", "evaluate", "export", "predict", "resume", "run"]

_MODULES = {
    "check": "checking",
    "choose": "choosing",
    **dict.fromkeys(("Run", "resume", "run"), "running"),
    **dict.fromkeys(("Comparison", "compare", "demo"), "studies"),
    **dict.fromkeys(("evaluate", "export", "predict"), "using"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
