"""fedpeft: federated fine-tuning of language models on data that may not leave its owners.

    import fedpeft
    run = fedpeft.run("config.yaml", {"method.lr": 1e-3})     # or a dict, or a RunConfig
    model = run.load_model()                                  # a transformers model with the adapter folded in

Names are imported when they are first used, so that `import fedpeft` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "Run": "fedpeft.app",
    "Comparison": "fedpeft.app",
    "run": "fedpeft.app",
    "resume": "fedpeft.app",
    "compare": "fedpeft.app",
    "demo": "fedpeft.app",
    "evaluate": "fedpeft.app",
    "predict": "fedpeft.app",
    "export": "fedpeft.app",
    "check": "fedpeft.app",
    "choose": "fedpeft.app",
    "RunConfig": "fedpeft.config",
    "load_config": "fedpeft.config",
    "federate": "fedpeft.core.federate",
    "Start": "fedpeft.core.federate",
    "Done": "fedpeft.core.federate",
    "Exchange": "fedpeft.core.exchange",
    "Method": "fedpeft.core.exchange",
    "Transport": "fedpeft.core.exchange",
    "Model": "fedpeft.core.model",
    "Fit": "fedpeft.core.fit",
    "Fitted": "fedpeft.core.fit",
    "AdamW": "fedpeft.core.fit",
    "AdaLora": "fedpeft.core.adapter",
    "SGD": "fedpeft.core.fit",
    "Lora": "fedpeft.core.adapter",
    "Bottleneck": "fedpeft.core.adapter",
    "Full": "fedpeft.core.adapter",
    "HeadOnly": "fedpeft.core.adapter",
    "InstancePrompt": "fedpeft.core.adapter",
    "LatePrompt": "fedpeft.core.adapter",
    "MixedPrompt": "fedpeft.core.adapter",
    "Prefix": "fedpeft.core.adapter",
    "Prompt": "fedpeft.core.adapter",
    "FedpeftError": "fedpeft.core.errors",
    "RequestError": "fedpeft.core.errors",
    "RunError": "fedpeft.core.errors",
}

__all__ = [
    "SGD",
    "AdaLora",
    "AdamW",
    "Bottleneck",
    "Comparison",
    "Done",
    "Exchange",
    "FedpeftError",
    "Fit",
    "Fitted",
    "Full",
    "HeadOnly",
    "InstancePrompt",
    "LatePrompt",
    "Lora",
    "Method",
    "MixedPrompt",
    "Model",
    "Prefix",
    "Prompt",
    "RequestError",
    "Run",
    "RunConfig",
    "RunError",
    "Start",
    "Transport",
    "__version__",
    "check",
    "choose",
    "compare",
    "demo",
    "evaluate",
    "export",
    "federate",
    "load_config",
    "predict",
    "resume",
    "run",
]

if TYPE_CHECKING:
    from fedpeft.app import Comparison, Run, check, choose, compare, demo, evaluate, export, predict, resume, run
    from fedpeft.config import RunConfig, load_config
    from fedpeft.core.adapter import (
        AdaLora,
        Bottleneck,
        Full,
        HeadOnly,
        InstancePrompt,
        LatePrompt,
        Lora,
        MixedPrompt,
        Prefix,
        Prompt,
    )
    from fedpeft.core.errors import FedpeftError, RequestError, RunError
    from fedpeft.core.exchange import Exchange, Method, Transport
    from fedpeft.core.federate import Done, Start, federate
    from fedpeft.core.fit import SGD, AdamW, Fit, Fitted
    from fedpeft.core.model import Model


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'fedpeft' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
