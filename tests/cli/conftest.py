"""typer 0.20 imports a name that newer versions of click warn about; the warning is met here, once, and not by us."""

from __future__ import annotations

import importlib
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    importlib.import_module("typer.testing")
