"""What this machine is, measured: memory, training speed, disk, bandwidth; as a device profile.

Speed is measured with fedpeft's own training loop on random weights: steps of b and of 2 b rows give the operations per
second and what a step costs besides, and a third size checks both. Operations are those that the planner counts. What a
step of one row takes longer on a quantised base is the time of unpacking it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpeft.app.planning import read_config
from fedpeft.core.adapter import Lora
from fedpeft.core.errors import ModelError, RequestError
from fedpeft.core.examples import Examples
from fedpeft.core.fit import AdamW, Fit
from fedpeft.core.rng import rng_for
from fedpeft.models.hf import HFModel
from fedpeft.models.load import freeze, resolve_device
from fedpeft.planner.cost import Shape, Step, shape_of, step_flops, weights
from fedpeft.planner.device import DEFAULT, FORMATS, Profile
from fedpeft.planner.memory import peak_memory
from fedpeft.planner.prices import unpacked_bytes

SMALL: dict[str, Any] = {  # measured where no model is given
    "model_type": "bert",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
LAYERS = 4  # of a model's shape with random weights: operations per second do not depend on how many there are
ROWS, TOKENS, CLASSES, RANK = 8, 64, 4, 8
REPEATS = 5
PROBE_BYTES = 16 * 2**20  # written to disk
MESSAGE_BYTES = 2**20  # sent to the given address: about one adapter
CONTENT_BYTES = 2**16  # an answer with less says nothing about bandwidth


@dataclass(frozen=True)
class Speed:
    """What steps of three sizes say.

    Attributes:
        flops_per_s: of the operations that the planner counts.
        overhead_s: of a step, besides.
        error: of the third size's predicted time, as a share of the measured one.
    """

    flops_per_s: float
    overhead_s: float
    error: float


def profile(
    model: str | None = None, device: str = "auto", address: str | None = None, name: str = "here"
) -> dict[str, Any]:
    """Measure this machine.

    Args:
        model: whose shape is measured, with random weights; None: a small one, which is indicative.
        device: as in `model.device`.
        address: URL that a message is sent to, for the bandwidth; None: it stays unknown.

    Returns:
        the `profile` (a `Profile`), and what else was found, as plain data.

    Raises:
        RequestError: a model, a device or an address that cannot be used.
    """
    where = resolve_device(device)
    config = SMALL if model is None else read_config(model)
    trained, predicted = random_model(config, where)
    speed = measure_speed(trained, REPEATS)
    ratio = _peak_ratio(trained, predicted, where)
    took = step_seconds(trained)
    free, context = free_memory(where)
    link = Link(0.0, 0.0, 0.0) if address is None else bandwidth(address)
    found = Profile(
        name=name,
        flops_per_s=speed.flops_per_s,
        memory_bytes=free + context,
        step_overhead_s=speed.overhead_s,
        context_bytes=context,
        peak_ratio=ratio or 1.0,
        up_bytes_per_s=link.up or DEFAULT.up_bytes_per_s,
        down_bytes_per_s=link.down or DEFAULT.down_bytes_per_s,
        latency_s=link.latency_s or DEFAULT.latency_s,
        dequant_bytes_per_s=unpacking_speed(took, shape_of(trained.config)),
        formats=tuple(took),
    )
    written, room = disk()
    return {
        "profile": found,
        "device": str(where),
        "threads": torch.get_num_threads(),
        "model": model or "a small built-in shape: indicative",
        "time_error": speed.error,
        "peak_ratio_measured": ratio is not None,
        "bandwidth_measured": {"up": link.up > 0, "down": link.down > 0},
        "disk_bytes_per_s": written,
        "disk_free_bytes": room,
    }


def random_model(config: dict[str, Any], where: torch.device) -> tuple[HFModel, Callable[[int], int]]:
    """A model of this shape with random weights and few layers, and the planner's peak memory for a number of rows."""
    from transformers import AutoConfig, AutoModel

    keys = ("num_hidden_layers", "n_layer")
    short = {key: min(LAYERS, config[key]) for key in keys if key in config}
    try:
        made = AutoConfig.for_model(**{**config, **short})
        module = AutoModel.from_config(made, dtype=torch.float32)  # type: ignore[no-untyped-call]
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"no model can be made from this configuration ({error}); give one that transformers knows"
        ) from error
    base = freeze(module, None, "random", where)
    own, shape = HFModel(base, Lora(RANK), CLASSES, token_budget=10**9), shape_of(base.config)
    ranks = {w.name: RANK for w in weights(shape, ("query", "value"))}
    return own, lambda rows: peak_memory(shape, Step(rows, TOKENS, ranks, classes=CLASSES)).peak


