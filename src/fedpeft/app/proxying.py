"""An adapter as something to speak with: what is written beside it, and how it is opened again.

`proxy.json` in an adapter's folder says which small model the adapter is for, how texts become prompts, and with which
large model and alpha it was chosen to speak.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpeft.app.federation import Federation
from fedpeft.app.holding import Holding, curve_facts
from fedpeft.core import tree
from fedpeft.core.adapter import spec_of
from fedpeft.core.errors import ModelError, RequestError
from fedpeft.core.tree import Params
from fedpeft.data.answers import Prompting
from fedpeft.data.templates import CHAT, PAIR, parse
from fedpeft.models.hf import HFModel
from fedpeft.models.lm_head import load_lm_head
from fedpeft.models.load import load_base
from fedpeft.models.peft_folder import NOTE, import_adapter, read_json
from fedpeft.models.readouts.generate import GenerateReadout
from fedpeft.models.sessions import Speaker
from fedpeft.proxy.answers import Completion, Emitted
from fedpeft.proxy.decode import Decoding, decode
from fedpeft.proxy.expert import expert_of
from fedpeft.proxy.settings import ALPHA_WORDS, Settings, alpha_fits
from fedpeft.proxy.trio import Trio

FILE, FORMAT = "proxy.json", 1
NO_LARGE = "none"  # in place of a large model: the tuned small one alone
VOICES = ("proxy", "large", "tuned_small", "base_small")


# --- writing ----------------------------------------------------------------------------------------------------


def artefact_files(fed: Federation, params: Params, held: Holding | None, round: int | None) -> dict[str, Any]:
    """`proxy.json` of an adapter that can be spoken with, by its name; nothing where labels are predicted.

    Args:
        round: after which the parameters were taken.
    """
    from fedpeft.proxy.tokenizers import fingerprint, real_tokens

    prompting, proxy = fed.format.prompting, fed.config.proxy
    if prompting is None:
        return {}
    try:
        Speaker(fed.model, params)
    except ModelError:  # an adapter that puts tokens into the text
        return {}
    tokenizer = fed.base.tokenizer
    curve = curve_facts(held.curve(params)) if held is not None and _drawn(held) else None
    facts = {
        "format": FORMAT,
        "small": {
            "name": fed.config.model.name,
            "dtype": fed.config.model.dtype,
            "quantize": fed.config.model.quantize,
            "sha256": fed.base.sha256,
        },
        "params_sha256": tree.sha256(params),
        "fingerprint": fingerprint(tokenizer),
        "vocab": real_tokens(tokenizer) if held is None else held.vocab,
        "end": prompting.end,
        "template": prompting.template,
        "plain": prompting.plain,
        "max_length": prompting.max_length,
        "large": proxy.large,
        "large_identity": None if held is None else held.large.caps.identity,
        "alpha": None if held is None else held.chosen(params),
        "curve": curve,
        "validation_sha256": None if curve is None else _texts_sha256(fed),
        "beta": proxy.beta,
        "top_k": proxy.top_k,
        "expert_prompt": proxy.expert_prompt,
        "speculate": proxy.speculate,
        "task": fed.config.task.name,
        "method": fed.config.method.name,
        "round": round,
    }
    return {FILE: facts}


def _drawn(held: Holding) -> bool:
    return held.scorable and len(held.fed.whole("validation")) > 0


def _texts_sha256(fed: Federation) -> str:
    digest = hashlib.sha256()
    for tokens in fed.whole("validation").tokens:
        digest.update(len(tokens).to_bytes(8, "little") + tokens.astype("<i4").tobytes())
    return digest.hexdigest()


# --- opening ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artefact:
    """A tuned small model, opened, and with it perhaps the large model that it steers.

    Attributes:
        trio: the models; without a large one the tuned small model alone.
        alpha: with which they speak together; None: there is no large model.
        name: what an endpoint calls it.
        template: of the prompts, as in `task.template`; None: Alpaca's.
        facts: what `proxy.json` says.
    """

    trio: Trio
    alpha: float | None
    name: str
    template: str | None
    facts: Mapping[str, Any]
    prompting: Prompting

    @property
    def settings(self) -> dict[str, Any]:
        """What `proxy.json` and the alpha say of `Settings`."""
        return {"alpha": self.alpha, "beta": float(self.facts.get("beta", 0.0))}

    @property
    def speculate(self) -> int:
        """Tokens to draft unless it is said otherwise: what the run was configured with, where the backend can."""
        able = self.trio.large is not None and self.trio.large.caps.block
        return int(self.facts.get("speculate", 0)) if able else 0

    def prompt(
        self,
        said: str | Sequence[Mapping[str, str]] | None = None,
        /,
        *,
        instruction: str | None = None,
        context: str = "",
    ) -> list[int]:
        """Token ids of a text as it is, of a conversation (messages with role and content), or of an instruction.

        A conversation is put into the tokenizer's chat template where the adapter was trained with that; else its last
        message is the instruction of the template, and what was said before the context, "role: text" a line (before
        the instruction where the template has no context). Where the adapter was trained on plain texts, the
        tokenizer's chat template is used if there is one.

        Raises:
            RequestError: none or both of them, an empty one, or a conversation that does not end with the user.
        """
        if (said is None) == (instruction is None) or not (said or instruction):
            raise RequestError(
                "the prompt is empty, or given twice; give one text, one instruction (with a context), or messages"
            )
        if said is None:
            ids = self._of_instruction(str(instruction), context)
        elif isinstance(said, str):
            ids = self._ids(said, True)
        else:
            ids = self._of_messages(said)
        if not ids:
            raise RequestError("the prompt gives no token; write something")
        return ids

    @cached_property
    def voices(self) -> dict[str, Trio]:
        """Who can be compared: the proxy and its parts."""
        trio = self.trio
        small = {"tuned_small": replace(trio, large=None, base=None)}
        if trio.tuned is not None:
            plain = Speaker(trio.tuned.model)
            small["base_small"] = replace(trio, large=None, tuned=plain, base=None, expert=None)
        if trio.large is None:
            return small
        return {"proxy": trio, "large": replace(trio, tuned=None, base=None), **small}

    def _of_instruction(self, instruction: str, context: str) -> list[int]:
        if self.prompting.plain:
            return self._ids(f"{instruction}\n{context}" if context else instruction, True)
        return self._ids(self.prompting.render(instruction, context), self.template != CHAT)

    def _of_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        for i, message in enumerate(messages):
            if not isinstance(message.get("content"), str) or not isinstance(message.get("role"), str):
                raise RequestError(f"message {i + 1} needs a role and a content, both texts")
        if messages[-1]["role"] != "user":
            raise RequestError(f"the last message is by {messages[-1]['role']!r}; it must be the user's")
        tokenizer = self.prompting.tokenizer
        chat = self.template == CHAT or (self.prompting.plain and getattr(tokenizer, "chat_template", None))
        if chat:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            return self._ids(str(text), False)
        before = [m["content"] if m["role"] == "system" else f"{m['role']}: {m['content']}" for m in messages[:-1]]
        if self.template is not None and PAIR not in parse(self.template).pieces:
            return self._of_instruction("\n".join([*before, messages[-1]["content"]]), "")
        return self._of_instruction(messages[-1]["content"], "\n".join(before))

    def _ids(self, text: str, framed: bool) -> list[int]:
        """With the special tokens that stand before a text, without those behind it, as in training."""
        tokenizer = self.prompting.tokenizer
        found = tokenizer(text, add_special_tokens=framed, return_special_tokens_mask=True, verbose=False)
        ids, special = list(map(int, found["input_ids"])), found["special_tokens_mask"]
        while framed and len(ids) > 1 and special[len(ids) - 1]:
            ids.pop()
        return ids


def open_artefact(
    folder: Path | str,
    large: str | None = None,
    alpha: float | None = None,
    token: str | None = None,
    expert_prompt: str | None = None,
) -> Artefact:
    """The adapter of a run, ready to speak, with a large model or without.

    Args:
        folder: a run's folder, or that of an exported adapter.
        large: the large model, as `proxy.large`; None: that of the run, if it had one; "none": none.
        alpha: None: that of the run, which is for its own large model and expert prompt alone.
        token: the large model's key.
        expert_prompt: as `proxy.expert_prompt`; None: that of the run; empty: none.

    Raises:
        RequestError: nothing to open there; another small model or tokenizer than the adapter was trained with; a
            large model without an alpha; an alpha out of range, or for nothing.
    """
    from fedpeft.proxy.backends import open_backend
    from fedpeft.proxy.tokenizers import check_tokenizers, fingerprint

    path, facts = _facts(Path(folder))
    if alpha is not None and not alpha_fits(alpha):
        raise RequestError(f"alpha is {alpha}; give {ALPHA_WORDS} (--alpha)")
    small, params = _small(path, facts)
    tokenizer, lm = small.base.tokenizer, small.lm
    assert lm is not None, "the small model was loaded with its head"
    if fingerprint(tokenizer) != facts["fingerprint"]:
        raise RequestError(
            f"the tokenizer of {facts['small']['name']} has changed since the adapter was trained; restore it"
        )
    ends = frozenset({int(facts["end"])})
    spec = facts.get("large") if large is None else None if large == NO_LARGE else large
    if spec is None and alpha is not None:
        raise RequestError(f"alpha is {alpha}, and there is no large model to steer; name one with --large")
    top_k = int(facts.get("top_k", 20))
    opened = None if spec is None else open_backend(spec, token=token, top_k=top_k)
    vocab = check_tokenizers(tokenizer, opened, ends, lm.vocabulary)
    base = None if opened is None else Speaker(small)
    candidates = None if opened is None or opened.caps.full else top_k
    framed = facts.get("expert_prompt") if expert_prompt is None else expert_prompt or None
    expert = expert_of(framed, tokenizer)
    trio = Trio(opened, Speaker(small, params), base, tokenizer, vocab, ends, candidates, expert)
    prompting = Prompting(
        tokenizer, int(facts["end"]), int(facts["max_length"]), facts["template"], plain=facts["plain"]
    )
    chosen = None if opened is None else _alpha(alpha, facts, opened.caps.identity, framed)
    return Artefact(trio, chosen, f"{facts['method']}-{facts['task']}", facts["template"], facts, prompting)


def _alpha(given: float | None, facts: Mapping[str, Any], identity: str, expert_prompt: str | None) -> float:
    if given is not None:
        return given
    known = facts.get("large_identity")
    if known is None or facts.get("alpha") is None:
        raise RequestError(f"no alpha was chosen with {identity}, and it has no usual value; give one with --alpha")
    if known != identity:
        raise RequestError(
            f"alpha was chosen with {known}, and the large model is {identity}; give one with --alpha, or run with "
            "proxy.large to have it chosen"
        )
    if (own := facts.get("expert_prompt")) != expert_prompt:
        raise RequestError(
            f"alpha was chosen {_with(own)}, and now speaks {_with(expert_prompt)}; give one with --alpha, or leave "
            "--expert-prompt out"
        )
    return float(facts["alpha"])


def _with(expert_prompt: str | None) -> str:
    return "without an expert prompt" if expert_prompt is None else f"with the expert prompt {expert_prompt!r}"


def _facts(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter's folder and its `proxy.json`."""
    path = folder / "adapter" if (folder / "config.yaml").is_file() else folder
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder; give that of a run, or of an exported adapter")
    if path != folder and not path.is_dir():
        raise RequestError(f"the run {folder} has no adapter yet; let it finish: fedpeft resume {folder}")
    if not (path / FILE).is_file():
        raise RequestError(
            f"{path} has no {FILE}, so nothing can be said with it; a run of task.format generate with adapter.kind "
            "lora writes one"
        )
    facts = read_json(path / FILE)
    if facts.get("format") != FORMAT:
        raise RequestError(f"{path / FILE} has the format {facts.get('format')!r}, and this version reads {FORMAT}")
    return path, facts


