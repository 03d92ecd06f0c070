"""The one idea: a federated method is a list of exchanges.

The server *picks* clients, *sends* each a record, each does *work* on it with its own memory, and the server *folds*
the answers into its state. State, memory and messages are frozen dataclasses (records) of the method's own file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

from torch import Tensor

from fedpeft.core import tree
from fedpeft.core.adapter import AdapterSpec
from fedpeft.core.errors import RecordError
from fedpeft.core.fit import Data, Fit, Fitted
from fedpeft.core.model import FisherProbe, Model
from fedpeft.core.packing import format_of
from fedpeft.core.rng import Rng, rng_for
from fedpeft.core.tree import Params

ClientId: TypeAlias = str
Record: TypeAlias = Any  # a frozen dataclass that `records.encode` can write
Steps: TypeAlias = "Generator[Fit | FisherProbe, Any, tuple[Record, Record]]"
"""Work that waits: a Fitted for each Fit that it yields, a Fisher for each FisherProbe."""
Work: TypeAlias = "tuple[Record, Record] | Steps"


# --- common records ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nothing:
    """The empty record: a method without client memory, a question without content."""


@dataclass(frozen=True)
class Weights:
    """Parameters that travel from the server to a client."""

    params: Params


@dataclass(frozen=True)
class Update:
    """The common reply: a client's parameters, how many examples it has, its mean training loss."""

    params: Params
    examples: int
    loss: float


# --- what a method is made of -----------------------------------------------------------------------------------


@dataclass
class Meter:
    """What one client's work cost, counted while it ran.

    Attributes:
        trained: (tokens, pairs) that went forward and backward, by the lowest block that the backward pass entered;
            pairs is the sum over rows of tokens times the keys that they attend to.
        products: multiply-adds beyond passes through the frozen base, see `Fitted.products`; may be negative.
        labels: rows by label that went into Fits, repeats counted: a curriculum by difficulty may prefer a label. They
            are for the run's own files, and part of no message.
        packed: steps whose Fit asked for the base in a quantised format, by the lowest block that they trained and
            whether blocks were computed again; a format that is only simulated counts as if it were packed.
    """

    steps: int = 0
    examples: int = 0
    trained: dict[int, tuple[int, int]] = field(default_factory=dict)
    forward_tokens: int = 0  # forward alone
    forward_pairs: int = 0
    products: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    packed: Counter[tuple[int, bool]] = field(default_factory=Counter)

    @property
    def trained_tokens(self) -> int:
        """Tokens that went forward and backward."""
        return sum(tokens for tokens, _ in self.trained.values())

    @property
    def trained_pairs(self) -> int:
        """Pairs of the same rows."""
        return sum(pairs for _, pairs in self.trained.values())

    def add(self, fit: Fit, fitted: Fitted, lowest_block: int) -> None:
        """Count one finished Fit."""
        used = [row for batch in fit.batches for row in batch]
        self.labels.update(fit.data.labels[used].tolist())
        self.steps += fitted.steps
        self.examples += fitted.examples
        self.products += fitted.products
        if format_of(fit.base) is not None:
            self.packed[lowest_block, fit.checkpointing] += fitted.steps
        self.train(fitted.tokens, fitted.pairs, lowest_block)

    def train(self, tokens: int, pairs: int, lowest_block: int) -> None:
        """Count passes forward, and backward down to a block."""
        before = self.trained.get(lowest_block, (0, 0))
        self.trained[lowest_block] = (before[0] + tokens, before[1] + pairs)


@dataclass(frozen=True)
class ServerEnv:
    """What the server's functions may use besides their arguments. Rounds count from 1; 0 is the set-up."""

    model: Model
    clients: Sequence[ClientId]
    seed: int
    rounds: int
    round: int = 0
    exchange: str = ""
    attempt: int = 0
    cohort: Sequence[ClientId] = ()  # who was asked, in cohort order; fewer may have answered
    resources: Mapping[ClientId, Any] = field(default_factory=dict)  # device profile per client
    held: Any = None  # what the server alone holds, as a Protocol of the method's own file; None: nothing

    def rng(self, purpose: str) -> Rng:
        """A generator of this place; see `rng_for`."""
        return rng_for(self.seed, purpose, self.exchange, self.round, "", self.attempt)

    def seed_for(self, purpose: str) -> int:
        """A 63-bit seed of this place, for `Fit.seed`."""
        return int(self.rng(purpose).integers(1 << 63))

    def initial(self) -> dict[str, Tensor]:
        """P0: the same fresh adapter that every client's `initial` gives."""
        return self.model.init(rng_for(self.seed, "adapter"))


