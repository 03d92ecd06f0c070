"""Which backend a specification means: a model in this process, or one of three kinds of server."""

from __future__ import annotations

from urllib.parse import parse_qsl

from fedpeft.core.errors import RequestError
from fedpeft.proxy import llamacpp, vllm
from fedpeft.proxy.blackbox import BlackBoxLM
from fedpeft.proxy.connection import TIMEOUT_S, Connection
from fedpeft.proxy.inprocess import load_inprocess
from fedpeft.proxy.llamacpp import LlamaCpp
from fedpeft.proxy.remote import Remote
from fedpeft.proxy.vllm import Vllm

KINDS = {"": ("wire",), "vllm": ("model",), "llamacpp": ()}  # by what stands before http: options after a "?"
KNOWN = "a model's name or folder, http://HOST:PORT, vllm+http://HOST:PORT or llamacpp+http://HOST:PORT"


def open_backend(
    spec: str,
    *,
    token: str | None = None,
    top_k: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    quantize: str = "none",
    timeout_s: float = TIMEOUT_S,
) -> BlackBoxLM:
    """The large model that a specification means, once it has answered.

    Args:
        spec: a shipped model, a folder in Hugging Face format or a hub name (in this process); `http://HOST:PORT` (our
            logit server; `?wire=float16` halves what travels); `vllm+http://HOST:PORT` (`?model=NAME` where it serves
            several); `llamacpp+http://HOST:PORT`. `https` in place of `http` with all of them.
        token: the server's key; None: none is sent.
        top_k: most candidates that vLLM or llama.cpp is asked for; None: 20 and 40.
        dtype, device, quantize: of a model in this process.
        timeout_s: seconds until a server must have begun to answer.

    Raises:
        RequestError: a specification that means nothing, or a token for a model in this process.
        ModelError: a model in this process that cannot be loaded.
        CannotDo: fewer candidates than make sense.
        BackendError: the server does not answer, or is of another kind.
    """
    scheme, mark, rest = spec.partition("://")
    if not mark:
        if token is not None:
            raise RequestError(f"{spec} is a model in this process and takes no key; leave out proxy.token_env")
        return load_inprocess(spec, dtype, device, quantize)
    kind, _, transport = scheme.rpartition("+")
    if transport not in ("http", "https") or kind not in KINDS:
        raise RequestError(f"{scheme}:// is no known kind of backend; give {KNOWN}")
    address, _, query = rest.partition("?")
    options = _options(spec, query, KINDS[kind])
    connection = Connection(f"{transport}://{address}", token, timeout_s)
    found: Remote | Vllm | LlamaCpp
    if kind == "vllm":
        found = Vllm(connection, vllm.TOP_K if top_k is None else top_k, options.get("model"))
    elif kind == "llamacpp":
        found = LlamaCpp(connection, llamacpp.TOP_K if top_k is None else top_k)
    else:
        found = Remote(connection, **options)
    _ = found.caps  # it answers, and is what it is taken for
    return found


def _options(spec: str, query: str, known: tuple[str, ...]) -> dict[str, str]:
    found = dict(parse_qsl(query, keep_blank_values=True))
    if wrong := sorted(found.keys() - set(known)):
        raise RequestError(f"{wrong[0]!r} in {spec} is no option; there is {' and '.join(known) or 'none'}")
    return found
