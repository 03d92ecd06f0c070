"""What a record may hold: one kind per type hint, each of which splits a value into tensors and JSON, and joins it.

| type hint | JSON | tensors |
|---|---|---|
| bool, int, float, str, None | itself; not finite floats as `NaN`, `Infinity` | |
| Tensor | `"tensor"` | one, named by its path |
| Mapping[str, Tensor] (`Params`) | how many | one per key; the keys are not repeated in the JSON |
| Mapping[str, T] | object, keys sorted | those of T |
| tuple[T, ...], tuple[A, B] | array | those of the items |
| frozenset[str] | sorted array | |
| a frozen dataclass | object of its fields | those of the fields |
| A \\| None | null, or A | those of A |
| A \\| B | object with one key, the member's tag (`{"Lora": ...}`) | those of the member |

The path of a tensor joins field names, positions and keys by "/"; in keys "%" is written "%25" and "/" "%2F".
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from fedpeft.core.errors import RecordError

Json: TypeAlias = Any
Out: TypeAlias = dict[str, Tensor]


class Kind(Protocol):
    """Values of one type."""

    tag: str  # names the type inside a union, and in errors

    def fits(self, value: object) -> bool:
        """Whether the value is of this type, as far as its surface tells."""
        ...

    def split(self, value: Any, path: str, out: Out) -> Json:
        """The value as JSON; its tensors are put into `out`."""
        ...

    def join(self, value: Json, path: str, shelf: Shelf) -> Any:
        """The value from its JSON; its tensors are taken from the shelf."""
        ...


class Shelf:
    """Tensors by path, each of which must be taken exactly once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._groups: dict[str, dict[str, Tensor]] = {}
        for path, t in tensors.items():
            group, slash, key = path.rpartition("/")
            if slash and not group:
                raise RecordError(f"tensor {path!r} is not part of the record")
            self._groups.setdefault(group, {})[key] = t

    def one(self, path: str) -> Tensor:
        """The tensor of this path."""
        group, _, key = path.rpartition("/")
        try:
            return self._groups[group].pop(key)
        except KeyError:
            raise RecordError(f"tensor {path!r} is missing") from None

    def group(self, path: str) -> dict[str, Tensor]:
        """All tensors whose path is this one and a key, by key in sorted order."""
        found = self._groups.pop(path, {})
        return {key: found[raw] for key, raw in sorted((unescaped(raw), raw) for raw in found)}

    def check_empty(self) -> None:
        """Raise RecordError if a tensor was not taken."""
        for group, left in self._groups.items():
            for key in left:
                raise RecordError(f"tensor {f'{group}/{key}' if group else key!r} is not part of the record")


def escaped(key: str) -> str:
    """The key as a part of a path."""
    return key.replace("%", "%25").replace("/", "%2F") if "%" in key or "/" in key else key


def unescaped(part: str) -> str:
    """The key of a part of a path; RecordError unless `escaped` writes it so."""
    if "%" not in part:
        return part
    key = part.replace("%2F", "/").replace("%25", "%")
    if escaped(key) != part:
        raise RecordError(f"the key {part!r} is not escaped as it should be")
    return key


def _wrong(path: str, value: object, wanted: str) -> RecordError:
    return RecordError(f"{path or 'the record'} must be {wanted}, but is a {type(value).__name__}: {str(value)[:80]}")


class _Scalar:
    def __init__(self, cls: type) -> None:
        self.tag = "None" if cls is type(None) else cls.__name__
        self._cls = cls

    def fits(self, value: object) -> bool:
        if isinstance(value, bool):
            return self._cls is bool
        return isinstance(value, (float, int) if self._cls is float else self._cls)

    def split(self, value: Any, path: str, out: Out) -> Json:
        return self.join(value, path, None)

    def join(self, value: Json, path: str, shelf: Shelf | None) -> Any:
        if not self.fits(value):
            raise _wrong(path, value, self.tag)
        try:
            return value if value is None else self._cls(value)
        except OverflowError:
            raise _wrong(path, value, "a float that 64 bits can hold") from None


