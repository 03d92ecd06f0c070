"""Which parameters are trainable, as data. The tensors are made by `models/adapters`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W x + (alpha / rank) B A x.

    The factor alpha / rank is the same for every client, also where ranks differ.
    """

    kind: ClassVar[str] = "lora"
    rank: int = 8  # rows of A, columns of B
    alpha: float = 16.0  # numerator of the scale alpha / rank
    targets: tuple[str, ...] = ("query", "value")  # projections by name, `all`, or a pattern with * over module paths
    blocks: tuple[int, ...] | None = None  # transformer blocks that get an adapter; None: all
    dropout: float = 0.0  # on the input of A, in training


@dataclass(frozen=True)
class AdaLora:
    """W x + (alpha / rank) P diag(E) Q x, in triplets that can be given up (Zhang et al. 2023, arXiv 2303.10512)."""

    kind: ClassVar[str] = "adalora"
    rank: int = 12  # triplets of every projection at first
    alpha: float = 24.0  # numerator of the scale alpha / rank
    targets: tuple[str, ...] = ("query", "value")  # projections by name, `all`, or a pattern with * over module paths
    blocks: tuple[int, ...] | None = None  # transformer blocks that get an adapter; None: all


@dataclass(frozen=True)
class HeadOnly:
    """No adapter in the base: only the classification head trains (a linear probe)."""

    kind: ClassVar[str] = "head"


@dataclass(frozen=True)
class Prefix:
    """Trainable keys and values before those of a layer's own tokens (Li & Liang 2021, arXiv 2101.00190).

    In every layer it is P-tuning v2 (Liu et al. 2022, arXiv 2110.07602); no network in front of the parameters.
    """

    kind: ClassVar[str] = "prefix"
    length: int = 20  # P: virtual tokens per layer
    blocks: tuple[int, ...] | None = None  # transformer blocks that get a prefix; None: all
    dropout: float = 0.1  # on the prefix's keys and values, in training
    deviation: float = 0.02  # standard deviation of the start, mean 0


@dataclass(frozen=True)
class Prompt:
    """Trainable embeddings before those of the text (Lester et al. 2021, arXiv 2104.08691)."""

    kind: ClassVar[str] = "prompt"
    length: int = 20  # P: virtual tokens
    start: Literal["vocabulary", "normal"] = "vocabulary"  # rows of the vocabulary, drawn once; or N(0, 0.02^2)


@dataclass(frozen=True)
class Bottleneck:
    """x + up(s(down(x))) after attention and after the feed-forward part (Houlsby et al. 2019, arXiv 1902.00751)."""

    kind: ClassVar[str] = "bottleneck"
    size: int = 64  # m: width of the bottleneck
    activation: Literal["gelu", "relu"] = "gelu"  # s
    norms: bool = True  # whether the blocks' own layer norms are trained too
    blocks: tuple[int, ...] | None = None  # transformer blocks that get an adapter; None: all


@dataclass(frozen=True)
class InstancePrompt:
    """A prompt that a network makes of the frozen sentence vector (IDPG, Wu et al. 2022, arXiv 2204.04497)."""

    kind: ClassVar[str] = "idpg"
    length: int = 5  # P: virtual tokens
    size: int = 16  # m: width between the two layers


@dataclass(frozen=True)
class MixedPrompt:
    """A target prompt and a mixture of frozen source prompts (ATTEMPT, Asai et al. 2022, arXiv 2205.11961)."""

    kind: ClassVar[str] = "attempt"
    length: int = 20  # P: virtual tokens; that of the sources
    size: int = 100  # r: width of the attention network
    sources: tuple[str, ...] = ()  # run folders whose prompts are the sources


@dataclass(frozen=True)
class LatePrompt:
    """A prompt made of a middle layer's states and put in there (LPT, Liu et al. 2022b, arXiv 2210.11292)."""

    kind: ClassVar[str] = "lpt"
    length: int = 5  # P: virtual tokens
    size: int = 256  # m: width of the generator
    block: int | None = None  # the block that the prompt enters; None: the middle one


@dataclass(frozen=True)
class Full:
    """No adapter: the base's own weights train, in a copy of every client's own (vanilla fine-tuning)."""

    kind: ClassVar[str] = "full"
    blocks: tuple[int, ...] | None = None  # blocks whose weights train, from the end where negative; None: all weights


AdapterSpec: TypeAlias = (
    Lora | AdaLora | HeadOnly | Prefix | Prompt | Bottleneck | InstancePrompt | MixedPrompt | LatePrompt | Full
)

ADAPTERS: dict[str, type[AdapterSpec]] = {spec.kind: spec for spec in get_args(AdapterSpec)}


def spec_of(values: Mapping[str, Any]) -> AdapterSpec:
    """The specification from plain data: its `kind`, and its fields, of which those left out have their defaults."""
    spec: type[Any] = ADAPTERS[values["kind"]]
    made: AdapterSpec = spec(**{name: frozen(value) for name, value in values.items() if name != "kind"})
    return made


def frozen(value: Any) -> Any:
    """Plain data with the tuples that frozen dataclasses hold in the place of JSON's lists."""
    return tuple(frozen(v) for v in value) if isinstance(value, list | tuple) else value