@dataclass(frozen=True)
class ClientEnv:
    """What a client's work may use besides its arguments."""

    client: ClientId
    model: Model
    splits: Mapping[str, Data]  # "train", and where the client has them "validation" and "test"
    seed: int
    rounds: int
    round: int = 0
    exchange: str = ""
    attempt: int = 0
    resources: Any = None  # this client's device profile
    meter: Meter = field(default_factory=Meter)
    usable: Sequence[int] | None = None  # rows that ordinary local training may use now; None: all
    longest: int | None = None  # tokens that their texts are cut to; None: they are whole

    @property
    def data(self) -> Data:
        """The training examples."""
        return self.splits["train"]

    def rng(self, purpose: str) -> Rng:
        """A generator of this place; see `rng_for`."""
        return rng_for(self.seed, purpose, self.exchange, self.round, self.client, self.attempt)

    def seed_for(self, purpose: str) -> int:
        """A 63-bit seed of this place, for `Fit.seed`."""
        return int(self.rng(purpose).integers(1 << 63))

    def initial(self) -> dict[str, Tensor]:
        """P0: the same fresh adapter that the server's `initial` gives; it needs no traffic."""
        return self.model.init(rng_for(self.seed, "adapter"))


MOST_EXAMPLES = 2**53  # the largest count that a float64 holds exactly
LARGEST_LOSS = 1e30  # far above any cross-entropy; sums of such losses stay finite


def matching(down: Record, up: Record) -> None:
    """The usual check of an answer, raising RecordError where it does not fit.

    Params must have the names, shapes and dtypes of the params of the same field that were sent; an answer with params
    counts at least one example, and its loss is a number that can be averaged.
    """
    weighty = False
    for name, got in vars(up).items():
        sent = vars(down).get(name)
        if isinstance(sent, Mapping) and isinstance(got, Mapping):
            tree.same_layout(sent, got)
            tree.same_dtypes(sent, got)
            weighty = weighty or bool(got)
    examples, loss = getattr(up, "examples", 1), getattr(up, "loss", 0.0)
    if not (1 if weighty else 0) <= examples <= MOST_EXAMPLES:
        raise RecordError(f"an answer counts {examples} examples; a count lies between {int(weighty)} and 2^53")
    if isinstance(loss, float | int) and not abs(loss) <= LARGEST_LOSS:
        raise RecordError(f"an answer's loss is {loss}; it must be finite and below {LARGEST_LOSS:g}")


def anything(down: Record, up: Record) -> None:
    """No check beyond the record's own types and finiteness."""


@dataclass(frozen=True)
class Exchange:
    """One step of a federated algorithm: pick, send, work, fold."""

    name: str
    down: type[Record]  # what the server sends
    up: type[Record]  # what a client answers
    pick: Callable[[Any, Sequence[ClientId], Rng], Sequence[ClientId]]
    send: Callable[[Any, ClientId], Record]
    work: Callable[[Any, Any, ClientEnv], Work]  # (down, memory, env) -> (up, memory)
    fold: Callable[[Any, Mapping[ClientId, Any], ServerEnv], Any]
    accept: Callable[[Any, Any], None] = matching  # (down, up): raises RecordError where the answer does not fit
    again: Callable[[Any, Sequence[ClientId], Rng], Sequence[ClientId]] | None = None  # below the quorum; None: `pick`
    quorum: float | None = None  # share of those asked who must answer; None: the run's; 0: nobody need