class _Tensor:
    tag = "Tensor"

    def fits(self, value: object) -> bool:
        return isinstance(value, Tensor)

    def split(self, value: Any, path: str, out: Out) -> Json:
        if not isinstance(value, Tensor):
            raise _wrong(path, value, "a Tensor")
        out[path] = value
        return "tensor"

    def join(self, value: Json, path: str, shelf: Shelf) -> Any:
        if value != "tensor":
            raise _wrong(path, value, "a Tensor")
        return shelf.one(path)


class _Params:
    tag = "Params"

    def fits(self, value: object) -> bool:
        return isinstance(value, Mapping) and all(isinstance(t, Tensor) for t in value.values())

    def split(self, value: Any, path: str, out: Out) -> Json:
        if not isinstance(value, Mapping):
            raise _wrong(path, value, "a mapping of tensors")
        for key, t in value.items():
            if not isinstance(key, str) or not isinstance(t, Tensor):
                raise _wrong(f"{path}/{key}", t, "a Tensor under a text key")
            out[f"{path}/{escaped(key)}"] = t
        return len(value)

    def join(self, value: Json, path: str, shelf: Shelf) -> Any:
        found = shelf.group(path)
        if type(value) is not int or value != len(found):
            raise RecordError(f"{path} is said to hold {str(value)[:80]} tensors, but {len(found)} came")
        return found


class _Map:
    tag = "Mapping"

    def __init__(self, item: Kind) -> None:
        self._item = item

    def fits(self, value: object) -> bool:
        return isinstance(value, Mapping)

    def split(self, value: Any, path: str, out: Out) -> Json:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(path, value, "a mapping with text keys")
        return {str(key): self._item.split(value[key], f"{path}/{escaped(key)}", out) for key in sorted(value)}

    def join(self, value: Json, path: str, shelf: Shelf) -> Any:
        if not isinstance(value, dict):
            raise _wrong(path, value, "a mapping")
        return {key: self._item.join(value[key], f"{path}/{escaped(key)}", shelf) for key in sorted(value)}


class _Tuple:
    tag = "tuple"

    def __init__(self, items: Sequence[Kind], repeated: bool) -> None:
        self._items = items
        self._repeated = repeated

    def fits(self, value: object) -> bool:
        return isinstance(value, tuple)

    def split(self, value: Any, path: str, out: Out) -> Json:
        if not isinstance(value, tuple):
            raise _wrong(path, value, "a tuple")
        pairs = zip(self._kinds(value, path), value, strict=True)
        return [kind.split(v, f"{path}/{i}", out) for i, (kind, v) in enumerate(pairs)]

    def join(self, value: Json, path: str, shelf: Shelf) -> Any:
        if not isinstance(value, list):
            raise _wrong(path, value, "a tuple")
        pairs = zip(self._kinds(value, path), value, strict=True)
        return tuple(kind.join(v, f"{path}/{i}", shelf) for i, (kind, v) in enumerate(pairs))

    def _kinds(self, value: Sequence[Any], path: str) -> Sequence[Kind]:
        if self._repeated:
            return [self._items[0]] * len(value)
        if len(value) != len(self._items):
            raise _wrong(path, value, f"a tuple of {len(self._items)} values")
        return self._items


class _Names:
    tag = "frozenset"

    def fits(self, value: object) -> bool:
        return isinstance(value, frozenset)

    def split(self, value: Any, path: str, out: Out) -> Json:
        if not isinstance(value, frozenset) or not all(isinstance(name, str) for name in value):
            raise _wrong(path, value, "a frozenset of texts")
        return sorted(value)

    def join(self, value: Json, path: str, shelf: Shelf) -> Any:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise _wrong(path, value, "a frozenset of texts")
        names = frozenset(value)
        if len(names) != len(value):
            raise _wrong(path, value, "a frozenset, each text once")
        return names