def _small(path: Path, facts: Mapping[str, Any]) -> tuple[HFModel, Params]:
    """The small model that the adapter is for, and the adapter."""
    told = facts["small"]
    base = load_base(told["name"], told["dtype"], "auto", told["quantize"])
    if base.sha256 != told["sha256"]:
        raise RequestError(
            f"the small model {told['name']} has sha256 {base.sha256[:12]}, and the adapter is for "
            f"{told['sha256'][:12]}; restore it"
        )
    model = HFModel(
        base, spec_of(read_json(path / NOTE)["adapter"]), 0, readout=GenerateReadout(load_lm_head(told["name"], base))
    )
    params = import_adapter(path, model)
    if tree.sha256(params) != facts["params_sha256"]:
        raise RequestError(f"{path / FILE} belongs to other parameters than those beside it; export the run again")
    return model, params


# --- speaking ---------------------------------------------------------------------------------------------------


def speak(artefact: Artefact, prompt: Sequence[int], settings: Settings, speculate: int = 0) -> Iterator[Emitted]:
    """Token after token of one answer, as it is said; the last one has a `finish`."""
    with Decoding(artefact.trio, [list(prompt)], [settings], speculate) as decoding:
        while emitted := decoding.step():
            yield from emitted


def compare(artefact: Artefact, prompt: Sequence[int], settings: Settings, speculate: int = 0) -> dict[str, Completion]:
    """The answers of the proxy and of its parts alone, by who says them (`VOICES`)."""
    found = {}
    for who, trio in artefact.voices.items():
        own = settings if trio.steered else replace(settings, alpha=None)
        found[who] = decode(trio, [list(prompt)], [own], speculate if trio.steered else 0)[0]
    return found


def answer(artefact: Artefact, prompt: Sequence[int], settings: Settings, speculate: int = 0) -> Completion:
    """One whole answer."""
    return decode(artefact.trio, [list(prompt)], [settings], speculate)[0]
