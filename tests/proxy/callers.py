"""Who asks the endpoint in tests: OpenAI's client, and requests of plain bytes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai

CLIENTS: list[openai.OpenAI] = []  # that are open


def client(url: str, key: str = "none") -> openai.OpenAI:
    """OpenAI's client, which never asks twice; it is closed behind the test."""
    CLIENTS.append(openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20))
    return CLIENTS[-1]


def close_clients() -> None:
    """All that are open."""
    while CLIENTS:
        CLIENTS.pop().close()


def post(url: str, body: Any, path: str = "/v1/completions", **headers: str) -> httpx.Response:
    """The answer to a body: bytes, or something to be written as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"content-type": "application/json"}
    return httpx.post(url + path, content=content, headers=kind | headers, timeout=20)
