"""Everything that a run needs, built from its configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedpeft.app.formats import Format, build_format
from fedpeft.app.room import FLAT_COPIES, too_small
from fedpeft.config import RunConfig, adapter_spec, build_method
from fedpeft.core import tree, wire
from fedpeft.core.adapter import AdaLora, Lora
from fedpeft.core.errors import DataError, FitError, ModelError
from fedpeft.core.evaluate import Evaluate
from fedpeft.core.examples import Examples
from fedpeft.core.exchange import Call, ClientId, Method, ServerEnv, Transport
from fedpeft.core.federate import Start
from fedpeft.core.memories import InMemory, Memories
from fedpeft.core.method import plain, rebuild
from fedpeft.core.ranks import Ranked
from fedpeft.core.rng import rng_for
from fedpeft.data.partition import Partition, PartitionSpec, partition
from fedpeft.data.tasks import SPLITS, Task, TaskSpec, load_task
from fedpeft.engines.inprocess import InProcess
from fedpeft.models import virtual
from fedpeft.models.hf import HFModel
from fedpeft.models.load import Base, load_base
from fedpeft.planner.configuration import most_tokens
from fedpeft.planner.cost import Shape, shape_of
from fedpeft.planner.device import DEFAULT, Profile, load_devices, lost
from fedpeft.runs.clock import Clock

if TYPE_CHECKING:
    from fedpeft.core.tree import Params

POOLED = "pooled"  # the one client of a method that trains on everybody's rows
AUTO_CLIENTS = 16  # most clients that `cohort_batching: auto` trains together
AUTO_BYTES = 256 * 2**20  # what their parameters, gradients and optimizer states may take


@dataclass(frozen=True)
class Federation:
    """A configured federation.

    Attributes:
        config: with `cohort_batching` and `threads` resolved to numbers, template and label words to those in use.
        data: each client's own rows by split.
        untrained: what the base scores without an adapter, by split, once it is known; where text is predicted.
    """

    config: RunConfig
    method: Method
    task: Task
    base: Base
    model: HFModel
    partition: Partition
    data: Mapping[ClientId, Mapping[str, Examples]]
    resources: Mapping[ClientId, Profile]
    format: Format
    untrained: dict[str, dict[str, float]] = field(default_factory=dict)
    _whole: dict[str, Examples] = field(default_factory=dict)

    @property
    def clients(self) -> list[ClientId]:
        """All client ids, sorted."""
        return sorted(self.data)

    @cached_property
    def cramped(self) -> Mapping[ClientId, tuple[int, int]]:
        """Clients whose device lacks memory for training, see `room.too_small`; none where the method plans for it."""
        return {} if self.method.plans_memory or self.config.run.devices is None else too_small(self)

    @property
    def invited(self) -> list[ClientId]:
        """The clients that may be asked to take part: all, or with `run.too_small: leave_out` those that have room."""
        if self.config.run.too_small == "train":
            return self.clients
        able = [client for client in self.clients if client not in self.cramped]
        wanted = max(1, int(getattr(self.method, "cohort", 0)))
        if len(able) < wanted:
            needed, usable = min(self.cramped.values())
            raise DataError(
                f"run.too_small leaves out {len(self.cramped)} of {len(self.clients)} clients, whose devices have less "
                f"memory than a step needs ({usable:,} of {needed:,} bytes), and {wanted} are wanted: lower "
                "method.batch_size, task.max_length or method.cohort, or set run.too_small to train"
            )
        return able

    @property
    def cohort(self) -> int:
        """How many clients take part in a round: the method's field of that name, 0 or none for all."""
        return min(int(getattr(self.method, "cohort", 0)) or len(self.invited), len(self.invited))

    @property
    def metric(self) -> str:
        """The score that selects."""
        return self.task.metric

    @property
    def classes(self) -> tuple[str, ...]:
        """What is predicted: the labels; nothing where text is, whose categories are not learnt."""
        return self.task.labels if self.format.of == "labels" else ()

    @property
    def positions(self) -> int | None:
        """How many tokens of text the model reads with the adapter, None where there is no bound."""
        longest = most_tokens(self.base.config)
        return None if longest is None else longest - virtual.positions(self.model.spec)

    def whole(self, split: str) -> Examples:
        """The rows of all clients, in the order of their ids."""
        if split not in self._whole:
            self._whole[split] = Examples.joined([self.data[c][split] for c in self.clients])
        return self._whole[split]

    def labels(self, split: str) -> dict[ClientId, np.ndarray[Any, np.dtype[np.int64]]]:
        """Class indices by client."""
        return {c: self.data[c][split].labels for c in self.clients}

    @cached_property
    def initial(self) -> Params:
        """P0, the adapter that the run starts from."""
        return self.model.init(rng_for(self.config.run.seed, "adapter"))

    @cached_property
    def shape(self) -> Shape:
        """Of the base, for counted operations, with the share of the training tokens that its own head sees."""
        readout, train = self.model.readout, self.whole("train")
        if readout.params or not len(train):
            return shape_of(self.base.config)
        items = [readout.training(0, train, row) for row in range(len(train))]
        share = sum(map(readout.projected, items)) / sum(map(readout.length, items))
        return replace(shape_of(self.base.config, lm_head=True), lm_share=share)

    @property
    def warnings(self) -> list[str]:
        """What of the request has no effect."""
        found = [self._idle_warnings(), self._rank_warnings(), self._size_warnings(), self._room_warnings()]
        return [*chain(*found), *self._proxy_warnings()]

    def _idle_warnings(self) -> list[str]:
        """Fields of the method that somebody changed, and that the others leave without effect."""
        usual = {field.name: field.default for field in fields(self.method)}  # type: ignore[arg-type]
        return [
            f"method.{name} has no effect: {why}"
            for name, why in self.method.idle().items()
            if getattr(self.method, name) != usual[name]
        ]

    def _proxy_warnings(self) -> list[str]:
        name, proxy = self.config.method.name, self.config.proxy
        found = []
        if proxy.public is not None and not hasattr(self.method, "distil"):
            found.append(f"proxy.public has no effect: {name} does not distil")
        elif proxy.public is not None and not getattr(self.method, "distil", False):
            found.append("proxy.public has no effect: method.distil is false")
        if self.format.of == "labels" and hasattr(self.method, "distil"):
            found.append(f"{name} tunes a classifier here: large models are steered in task.format generate alone")
        return found

    def _rank_warnings(self) -> list[str]:
        ranked = sorted({device.name for device in self.resources.values() if device.rank})
        if not ranked:
            return []
        what = f"the rank of {', '.join(map(repr, ranked))} in run.devices has no effect"
        if not isinstance(self.method, Ranked):
            return [f"{what}: {self.config.method.name} gives every client the same rank, or its own choice"]
        return [f"{what}: method.ranks deals the ranks out"] if self.method.ranks else []

    def _room_warnings(self) -> list[str]:
        if not self.cramped:
            return []
        client, (needed, usable) = min(self.cramped.items(), key=lambda one: one[1][1] / one[1][0])
        done = "they take part all the same; run.too_small: leave_out excludes them"
        if self.config.run.too_small == "leave_out":
            done = "they are left out"
        return [
            f"{len(self.cramped)} of {len(self.clients)} clients have devices with less memory than training needs "
            f"({client}: {usable:,} of {needed:,} bytes); {done}"
        ]

    def _size_warnings(self) -> list[str]:
        spec, sides = self.model.spec, {slot.name: min(slot.d_out, slot.d_in) for slot in self.model.slots.values()}
        least = min(sides, key=lambda name: sides[name], default=None)
        if not isinstance(spec, Lora | AdaLora) or least is None or spec.rank <= sides[least]:
            return []
        told = f"adapter.rank {spec.rank} is above {sides[least]}, the smallest side of {least}"
        return [f"{told}: more rank than that adds nothing"]

    @property
    def clock(self) -> Clock:
        """Simulated seconds on the clients' devices."""
        return Clock(self.shape, self.resources)

    def start(self) -> Start:
        """Before the first exchange."""
        run = self.config.run
        env = ServerEnv(self.model, self.invited, run.seed, run.rounds, resources=self.resources)
        return Start(0, self.method.init(env))

    def transport(self, memories: Memories | None = None) -> Transport:
        """The engine with its wire, its devices' clock and faults."""
        run = self.config.run
        engine = replace(
            self.bare_engine(memories),
            clock=self.clock,
            deadline_s=run.deadline_s,
            fault=self._fault,
            wire=partial(wire.wired, wire=run.wire),
        )
        return wire.with_wire(engine, run.wire)

    def bare_engine(self, memories: Memories | None = None) -> InProcess:
        """The engine with a perfect wire and devices that always answer: for evaluation."""
        values = plain(self.method)
        return InProcess(
            make=lambda: rebuild(type(self.method), values),
            model=self.model,
            data=self.data,
            seed=self.config.run.seed,
            batch=batching(self.config),
            memories=memories or InMemory(),
            resources=self.resources,
        )

    def evaluation(self, number: int, round: int, versions: Mapping[ClientId, int]) -> Call:
        """The call by which every client scores its own model."""
        exchange = Evaluate(self.method).exchange()
        return Call(exchange, number, round, self.config.run.rounds, versions=versions)

    def _fault(self, client: ClientId, call: Call) -> str | None:
        device = self.resources[client]
        if lost(device, self.config.run.seed, client, call.number, call.attempt):
            return f"not available (its device {device.name!r} answers with probability {device.availability:g})"
        return None