class _Union:
    tag = "union"

    def __init__(self, members: Sequence[Kind], optional: bool) -> None:
        self._members = {m.tag: m for m in members}
        self._optional = optional
        self._only = members[0] if len(members) == 1 else None
        if len(self._members) < len(members):
            raise RecordError(f"a union of several {members[0].tag} types cannot be told apart; give them class names")

    def fits(self, value: object) -> bool:
        return (value is None and self._optional) or any(m.fits(value) for m in self._members.values())

    def split(self, value: Any, path: str, out: Out) -> Json:
        if value is None and self._optional:
            return None
        if self._only is not None:
            return self._only.split(value, path, out)
        for tag, member in self._members.items():
            if member.fits(value):
                return {tag: member.split(value, path, out)}
        raise _wrong(path, value, f"one of {', '.join(self._members)}")

    def join(self, value: Json, path: str, shelf: Shelf) -> Any:
        if value is None and self._optional:
            return None
        if self._only is not None:
            return self._only.join(value, path, shelf)
        if not isinstance(value, dict) or len(value) != 1:
            raise _wrong(path, value, f"one of {', '.join(self._members)}")
        [(tag, inner)] = value.items()
        if tag not in self._members:
            raise RecordError(f"{path} must be one of {', '.join(self._members)}, but is said to be a {tag[:80]!r}")
        return self._members[tag].join(inner, path, shelf)


class _Dataclass:
    def __init__(self, cls: type) -> None:
        self.tag = cls.__name__
        self._cls = cls

    @cached_property
    def _fields(self) -> dict[str, Kind]:  # late, so that a class may hold itself
        try:
            hints = typing.get_type_hints(self._cls)
        except NameError as error:
            raise RecordError(f"the types of {self.tag} cannot be resolved: {error}; define it in a module") from error
        names = [f.name for f in dataclasses.fields(self._cls) if f.init]
        return {name: kind_of(hints[name], f"{self.tag}.{name}") for name in names}

    def fits(self, value: object) -> bool:
        return type(value) is self._cls

    def split(self, value: Any, path: str, out: Out) -> Json:
        if type(value) is not self._cls:
            raise _wrong(path, value, self.tag)
        prefix = f"{path}/" if path else ""
        return {name: kind.split(getattr(value, name), prefix + name, out) for name, kind in self._fields.items()}

    def join(self, value: Json, path: str, shelf: Shelf) -> Any:
        if not isinstance(value, dict):
            raise _wrong(path, value, self.tag)
        prefix = f"{path}/" if path else ""
        if odd := sorted(value.keys() ^ self._fields.keys()):
            state = "missing" if odd[0] in self._fields else "unknown"
            raise RecordError(f"{self.tag}: the field {(prefix + odd[0])[:200]!r} is {state}")
        given = {name: kind.join(value[name], prefix + name, shelf) for name, kind in self._fields.items()}
        try:
            return self._cls(**given)
        except Exception as error:  # a check in the class's own __post_init__
            raise RecordError(f"{path or self.tag} refuses its values: {error}") from error


_KINDS: dict[type, Kind] = {}  # type hints are read once per class


def record_kind(cls: type) -> Kind:
    """The kind of a record class. Raises RecordError unless it is a frozen dataclass."""
    kind = _KINDS.get(cls)
    if kind is None:
        params = getattr(cls, "__dataclass_params__", None)
        if params is None or not params.frozen:
            raise RecordError(f"{cls.__name__} is not a record; declare it with @dataclass(frozen=True)")
        kind = _KINDS[cls] = _Dataclass(cls)
    return kind


def kind_of(hint: Any, where: str) -> Kind:
    """The kind of a type hint. Raises RecordError, naming `where`, for a type that cannot travel."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in (bool, int, float, str, types.NoneType):
        return _Scalar(hint)
    if hint is Tensor:
        return _Tensor()
    if origin in (typing.Union, types.UnionType):
        # float takes ints too, so it is asked last
        members = sorted((a for a in args if a is not types.NoneType), key=lambda a: a is float)
        return _Union([kind_of(a, where) for a in members], optional=types.NoneType in args)
    if origin in (Mapping, dict) and args[0] is str:
        return _Params() if args[1] is Tensor else _Map(kind_of(args[1], where))
    if origin is tuple:
        repeated = args[-1:] == (...,)
        return _Tuple([kind_of(a, where) for a in (args[:1] if repeated else args)], repeated)
    if hint == frozenset[str]:
        return _Names()
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return record_kind(hint)
    raise RecordError(
        f"{where} has the type {hint}, which cannot travel; use bool, int, float, str, None, Tensor, "
        "Mapping[str, ...], tuple, frozenset[str], a frozen dataclass or a union of these"
    )
