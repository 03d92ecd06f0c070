"""How well generated texts match their references: exact match and ROUGE-L."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_match(said: str, references: Sequence[str], what: str = "text") -> bool:
    """Whether a text equals one of its references.

    Args:
        what: `text`, compared without case and with blanks collapsed; `number`, by the last number of each.
    """
    if what == "number":
        own = last_number(said)
        return own is not None and own in {last_number(reference) for reference in references}
    return _plain(said) in {_plain(reference) for reference in references}


def last_number(text: str) -> float | None:
    """The last number of a text, commas between its digits left out: 1234.0 of "is 1,234."; None: there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def rouge_available() -> bool:
    """Whether the library that computes ROUGE-L is installed."""
    try:
        import rouge_score.rouge_scorer  # noqa: F401
    except ImportError:
        return False
    return True


def rouge_l(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean over texts of ROUGE-L's F with stemmed words, each text against its best reference (rouge-score).

    Reference: Lin 2004, "ROUGE: a package for automatic evaluation of summaries".
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = (
        max(scorer.score(one, text)["rougeL"].fmeasure for one in own)
        for text, own in zip(said, references, strict=True)
    )
    return math.fsum(scores) / len(said)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