def batching(config: RunConfig) -> int:
    """How many clients train together, of a resolved configuration."""
    setting = config.run.cohort_batching
    return setting if isinstance(setting, int) else 1


@contextmanager
def computing(config: RunConfig) -> Iterator[None]:
    """Compute with the configuration's number of threads; afterwards the process has its own number again."""
    before = torch.get_num_threads()
    if isinstance(config.run.threads, int):
        torch.set_num_threads(config.run.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build(config: RunConfig, saved: Mapping[str, Any] | None = None) -> Federation:
    """The federation that a configuration describes; `threads: auto` means those that the process has at this moment.

    Args:
        saved: the partition of an earlier part of the same run; None makes it anew.

    Raises:
        RequestError: whatever cannot be met, with what to change.
    """
    method = build_method(config)
    task = load_task(task_spec(config))
    base = load_base(config.model.name, config.model.dtype, config.model.device, config.model.quantize)
    spec = adapter_spec(config)
    if refusal := method.accepts(spec):
        raise ModelError(refusal)
    format = build_format(config, task, base)
    model = HFModel(
        base, spec, len(task.labels) if format.of == "labels" else 0, config.run.token_budget, format.readout
    )
    _check_length(config.task.max_length, model)
    if config.run.init_from is not None:
        _warm_start(model, Path(config.run.init_from))
    shares = Partition.from_json(json.dumps(saved)) if saved else partition(_partition_spec(config), task)
    shares.check_task(task)
    data = _client_data(format, task, shares)
    if method.pooled:
        data = {POOLED: {split: Examples.joined([own[split] for own in data.values()]) for split in SPLITS}}
    _check_cohort(method, list(data))
    resources: Mapping[ClientId, Profile] = {}
    if config.run.devices is not None and POOLED not in data:  # everybody's rows in one place: no client's device
        resources = load_devices(Path(config.run.devices), list(data), config.run.seed)
    devices = {c: resources.get(c, DEFAULT) for c in data}
    config = _resolved(config, task, model, len(data))
    return Federation(config, method, task, base, model, shares, data, devices, format)


def _warm_start(model: HFModel, folder: Path) -> None:
    """Let the model start from the best-validated adapter of another run, or from an adapter's own folder."""
    from fedpeft.models.adapters import delta
    from fedpeft.models.export import import_adapter

    ran, adapter = (folder / "config.yaml").is_file(), folder / "adapter"
    if ran and not adapter.is_dir():
        raise ModelError(f"run.init_from: the run {folder} has no adapter yet; let it finish: fedpeft resume {folder}")
    if not folder.is_dir():
        raise ModelError(f"run.init_from {str(folder)!r} is not a folder; give a run folder or a PEFT adapter's folder")
    try:
        params = import_adapter(adapter if ran else folder, model)
        if not (folded := any(name.startswith(delta.PREFIX) for name in params)):
            model.warm_start(params)
    except (ModelError, FitError) as error:
        own = adapter if ran else folder
        why = str(error).removeprefix(f"{own} ").removeprefix("does not fit this model: ").rstrip(".")
        raise ModelError(
            f"run.init_from {folder}{_kind_of(own)} does not fit this run's adapter ({model.spec.kind}) and labels: "
            f"{why}. Use the adapter.kind, its settings{_settings_of(own)} and the labels of that run, or leave "
            "run.init_from out."
        ) from error
    if folded:
        raise ModelError(
            f"run.init_from {folder}: what that run learnt changes the base's own weights, and is no adapter to go on "
            "with. Start from the nearest LoRA: fedpeft export RUN_DIR --rank N --to DIR, with adapter.rank: N (and "
            "adapter.alpha so that alpha / rank is as it was); or from its merged model: fedpeft export RUN_DIR "
            "--merge --to DIR, and model.name: DIR (a head starts anew)"
        )


def _kind_of(folder: Path) -> str:
    """The kind of an exported adapter in brackets, as far as its folder tells: " (prefix)"."""
    from fedpeft.models.peft_folder import NOTE, read_json

    with suppress(ModelError, AttributeError):  # damaged, which the error beside it says
        if kind := read_json(folder / NOTE).get("adapter", {}).get("kind"):
            return f" ({kind})"
    return ""


def _settings_of(folder: Path) -> str:
    """The rank and alpha of an exported LoRA in brackets: " (adapter.rank 4, adapter.alpha 8)"."""
    from fedpeft.models.peft_folder import NOTE, read_json

    with suppress(ModelError, AttributeError, KeyError, TypeError, ValueError):
        spec = read_json(folder / NOTE)["adapter"]
        return f" (adapter.rank {spec['rank']:d}, adapter.alpha {spec['alpha']:g})"
    return ""


def _resolved(config: RunConfig, task: Task, model: HFModel, clients: int) -> RunConfig:
    """The configuration with what `auto`, `off` and null mean here, so that a resumed run does the same."""
    setting = config.run.cohort_batching
    if setting == "off" or (setting == "auto" and model.weights):  # weights of their own train one after another
        setting = 1
    elif setting == "auto":
        own = tree.count(model.init(rng_for(0, "adapter"))) * 4 * FLAT_COPIES
        setting = max(1, min(AUTO_CLIENTS, AUTO_BYTES // own, clients))
    threads = torch.get_num_threads() if config.run.threads == "auto" else config.run.threads
    run = config.run.model_copy(update={"cohort_batching": setting, "threads": threads})
    where = config.model.model_copy(update={"device": str(model.device)})
    prompt = config.task.model_copy(update={"template": task.template, "label_words": task.words})
    return config.model_copy(update={"run": run, "model": where, "task": prompt})


def _check_cohort(method: Method, clients: list[ClientId]) -> None:
    cohort = getattr(method, "cohort", 0)
    if isinstance(cohort, int) and cohort > len(clients):
        raise DataError(
            f"method.cohort is {cohort} and there are {len(clients)} clients; lower the cohort, or 0 for all"
        )


def task_spec(config: RunConfig) -> TaskSpec:
    """The task that the configuration describes."""
    values = config.task.model_dump()
    values["name"] = values["name"] or "demo"
    return TaskSpec(**values)


def _partition_spec(config: RunConfig) -> PartitionSpec:
    return PartitionSpec(**config.partition.model_dump())


def _check_length(max_length: int, model: HFModel) -> None:
    longest, own = most_tokens(model.base.config), virtual.positions(model.spec)
    if longest is None or max_length + own <= longest:
        return
    if not own:
        raise ModelError(f"task.max_length is {max_length}; lower it, the model reads {longest} tokens")
    raise ModelError(
        f"adapter.length {own} and task.max_length {max_length} need {own + max_length} positions; the model has "
        f"{longest}: lower one of them"
    )


def _client_data(format: Format, task: Task, shares: Partition) -> dict[ClientId, dict[str, Examples]]:
    tables = {split: shares.table(task, split) for split in SPLITS}
    tokens: dict[int, Examples] = {}
    for table in tables.values():
        if table is not None and id(table) not in tokens:
            tokens[id(table)] = format.tokens(table)
    nobody = Examples((), np.zeros(0, dtype=np.int64))
    return {
        client: {
            split: nobody if table is None else tokens[id(table)].take(shares.rows(split)[client])
            for split, table in tables.items()
        }
        for client in shares.clients
    }
