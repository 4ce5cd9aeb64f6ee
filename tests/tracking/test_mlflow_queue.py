from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from finetuning.tracking.mlflow.queue_file import (
    Delivery,
    SpoolWriter,
    delivery_path,
    latest_run,
    plain_metrics,
    read_orders,
    set_aside,
    spools,
    whole_bytes,
)
from finetuning.tracking.settings import LONGEST_VALUE, parameters, version_tags


def write(path: Path, *kinds: str) -> None:
    writer = SpoolWriter(path)
    for kind in kinds:
        writer.append(kind, of=path.name)
    writer.close()


def test_orders_come_back_in_order_from_any_position(tmp_path: Path) -> None:
    path = tmp_path / "mlflow_spool.jsonl"
    write(path, "run", "metrics", "end")
    orders = list(read_orders(path, 0))
    assert [order.kind for order in orders] == ["run", "metrics", "end"]
    assert [order.kind for order in read_orders(path, orders[0].end)] == ["metrics", "end"]
    assert [order.kind for order in read_orders(path, 0, orders[1].end)] == ["run", "metrics"]
    assert orders[-1].end == path.stat().st_size == whole_bytes(path)


def test_a_torn_line_is_never_read_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "mlflow_spool.jsonl"
    write(path, "run", "metrics")
    whole = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(b'{"do": "metr')
    assert [order.kind for order in read_orders(path, 0)] == ["run", "metrics"]
    assert whole_bytes(path) == whole
    write(path, "end")
    assert [order.kind for order in read_orders(path, 0)] == ["run", "metrics", "unreadable", "end"]


def test_a_full_disk_is_an_error_at_once() -> None:
    writer = SpoolWriter(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        writer.append("metrics")


def test_the_newest_run_and_whether_it_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "mlflow_spool.jsonl"
    assert latest_run(path) == (None, False)
    write(path, "run", "end")
    assert latest_run(path)[1]
    write(path, "run", "metrics")
    run, ended = latest_run(path)
    assert run is not None
    assert not ended


def test_setting_aside_keeps_every_spool_with_its_delivery(tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / "mlflow_spool.jsonl"
        write(path, "run")
        Delivery(run_id=str(number)).write(delivery_path(path))
        set_aside(tmp_path)
    write(tmp_path / "mlflow_spool.jsonl", "run")
    found = spools(tmp_path)
    assert [Delivery.read(delivery_path(path)).run_id for path in found] == [*map(str, range(12)), None]


def test_a_delivery_file_of_another_shape_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "mlflow_run.json"
    for text in ("", "[1]", "{", '{"run_id": "a", "unknown": 1}'):
        path.write_text(text)
        assert Delivery.read(path).records_sent == 0
    assert Delivery.read(path).run_id == "a"


def test_numbers_that_json_lacks_are_words() -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1, "e": "text"}
    plain = plain_metrics(values)
    assert plain == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.0}
    assert all(isinstance(float(value), float) for value in plain.values())
    json.dumps(plain, allow_nan=False)


def test_parameters_are_flat_short_and_without_secrets() -> None:
    config = {
        "run_conf": {"model": "m", "model_args": {"token": "hf_secret", "revision": None}},
        "tracking": {"mlflow_server_uri": "http://ada:pw@host"},
        "data_conf": {"datasets": [{"path": "a", "api_key": "sk"}, {"path": "b"}]},
        "target_modules": ["q", "v"],
        "template": "x" * 10_000,
        "eos_token": "</s>",
    }
    found = parameters(config)
    assert found["run_conf.model_args.revision"] == "None"
    assert found["data_conf.datasets.1.path"] == "b"
    assert found["target_modules"] == '["q", "v"]'
    assert found["eos_token"] == "</s>"
    assert len(found["template"]) == LONGEST_VALUE
    in_sections = parameters(config, flatten=False)
    assert json.loads(in_sections["run_conf"])["model"] == "m"
    for shown in (str(found), str(in_sections)):
        assert not any(secret in shown for secret in ("hf_secret", "ada", "pw@", "sk"))


def test_version_tags_name_the_engine_and_its_libraries() -> None:
    assert {"version.finetuning", "version.torch", "version.python", "platform"} <= set(version_tags())
