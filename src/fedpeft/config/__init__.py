"""Validated configuration: what people write, checked all at once, with every default filled in."""

from __future__ import annotations

from fedpeft.config.folders import default_folder, free_folder, slug
from fedpeft.config.load import adapter_spec, build_method, load_config, resolved
from fedpeft.config.reading import parse_overrides
from fedpeft.config.sections import (
    AdapterSection,
    MethodSection,
    ModelSection,
    PartitionSection,
    ProxySection,
    RunConfig,
    RunSection,
    StopSection,
    TaskSection,
)
from fedpeft.config.study import Cell, StudyConfig, cells, load_study

__all__ = [
    "AdapterSection",
    "Cell",
    "MethodSection",
    "ModelSection",
    "PartitionSection",
    "ProxySection",
    "RunConfig",
    "RunSection",
    "StopSection",
    "StudyConfig",
    "TaskSection",
    "adapter_spec",
    "build_method",
    "cells",
    "default_folder",
    "free_folder",
    "load_config",
    "load_study",
    "parse_overrides",
    "resolved",
    "slug",
]
