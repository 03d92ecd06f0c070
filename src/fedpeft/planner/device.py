"""Device profiles: how fast, how large, how well connected and how reliable each client's machine is.

A devices file is TOML. Profiles are named tables; a key that a profile leaves out keeps the value of `DEFAULT`.

    [profile.phone]
    flops_per_s = 5.0e10        # what training achieves, not the data sheet's peak
    memory_bytes = 4_000_000_000
    up_bytes_per_s = 6.0e5
    down_bytes_per_s = 2.5e6
    latency_s = 0.08
    availability = 0.9          # probability that the client answers when it is asked
    rank = 4                    # of its LoRA, in methods that let ranks differ
    formats = ["int8", "nf4"]   # what its base can be kept in: full (as it is loaded), int8, nf4, nf4dq

    [profile.laptop]            # equal to the default

    [clients]                   # either one line per client ...
    client-000 = "phone"
    client-001 = "laptop"

    [clients]                   # ... or shares, dealt out by the seed
    assign = {phone = 0.5, laptop = 0.5}

Without `[clients]`, a file that holds one profile gives it to everybody.

What `fedpeft profile` writes and `fedpeft plan` reads are profiles too, in larger units (`DEVICE_KEYS`), one a table:

    [[device]]
    name = "workstation"
    memory_gb = 16
    tflops = 20
    up_mbps = 40
    down_mbps = 100
    examples = 4000             # that it holds; `fedpeft plan` needs it

A run takes them as well, once [clients] says who has which.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.core.counts import dealt
from fedpeft.core.errors import ConfigError, RecordError, RequestError
from fedpeft.core.rng import rng_for

if TYPE_CHECKING:
    from fedpeft.core.exchange import ClientId

FORMATS = ("full", "int8", "nf4", "nf4dq")  # of the base, most bits first


@dataclass(frozen=True)
class Profile:
    """One kind of machine. The defaults are a plausible edge machine, chosen by us and measured nowhere.

    They are those of a small board or an office laptop without a usable GPU: 5e11 floating point operations a second
    achieved in training, 8 GB of memory, a home connection of 50 Mbit/s down and 10 Mbit/s up, and 50 ms per message.
    """

    name: str = "edge"
    flops_per_s: float = 5e11  # achieved in training
    memory_bytes: int = 8_000_000_000
    up_bytes_per_s: float = 1.25e6
    down_bytes_per_s: float = 6.25e6
    latency_s: float = 0.05  # per message and answer together
    availability: float = 1.0  # probability that a picked client answers, in (0, 1]
    rank: int = 0  # of the LoRA that this machine trains, in methods with unequal ranks; 0: the adapter's
    context_bytes: int = 0  # taken by the driver before anything is computed
    peak_ratio: float = 1.0  # measured peak memory over the predicted one
    step_overhead_s: float = 0.0  # of one training step, besides its operations
    dequant_bytes_per_s: float = 0.0  # of float32 weights that a quantised base is unpacked into; 0: not counted
    formats: tuple[str, ...] = FORMATS  # what the base can be kept in; "full" is as it is loaded


DEVICE_KEYS: Mapping[str, tuple[str, float]] = {  # of [[device]]: the profile's key, and what one unit is of it
    "memory_gb": ("memory_bytes", 1e9),
    "tflops": ("flops_per_s", 1e12),
    "up_mbps": ("up_bytes_per_s", 1e6 / 8),
    "down_mbps": ("down_bytes_per_s", 1e6 / 8),
    "context_gb": ("context_bytes", 1e9),
    "dequant_gb_per_s": ("dequant_bytes_per_s", 1e9),
}
DEFAULT = Profile()
_KEYS = tuple(f.name for f in dataclasses.fields(Profile) if f.name != "name")
_OF_DEVICE = {*DEVICE_KEYS, *(set(_KEYS) - {own for own, _ in DEVICE_KEYS.values()}), "examples"}  # as suggested


def load_devices(path: Path, clients: Sequence[ClientId], seed: int = 0) -> dict[ClientId, Profile]:
    """The profile of every client, as the devices file says.

    Args:
        path: a TOML file; the module's docstring shows one.
        clients: all clients of the run.
        seed: deals the profiles out where the file gives shares (`assign`).

    Raises:
        RequestError: the file cannot be read or is not TOML.
        ConfigError: everything else that is wrong in it, at once.
    """
    content = _content(path)
    problems = [_unknown(f"{path}: table", key, _TABLES) for key in content.keys() - _TABLES]
    profiles = {name: profile for name, (profile, _) in _every(content, path, problems).items()}
    chosen = _assignment(content.get("clients"), sorted(profiles), clients, seed, path, problems)
    if problems:
        raise ConfigError(problems)
    return {client: profiles[chosen[client]] for client in clients}


_WHOLE = frozenset({"memory_bytes", "rank", "context_bytes"})
_MAY_BE_ZERO = frozenset({"latency_s", "context_bytes", "step_overhead_s", "dequant_bytes_per_s"})
_TABLES = frozenset({"profile", "device", "clients"})


def load_machines(path: Path) -> dict[str, tuple[Profile, int]]:
    """Every machine of a devices file with the number of examples that it holds, in the file's order.

    Raises:
        RequestError: the file cannot be read or is not TOML.
        ConfigError: everything else that is wrong in it, at once.
    """
    content, problems = _content(path), list[str]()
    problems += [_unknown(f"{path}: table", key, _TABLES) for key in content.keys() - _TABLES]
    found = _every(content, path, problems)
    problems += [
        f"{path}: {name} says no examples; add how many rows it holds" for name, (_, n) in found.items() if not n
    ]
    if problems:
        raise ConfigError(problems)
    return found


def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read the devices file {path}: {error.strerror}. Check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the devices file {path} is not TOML: {error}. Mend that line.") from error


def _every(content: Mapping[str, Any], path: Path, problems: list[str]) -> dict[str, tuple[Profile, int]]:
    """Profiles of both kinds of table, and the examples of those that say them."""
    named, listed = content.get("profile", {}), content.get("device", [])
    if not isinstance(named, dict):
        problems.append(f"{path}: profile is {named!r}; write a table such as [profile.phone]")
    if not isinstance(listed, list):
        problems.append(f"{path}: device is {listed!r}; write a table [[device]] for each machine")
    tables = dict(named) if isinstance(named, dict) else {}
    devices = set[str]()
    for i, table in enumerate(listed if isinstance(listed, list) else ()):
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            problems.append(f'{path}: the {i + 1}. [[device]] has no name; add name = ".."')
            continue
        if table["name"] in tables:
            problems.append(f"{path}: two machines are called {table['name']!r}; give each a name of its own")
        tables[table["name"]] = {key: value for key, value in table.items() if key != "name"}
        devices.add(table["name"])
    examples = {}
    for name, table in tables.items():
        count = table.pop("examples", 0) if isinstance(table, dict) else 0
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            problems.append(f"{path}: examples of {name} is {count!r}; give a whole number of at least 1")
        else:
            examples[name] = count
    profiles = _profiles(tables, devices, path, problems)
    return {name: (profile, examples.get(name, 0)) for name, profile in profiles.items()}


def _scaled(key: str, value: Any) -> Any:
    unit = DEVICE_KEYS[key][1]
    return value * unit if isinstance(value, int | float) and not isinstance(value, bool) else value


def _profiles(
    tables: Mapping[str, Any], devices: Collection[str], path: Path, problems: list[str]
) -> dict[str, Profile]:
    """Profiles by name; those of `devices` may be in larger units."""
    if not tables:
        problems.append(f"{path} defines no profile; add a table such as [profile.phone]")
        return {}
    found: dict[str, Profile] = {}
    for name, table in tables.items():
        found[name] = dataclasses.replace(DEFAULT, name=name)
        if not isinstance(table, dict):
            problems.append(f"{path}: profile.{name} is {table!r}; write a table [profile.{name}]")
            continue
        where = f"{path}: {'device' if name in devices else 'profile'}.{name}."
        larger = DEVICE_KEYS if name in devices else {}
        problems += [
            f"{where}{key} stands beside {own}, which is the same in other units; use one of the two"
            for key, (own, _) in larger.items()
            if key in table and own in table
        ]
        values: dict[str, Any] = {}
        for key, told in table.items():
            own, value = larger[key][0] if key in larger else key, _scaled(key, told) if key in larger else told
            if own not in _KEYS:
                problems.append(_unknown(where, key, _OF_DEVICE if name in devices else _KEYS))
            elif problem := _bad_value(own, value):
                problems.append(f"{where}{key} is {told!r}; {problem}")
            elif own == "formats":
                values[own] = tuple(f for f in FORMATS if f in value)
            else:
                values[own] = int(value) if own in _WHOLE else float(value)
        found[name] = dataclasses.replace(found[name], **values)
    return found


def _bad_value(key: str, value: Any) -> str | None:
    if key == "formats":
        good = isinstance(value, list | tuple) and value and all(f in FORMATS for f in value)
        return None if good else f"give a list of some of {', '.join(FORMATS)}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "give a finite number"
    if key in _MAY_BE_ZERO:
        return None if value >= 0 else "give a number that is not negative"
    if key == "rank":
        return None if value >= 0 and value == int(value) else "give a whole number of at least 0"
    if key == "availability":
        return None if 0 < value <= 1 else "give a probability above 0 and at most 1"
    return None if value > 0 else "give a number above 0"


def _assignment(
    table: Any, profiles: Sequence[str], clients: Sequence[ClientId], seed: int, path: Path, problems: list[str]
) -> dict[ClientId, str]:
    """Profile name per client; an incomplete answer where problems were found."""
    if table is None:
        if len(profiles) == 1:
            return dict.fromkeys(clients, profiles[0])
        if profiles:
            problems.append(f"{path} has {len(profiles)} profiles and no [clients]; say who gets which")
        return {}
    if not isinstance(table, dict):
        problems.append(f"{path}: clients is {table!r}; write a table [clients]")
        return {}
    shares = table.get("assign")
    if isinstance(shares, dict):
        for client in table.keys() - {"assign"}:
            problems.append(f"{path}: clients.{client} stands beside clients.assign; use one of the two ways")
        return _dealt(shares, profiles, clients, seed, path, problems)
    return _listed(table, profiles, clients, path, problems)


def _listed(
    table: Mapping[str, Any], profiles: Sequence[str], clients: Sequence[ClientId], path: Path, problems: list[str]
) -> dict[ClientId, str]:
    for client, name in table.items():
        if client not in clients:
            problems.append(_unknown(f"{path}: clients.", client, clients))
        if name not in profiles:
            problems.append(_unknown(f"{path}: clients.{client} names profile", str(name), profiles))
    if missing := sorted(set(clients) - table.keys()):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        problems.append(f"{path}: no profile for {', '.join(missing[:3])}{more}; add them to [clients]")
    return {client: str(name) for client, name in table.items()}


def _dealt(
    shares: Mapping[str, Any],
    profiles: Sequence[str],
    clients: Sequence[ClientId],
    seed: int,
    path: Path,
    problems: list[str],
) -> dict[ClientId, str]:
    before = len(problems)
    for name, share in shares.items():
        if name not in profiles:
            problems.append(_unknown(f"{path}: clients.assign names profile", name, profiles))
        if _bad_value("share", share):
            problems.append(f"{path}: clients.assign.{name} is {share!r}; give a number above 0")
    if len(problems) > before:
        return {}
    if abs(math.fsum(shares.values()) - 1) > 1e-6:
        problems.append(f"{path}: the shares of clients.assign sum to {math.fsum(shares.values()):g}; make it 1")
        return {}
    order = rng_for(seed, "devices").permutation(len(clients))
    counts = dealt([shares[name] for name in sorted(shares)], len(clients))
    by_name = dict(zip(sorted(shares), counts, strict=True))
    names = [name for name in shares for _ in range(by_name[name])]
    return {sorted(clients)[place]: name for place, name in zip(order, names, strict=True)}


def _unknown(where: str, key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names[:6]) or 'none'}"
    space = "" if where.endswith(".") else " "
    return f"{where}{space}{key!r} is unknown; {remedy}"


def as_device(profile: Profile, examples: int | None = None) -> str:
    """The profile as a [[device]] table; what is as in `DEFAULT` and not measured here is left out, or a comment."""
    lines = ["[[device]]", f'name = "{profile.name}"']
    if profile.flops_per_s != DEFAULT.flops_per_s:
        lines.append("# tflops are of the shape that was measured: without --model a small one, which is indicative")
    ways = {"up": "up_bytes_per_s", "down": "down_bytes_per_s"}
    usual = {way: f"{8e-6 * getattr(DEFAULT, key):g}" for way, key in ways.items()}
    assumed = [way for way, key in ways.items() if getattr(profile, key) == getattr(DEFAULT, key)]
    if len(assumed) == 2:
        lines.append(f"# bandwidth unknown: {usual['up']} Mbit/s up, {usual['down']} down are assumed")
    elif assumed:
        lines.append(f"# bandwidth {assumed[0]} unknown: {usual[assumed[0]]} Mbit/s are assumed")
    for key, (own, unit) in DEVICE_KEYS.items():
        if getattr(profile, own) != getattr(DEFAULT, own):
            lines.append(f"{key} = {getattr(profile, own) / unit:.6g}")
    for key in ("latency_s", "step_overhead_s", "peak_ratio"):
        if getattr(profile, key) != getattr(DEFAULT, key):
            lines.append(f"{key} = {getattr(profile, key):.6g}")
    lines.append(f"formats = [{', '.join(f'{chr(34)}{f}{chr(34)}' for f in profile.formats)}]")
    if examples is not None:
        lines.append(f"examples = {examples}")
    return "\n".join(lines) + "\n"


def check_profile(profile: Profile) -> None:
    """Raise RecordError unless a profile that came from afar could stand in a devices file."""
    for key in _KEYS:
        if problem := _bad_value(key, getattr(profile, key)):
            raise RecordError(f"a device profile's {key} is {getattr(profile, key)!r}; {problem}")


def lost(profile: Profile, seed: int, client: ClientId, number: int, attempt: int = 0) -> bool:
    """Whether a picked client fails to answer: a fault schedule that depends on the seed and the place alone.

    Args:
        profile: the client's; with availability 1 it always answers.
        number: of the exchange in the run, from 0.
        attempt: of the exchange, from 0; a repeated exchange draws anew.
    """
    if profile.availability >= 1:
        return False
    return bool(rng_for(seed, "availability", "", number, client, attempt).random() >= profile.availability)