class Method(Protocol):
    """A federated algorithm. Its hyper-parameters are its fields (plain data); its functions are pure.

    A method is a frozen dataclass in a module of its own that ends with `METHOD = ThatClass`. Functions that it does
    not define are taken from `core.method` (see there).
    """

    state: ClassVar[type[Record]]
    memory: ClassVar[type[Record]]
    pooled: ClassVar[bool]  # whether it runs on one client that holds everybody's rows
    plans_by_rounds: ClassVar[bool]  # whether another number of rounds makes the same round another one
    plans_memory: ClassVar[bool]  # whether it sees to it itself that every client's device has room for its work
    chooses_rows: ClassVar[bool]  # whether it decides which of its rows a client trains on in a round

    @property
    def personalised(self) -> bool:
        """Whether a client's own model can differ from the global one."""
        ...

    def adapter(self) -> AdapterSpec:
        """The adapter that the method trains unless the configuration names another."""
        ...

    def accepts(self, spec: AdapterSpec) -> str | None:
        """None where the method can train this adapter, else a sentence that says why not and what to use."""
        ...

    def accepts_schedule(self, kind: str) -> str | None:
        """None where `method.schedule` can decide which rows it trains on, else a sentence that says why not."""
        ...

    def idle(self) -> Mapping[str, str]:
        """Fields that have no effect beside the values of the others, with the reason; people are told of them."""
        ...

    def init(self, env: ServerEnv) -> Record:
        """The server's state before anything was exchanged."""
        ...

    def init_client(self, env: ClientEnv) -> Record:
        """A client's memory before it ever took part."""
        ...

    def setup(self) -> Sequence[Exchange]:
        """The exchanges made once, before round 1."""
        ...

    def round(self) -> Sequence[Exchange]:
        """The exchanges of every round."""
        ...

    def result(self, state: Any) -> Params:
        """The global model: evaluated, saved, served."""
        ...

    def personal(self, params: Params, memory: Any) -> Params:
        """A client's own model, from the global params and its memory."""
        ...

    def shared_names(self, state: Any) -> Sequence[str]:
        """Names of the global params that count for everybody, also where a memory still has others by that name."""
        ...

    def trains_on(self, layers: int) -> str:
        """`Fit.base` of clients that have a part of the server's model alone, of so many blocks; "": they have it all.

        Where it is not "", evaluation scores the global params on it too.
        """
        ...

    def rows_of_round(self, rows: float) -> float:
        """Rows that a client with so many trains on in one round, repeats counted, as an estimate of costs takes it."""
        ...

    def choices(self, state: Any) -> Mapping[str, Any]:
        """What the method decided by itself, as JSON can carry it, for the run's record; a "warning" is logged.

        Known to the report are `layers`, `of_layers`, `layer_scores` and a sentence `scores_mean` that says what these
        mean; everything else is shown as it is.
        """
        ...


# --- how records travel -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One exchange being made: its place in the run, and which version of its memory each client is to use."""

    exchange: Exchange
    number: int  # of this exchange in the run, from 0
    round: int
    rounds: int
    attempt: int = 0
    versions: Mapping[ClientId, int] = field(default_factory=dict)  # newest committed memory; absent: none yet

    @property
    def version(self) -> int:
        """The version number of memories that this call stages; unique and growing within a run."""
        return self.number * 16 + self.attempt + 1


@dataclass(frozen=True)
class Receipt:
    """What one client's part of an exchange cost, and why its answer was not used, if it was not."""

    client: ClientId
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0  # measured here
    simulated_seconds: float = 0.0  # on the client's device profile; for a late client the deadline
    meter: Meter = field(default_factory=Meter)
    lost: str | None = None
    staged: bool = False  # a new memory waits under the call's version
    attempt: int = 0  # of the call; attempts of one exchange follow one another


@dataclass(frozen=True)
class Answers:
    """What came back: valid answers by client, and a receipt for everybody who was asked."""

    ups: Mapping[ClientId, Record]
    receipts: tuple[Receipt, ...] = ()


class Transport(Protocol):
    """How records travel. An engine is a Transport, and engines differ in nothing else."""

    def clients(self) -> Sequence[ClientId]:
        """Stable ids of all clients that exist, sorted."""
        ...

    def exchange(self, call: Call, downs: Mapping[ClientId, Record]) -> Answers:
        """Carry each record to its client, let it work, and bring back the answers that came and were valid."""
        ...
