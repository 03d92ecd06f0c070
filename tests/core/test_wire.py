"""Reduced precision: how exact, how small, and that methods and engines see nothing of it."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toy
from fedpeft import methods
from fedpeft.core import records
from fedpeft.core.changes import Copy, News, news_for
from fedpeft.core.client import Job
from fedpeft.core.cohort import everyone
from fedpeft.core.errors import ClientError, RecordError, RequestError
from fedpeft.core.exchange import Answers, Call, ClientEnv, Exchange, Nothing, ServerEnv, Update, Weights, matching
from fedpeft.core.federate import Done, federate
from fedpeft.core.fit import SGD, Fit, Fitted, Moments
from fedpeft.core.wire import BLOCK, WIRES, Packed, Unpacked, Wired, pack, unpack, wired, with_wire
from fedpeft.engines.inprocess import InProcess
from fedpeft.methods.fedavg import FedAvg
from fedpeft.methods.fedex_lora import Broadcast
from record_examples import example, minilm_lora, same
from toy import ToyModel, federation

NARROW = [wire for wire in WIRES if wire != "float32"]
ENV: Any = None  # nothing of it is used here


# --- precision and size -----------------------------------------------------------------------------------------


def test_bfloat16_is_exact_to_two_to_the_minus_eight() -> None:
    t = torch.randn(7, 100, dtype=torch.float64) * torch.logspace(-30, 30, 100, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        got = unpack(pack(Weights({"w": t.to(dtype)}), "bfloat16"), Weights, "bfloat16").params["w"]
        assert got.dtype is dtype
        error = (got.double() - t).abs() / t.abs()
        assert 0 < error.max() <= 2**-8


numbers = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)


@settings(deadline=None, max_examples=60)
@given(st.lists(numbers, min_size=BLOCK, max_size=3 * BLOCK), st.sampled_from([torch.float32, torch.float64]))
def test_int8_is_exact_to_half_a_step_of_its_block(values: list[float], dtype: torch.dtype) -> None:
    t = torch.tensor(values, dtype=dtype)
    packed = pack(Weights({"w": t}), "int8")
    got = unpack(packed, Weights, "int8").params["w"]
    assert packed.tensors["params/w"].dtype is torch.int8 and got.dtype is dtype and got.shape == t.shape
    for i, start in enumerate(range(0, len(t), BLOCK)):
        block = t[start : start + BLOCK].double()
        step = float(block.abs().max()) / 127
        assert math.isclose(float(packed.scales[i]), step, rel_tol=1e-6)
        error = (got[start : start + BLOCK].double() - block).abs()
        assert error.max() <= step / 2 * (1 + 1e-4)  # and the rounding of float32


def test_int8_by_hand() -> None:
    """The block 1..64 has the scale 64/127; 10 / scale = 19.84, so 10 travels as 20 and comes back as 20 * 64/127."""
    packed = pack(Weights({"w": torch.arange(1.0, 65.0)}), "int8")
    assert packed.scales.tolist() == [torch.tensor(64 / 127).item()]
    assert packed.tensors["params/w"][9] == 20
    assert unpack(packed, Weights, "int8").params["w"][9].item() == pytest.approx(20 * 64 / 127)


def test_int8_keeps_zeros_and_shapes() -> None:
    t = torch.zeros(5, 3, 13)
    t[4, 2, 12] = -8.0
    assert torch.equal(unpack(pack(Weights({"w": t}), "int8"), Weights, "int8").params["w"], t)


@pytest.mark.parametrize("wire", NARROW)
def test_what_is_not_narrowed_comes_back_to_the_bit(wire: str) -> None:
    small, big = torch.randn(63), torch.randn(2, BLOCK)
    exact = {
        "small": small, "small double": small.double(), "half": big.half(), "brain": big.bfloat16(),
        "int": torch.arange(1000), "byte": torch.arange(200).to(torch.int8), "bool": big > 0, "empty": big[:0],
    }  # fmt: skip
    record = example(params=exact | {"big": big}, real=0.1)
    got = unpack(pack(record, wire), type(record), wire)
    assert not torch.equal(got.params["big"], big)
    assert same(replace(got, params={name: got.params[name] for name in exact}), replace(record, params=exact))


@pytest.mark.parametrize(("wire", "ratio"), [("float32", 1), ("bfloat16", 1 / 2), ("int8", 1 / 4 + 1 / BLOCK)])
def test_bytes_of_minilm_lora(wire: str, ratio: float) -> None:
    """int8: one byte per number and one scale of four bytes per block, so 1/4 + 4/(4*64) of float32."""
    update = Update(minilm_lora(), 100, 0.5)
    raw = sum(t.nbytes for t in update.params.values())
    assert ratio * raw <= len(records.encode(pack(update, wire))) <= ratio * raw + 0.02 * raw


def test_packing_changes_nothing_and_equal_tensors_are_narrowed_once() -> None:
    t = torch.randn(100)
    before = t.clone()
    seen: dict[int, Any] = {}
    a, b = (pack(Weights({"w": t}), "int8", seen) for _ in range(2))
    assert a.tensors["params/w"] is b.tensors["params/w"] and torch.equal(t, before)


@pytest.mark.parametrize("wire", NARROW)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_stay_so(wire: str, bad: float) -> None:
    t = torch.ones(3 * BLOCK)
    t[70] = bad
    got = unpack(pack(Weights({"w": t}), wire), Weights, wire).params["w"]
    assert not got[70].isfinite() and got[:64].isfinite().all() and got[128:].isfinite().all()


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [lambda w: pack(Nothing(), w), lambda w: with_wire(ENV, w), lambda w: wired(ENV, w)])
def test_a_wire_that_does_not_exist_is_refused(use: Any) -> None:
    with pytest.raises(RequestError, match="'fp4' does not exist; use one of float32, bfloat16, int8"):
        use("fp4")


def lied(packed: Packed, **head: Any) -> Packed:
    return replace(packed, value=json.dumps(json.loads(packed.value) | head))


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (lambda p: replace(p, value="{"), "not JSON"),
        (lambda p: replace(p, value="{}"), "needs wire, type, value and dtypes"),
        (lambda p: lied(p, wire="bfloat16"), "set run.wire alike"),
        (lambda p: lied(p, type="Update"), "Update by the wire int8 came where Weights"),
        (lambda p: lied(p, dtypes=3), "not those of its tensors"),
        (lambda p: lied(p, dtypes={"other": "int8"}), "not those of its tensors"),
        (lambda p: lied(p, dtypes={"params/w": "int64"}), "came as torch.int8"),
        (lambda p: lied(p, dtypes={"params/w": "complex64"}), "complex64"),
        (lambda p: lied(p, dtypes={"params/w": [1]}), "came as torch.int8"),
        (lambda p: lied(p, value={"params": 2}), "said to hold 2 tensors"),
        (lambda p: replace(p, tensors={"params/w": torch.ones(100)}), "came as torch.float32"),
        (lambda p: replace(p, scales=p.scales[:1]), "needs 2 scales; 1 are left"),
        (lambda p: replace(p, scales=p.scales.repeat(2)), "4 scales came where 2 were expected"),
        (lambda p: replace(p, scales=p.scales.double()), "scales must be float32"),
        (lambda p: replace(p, scales=torch.tensor(1.0)), "in one dimension"),
        (lambda p: replace(p, tensors=dict(p.tensors) | {"x": torch.ones(2)}), "'x' is not part of the record"),
    ],
)
def test_packed_records_that_lie_are_refused(lie: Any, words: str) -> None:
    packed = pack(Weights({"w": torch.randn(100)}), "int8")
    assert unpack(packed, Weights, "int8").params["w"].shape == (100,)
    with pytest.raises(RecordError, match=words):
        unpack(lie(packed), Weights, "int8")


# --- exchanges and transports -----------------------------------------------------------------------------------


def train(down: Weights, memory: Moments, env: ClientEnv) -> Generator[Fit, Fitted, tuple[Update, Moments]]:
    try:
        fitted = yield Fit(down.params, toy.points([1, 2]), (), SGD())
    except ClientError:
        return Update(down.params, 0, -1.0), memory
    return Update(fitted.params, 3, 0.25), Moments(memory.step + 1)


def score(down: Weights, memory: Moments, env: ClientEnv) -> tuple[Update, Moments]:
    return Update(down.params, 2, 0.5), memory


def total(state: float, ups: Mapping[str, Update], env: ServerEnv) -> float:
    return state + sum(up.loss for up in ups.values())


def exchange(work: Any) -> Exchange:
    return Exchange("train", Weights, Update, everyone, lambda state, client: Weights(PARAMS), work, total)


PARAMS = {"w": torch.randn(2, 100), "b": torch.randn(3)}
FITTED = Fitted({name: t + 1 for name, t in PARAMS.items()}, (0.25,), 1, 3, Moments())


@pytest.mark.parametrize("wire", NARROW)
def test_wired_work_sees_plain_records_and_its_own_memory(wire: str) -> None:
    end = wired(exchange(train), wire)
    assert (end.name, end.down, end.up) == ("train", Packed, Packed)
    down = end.send(None, "a")
    job = Job(end, down, Moments(4), ENV)
    assert job.fit is not None and same(Weights(job.fit.params), unpack(down, Weights, wire))
    job.env = ClientEnv("a", ToyModel(), {}, 0, 1)
    job.resume(FITTED)
    assert job.result is not None
    up, memory = job.result
    assert memory == Moments(5) and isinstance(up, Packed)
    assert same(unpack(up, Update, wire), unpack(pack(Update(FITTED.params, 3, 0.25), wire), Update, wire))
    end.accept(down, up)
    assert end.fold(1.0, {"a": up, "b": up}, ENV) == 1.5


def test_errors_reach_the_inner_generator_and_plain_work_is_packed_too() -> None:
    end = wired(exchange(train), "int8")
    job = Job(end, end.send(None, "a"), Moments(), ENV)
    job.resume(ClientError("out of memory"))
    assert job.result is not None and unpack(job.result[0], Update, "int8").loss == -1.0
    job = Job(wired(exchange(score), "int8"), end.send(None, "a"), Moments(), ENV)
    assert job.result is not None and unpack(job.result[0], Update, "int8").loss == 0.5
    job = Job(end, pack(Weights(PARAMS), "bfloat16"), Moments(), ENV)
    assert isinstance(job.error, RecordError)


def test_a_wired_answer_is_checked_as_the_plain_one_would_be() -> None:
    end = wired(exchange(score), "int8")
    down = pack(Weights(PARAMS), "int8")
    with pytest.raises(RecordError, match="has shape"):
        end.accept(down, pack(Update({"w": torch.ones(1), "b": torch.ones(3)}, 1, 0.0), "int8"))
    with pytest.raises(RecordError, match="counts -1"):
        end.accept(down, pack(Update(PARAMS, -1, 0.0), "int8"))
    with pytest.raises(RecordError, match="loss of Update is nan"):
        end.accept(down, pack(Update(PARAMS, 1, math.nan), "int8"))
    with pytest.raises(RecordError, match=r"params/w .* not finite"):
        end.accept(down, pack(Update({"w": torch.full((2, 100), math.inf), "b": torch.ones(3)}, 1, 0.0), "int8"))


@dataclass(frozen=True)
class Direct:
    """An engine that lets every client work at once, over encoded records."""

    def clients(self) -> Sequence[str]:
        return ["a", "b"]

    def exchange(self, call: Call, downs: Mapping[str, Any]) -> Answers:
        ups = {}
        for client, down in downs.items():
            sent = records.decode(records.encode(down), call.exchange.down)
            up, _ = call.exchange.work(sent, Moments(), ENV)  # type: ignore[misc]
            ups[client] = records.decode(records.encode(up), call.exchange.up)
            call.exchange.accept(down, ups[client])
        return Answers(ups)


@pytest.mark.parametrize("wire", NARROW)
def test_a_wired_transport_is_a_transport(wire: str) -> None:
    transport = with_wire(Direct(), wire)
    assert isinstance(transport, Wired) and transport.clients() == ["a", "b"]
    downs = {client: Weights(PARAMS) for client in ("b", "a")}
    answers = transport.exchange(Call(exchange(score), 0, 1, 1), downs)
    assert isinstance(answers.ups, Unpacked) and list(answers.ups) == ["b", "a"] and len(answers.ups) == 2
    assert "a" in answers.ups and "c" not in answers.ups
    narrow = unpack(pack(Weights(PARAMS), wire), Weights, wire).params
    twice = unpack(pack(Weights(narrow), wire), Weights, wire).params  # once down, once up
    assert same(answers.ups["a"], Update(twice, 2, 0.5))


def test_float32_wraps_nothing() -> None:
    transport, plain = Direct(), exchange(score)
    assert with_wire(transport, "float32") is transport
    assert wired(plain, "float32") is plain and plain.accept is matching


@pytest.mark.parametrize(("wire", "ratio", "error"), [("bfloat16", 1 / 2, 2**-8), ("int8", 1 / 4 + 1 / BLOCK, 0.02)])
def test_a_federation_in_process_over_a_wire(wire: str, ratio: float, error: float) -> None:
    """Four clients whose optima are 2,000 numbers: the same cohorts, nearly the same model, fewer bytes."""

    def run(wire: str) -> tuple[list[Done], torch.Tensor]:
        model: Any = ToyModel(width=2000, dtype="float32")
        engine = InProcess(FedAvg, model, federation(False, width=2000), 7, 2, wire=partial(wired, wire=wire))
        done = list(federate(FedAvg(lr=0.1), with_wire(engine, wire), model, rounds=3, seed=7))
        return done, torch.cat(list(done[-1].state.params.values()))

    (plain, want), (narrow, got) = run("float32"), run(wire)
    assert [d.answered for d in narrow] == [d.answered for d in plain] and len(plain[0].answered) == 4
    assert 0 < (got - want).norm() < error * want.norm()
    for before, after in zip(plain[0].receipts, narrow[0].receipts, strict=True):
        for direction in ("bytes_down", "bytes_up"):
            assert getattr(after, direction) == pytest.approx(ratio * getattr(before, direction), rel=0.2)


@pytest.mark.parametrize("wire", NARROW)
@pytest.mark.parametrize("name", ["flora", "fedex_lora", "deltalora"])
def test_a_change_of_the_base_is_the_same_everywhere_by_any_wire(name: str, wire: str) -> None:
    """Clients of the server's version have its bits, whether they got steps or the whole; parameters are narrowed."""
    model = ToyModel(width=400, rank=2, dtype="float32")
    method: Any = methods.build(name, {"cohort": 2, "lr": 0.05, "batch_size": 2})
    engine = InProcess(lambda: method, model, federation(False, width=400), 3, wire=partial(wired, wire=wire))
    loop = federate(method, with_wire(engine, wire), model, rounds=6, seed=3)
    totals, checked, wholes = [{}], 0, 0
    for step in loop:
        totals.append(step.state.changed.total)
        for client in step.cohort:
            copy = engine.memories.load(client, step.versions[client], Copy)
            assert same(copy.total, totals[copy.version])
            checked += copy.version > 0
        wholes += any(news_for(step.state.changed, client).whole is not None for client in engine.clients())
    assert checked >= 6 and wholes
    down = method.send(step.state, step.cohort[0])
    packed = pack(down, wire)
    assert all(t.dtype is torch.float32 for path, t in packed.tensors.items() if path.startswith("news/"))
    assert any(t.dtype is not torch.float32 for t in packed.tensors.values()) is (name != "flora")
    got = unpack(packed, type(down), wire)
    assert records.encode(got.news) == records.encode(down.news)


def test_what_must_be_exact_may_not_come_narrowed() -> None:
    packed = pack(Broadcast({"w": torch.ones(100)}, News(1, whole={"d": torch.ones(100)})), "bfloat16")
    lie = replace(packed, tensors={path: t.bfloat16() for path, t in packed.tensors.items()})
    with pytest.raises(RecordError, match=r"news/whole/d came as torch.bfloat16"):
        unpack(lie, Broadcast, "bfloat16")
