"""What the tuned small model alone reads around a prompt, such as a system prompt or a chat template.

Proxy-tuning (Liu et al. 2024, arXiv 2401.08565) may give its expert another prompt than the other two models: they
share the tokens of the answer, not those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedpeft.core.errors import RequestError
from fedpeft.core.examples import Examples

PLACE = "{prompt}"
CHAT = "chat"  # in place of a text: the tokenizer's own template
ALLOWED = f"a text with {PLACE} at most once, or {CHAT}"


@dataclass(frozen=True)
class Expert:
    """Token ids around a prompt.

    Attributes:
        before, behind: what stands there.
        lead: special tokens that the tokenizer puts in front of a text.
        leads: whether they stay in front of a prompt that begins with them; else they go.
    """

    before: tuple[int, ...]
    behind: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()
    leads: bool = True

    def around(self, prompt: Sequence[int]) -> list[int]:
        """What the tuned model reads for a prompt."""
        n = len(self.lead) if tuple(prompt[: len(self.lead)]) == self.lead else 0
        return [*(prompt[:n] if self.leads else ()), *self.before, *prompt[n:], *self.behind]

    def examples(self, data: Examples) -> Examples:
        """Rows whose answers stand behind what the tuned model reads."""
        assert data.starts is not None, "rows of the format generate have answers"
        pairs = list(zip(data.tokens, data.starts.tolist(), strict=True))
        fronts = [self.around(own[:start].tolist()) for own, start in pairs]
        tokens = tuple(
            np.asarray([*front, *own[start:].tolist()], np.int32)
            for front, (own, start) in zip(fronts, pairs, strict=True)
        )
        return replace(data, tokens=tokens, starts=np.fromiter(map(len, fronts), np.int64, count=len(fronts)))


def placed(text: str) -> bool:
    """Whether a text says where the prompt stands at most once."""
    return text.count(PLACE) <= 1


def expert_of(text: str | None, tokenizer: Any) -> Expert | None:
    """An expert prompt in token ids; None where there is none.

    Args:
        text: stands before the prompt, or around it where it has `{prompt}`; `chat`: the tokenizer's own template;
            None or empty: nothing.

    Raises:
        RequestError: a text that gives no token or has `{prompt}` twice, or a tokenizer without a template.
    """
    if not text:
        return None
    if not placed(text):
        raise RequestError(f"the expert prompt {text!r} has {PLACE} {text.count(PLACE)} times; give {ALLOWED}")
    if text == CHAT:
        if not getattr(tokenizer, "chat_template", None):
            raise RequestError(f"the expert prompt is {CHAT}, and the tokenizer has no chat template; write a text")
        message = [{"role": "user", "content": PLACE}]
        whole = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    else:
        whole = text if PLACE in text else text + PLACE
    before, _, behind = whole.partition(PLACE)
    found = Expert(_ids(tokenizer, before), _ids(tokenizer, behind), _lead(tokenizer), text != CHAT)
    if not found.before and not found.behind:
        raise RequestError(f"the expert prompt {text!r} gives no token of the tokenizer; write something else")
    return found


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(map(int, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])) if text else ()


def _lead(tokenizer: Any) -> tuple[int, ...]:
    told = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, special = told["input_ids"], told["special_tokens_mask"]
    n = next((i for i, mark in enumerate(special) if not mark), len(special))
    return tuple(map(int, ids[:n]))
