"""What most methods have in common, as functions to share: a method states what is different about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from fedpeft.core.adapter import AdapterSpec, Lora
from fedpeft.core.exchange import ClientEnv, Exchange, Method, Nothing, Record
from fedpeft.core.tree import Params

M = TypeVar("M", bound=Method)


class Defaults:
    """The parts of `Method` that most papers do not mention: LoRA, no set-up, no client memory, no personal model."""

    memory: ClassVar[type[Record]] = Nothing

    def adapter(self) -> AdapterSpec:
        """LoRA of rank 8 on query and value."""
        return Lora()

    def accepts(self, spec: AdapterSpec) -> str | None:
        """Any adapter."""
        return None

    def init_client(self, env: ClientEnv) -> Record:
        """No memory."""
        return Nothing()

    def setup(self) -> Sequence[Exchange]:
        """No set-up."""
        return ()

    def personal(self, params: Params, memory: Any) -> Params:
        """Everybody's model is the global one."""
        return params


def plain(method: Method) -> dict[str, Any]:
    """The hyper-parameters as plain data that JSON can carry."""
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}  # type: ignore[arg-type]


def rebuild(cls: type[M], values: Mapping[str, Any]) -> M:
    """A fresh method from plain data: JSON's lists become the tuples that frozen dataclasses hold."""
    return cls(**{name: _frozen(value) for name, value in values.items()})


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    return value
