"""The sections of a configuration: a field's docstring is its help text; defaults and bounds stand only here."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from fedpeft.proxy.expert import ALLOWED, placed
from fedpeft.proxy.settings import ALPHA_WORDS, alpha_fits

DEMO_CLIENTS = 24
CLIENTS = 100

Count: TypeAlias = Annotated[int, Field(ge=1)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name: TypeAlias = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]
Share: TypeAlias = Annotated[float, Field(gt=0, le=1)]


def _device(name: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        return name
    raise ValueError("auto, cpu, mps, cuda, or cuda with a number such as cuda:1")


def _alpha(value: float) -> float:
    if alpha_fits(value):
        return value
    raise ValueError(ALPHA_WORDS)


def _expert(text: str) -> str:
    if placed(text):
        return text
    raise ValueError(ALLOWED)


class Section(BaseModel):
    """A group of keys: immutable, no unknown keys, help text from the docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class ModelSection(Section):
    """The frozen base model."""

    name: Annotated[str, Field(min_length=1)] = "demo"
    """`demo`, `demo-small` or `demo-large` (in the package), `minilm`, a folder in Hugging Face format (safetensors
    only), or a hub id."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the base; adapters train in float32."""

    quantize: Literal["none", "int8", "nf4", "nf4dq"] = "none"
    """Number format that the frozen blocks' linear weights are kept in: `nf4dq` takes the least memory, `int8` is
    the most exact; a step takes longer with each of them."""

    device: Annotated[str, AfterValidator(_device)] = "auto"
    """Where the model computes; `auto` takes a GPU where there is one."""


