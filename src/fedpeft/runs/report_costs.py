"""What proxy-tuning cost beside tuning the large model itself, as a table and a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from fedpeft.runs.history import Group
from fedpeft.runs.report_sections import section, table
from fedpeft.runs.units import bytes_text, count_text, flops_text

ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (  # key of a bill, what it is, how it is written
    ("once_bytes", "a client's frozen model, once", bytes_text),
    ("adapter_bytes", "adapters of all clients, both ways", bytes_text),
    ("client_memory_bytes", "memory of a client's training step", bytes_text),
    ("client_flops", "operations of all clients", flops_text),
    ("server_flops", "operations of the server in training", flops_text),
    ("token_flops", "operations of a served token", flops_text),
    ("serving_bytes", "memory to serve one request", bytes_text),
)


def proxy_costs(g: Group) -> str:
    """The section of a group's first run that knows its large model; empty without one."""
    found = next((own for run in g.runs if isinstance(own := run.manifest.get("proxy_costs"), Mapping) and own), None)
    if found is None:
        return ""
    proxy, direct = found["proxy"], found["direct"]
    rows = [
        [
            what,
            show(proxy[key]) + ("" if key != "adapter_bytes" else ", counted"),
            show(direct[key]),
            _ratio(proxy[key], direct[key]),
        ]
        for key, what, show in ROWS
    ]
    counted, request = found["counted"], found["requests"]
    note = (
        f"Clients tuned the small model; beside it the same rounds over {found['large']}, with LoRA of the same rank. "
        f"{count_text(counted['clients'], 'client')}, {count_text(counted['turns'], 'turn')} and "
        f"{count_text(counted['tokens'], 'token')} are counted, the rest is computed from the models' configurations; "
        f"a request has {count_text(request['prompt_tokens'], 'token')} and its answer "
        f"{request['answer_tokens']:,}."
    )
    head = ["cost", "proxy-tuning", "direct tuning", "ratio"]
    return section(f"What {g.label} costs and saves", note, table(head, rows, words="cost") + _words(found))


def _words(found: Mapping[str, Any]) -> str:
    tokens = found["break_even_tokens"]
    if tokens is None:
        said = "Training cost more than tuning the large model would have, and so does every served token."
    else:
        said = (
            f"Every served token costs more than with a large model that was tuned itself; after about "
            f"{count_text(round(tokens), 'served token')} that has used up the operations which training saved."
        )
    lacks = f" Not counted: {found['lacks']}." if found.get("lacks") else ""
    return f"<p>{escape(said + lacks)}</p>"


def _ratio(own: float, other: float) -> str:
    return f"{own / other:.3g}" if other else "—"
