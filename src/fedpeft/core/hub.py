"""The Hugging Face hub where this machine does not reach it: known in seconds, not after a minute of loud retries."""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 3.0  # how long the hub may take to give a first sign of life
HUB = "https://huggingface.co"
_OFFLINE = ("huggingface_hub.constants", "datasets.config")  # modules that hold the switch, as HF_HUB_OFFLINE


@contextmanager
def loading_from_hub(name: str) -> Iterator[None]:
    """Load a model or a data set inside: where the hub does not answer, from what was downloaded before, at once.

    The libraries of the hub must be imported already; their own retries are for a hub that can be reached.

    Args:
        name: what is loaded; a folder that exists needs no hub.

    Raises:
        ConnectionError: the hub does not answer, and loading failed without it.
    """
    if Path(name).is_dir() or hub_answers():
        yield
        return
    modules = [module for key in _OFFLINE if (module := sys.modules.get(key)) is not None]
    before = [getattr(module, "HF_HUB_OFFLINE", False) for module in modules]
    for module in modules:
        module.__dict__["HF_HUB_OFFLINE"] = True
    try:
        yield
    except Exception as error:
        raise ConnectionError(
            f"{os.environ.get('HF_ENDPOINT', HUB)} does not answer, and {name} was not downloaded before"
        ) from error
    finally:
        for module, value in zip(modules, before, strict=True):
            module.__dict__["HF_HUB_OFFLINE"] = value


def hub_answers() -> bool:
    """Whether the hub, or the mirror that HF_ENDPOINT names, gives any answer within `PATIENCE_S`."""
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", HUB), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S):
            return True
    except urllib.error.HTTPError:  # it answers that it does not like the question
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # somebody is there; certificates are the libraries' business
    except (OSError, ValueError):
        return False