class TaskSection(Section):
    """The data and what is to be predicted."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """Without `train`: `demo` (the default) or a hub data set (`owner/name[:configuration]`). With `train`: what
    tables and folders call the task."""

    train: str | None = None
    """Training rows: a .jsonl[.gz], .csv[.gz] or .parquet file; a folder or pattern is one file per client."""

    validation: str | None = None
    """Rows to select by (hub: the split's name); null: 10 % of each client's training rows, or the demo's own."""

    test: str | None = None
    """Rows to report on, scored once at the end (hub: the split's name); null: none, or the demo's or the hub's own."""

    format: Literal["head", "cloze", "verbalizer", "generate"] = "head"
    """How a label is predicted: `head`, by a trained classification head; `cloze`, by a masked model's word at a mask;
    `verbalizer`, by a causal model's likeliest answer. Or `generate`: a causal model learns what to say, by rows of
    instruction, context and response, or by plain text."""

    template: Annotated[str, Field(min_length=1)] | None = None
    """For cloze and verbalizer: `{text}` (a pair: `{a}` and `{b}`), and for the label `<mask>` (cloze) or `%s`
    (verbalizer); null: the known one of the data set, else a general one. For generate: `{instruction}` and perhaps
    `{context}`, or `chat`, the tokenizer's own; null: Alpaca's."""

    label_words: Annotated[tuple[Name, ...], Field(min_length=2)] | None = None
    """For cloze and verbalizer: a word for each label that is kept, in their order (cloze: of one token); null: those
    of a known data set, else the labels' own names."""

    loss_over: Literal["vocabulary", "labels"] = "vocabulary"
    """For cloze: what the label word is told from in training, the whole `vocabulary` or the other `labels`' words.
    Prompts learn more from `labels` where rounds are few."""

    text: Annotated[str, Field(min_length=1)] = "text"
    """Column of the text; where there is no column `text`, `sentence1` with `sentence2` is taken. For generate:
    `instruction` is taken where it has a response, else plain text."""

    text_pair: str | None = None
    """Column of the second text of a pair; for generate that of the context (null: `context` where it is there)."""

    label: Annotated[str, Field(min_length=1)] = "label"
    """Column of the label: a name or an index. For generate: a category to skew a partition by (else `category`)."""

    labels: Annotated[tuple[Name, ...], Field(min_length=2)] | None = None
    """Label names in the order of their indices; null: from `meta.json` beside the file, else the values, sorted."""

    max_length: Annotated[int, Field(ge=3, le=8192)] = 128
    """Tokens that a row is cut to, special tokens included."""

    metric: Literal["accuracy", "macro_f1", "matthews", "acc_f1", "perplexity", "choice_accuracy"] | None = None
    """Score that selects and that `run.stop.score` means; null: from `meta.json`, else the task's usual one. For
    generate: `perplexity` (lower is better), or `choice_accuracy` where rows have choices."""

    limit: Count | None = None
    """At most this many training rows: a random sample, the same every time."""

    classes: Annotated[tuple[Name, ...], Field(min_length=2)] | Annotated[int, Field(ge=2)] | None = None
    """Keep only these labels, or the first n; other rows are dropped."""

    response: Annotated[str, Field(min_length=1)] = "response"
    """For generate: column of what is to be said; where it is not there, the text itself is learnt."""

    references: Annotated[str, Field(min_length=1)] = "references"
    """For generate: column with lists of further right answers, which ROUGE-L and exact match take too."""

    choices: Annotated[str, Field(min_length=1)] = "choices"
    """For generate: column with lists of answers, the response among them; the likeliest is compared with it."""

    end: Annotated[str, Field(min_length=1)] | None = None
    """For generate: the token that ends an answer, as the tokenizer writes it; null: the tokenizer's end token, else
    the model's."""

    match: Literal["text", "number"] = "text"
    """For generate: what an exact match compares, the whole text or the last number in it."""

    generate_rows: Annotated[int, Field(ge=0)] = 64
    """For generate: test rows that the best and the untrained model say something for, at the end; 0: none."""

    generate_tokens: Count = 64
    """For generate: most tokens of what is said."""


class PartitionSection(Section):
    """How the training rows are divided among clients."""

    kind: Literal["iid", "dirichlet", "quantity", "natural", "file"] = "dirichlet"
    """`iid`; `dirichlet` (skewed labels); `quantity` (skewed sizes); `natural` (a column names the client);
    `file` (one file per client)."""

    clients: Count | None = None
    """Number of clients (`natural`: at most so many, groups are put together; `file`: as many as files); null: 24 for
    the demo task, else 100."""

    alpha: Positive = 1.0
    """Concentration of each client's label distribution; small means that a client sees few labels."""

    size_alpha: Positive = 5.0
    """Concentration of the clients' sizes; small means unequal sizes."""

    by: str | None = None
    """Column that names the client, for `natural`; the demo has `bundle`."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the partition; the seeds of a study leave it alone."""


class MethodSection(Section):
    """The federated algorithm with its own fields."""

    model_config = ConfigDict(extra="allow")

    name: str = "fedavg"
    """A method of the package (`fedpeft list methods`) or `module:Class`."""

    @property
    def fields(self) -> dict[str, Any]:
        """The method's hyper-parameters as plain data."""
        return dict(self.__pydantic_extra__ or {})


class AdapterSection(Section):
    """Which parameters are trainable."""

    model_config = ConfigDict(extra="allow")

    kind: str = "lora"
    """The kind of adapter (`fedpeft list adapters`); the method chooses where it is not given."""

    @property
    def fields(self) -> dict[str, Any]:
        """The adapter's settings as plain data."""
        return dict(self.__pydantic_extra__ or {})


class StopSection(Section):
    """When a run may end before its last round; the first limit reached ends it."""

    score: Positive | None = None
    """Validation score (`task.metric`): of the personalised models where the method makes them, else the global one."""

    bytes: Count | None = None
    """Traffic in bytes, both directions together."""

    seconds: Positive | None = None
    """Measured seconds of the whole run, earlier parts of a resumed one included."""

    patience: Count | None = None
    """Evaluations in a row without a better validation score."""


class RunSection(Section):
    """How the run goes."""

    rounds: Count = 40
    """Rounds of the method."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything but the partition."""

    evaluate_every: Count = 10
    """Rounds between evaluations on validation rows; the last round is always evaluated."""

    engine: Literal["inprocess"] = "inprocess"
    """How records travel: `inprocess` runs all clients in this process."""

    cohort_batching: Literal["auto", "off"] | Count = "auto"
    """Clients trained in one pass of the base: `auto`, `off` (one by one: bits equal on every engine), or a number."""

    token_budget: Annotated[int, Field(ge=64)] = 2048
    """Tokens in one part of a cohort's training step; more is faster until memory is short."""

    quorum: Share = 0.5
    """Share of the cohort that must answer; below it the round is repeated with a new cohort, three times."""

    deadline_s: Positive | None = None
    """Simulated seconds after which a client's answer is too late; null waits for everybody."""

    wire: Literal["float32", "bfloat16", "int8"] = "float32"
    """Number format of what travels."""

    devices: str | None = None
    """TOML file that maps clients to device profiles; null: all equal."""

    too_small: Literal["train", "leave_out"] = "train"
    """Clients whose device has less memory than a training step is predicted to need: they `train` all the same, or the
    run does without them (`leave_out`). Methods that plan for each device, such as fedpipe, see to it themselves."""

    init_from: str | None = None
    """Run folder whose best adapter this run starts from."""

    stop: StopSection = StopSection()
    """Limits that end the run early."""

    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Where scores are sent besides the run folder."""

    threads: Literal["auto"] | Count = "auto"
    """CPU threads; `auto` leaves torch's own choice and records it."""


class ProxySection(Section):
    """A large model that nobody opens, steered by the small one that was tuned; for `task.format: generate`."""

    large: Annotated[str, Field(min_length=1)] | None = None
    """The large model: a name, folder or hub id as in `model.name`, loaded at the server; or an address,
    `http://` (`fedpeft serve --logits`), `vllm+http://` or `llamacpp+http://`. Null: none; one can be named later."""

    public: str | None = None
    """Texts that the server may show the large model, to distil it into the small one in every round (fedpt): a file
    in the task's columns; a response may be missing. Null: nothing is distilled."""

    alpha: Literal["auto"] | Annotated[float, AfterValidator(_alpha)] = "auto"
    """How much of the small models' difference is added, a number from -100 to 100; `auto` chooses it on the validation
    texts."""

    select: Literal["nll", "exact_match", "rouge_l"] = "nll"
    """What `auto` goes by in the end: the likelihood of the validation answers, or what is said for validation rows."""

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Plausibility: a token is out whose probability by the large model is below this share of the likeliest one's."""

    speculate: Annotated[int, Field(ge=0)] = 0
    """Tokens drafted ahead where texts are said, from what a text said before or by the small model; 0: none."""

    top_k: Annotated[int, Field(ge=5)] = 20
    """Candidates asked of a large model that tells the likeliest tokens alone."""

    expert_prompt: Annotated[str, Field(min_length=1), AfterValidator(_expert)] | None = None
    """What the tuned small model alone reads before each prompt, such as a system prompt, or around it where the text
    has `{prompt}`; `chat`: the tokenizer's own template. Null: it reads what the others read."""

    token_env: Annotated[str, Field(min_length=1)] | None = None
    """Name of the environment variable that holds the large model's key; null: it asks for none."""


class RunConfig(Section):
    """A whole configuration of one run."""

    model: ModelSection = ModelSection()
    task: TaskSection = TaskSection()
    partition: PartitionSection = PartitionSection()
    method: MethodSection = MethodSection()
    adapter: AdapterSection = AdapterSection()
    run: RunSection = RunSection()
    proxy: ProxySection = ProxySection()


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "task": TaskSection,
    "partition": PartitionSection,
    "method": MethodSection,
    "adapter": AdapterSection,
    "run": RunSection,
    "proxy": ProxySection,
}

LATER: dict[str, str] = {
    "privacy": "clipping and noise come with the Flower engine",
    "run.engine: flower": "will connect real sites over a network and is not in this version; use inprocess, which "
    "runs all clients in this process",
}
"""Keys and values of the planned interface that this version does not have, and what they wait for."""