def rows_of(count: int, vocabulary: int) -> Examples:
    """Random rows of equal length."""
    rng = rng_for(0, "profile")
    ids = rng.integers(5, max(6, vocabulary), size=(count, TOKENS)).astype(np.int32)
    return Examples(tuple(ids), rng.integers(CLASSES, size=count))


def measure_speed(model: HFModel, repeats: int = REPEATS, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Operations per second and overhead from steps of b and 2 b rows; medians of interleaved repetitions.

    Args:
        clock: seconds; processor time leaves out what else runs on the machine.
    """
    shape = shape_of(model.config)
    ranks = {w.name: RANK for w in weights(shape, ("query", "value"))}
    counts = (ROWS, 2 * ROWS, 3 * ROWS)
    flops = [step_flops(shape, Step(n, TOKENS, ranks, classes=CLASSES)).total for n in counts]
    params = model.init(rng_for(0, "adapter"))
    fits = [Fit(params, rows_of(n, shape.vocab), [list(range(n))] * 3, AdamW(1e-3)) for n in counts]
    times: list[list[float]] = [[] for _ in counts]
    for turn in range(repeats + 1):
        for own, fit in zip(times, fits, strict=True):
            seconds = _timed(model, fit, clock)
            if turn:  # the first turn warms up
                own.append(seconds)
    return solve(flops, [statistics.median(own) for own in times])


def _timed(model: HFModel, fit: Fit, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one step."""
    start = clock()
    model.fit(fit)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return (clock() - start) / fit.steps


def solve(flops: list[int], seconds: list[float]) -> Speed:
    """t = overhead + flops / speed through the first two sizes, checked on the third."""
    slope = (seconds[1] - seconds[0]) / (flops[1] - flops[0])
    if slope <= 0:  # noise, or a machine that these steps do not fill: all of it counts as speed
        slope = seconds[1] / flops[1]
    overhead = max(0.0, seconds[0] - slope * flops[0])
    error = abs(overhead + slope * flops[2] - seconds[2]) / seconds[2]
    return Speed(1 / slope, overhead, error)


def step_seconds(
    model: HFModel, repeats: int = REPEATS, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of a step of one row by format of the base, of those in which it runs; the least of some repetitions.

    Args:
        clock: see `measure_speed`.
    """
    fit = Fit(model.init(rng_for(0, "adapter")), rows_of(1, 100), [[0]] * 3, AdamW(1e-3))
    able = {bits: other for bits in FORMATS if (other := _works(model, bits, fit)) is not None}
    times: dict[str, list[float]] = {bits: [] for bits in able}
    for _ in range(repeats):
        for bits, other in able.items():
            times[bits].append(_timed(other, fit, clock))
    return {bits: min(own) for bits, own in times.items()}


def _works(model: HFModel, bits: str, fit: Fit) -> HFModel | None:
    """A model on a base of this format, or None where a step does not run on it."""
    try:
        other = HFModel(model.base.at("" if bits == "full" else bits), Lora(RANK), CLASSES)
        other.fit(fit)
    except Exception:  # whatever goes wrong, it cannot be used here
        return None
    return other


def unpacking_speed(took: Mapping[str, float], shape: Shape) -> float:
    """Bytes of unpacked float32 weights per second, one speed for all formats: that of their mean time.

    Args:
        took: seconds of a step by format; see `step_seconds`.
        shape: of the model that made the step, whose lowest block trained.

    Returns:
        0, which is not counted, where a step takes no longer, or there is nothing to compare.
    """
    packed = [seconds for bits, seconds in took.items() if bits != "full"]
    if "full" not in took or not packed:
        return 0.0
    longer = statistics.fmean(packed) - took["full"]
    return unpacked_bytes(shape) / longer if longer > 0 else 0.0


def _peak_ratio(model: HFModel, predicted: Callable[[int], int], where: torch.device) -> float | None:
    """Measured over predicted peak memory of a step; None where it cannot be measured within a process."""
    if where.type != "cuda":
        return None
    params = model.init(rng_for(0, "adapter"))
    fit = Fit(params, rows_of(ROWS, 100), [list(range(ROWS))] * 2, AdamW(1e-3))
    torch.cuda.reset_peak_memory_stats(where)
    model.fit(fit)
    return torch.cuda.max_memory_allocated(where) / predicted(ROWS)


def free_memory(where: torch.device) -> tuple[int, int]:
    """Bytes that are free, and bytes that the driver's context takes of the rest."""
    if where.type == "cuda":
        free, total = torch.cuda.mem_get_info(where)
        return int(free), max(0, int(total - free - torch.cuda.memory_reserved(where)))
    limits = [_cgroup_free(), _available()]
    known = [limit for limit in limits if limit is not None]
    return (min(known) if known else DEFAULT.memory_bytes), 0


def _available() -> int | None:
    """Of Linux, what could be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return found.get("MemAvailable")


def _cgroup_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves; None without one."""
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        used = int((root / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return max(0, int(limit) - used) if limit.isdigit() else None


def disk(folder: Path | None = None) -> tuple[float, int]:
    """Bytes per second that are written and synchronised, and bytes that are free."""
    place = folder or Path(tempfile.gettempdir())
    with tempfile.TemporaryFile(dir=place) as file:
        start = time.perf_counter()
        file.write(b"\0" * PROBE_BYTES)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    return PROBE_BYTES / max(seconds, 1e-9), shutil.disk_usage(place).free


@dataclass(frozen=True)
class Link:
    """A way to a server: bytes per second up and down, 0 where that is not known, and seconds that any answer takes."""

    up: float
    down: float
    latency_s: float


def bandwidth(address: str) -> Link:
    """What lies between here and an address, beyond the time that an answer without content takes.

    Up is a message sent by POST, where the server takes it; down the content of the address, where that is large enough
    to tell (`CONTENT_BYTES`).

    Raises:
        RequestError: the address does not answer.
    """
    if not address.startswith(("http://", "https://")):
        raise RequestError(f"--server is {address!r}; give a URL that begins with http:// or https://")
    latency = statistics.median(_exchange(address, "HEAD")[0] for _ in range(3))
    try:
        sent, taken, _ = _exchange(address, "POST", b"\0" * MESSAGE_BYTES)
    except RequestError:  # it answered before: it hangs up on who sends it something
        sent, taken = 0.0, False
    got, given, count = _exchange(address, "GET")
    up = MESSAGE_BYTES / max(sent - latency, 1e-9) if taken else 0.0
    return Link(up, count / max(got - latency, 1e-9) if given and count >= CONTENT_BYTES else 0.0, latency)


def _exchange(address: str, method: str, body: bytes | None = None) -> tuple[float, bool, int]:
    """Seconds of a request, whether the server did as asked, and bytes of its answer."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    start = time.perf_counter()
    try:
        with urlopen(Request(address, data=body, method=method), timeout=60) as answer:
            count = len(answer.read())
    except HTTPError as error:
        with error:
            return time.perf_counter() - start, False, len(error.read())
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise RequestError(
            f"--server {address} does not answer: {error}. Leave it out, or give another URL."
        ) from error
    return time.perf_counter() - start, True, count
