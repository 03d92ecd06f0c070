"""One connection to a server that is asked for scores: key, time-outs, and what went wrong in words."""

from __future__ import annotations

import json
import math
import time
import weakref
from collections.abc import Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fedpeft.core.errors import RequestError
from fedpeft.proxy.blackbox import BackendError, NoAnswer
from fedpeft.proxy.turns import waiting

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 120.0
CONNECT_S = 10.0
TRICKLE = 1000  # bytes a second, below which an answer that takes longer than the limit is given up
MAX_JSON_BYTES = 64 << 20


class Refused(BackendError):
    """The server answered with an error.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Connection:
    """Requests to one server, over connections that stay open until `close()`; several threads may share it.

    Args:
        url: `http://HOST:PORT` or `https://..`, perhaps with a path before that of the protocol.
        token: goes into the header `Authorization: Bearer TOKEN`; None: no such header.
        timeout_s: seconds until an answer must have begun, and between parts of it; after so long at least `TRICKLE`
            bytes a second must have come.

    Raises:
        RequestError: an address or a key that cannot be one, or httpx is not installed.
    """

    def __init__(self, url: str, token: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        try:
            import httpx
        except ImportError as error:
            raise RequestError("asking a model over HTTP needs httpx: pip install 'fedpeft[proxy]'") from error
        self.url = _checked(url)
        if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
            raise RequestError("the key is empty or no printable ASCII; look at what proxy.token_env's variable holds")
        self._with_key, self._timeout_s = token is not None, timeout_s
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._client = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_S),
            trust_env=not is_loopback(urlsplit(self.url).hostname or ""),
            limits=httpx.Limits(max_connections=64),
        )
        self.close = weakref.finalize(self, self._client.close)  # at the latest when nobody has it any more

    def get_json(self, path: str) -> Any:
        """The JSON of an answer. Raises BackendError."""
        return self._json(self.send("GET", path))

    def post_json(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of an answer to JSON. Raises BackendError."""
        content = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        return self._json(self.send("POST", path, content, "application/json"))

    def send(
        self, method: str, path: str, body: bytes | None = None, kind: str = "", max_bytes: int = MAX_JSON_BYTES
    ) -> bytes:
        """The body of an answer.

        A connection that broke before an answer came is tried once more: one that stayed open too long may have been
        closed by the server meanwhile.

        Raises:
            Refused: the server answered with an error.
            NoAnswer: it did not answer within the limit, or byte by byte.
            BackendError: it could not be reached, or answered with more than `max_bytes`.
        """
        import httpx

        headers = {"content-type": kind} if kind else {}
        for attempt in range(2):
            try:
                with waiting():
                    return self._once(method, path, body, headers, max_bytes)
            except (httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError) as error:
                if attempt:
                    raise self._silent(error) from error
            except httpx.HTTPError as error:
                raise self._silent(error) from error
        raise AssertionError("unreachable")

    def _once(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], max_bytes: int) -> bytes:
        found, began = bytearray(), time.monotonic()
        with self._client.stream(method, path, content=body, headers=dict(headers)) as response:
            for part in response.iter_bytes():
                found += part
                if len(found) > max_bytes:
                    raise BackendError(f"{self.url} answered with more than {max_bytes} bytes; ask for less at a time")
                spent = time.monotonic() - began
                if spent > self._timeout_s and len(found) < TRICKLE * spent:
                    raise NoAnswer(
                        f"{self.url} sent {len(found)} bytes in {spent:.0f} s; see what holds it up, or ask another"
                    )
            if not response.is_success:
                raise self._refusal(response, bytes(found), path)
        return bytes(found)

    def _refusal(self, response: httpx.Response, body: bytes, path: str) -> Refused:
        status = response.status_code
        if status in (401, 403):
            key = "the key that was sent is wrong" if self._with_key else "it wants a key, and none was sent"
            text = f"{self.url} refused ({status}): {key}; name the variable that holds it in proxy.token_env"
            return Refused(text, status)
        if status == 404:
            return Refused(f"{self.url} has no {path} (404); is it a server of the kind that the address says?", status)
        return Refused(f"{self.url} answered {status}: {_message(body)}", status)

    def _silent(self, error: Exception) -> BackendError:
        import httpx

        kind = NoAnswer if isinstance(error, httpx.TimeoutException) else BackendError
        what = f"{type(error).__name__}: {str(error)[:200]}" if str(error) else type(error).__name__
        return kind(f"{self.url} did not answer ({what}); see whether the server runs and can be reached")

    def _json(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            start = body[:80].decode(errors="replace")
            raise BackendError(f"{self.url} did not answer with JSON but {start!r}; is it the right server?") from None


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RequestError(f"the address {url!r} is none ({error}); give http://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise RequestError(f"the address {url!r} is none; give http://HOST:PORT or https://HOST")
    if parts.username or parts.password:
        raise RequestError("a key does not belong into an address; name the variable that holds it in proxy.token_env")
    if parts.fragment or parts.query:
        raise RequestError(f"the address {url!r} has more than a host, a port and a path; leave out what follows")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether a host name or address leads to this machine and cannot be reached from another."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _message(body: bytes) -> str:
    """What an error's body says, whichever of the usual forms it has."""
    try:
        told = json.loads(body)
        told = told.get("error", told)
        text = told.get("message", told) if isinstance(told, dict) else told
    except (ValueError, AttributeError, RecursionError):
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:300] or "nothing more"


def listed(told: Any, *keys: str | int) -> Any:
    """A value deep within JSON; None where it is not there."""
    for key in keys:
        if isinstance(told, dict) and isinstance(key, str):
            told = told.get(key)
        elif isinstance(told, list) and isinstance(key, int) and -len(told) <= key < len(told):
            told = told[key]
        else:
            return None
    return told


def as_logprob(value: Any) -> float | None:
    """A log-probability out of JSON; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def as_ids(told: Any) -> list[int] | None:
    """Token ids out of JSON; None where they are none."""
    if not isinstance(told, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in told):
        return None
    return told
