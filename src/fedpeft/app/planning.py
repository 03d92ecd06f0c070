"""Plans without a run: what machines of a devices file would do with a model, from its configuration alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpeft.core.errors import ConfigError, ModelError, RequestError
from fedpeft.planner.configuration import most_tokens
from fedpeft.planner.cost import Shape, Step, all_weights, first_input, shape_of, step_flops, weights
from fedpeft.planner.device import FORMATS, Profile, load_machines
from fedpeft.planner.fleet import Fleet, Search, plan_fleet
from fedpeft.planner.memory import Loop, parameters, peak_memory
from fedpeft.planner.plan import Choices, Job, as_plain
from fedpeft.planner.prices import Costs

ATTENTION = ("query", "key", "value", "output")
SHORT = {"q": "query", "k": "key", "v": "value", "o": "output"}
FIXED = ("batch", "rank", "kinds", "bits", "checkpointing")
DEFAULT_DEADLINE = (
    "the median machine's time for all its examples with one weight at the least rank in the largest batch that fits"
)


def read_config(model: str) -> dict[str, Any]:
    """The configuration of `demo`, `minilm`, a folder, a configuration file, or a hub name; no weights are read.

    Raises:
        ModelError: there is none; the message says what to give.
    """
    path = Path(model).expanduser()
    if not path.is_file():
        from fedpeft.models.load import locate

        found = Path(locate(model))
        if not found.is_dir():
            return _hub_config(model)
        path = found / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not a model's configuration: {error}. Give its config.json.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a model's configuration: it holds no keys. Give its config.json.")
    return content


def _hub_config(name: str) -> dict[str, Any]:
    from transformers import AutoConfig

    from fedpeft.core.hub import loading_from_hub

    try:
        with loading_from_hub(name):
            found: dict[str, Any] = AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ModelError(
            f"no configuration of {name!r} can be had: {reason}. Give a folder or a config.json."
        ) from error
    return found


def plan(
    model: str,
    devices: Path,
    tokens: int,
    *,
    deadline: float | None = None,
    scores: Path | None = None,
    fix: str | None = None,
    kinds: Sequence[str] = ATTENTION,
    classes: int | None = None,
    dtype: str | None = None,
    search: Search = "greedy",
    cover: int = 0,
    choices: Choices | None = None,
    loop: Loop = "ours",
) -> dict[str, Any]:
    """What every machine would do, why, and what it would cost.

    Args:
        model: see `read_config`.
        devices: a devices file whose machines say how many examples they hold.
        tokens: of a row.
        deadline: seconds of a round; None: `DEFAULT_DEADLINE`.
        scores: of the weights: the folder of a fedpipe run, or a JSON file (score by weight); None: all alike.
        fix: one configuration that is priced instead, such as "batch=4,rank=8,kinds=q+v,bits=nf4dq".
        classes: of a classifier; None: a language model.
        dtype: of the base as it is loaded; None: the configuration's own, else float32.
        cover: how many of the best weights somebody must train.
        loop: with `fix`, whose training loop memory is predicted for; "plain": one that keeps adapters in float32
            beside autograd.

    Raises:
        RequestError: whatever cannot be met, with what to change.
    """
    _check(tokens, deadline, classes, cover, loop, fix)
    config, machines = read_config(model), load_machines(devices)
    shape = shape_of(config, lm_head=classes is None)
    fixed = _fixed(fix) if fix else {}
    every = weights(shape, _known(fixed.get("kinds", tuple(kinds)), shape))
    if cover > len(every):
        raise RequestError(f"--cover is {cover}, and there are {len(every)} candidate weights; give at most that many")
    found = None if scores is None else _scores(scores, {w.name for w in every}, shape.layers)
    job = Job(
        shape,
        every,
        {w.name: 1 / len(every) if found is None else found.get(w.name, 0.0) for w in every},
        longest=tokens,
        mean=float(tokens),
        classes=classes,
        dtype=_dtype(config, dtype),
        head_bytes=4 * (shape.hidden + 1) * (classes or 0),
        choices=choices or Choices(),
    )
    unscored = [] if found is None else [w.name for w in every if w.name not in found]
    of_scores = {"scores": "all alike" if found is None else str(scores), "unscored": unscored}
    facts = {"model": model, "most_tokens": most_tokens(config), **_facts(job), **of_scores}
    if fixed:
        return facts | {"fixed": _priced(job, machines, fixed, loop)}
    fleet = plan_fleet(job, machines, deadline, search, cover)
    return facts | _told(job, machines, fleet, deadline)


def _check(tokens: int, deadline: float | None, classes: int | None, cover: int, loop: Loop, fix: str | None) -> None:
    """Raise RequestError for a number that cannot be, and for what goes with --fix alone."""
    if tokens < 1:
        raise RequestError(f"--seq is {tokens}; give the tokens of a row, at least 1")
    if deadline is not None and not 0 < deadline < math.inf:
        raise RequestError(f"--deadline is {deadline:g}; give the seconds of a round, a finite number above 0")
    if classes is not None and classes < 2:
        raise RequestError(f"--classes is {classes}; give at least 2, or leave it out for a language model")
    if cover < 0:
        raise RequestError(f"--cover is {cover}; give how many weights somebody must train, at least 0")
    if loop != "ours" and not fix:
        raise RequestError(
            f"--loop {loop} is for --fix, which prices one configuration; plans are for the loop of fedpeft. "
            "Add --fix or leave --loop out"
        )


def _facts(job: Job) -> dict[str, Any]:
    size, count = parameters(job.shape).total, len(job.weights)
    return {"parameters": size, "tokens": job.longest, "dtype": job.dtype, "candidates": count}


def _dtype(config: Mapping[str, Any], given: str | None) -> str:
    """Of the base as it is loaded: what was given, else what its configuration says, else float32."""
    own = given or str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if own not in ("float32", "bfloat16", "float16"):
        raise RequestError(f"--dtype is {own!r}; use float32 or bfloat16")
    return "bfloat16" if own == "float16" else own


def _told(
    job: Job, machines: Mapping[str, tuple[Profile, int]], fleet: Fleet, deadline: float | None
) -> dict[str, Any]:
    trained = {name for p in fleet.plans.values() for name in p.ranks}
    usable = {name: Costs(job, *own).usable for name, own in machines.items()}
    room = {name: Costs(job, *own).room for name, own in machines.items()}
    return {
        "deadline_s": fleet.deadline_s,
        "deadline_from": "given" if deadline is not None else DEFAULT_DEADLINE,
        "under_training": fleet.under_training if fleet.plans else None,
        "plans": {
            name: as_plain(p, fleet.examples[name], job.weights) | {"usable_bytes": room[name]}
            for name, p in fleet.plans.items()
        },
        "excluded": {
            name: vars(no) | {"usable_bytes": usable[name], "missing_bytes": Costs(job, *machines[name]).missing(no)}
            for name, no in fleet.excluded.items()
        },
        "untrained": [w.name for w in job.weights if w.name not in trained],
        "uncalibrated": {
            "memory": [name for name, (profile, _) in machines.items() if profile.peak_ratio == 1],
            "time": [name for name, (profile, _) in machines.items() if not profile.step_overhead_s],
        },
    }


def _priced(
    job: Job, machines: Mapping[str, tuple[Profile, int]], fixed: Mapping[str, Any], loop: Loop
) -> dict[str, Any]:
    """Memory, operations and time of one configuration on every machine."""
    rank, batch, bits = fixed.get("rank", 8), fixed.get("batch", 8), fixed.get("bits", "full")
    ranks = {w.name: rank for w in job.weights}
    told: dict[str, Any] = {"batch": batch, "rank": rank, "bits": bits, "kinds": sorted({w.kind for w in job.weights})}
    step = Step(
        rows=batch,
        tokens=job.longest,
        trained=ranks,
        base=job.loaded(bits),
        compute=job.dtype,
        classes=job.classes,
        checkpointing=fixed.get("checkpointing", False),
    )
    memory, flops = peak_memory(job.shape, step, loop), step_flops(job.shape, step).total
    lowest, _ = first_input(job.shape, step)
    told |= {"memory": vars(memory), "flops": flops, "loop": loop, "machines": {}}
    for name, (profile, examples) in machines.items():
        costs = Costs(replace(job, choices=replace(job.choices, applied=False)), profile, examples)
        steps, unpacking = costs.steps(batch), costs.unpacking(bits, lowest, step.checkpointing)
        seconds = profile.step_overhead_s + flops / profile.flops_per_s + unpacking
        told["machines"][name] = {
            "usable_bytes": costs.room,
            "peak_bytes": round(memory.peak * profile.peak_ratio) + profile.context_bytes,
            "fits": memory.peak <= costs.usable,
            "step_s": seconds,
            "steps": steps,
            "round_s": costs.messages(ranks) + steps * seconds,
        }
    return told


def _fixed(text: str) -> dict[str, Any]:
    """`batch=4,rank=8,kinds=q+v,bits=nf4dq,checkpointing=yes` as values."""
    found: dict[str, Any] = {}
    problems = []
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key in ("batch", "rank"):
            if value.isdigit() and int(value) >= 1:
                found[key] = int(value)
            else:
                problems.append(f"--fix {key} is {value!r}; give a whole number of at least 1")
        elif key == "kinds":
            found[key] = tuple(value.split("+"))
        elif key == "bits" and value in FORMATS:
            found[key] = value
        elif key == "bits":
            problems.append(f"--fix bits is {value!r}; use one of {', '.join(FORMATS)}")
        elif key == "checkpointing" and value in ("yes", "no"):
            found[key] = value == "yes"
        else:
            problems.append(f"--fix names {part.strip()!r}; write some of {', '.join(f'{k}=..' for k in FIXED)}")
    if problems:
        raise ConfigError(problems)
    return found


def _known(kinds: Sequence[str], shape: Shape) -> tuple[str, ...]:
    """Kinds of weights by their names or first letters; `all` is every one."""
    known = tuple(dict.fromkeys(w.kind for w in all_weights(shape)))
    names = known if tuple(kinds) == ("all",) else tuple(SHORT.get(kind, kind) for kind in kinds)
    if unknown := [kind for kind in names if kind not in known]:
        has = f"it has {', '.join(known)}; q k v o and all are short"
        raise RequestError(f"the model has no weights {unknown[0]!r}; {has}")
    return names


def _scores(path: Path, names: set[str], layers: int) -> dict[str, float]:
    """Scores of those weights that have one, summing to 1, from a fedpipe run or a file."""
    file = path / "manifest.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found: Mapping[str, Any] = content["choices"]["weight_scores"] if path.is_dir() else content
        if not isinstance(found, Mapping):
            raise TypeError("it has no names")
        scores = {name: float(found[name]) for name in names if name in found}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RequestError(
            f"--scores {path} holds no scores of weights ({error}); give a fedpipe run, or a JSON file such as "
            '{"block.0.query": 0.1, ..}'
        ) from error
    if beyond := [name for name in found if _block(name) >= layers]:
        raise RequestError(
            f"--scores {path} names {max(beyond, key=_block)!r}, and the model has {layers} blocks, from 0; give the "
            "scores of this model"
        )
    total = sum(scores.values())
    if not scores or min(scores.values()) < 0 or not 0 < total < math.inf:
        raise RequestError(
            f"--scores {path} has no score above 0 for the weights of this model, such as {min(names)!r}"
        )
    return {name: score / total for name, score in scores.items()}


def _block(name: str) -> int:
    """The block of a weight's name; -1 where it names none."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "block" and len(parts) > 1 and parts[1].isdecimal() else -1
