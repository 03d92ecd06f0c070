"""Templates and label words: how a text and a label become one sequence that a language model can judge.

A template is written as text with fields: `{text}` (or `{a}`) for a text, `{b}` (or `{text_pair}`) for the second one
of a pair, and for the label `<mask>` in the format `cloze`, `%s` (or `{label}`) in the format `verbalizer`. In the
format `generate` the texts are `{instruction}` and `{context}`; what is to be said comes behind the template.

Templates and words of the known data sets, and the general ones, are those of FedPepTAO's experiments. How a pair is
joined for the verbalizer (both texts, then the question) is ours. So are the words of the demo task, chosen on its
training rows, of which the untrained demo model gets 47 % right (the most frequent label: 21 %).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

TEXT, PAIR, MASK, ANSWER = "{text}", "{b}", "<mask>", "%s"
_NAMES = {TEXT: TEXT, "{a}": TEXT, PAIR: PAIR, "{text_pair}": PAIR, MASK: MASK, ANSWER: ANSWER, "{label}": ANSWER,
          "{instruction}": TEXT, "{context}": PAIR}  # fmt: skip
_FIELD = re.compile(r"(<mask>|%s|\{\w*\})")
FORMATS = ("head", "cloze", "verbalizer", "generate")
CHAT = "chat"  # of generate: instead of a template, the tokenizer's own
LOSS_OVER = ("vocabulary", "labels")  # of cloze; the first is the usual one
GENERAL = {  # (single texts, pairs)
    "cloze": ("{text} . It was <mask> .", "{a} ? <mask> , {b}"),
    "verbalizer": ("{text} It was %s .", "{a} {b} They are %s ."),
}


@dataclass(frozen=True)
class Rendered:
    """A row in its template.

    Attributes:
        text: the whole sequence.
        spans: where the row's own texts begin and end in it, in characters.
        mask: where the template's mask begins; None: it has none.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    mask: int | None


@dataclass(frozen=True)
class Template:
    """A template in pieces: literal text, and the fields under their first names (`TEXT`, `PAIR`, `MASK`, `ANSWER`)."""

    pieces: tuple[str, ...]

    @property
    def masked(self) -> bool:
        """Whether it has a mask."""
        return MASK in self.pieces

    def render(self, text: str, pair: str | None, mask: str) -> Rendered:
        """Fill in a row; nothing in its texts is taken for a field.

        Args:
            mask: how the tokenizer writes its mask.
        """
        whole, spans, place = "", [], None
        own = {TEXT: text, PAIR: pair or ""}
        for piece in self.pieces:
            start = len(whole)
            if piece in own:
                whole += own[piece]
                spans.append((start, len(whole)))
            elif piece == MASK:
                whole, place = whole + mask, start
            else:
                whole += piece
        return Rendered(whole, tuple(spans), place)

    def split(self) -> tuple[Template, str, str]:
        """What stands before the answer, without its last blanks; these blanks; and what stands behind the answer."""
        at = self.pieces.index(ANSWER)
        before, blank = self.pieces[:at], ""
        if before and before[-1] not in (TEXT, PAIR):
            kept = before[-1].rstrip()
            blank = before[-1][len(kept) :]
            before = (*before[:-1], kept) if kept else before[:-1]
        return Template(before), blank, "".join(self.pieces[at + 1 :])


def parse(text: str) -> Template:
    """The template that a text describes; `template_problems` tells whether it can be used."""
    return Template(tuple(_NAMES.get(piece, piece) for piece in _FIELD.split(text) if piece))


def template_problems(
    format: str, template: str | None, words: Sequence[str] | None, loss_over: str = LOSS_OVER[0]
) -> list[str]:
    """What is wrong with `task.format`, `.template`, `.label_words` and `.loss_over`, one sentence each."""
    if format not in FORMATS:
        return [f"task.format {format!r} does not exist; there are: {', '.join(FORMATS)}"]
    if loss_over not in LOSS_OVER:
        return [f"task.loss_over {loss_over!r} does not exist; there are: {', '.join(LOSS_OVER)}"]
    if loss_over != LOSS_OVER[0] and format != "cloze":
        return [f"task.loss_over: {loss_over} belongs to the format cloze, and task.format is {format}"]
    if format == "generate":
        found = [] if words is None else ["task.label_words is for cloze and verbalizer, and task.format is generate"]
        return found + ([] if template in (None, CHAT) else _prompt_problems(str(template)))
    if format == "head":
        given = [key for key, value in (("template", template), ("label_words", words)) if value is not None]
        formats = {"template": "cloze, verbalizer and generate", "label_words": "cloze and verbalizer"}
        return [f"task.{key} belongs to the formats {formats[key]}, and task.format is head" for key in given]
    found = [] if template is None else _field_problems(format, template)
    if words is not None:
        bare = [str(word).strip() for word in words]
        if len(bare) < 2 or len(set(bare)) < len(bare) or not all(bare):
            found.append(f"task.label_words is {list(words)}; give a different word for each label")
    return found


