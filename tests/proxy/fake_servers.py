"""Servers that speak vLLM's and llama.cpp's protocols, as a process: true log-probabilities of a tiny model.

`python tests/proxy/fake_servers.py` prints the two ports. A first part of the path that is one of `FAULTS` makes the
server err in that way.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

KEY = "k3y"
CONTEXT = 40  # tokens that the servers read, fewer than the model
MOST = 20  # vLLM's --max-logprobs
FAULTS = ("strings", "few", "logits", "nolabels", "bare", "garbage", "nothing", "other", "die", "swapped", "texts",
          "hang", "drip")  # fmt: skip
LONGEST = 5  # tokens of a text that a server with the fault "hang" answers


class Handler(BaseHTTPRequestHandler):
    """What both have in common."""

    protocol_version = "HTTP/1.1"
    fault = ""
    lock = threading.Lock()
    seen: list[dict[str, Any]] = []  # noqa: RUF012

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._do({})

    def do_POST(self) -> None:
        self._do(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _do(self, body: dict[str, Any]) -> None:
        first, _, rest = self.path.lstrip("/").partition("/")
        self.fault, path = (first, f"/{rest}") if first in FAULTS else ("", self.path)
        if path == "/seen":
            return self.tell(self.seen)
        if self.headers.get("authorization") != f"Bearer {KEY}":
            return self.tell({"error": {"message": "Unauthorized", "type": "auth"}}, 401)
        if self.fault == "garbage":
            return self.tell("<html>", raw=True)
        if self.fault == "die" and body:
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if self.fault in ("hang", "drip") and path in ("/v1/completions", "/completion"):
            if self.fault == "drip":
                return self.drip()
            texts = body["prompt"] if path == "/v1/completions" else [body["prompt"]]
            if max(map(len, texts)) > LONGEST:
                return time.sleep(3600)
        with self.lock:
            self.seen.append({"path": path, **body})
            self.serve(path, body)
        return None

    def tell(self, told: Any, status: int = 200, raw: bool = False) -> None:
        content = told.encode() if raw else json.dumps(told).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def drip(self) -> None:
        """An answer that never ends, byte by byte."""
        self.send_response(200)
        self.send_header("content-length", "100000")
        self.end_headers()
        with suppress(OSError):  # the client leaves
            while True:
                self.wfile.write(b" ")
                time.sleep(0.02)

    def serve(self, path: str, body: dict[str, Any]) -> None:
        raise NotImplementedError

    def ranked(self, ids: list[int]) -> list[tuple[int, float]]:
        """All tokens behind a text with their log-probabilities, likeliest first."""
        import lent

        last = lent.reference(ids)[-1].tolist()
        return sorted(enumerate(last), key=lambda item: -item[1])

    def ids(self, text: str) -> list[int]:
        import lent

        tokenizer = lent.tiny_lm.word_tokenizer() if self.fault == "other" else lent.TOKENIZER
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class VllmHandler(Handler):
    """`vllm serve`."""

    def serve(self, path: str, body: dict[str, Any]) -> None:
        if path == "/v1/models":
            own = {"id": "tiny/large", "object": "model", "root": "tiny/large", "max_model_len": CONTEXT}
            return self.tell({"object": "list", "data": [own, {**own, "id": "lora"}]})
        if path == "/tokenize":
            assert body["add_special_tokens"] is False and body["model"] == "tiny/large"
            ids = self.ids(body["prompt"])
            return self.tell({"count": len(ids), "max_model_len": CONTEXT, "tokens": ids, "token_strs": None})
        if path != "/v1/completions":
            return self.tell({"detail": "Not Found"}, 404)
        assert body["max_tokens"] == 1 and body["model"] == "tiny/large"
        if self.fault == "texts":
            told = {"type": "string_type", "loc": ["body", "prompt"], "msg": "Input should be a valid string"}
            return self.tell({"detail": [told]}, 422)
        labels = body.get("logprob_token_ids")
        if labels is None and body["logprobs"] > MOST:
            message = f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed: {MOST}"
            return self.tell({"error": {"message": message, "type": "BadRequestError", "code": 400}}, 400)
        if max(map(len, body["prompt"])) + 1 > CONTEXT:
            return self.tell({"error": {"message": "maximum context length", "code": 400}}, 400)
        choices = [self.choice(i, ids, body) for i, ids in enumerate(body["prompt"])]
        if self.fault == "nothing":
            choices = []
        self.tell(
            {"id": "cmpl-1", "object": "text_completion", "choices": choices[:: -1 if self.fault == "swapped" else 1]}
        )
        return None

    def choice(self, index: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        ranked, labels = self.ranked(ids), body.get("logprob_token_ids")
        top = ranked[: body["logprobs"]]
        if labels and self.fault != "nolabels":
            top = [ranked[0], *(own for own in ranked[1:] if own[0] in labels)]
            top = [own for own in top if own[0] in labels or own == ranked[0]]
        top = top[:-1] if self.fault == "few" else top
        if self.fault == "logits":
            top = [(i, value + 9) for i, value in top]
        by_id = body["return_tokens_as_token_ids"] and self.fault != "strings"
        named = {(f"token_id:{i}" if by_id else f"word{i}"): max(value, -9999.0) for i, value in top}
        logprobs = {
            "tokens": list(named)[:1],
            "token_logprobs": [top[0][1]],
            "top_logprobs": [named],
            "text_offset": [0],
        }
        told = None if self.fault == "bare" else logprobs
        return {"index": index, "text": "x", "logprobs": told, "finish_reason": "length"}


class LlamaHandler(Handler):
    """`llama-server`."""

    def serve(self, path: str, body: dict[str, Any]) -> None:
        if path == "/props":
            settings = {"n_ctx": CONTEXT, "id": 0}
            return self.tell({"default_generation_settings": settings, "total_slots": 2, "model_path": "/m/tiny.gguf"})
        if path == "/v1/models":
            import lent

            if self.fault == "few":
                return self.tell({"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}, 404)
            return self.tell({"data": [{"id": "tiny", "meta": {"n_vocab": lent.VOCAB, "n_ctx_train": 64}}]})
        if path == "/tokenize":
            assert body["add_special"] is False
            ids = self.ids(body["content"])
            return self.tell({"tokens": [str(i) for i in ids] if self.fault == "strings" else ids})
        if path != "/completion":
            return self.tell({"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}, 404)
        assert body["n_predict"] == 1 and body["temperature"] < 0
        assert body["post_sampling_probs"] is False and all(isinstance(i, int) for i in body["prompt"])
        top = self.ranked(body["prompt"])[: body["n_probs"]]
        named = [{"id": i, "token": f"word{i}", "bytes": [1], "logprob": value} for i, value in top]
        if self.fault == "strings":
            named = [{"tok_str": own["token"], "prob": 0.5} for own in named]
        told = {"content": "x", "tokens": [], "completion_probabilities": [{**named[0], "top_logprobs": named}]}
        if self.fault == "bare":
            told["completion_probabilities"] = []
        self.tell(told)
        return None


@contextmanager
def running() -> Iterator[dict[str, str]]:
    """The servers in a process of their own: addresses by protocol."""
    with Popen([sys.executable, __file__], stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ports = process.stdout.readline().split()
            assert len(ports) == 2, "the servers did not start"
            yield {name: f"http://127.0.0.1:{port}" for name, port in zip(("vllm", "llamacpp"), ports, strict=True)}
        finally:
            process.kill()


def main() -> None:
    here = Path(__file__).parent
    sys.path[:0] = [str(here.parent), str(here)]
    import lent

    lent.reference([1])
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (VllmHandler, LlamaHandler)]
    print(*(server.server_port for server in servers), flush=True)
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()
