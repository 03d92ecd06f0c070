"""From a configuration to a federation: data of every client, devices, what `auto` means, where it starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import small
from fedpeft import app
from fedpeft.app.federation import AUTO_BYTES, AUTO_CLIENTS, FLAT_COPIES, POOLED, batching, build, computing
from fedpeft.config import load_config
from fedpeft.core import tree
from fedpeft.core.errors import ConfigError, DataError, ModelError
from fedpeft.core.rng import rng_for
from fedpeft.models.load import load_base
from fedpeft.planner.device import DEFAULT
from fedpeft.runs.store import RunFolder


def made(place: Path, **changes: Any) -> Any:
    return build(load_config(small.config(place, **changes)))


def test_every_row_belongs_to_one_client(place: Path) -> None:
    fed = made(place)
    assert fed.clients == [f"00{i}" for i in range(6)]
    assert sum(len(fed.data[c]["train"]) + len(fed.data[c]["validation"]) for c in fed.clients) == 120
    assert sum(len(fed.data[c]["test"]) for c in fed.clients) == 42
    tokenizer = load_base(str(place / "tiny"), device="cpu").tokenizer
    expected = sorted(tuple(tokenizer(row["text"])["input_ids"]) for row in small.rows(120, "train"))
    rows = [data for c in fed.clients for data in (fed.data[c]["train"], fed.data[c]["validation"])]
    assert sorted(tuple(t.tolist()) for data in rows for t in data.tokens) == expected


def test_whole_split_is_the_clients_rows_in_the_order_of_their_ids(place: Path) -> None:
    fed = made(place)
    whole = fed.whole("test")
    parts = [fed.data[c]["test"] for c in fed.clients]
    assert np.array_equal(whole.labels, np.concatenate([part.labels for part in parts]))
    assert [t.tolist() for t in whole.tokens] == [t.tolist() for part in parts for t in part.tokens]
    assert whole is fed.whole("test")


def test_pairs_keep_their_segments_also_where_a_client_has_no_test_rows(place: Path) -> None:
    fed = made(
        place,
        task__train=str(place / "pairs.jsonl"),
        task__test=str(place / "pairs_test.jsonl"),
        partition__clients=40,
        partition__size_alpha=1.0,
    )
    assert fed.task.labels == ("other", "same") and min(len(fed.data[c]["test"]) for c in fed.clients) == 0
    whole = fed.whole("test")
    assert whole.segments is not None and len(whole.segments) == len(whole) == 30
    assert all(set(s.tolist()) == {0, 1} for s in whole.segments)


def test_pooled_method_has_one_client_with_all_rows(place: Path) -> None:
    fed = made(place, method__name="centralized")
    assert fed.clients == [POOLED] and len(fed.partition.clients) == 6
    assert len(fed.data[POOLED]["train"]) == sum(len(rows) for rows in fed.partition.train.values())


def test_auto_is_resolved_to_numbers_once(place: Path) -> None:
    fed = made(place)
    assert batching(fed.config) == fed.config.run.cohort_batching == 6  # all clients: the adapter is tiny
    assert batching(made(place, run__cohort_batching="off").config) == 1
    assert batching(made(place, run__cohort_batching=3).config) == 3
    wide = made(place, adapter__rank=8000)
    own = tree.count(wide.initial) * 4 * FLAT_COPIES
    assert batching(wide.config) == AUTO_BYTES // own < 6 <= AUTO_CLIENTS


def test_threads_hold_inside_and_not_outside(place: Path) -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), computing(load_config(small.config(place, run__threads=before + 1))):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_devices_are_those_of_the_file(place: Path, tmp_path: Path) -> None:
    devices = tmp_path / "devices.toml"
    devices.write_text("[profile.phone]\nlatency_s = 1.5\n")
    fed = made(place, run__devices=str(devices))
    assert {device.latency_s for device in fed.resources.values()} == {1.5}
    assert fed.resources.keys() == set(fed.clients)
    assert set(made(place).resources.values()) == {DEFAULT}


def test_configuration_refused_by_what_the_data_and_the_model_are(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"task.max_length is 64; lower it, the model reads 32 tokens"):
        made(place, task__max_length=64)
    with pytest.raises(DataError, match=r"partition.clients is 121, but there are only 120"):
        made(place, partition__clients=121)
    with pytest.raises(ConfigError, match=r"cohort: 7 is above partition.clients = 6"):
        made(place, method__cohort=7)
    files = tmp_path / "files"
    files.mkdir()
    for i in range(3):
        small.write_rows(files / f"site{i}.jsonl", small.rows(30, f"site{i}"))
    with pytest.raises(DataError, match=r"method.cohort is 4 and there are 3 clients; lower the cohort, or 0 for all"):
        made(place, task__train=str(files), partition__kind="file", partition__clients=None)
    assert made(
        place, task__train=str(files), partition__kind="file", partition__clients=None, method__cohort=0
    ).clients == ["site0", "site1", "site2"]


def test_robertas_positions_start_behind_the_padding(place: Path, tmp_path: Path) -> None:
    """RoBERTa's 34 positions hold 32 tokens: the first is that of padding id + 1."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    AutoTokenizer.from_pretrained(place / "tiny").save_pretrained(tmp_path / "roberta")
    shape = RobertaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=34, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(shape, add_pooling_layer=False).save_pretrained(tmp_path / "roberta")
    where = {"model__name": str(tmp_path / "roberta")}
    with pytest.raises(ModelError, match=r"task.max_length is 33; lower it, the model reads 32 tokens"):
        made(place, task__max_length=33, **where)
    assert made(place, task__max_length=32, **where).base.family == "roberta"


