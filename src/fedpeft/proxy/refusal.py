"""Refusals of the HTTP endpoint: a status, and the error body that clients of OpenAI's API read."""

from __future__ import annotations

from typing import Any

from fedpeft.core.errors import RequestError, out_of_memory
from fedpeft.proxy.blackbox import BackendError, CannotDo

WRONG, OVERLOADED, FAILED = "invalid_request_error", "rate_limit_error", "server_error"


class Refusal(RequestError):
    """A request that is answered with an error.

    Args:
        message: what is wrong, the value, and the remedy.
        param: the field that is meant.
        code: what programs compare.
        status: of HTTP.
        kind: `invalid_request_error`, `rate_limit_error` or `server_error`.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
        kind: str = WRONG,
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.kind = param, code, status, kind

    def body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told of any error; of one that nobody foresaw, its kind alone, for it may quote a prompt."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, BackendError):
        return Refusal(str(error), None, "backend_error", 502, FAILED)
    if isinstance(error, CannotDo):
        return Refusal(str(error), None, "cannot_do")
    if isinstance(error, RequestError):
        return Refusal(str(error))
    if out_of_memory(error):
        message = "the server ran out of memory; ask for fewer or shorter texts, or start it with a smaller --max-batch"
        return Refusal(message, None, "out_of_memory", 503, FAILED)
    message = f"the server failed with {type(error).__name__}; its log says where"
    return Refusal(message, None, "internal_error", 500, FAILED)
