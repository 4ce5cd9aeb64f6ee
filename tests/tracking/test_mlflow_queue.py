from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from finetuning.tracking.mlflow.queue import (
    Queue,
    UploadState,
    latest_run,
    list_queues,
    numbers_in,
    read_records,
    rotate,
    state_path,
)
from finetuning.tracking.settings import MAX_VALUE_LENGTH, parameters, version_tags


def write(path: Path, *kinds: str) -> None:
    queue = Queue(path)
    for kind in kinds:
        queue.append(kind, of=path.name)


def kinds(path: Path, start: int = 0) -> list[str]:
    return [record.kind for record in read_records(path, start)]


def test_records_are_read_in_order_from_any_offset(tmp_path: Path) -> None:
    path = tmp_path / "mlflow_queue.jsonl"
    write(path, "run", "metrics", "end")
    records = list(read_records(path))
    assert [record.kind for record in records] == ["run", "metrics", "end"]
    assert kinds(path, records[0].end) == ["metrics", "end"]
    assert records[-1].end == path.stat().st_size


def test_an_incomplete_line_is_skipped_and_the_next_record_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mlflow_queue.jsonl"
    write(path, "run", "metrics")
    with path.open("ab") as stream:
        stream.write(b'{"kind": "metr' + b"x" * 100_000)
    assert kinds(path) == ["run", "metrics"]
    write(path, "end")
    assert kinds(path) == ["run", "metrics", "end"]


def test_a_full_disk_is_one_warning_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    queue = Queue(Path("/dev/full"))
    for _ in range(3):
        queue.append("metrics")
    assert queue.error == "No space left on device"
    assert caplog.text.count("No space left") == 1


def test_the_newest_run_and_whether_it_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "mlflow_queue.jsonl"
    assert latest_run(path) == (None, False)
    write(path, "run", "end", "metrics")
    assert latest_run(path)[1]
    write(path, "run", "metrics")
    run, ended = latest_run(path)
    assert run is not None
    assert not ended


def test_rotation_keeps_every_queue_with_its_state(tmp_path: Path) -> None:
    path = tmp_path / "mlflow_queue.jsonl"
    for number in range(12):
        write(path, "run")
        UploadState(run_id=str(number)).write(path)
        rotate(tmp_path)
    write(path, "run")
    states = [UploadState.read(queue) for queue in list_queues(tmp_path)]
    assert [state.run_id for state in states] == [*map(str, range(12)), None]


def test_a_state_file_of_another_shape_counts_as_none(tmp_path: Path) -> None:
    queue = tmp_path / "mlflow_queue.jsonl"
    for text in ("", "[1]", "{", '{"run_id": "a", "unknown": 1}'):
        state_path(queue).write_text(text)
        assert UploadState.read(queue).offset == 0
    assert UploadState.read(queue).run_id == "a"


def test_the_queue_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    orders = [
        {"do": "run", "key": "k", "umbrella": {"key": "p", "name": "night", "jobs": 1}},
        {"do": "artifact", "path": "/sent", "to": ""},
        {"do": "artifact", "path": "/waiting", "to": "model"},
        {"do": "end", "status": "FINISHED"},
    ]
    lines = [json.dumps(order) + "\n" for order in orders]
    for suffix in ("", ".1"):
        (tmp_path / f"mlflow_spool{suffix}.jsonl").write_text("".join(lines))
        saved = {
            "run_id": "r",
            "records_sent": len("".join(lines[:3])),
            "files_sent": len("".join(lines[:2])),
            "files_left": [{"path": "/failed", "to": ""}],
            "alive_at": 1.0,
        }
        (tmp_path / f"mlflow_run{suffix}.json").write_text(json.dumps(saved))
    queues = list_queues(tmp_path)
    assert [queue.name for queue in queues] == ["mlflow_queue.1.jsonl", "mlflow_queue.jsonl"]
    for queue in queues:
        run, ended = latest_run(queue)
        assert ended
        assert run is not None
        assert run.fields["parent"]["name"] == "night"
        state = UploadState.read(queue)
        assert state.run_id == "r"
        assert [file["path"] for file in state.pending_files] == ["/failed", "/waiting"]
        assert kinds(queue, state.offset) == ["end"]


def test_numbers_that_json_lacks_are_words(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "mlflow_queue.jsonl")
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1, "e": "text", "f": None}
    queue.append("metrics", values=numbers_in(values), step=7)
    line = queue.path.read_text()
    record = json.loads(line, parse_constant=pytest.fail)
    assert record["values"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.0}
    assert record["step"] == 7
    assert all(isinstance(float(value), float) for value in record["values"].values())


def test_parameters_are_flat_short_and_without_secrets() -> None:
    config = {
        "run_conf": {"model": "m", "model_args": {"token": "hf_secret", "revision": None}},
        "tracking": {"mlflow_server_uri": "http://ada:pw@host"},
        "data_conf": {"datasets": [{"path": "a", "api_key": "sk"}, {"path": "b"}]},
        "target_modules": ["q", "v"],
        "template": "x" * 10_000,
        "eos_token": "</s>",
    }
    result = parameters(config)
    assert "run_conf.model_args.revision" not in result, "what has no value is no parameter"
    assert result["data_conf.datasets.1.path"] == "b"
    assert result["target_modules"] == '["q", "v"]'
    assert result["eos_token"] == "</s>"
    assert len(result["template"]) == MAX_VALUE_LENGTH
    in_sections = parameters(config, flatten=False)
    assert json.loads(in_sections["run_conf"])["model"] == "m"
    for displayed in (str(result), str(in_sections)):
        assert not any(secret in displayed for secret in ("hf_secret", "ada", "pw@", "sk"))


def test_version_tags_name_the_engine_and_its_libraries() -> None:
    assert {"version.finetuning", "version.torch", "version.python", "platform"} <= set(version_tags())