# --- init_from --------------------------------------------------------------------------------------------------


def test_run_starts_from_the_best_adapter_of_another(place: Path, tmp_path: Path, finished: app.Run) -> None:
    done = app.run(small.config(place, run__init_from=str(finished.folder), run__rounds=1), out=tmp_path / "run")
    first = RunFolder.open(done.folder).metrics()[0]["metrics"]["validation"]["global"]
    assert first == finished.metrics["best"]["validation"]["global"]
    best = small.checkpoint(finished.folder).best
    assert best is not None and done.manifest["initial_sha256"] == tree.sha256(best)
    from_adapter = made(place, run__init_from=str(finished.folder / "adapter"))
    assert tree.sha256(from_adapter.initial) == tree.sha256(best)
    assert tree.sha256(from_adapter.model.init(rng_for(9, "adapter"))) == tree.sha256(best)


def test_start_that_does_not_fit_is_refused(place: Path, tmp_path: Path, finished: app.Run) -> None:
    own = r"run.init_from .* does not fit this run.*its settings \(adapter.rank 4, adapter.alpha 16\)"
    with pytest.raises(ModelError, match=own):
        made(place, run__init_from=str(finished.folder), adapter__rank=2)
    values = small.config(place, run__init_from=str(finished.folder))
    values["adapter"] = {"kind": "prefix"}
    both = r"run.init_from .* \(lora\) does not fit this run's adapter \(prefix\)"
    with pytest.raises(ModelError, match=both) as other:
        build(load_config(values))
    assert str(other.value).count("does not fit") == 1
    with pytest.raises(
        ModelError, match=r"run.init_from .*does not fit this run's adapter \(lora\) and labels: .*Use the"
    ):
        made(place, run__init_from=str(finished.folder), task__classes=["cooking", "sailing"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"run.init_from"):
        made(place, run__init_from=str(empty))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished.folder, unfinished, ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(ModelError, match=r"the run .*unfinished has no adapter yet; let it finish"):
        made(place, run__init_from=str(unfinished))


def test_fields_that_the_others_leave_without_effect_are_told(place: Path) -> None:
    """Those that somebody changed; the others are nobody's business."""
    fibecfed = {"method__name": "fibecfed", "method__layers_by": "all"}
    assert made(place, **fibecfed).warnings == []
    changed = made(place, **fibecfed, method__gal_count="eigengap", method__gal_ratio=0.25)
    shared = "has no effect: method.layers_by all shares every layer"
    assert changed.warnings == [f"method.gal_count {shared}", f"method.gal_ratio {shared}"]
    by_length = made(place, method__schedule="length", method__schedule_beta=0.5)
    assert by_length.warnings == ["method.schedule_beta has no effect: method.schedule length has a pace of its own"]
    assert made(place, method__schedule="loss", method__schedule_beta=0.5).warnings == []


def test_a_rank_above_what_a_projection_has_is_told(place: Path) -> None:
    """The toy's width is 32."""
    assert made(place, adapter__rank=32).warnings == []
    (told,) = made(place, adapter__rank=33).warnings
    assert told.startswith("adapter.rank 33 is above 32, the smallest side of block.0.query")


def test_ranks_of_devices_that_have_no_effect_are_told(place: Path, tmp_path: Path) -> None:
    """In the log, to who watches, and by `check`; where a method takes them there is nothing to say."""
    devices = tmp_path / "devices.toml"
    devices.write_text("[profile.phone]\nrank = 2\n[profile.laptop]\n[clients]\nassign = {phone = 0.5, laptop = 0.5}\n")
    values = {"run__devices": str(devices), "run__rounds": 1}
    flat = small.config(place, **values)
    told: list[str] = []
    run = app.run(flat, out=tmp_path / "run", progress=lambda sign: told.append(sign.message or ""))
    said = (
        "the rank of 'phone' in run.devices has no effect: fedavg gives every client the same rank, or its own choice"
    )
    assert f"warning: {said}" in told and said in (run.folder / "run.log").read_text()
    assert app.check(flat)["warnings"] == [said]
    dealt = made(place, **values, method__name="hetlora", method__ranks=[1, 4])
    assert dealt.warnings == ["the rank of 'phone' in run.devices has no effect: method.ranks deals the ranks out"]
    taken = small.config(place, **values, method__name="hetlora")
    assert "warnings" not in app.check(taken)
    ranks = app.run(taken, out=tmp_path / "taken").manifest["choices"]["clients_by_rank"]
    assert {rank: len(clients) for rank, clients in ranks.items()} == {"2": 3, "4": 3}
    assert sorted(client for held in ranks.values() for client in held) == dealt.clients
