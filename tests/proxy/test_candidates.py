"""vLLM and llama.cpp over loopback: fakes in a process of their own that compute the scores of the same tiny model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import torch

import trios
from fedpeft.core.errors import RequestError
from fedpeft.proxy.backends import open_backend
from fedpeft.proxy.blackbox import BackendError, CannotDo, Full, Labels, TopK
from fedpeft.proxy.candidates import gathered
from fedpeft.proxy.connection import Connection, Refused
from fedpeft.proxy.decode import decode
from fedpeft.proxy.llamacpp import LlamaCpp
from fedpeft.proxy.recorded import ask
from fedpeft.proxy.scoring import alpha_curve, score
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.tokenizers import check_tokenizers
from fedpeft.proxy.trio import Trio
from fedpeft.proxy.vllm import Vllm
from proxy.fake_servers import CONTEXT, KEY
from proxy.lent import TOKENIZER, VOCAB, large, prompts, reference

KINDS = ["vllm", "llamacpp"]


def backend(fakes: dict[str, str], kind: str, fault: str = "", **more: Any) -> Any:
    return open_backend(f"{kind}+{fakes[kind]}{fault and '/'}{fault}", token=KEY, **more)


def seen(fakes: dict[str, str], kind: str) -> list[dict[str, Any]]:
    return list(json.loads(httpx.get(f"{fakes[kind]}/seen", trust_env=False).text))


def test_what_they_can_do(fakes):
    vllm, llama = backend(fakes, "vllm").caps, backend(fakes, "llamacpp").caps
    assert (
        vllm.identity == f"tiny/large at vllm+{fakes['vllm']}"
        and llama.identity == f"tiny.gguf at llamacpp+{fakes['llamacpp']}"
    )
    assert (vllm.top_k, llama.top_k) == (20, 40) and (vllm.vocab, llama.vocab) == (0, VOCAB)
    for caps in (vllm, llama):
        assert not caps.full and not caps.block and not caps.deterministic and caps.fingerprint is None
        assert caps.max_context == CONTEXT - 1
    assert backend(fakes, "vllm", top_k=7).caps.top_k == backend(fakes, "llamacpp", top_k=7).caps.top_k == 7
    assert backend(fakes, "llamacpp", "few").caps.vocab == 0  # an older server without /v1/models


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_the_likeliest_with_true_log_probabilities(fakes, kind):
    texts = prompts(5, 2)
    session = backend(fakes, kind).open(texts, TopK(8))
    first = session.first
    session.keep([1, 0])
    later = session.scores([[5], [6]])
    for row, (text, found, place) in enumerate(
        ((texts[0], first, 0), (texts[1], first, 1), ([*texts[1], 5], later, 0), ([*texts[0], 6], later, 1))
    ):
        right, ids = reference(text)[-1].sort(descending=True, stable=True)
        assert found.ids is not None and found.ids[place, 0].tolist() == ids[:8].tolist(), row
        torch.testing.assert_close(found.values[place, 0].double(), right[:8], atol=1e-6, rtol=0)
        assert float(found.mass[place, 0]) == pytest.approx(float(right[:8].exp().sum()), abs=1e-6)
    assert not first.exact and first.values.shape == (2, 1, 8) and first.values.dtype == torch.float32
    own = [body for body in seen(fakes, kind) if body["path"].endswith(("completions", "completion"))][-1]
    assert own["prompt"] in ([[*texts[1], 5], [*texts[0], 6]], [*texts[1], 5], [*texts[0], 6])  # ids, the whole text
    session.close()
    with pytest.raises(RequestError, match="closed"):
        session.scores([[1], [1]])


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_says_what_it_says_in_process_with_as_many_candidates(fakes, kind):
    small = trios.model("gpt2", 1)
    tuned, base = trios.Speaker(small, trios.adapter(small, 3)), trios.Speaker(small)
    texts = [[token % trios.VOCABULARY for token in own] for own in prompts(4, 2)]
    found = []
    for model in (large(), backend(fakes, kind)):
        trio = Trio(model, tuned, base, None, trios.VOCABULARY, frozenset({2}), candidates=20)
        found.append([own.tokens for own in decode(trio, texts, [Settings(max_tokens=6, alpha=0.7)] * 2)])
    assert found[0] == found[1]


def test_answers_in_another_order_are_put_right(fakes):
    texts = prompts(6, 3)
    right, found = (backend(fakes, "vllm", fault).open(texts, TopK(5)).first for fault in ("", "swapped"))
    assert torch.equal(right.values, found.values)


def test_labels(fakes):
    text, labels = prompts(7, 1), (40, 3, 9, 77)
    found = backend(fakes, "vllm").open(text, Labels(labels)).first
    right = reference(text[0])[-1][list(labels)]
    torch.testing.assert_close(found.values[0, 0].double(), right, atol=1e-6, rtol=0)
    assert found.ids is not None and found.ids.tolist() == [[list(labels)]]
    assert float(found.mass) == pytest.approx(float(right.exp().sum()), abs=1e-6)
    with pytest.raises(CannotDo, match="129 labels: it gives 128"):
        backend(fakes, "vllm").open(text, Labels(tuple(range(129))))
    with pytest.raises(CannotDo, match="logprob_token_ids"):
        backend(fakes, "vllm", "nolabels").open(text, Labels(labels))
    with pytest.raises(CannotDo, match=r"labels.*likeliest"):
        backend(fakes, "llamacpp").open(text, Labels(labels))


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_are_probed(fakes, kind):
    assert check_tokenizers(TOKENIZER, backend(fakes, kind), {0}) == VOCAB
    with pytest.raises(RequestError, match="one family"):
        check_tokenizers(TOKENIZER, backend(fakes, kind, "other"), {0})


@pytest.mark.parametrize("kind", KINDS)
def test_what_they_cannot_do(fakes, kind):
    made = backend(fakes, kind)
    with pytest.raises(CannotDo, match="all tokens"):
        made.open([[1]], Full())
    with pytest.raises(CannotDo, match="41 tokens"):
        made.open([[1]], TopK(41))
    with pytest.raises(CannotDo, match="4 candidates"):
        backend(fakes, kind, top_k=4)
    with pytest.raises(RequestError, match=f"{CONTEXT} tokens"):
        made.open([[1] * CONTEXT], TopK(5))
    session = made.open([[1]], TopK(5))
    with pytest.raises(CannotDo, match="scores of several positions"):
        session.scores([[1, 2]])
    with pytest.raises(CannotDo, match="speculate to 0"):
        session.rollback(1)


@pytest.mark.parametrize(
    ("kind", "fault", "error", "words"),
    [
        ("vllm", "strings", CannotDo, "return_tokens_as_token_ids"),
        ("vllm", "texts", CannotDo, "takes texts alone"),
        ("vllm", "bare", CannotDo, "no logprobs"),
        ("vllm", "few", BackendError, "4 candidates where 5"),
        ("vllm", "logits", BackendError, "raw_logprobs"),
        ("vllm", "nothing", BackendError, "did not answer each of 1"),
        ("vllm", "die", BackendError, "did not answer"),
        ("llamacpp", "strings", CannotDo, "as text"),
        ("llamacpp", "bare", CannotDo, "completion_probabilities"),
        ("llamacpp", "die", BackendError, "did not answer"),
    ],
)
def test_servers_that_answer_otherwise_are_named(fakes, kind, fault, error, words):
    with pytest.raises(error, match=words):
        backend(fakes, kind, fault).open([[1, 2]], TopK(5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_key_or_another_kind_of_server(fakes, kind):
    for token, words in ((None, "none was sent"), ("other", "that was sent is wrong")):
        with pytest.raises(Refused, match=words):
            open_backend(f"{kind}+{fakes[kind]}", token=token)
    with pytest.raises(BackendError, match="not answer with JSON"):
        backend(fakes, kind, "garbage")
    with pytest.raises(BackendError, match="has no /v1/model "):
        open_backend(fakes[kind], token=KEY)  # as a logit server
    other = fakes["llamacpp" if kind == "vllm" else "vllm"]
    with pytest.raises(BackendError, match=r"is it (a server of the kind|a vLLM server)"):
        open_backend(f"{kind}+{other}", token=KEY)
    with pytest.raises(CannotDo, match="tokenising"):
        LlamaCpp(Connection(f"{fakes['llamacpp']}/strings", KEY)).tokenize("a b")


def test_vllm_tells_which_models_it_has_and_how_many_candidates(fakes):
    assert open_backend(f"vllm+{fakes['vllm']}?model=lora", token=KEY).caps.identity.startswith("lora at")
    with pytest.raises(BackendError, match="not the model 'none'; it has tiny/large, lora"):
        open_backend(f"vllm+{fakes['vllm']}?model=none", token=KEY)
    with pytest.raises(Refused, match="greater than max allowed: 20; see --max-logprobs"):
        Vllm(Connection(fakes["vllm"], KEY), 30).open([[1]], TopK(25))


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_more_is_refused_before_the_first_token(fakes, kind):
    small = trios.model("gpt2", 1)
    tuned, base = trios.Speaker(small, trios.adapter(small, 3)), trios.Speaker(small)

    def trio(**more: Any) -> Trio:
        return Trio(backend(fakes, kind), tuned, base, None, trios.VOCABULARY, frozenset({2}), **more)

    texts, starts = [[5, 6, 7, 8], [9, 10, 11]], [2, 1]
    asked = len(seen(fakes, kind))
    for refused in (
        lambda: trio(candidates=4),
        lambda: decode(trio(), texts, [Settings(max_tokens=2, alpha=1.0)] * 2, 3),  # speculation
        lambda: score(trio(), texts, starts, 1.0),  # perplexity, continuations of several tokens
        lambda: alpha_curve(trio(), texts, starts),
        lambda: list(ask(trio().large, texts, starts, trios.VOCABULARY)),  # distillation
    ):
        with pytest.raises(CannotDo) as caught:
            refused()
        assert caught.value.remedy
    assert not [body for body in seen(fakes, kind)[asked:] if "prompt" in body]


def test_golden_candidates():
    """Log-probabilities of (2, 1, 0): the two likeliest cover .909969; of equal ones the lower id comes first."""
    z = torch.tensor([2.0, 1.0, 0.0]).double().log_softmax(0).tolist()
    told = gathered([{7: z[2], 4: z[1], 9: z[0]}], TopK(2), "x")
    assert told.ids is not None and told.ids.tolist() == [[[9, 4]]]
    assert float(told.mass) == pytest.approx(0.909969, abs=1e-6)
    tied = gathered([{8: -2.0, 3: -2.0, 5: -1.0}], TopK(2), "x")
    assert tied.ids is not None and tied.ids.tolist() == [[[5, 3]]]