def _prompt_problems(template: str) -> list[str]:
    pieces = parse(template).pieces
    what = f"task.template {template!r}"
    odd = [p for p in pieces if p in (MASK, ANSWER) or (_FIELD.fullmatch(p) and p not in _NAMES)]
    if odd:
        return [f"{what} names {odd[0]}; in the format generate its fields are {{instruction}} and {{context}}"]
    if {pieces.count(TEXT), pieces.count(PAIR)} not in ({1}, {0, 1}):
        return [f"{what} needs {{instruction}} or {{context}}, each at most once; or write {CHAT}"]
    return []


def _field_problems(format: str, template: str) -> list[str]:
    pieces = parse(template).pieces
    what = f"task.template {template!r}"
    found = [
        f"{what} names {piece}; its fields are {{text}}, {{a}} and {{b}}, <mask> (cloze) and %s (verbalizer)"
        for piece in pieces
        if _FIELD.fullmatch(piece) and piece not in _NAMES
    ]
    label, other = (MASK, ANSWER) if format == "cloze" else (ANSWER, MASK)
    if pieces.count(label) != 1:
        found.append(f"{what} has {pieces.count(label)} times {label}; format {format} needs it once")
    if other in pieces:
        found.append(f"{what} has {other}, which format {format} does not know; write {label}")
    if TEXT not in pieces or max(pieces.count(TEXT), pieces.count(PAIR)) > 1:
        found.append(f"{what} needs {{text}} (or {{a}}) once, and {{b}} at most once")
    elif format == "verbalizer" and label in pieces and {TEXT, PAIR} & {*pieces[pieces.index(label) :]}:
        found.append(f"{what} has a text behind %s; in the format verbalizer texts come before the answer")
    return found


# --- known data sets --------------------------------------------------------------------------------------------

_REVIEWS = {"negative": "terrible", "positive": "great", "0": "terrible", "1": "great"}
_ENTAILED = {"entailment": "Yes", "not_entailment": "No", "0": "Yes", "1": "No"}
_NO_YES = {"0": "No", "1": "Yes"}
_KNOWN: Mapping[str, Mapping[str, str]] = {  # by name of the data set: the word of each label
    **dict.fromkeys(("sst2", "sst-2", "mr", "mpqa"), _REVIEWS),
    "cola": {"unacceptable": "unacceptable", "acceptable": "acceptable", "0": "unacceptable", "1": "acceptable"},
    "subj": {"subjective": "subjective", "objective": "objective", "0": "subjective", "1": "objective"},
    "trec": {
        "desc": "Description", "enty": "Entity", "abbr": "Expression", "hum": "Human", "loc": "Location",
        "num": "Number", "0": "Description", "1": "Entity", "2": "Expression", "3": "Human", "4": "Location",
        "5": "Number",
    },
    "mrpc": {"not_equivalent": "No", "equivalent": "Yes", **_NO_YES},
    "boolq": {"false": "No", "true": "Yes", "no": "No", "yes": "Yes", **_NO_YES},
    **dict.fromkeys(("rte", "qnli"), _ENTAILED),
    "demo": {
        "network": "server", "text": "text", "concurrency": "process", "files": "files", "language": "objects",
        "numbers": "numbers", "tooling": "debug",
    },
}  # fmt: skip
_OWN_CLOZE = dict.fromkeys(("trec", "demo"), "<mask> : {text}")


def known(format: str, names: Iterable[str], labels: Sequence[str], pairs: bool) -> tuple[str, tuple[str, ...] | None]:
    """The template of a task and its label words; None: no known data set with these labels.

    Args:
        names: what the task and its folder are called; the first known one counts.
        labels: label names, in order.
        pairs: whether rows have two texts.
    """
    general = GENERAL[format][pairs]
    for name in names:
        words = _KNOWN.get(name.lower(), {})
        if words and all(label.lower() in words for label in labels):
            own = _OWN_CLOZE.get(name.lower(), general) if format == "cloze" else general
            return own, tuple(words[label.lower()] for label in labels)
    return general, None
