"""What arrives in MLflow, asked of a real server and of real stores."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.tracking.mlflow.queue import UploadState
from finetuning.tracking.mlflow.tracker import MlflowTracker, start_mlflow
from finetuning.tracking.settings import TrackingOptions, parameters, resolve_tracking
from finetuning.tracking.tracker import LogEvent, StepMetrics

Client = Callable[[str], Any]


def start(uri: str, output: Path, *, resumed: bool = False, **environ: str) -> MlflowTracker:
    plan = resolve_tracking(TrackingOptions(uri), None, {"MLFLOW_EXPERIMENT_NAME": "tests", **environ})
    tracker = start_mlflow(plan, output, job="sft", resumed=resumed, tags={"version.finetuning": "0"})
    assert tracker is not None
    return tracker


def history(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def test_a_whole_run_arrives(mlflow_server: Any, tmp_path: Path, client: Client) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("method: sft\n")
    model = tmp_path / "checkpoint-final"
    (model / "inside").mkdir(parents=True)
    for name in ("model.safetensors", "inside/tokenizer.json", "training_args.bin"):
        (model / name).write_text(name)
    tracker = start(mlflow_server.uri, tmp_path / "out", HF_MLFLOW_LOG_ARTIFACTS="1")
    values = {f"section.key_{number}": "v" * number for number in range(250)}
    tracker.queue.append(
        "params", values=parameters({**values, "run_conf": {"model": "m", "hub_token": "hf_x"}, "long": "y" * 9000})
    )
    tracker.log_file(config, "config")
    for step in (10, 20, 30):
        metrics = StepMetrics(step, 30, tokens_seen=step * 100, tokens_per_s=float(step))
        tracker.log(LogEvent("training", metrics, {"loss": 1 / step, "rewards/(odd) name": math.nan, "inf": math.inf}))
    tracker.log(LogEvent("validation", StepMetrics(30, 30), {"eval_loss": 0.25}))
    tracker.log_model_files(model)
    end = tracker.finish("FINISHED", wait_s=60)

    assert end.error is None
    server = client(mlflow_server.uri)
    run = server.get_run(end.run_id)
    assert end.url == f"{mlflow_server.uri}/#/experiments/{run.info.experiment_id}/runs/{end.run_id}"
    assert server.get_experiment(run.info.experiment_id).name == "tests"
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert run.info.run_name == end.run_name
    assert run.data.tags["mlflow.source.name"] == "finetuning sft"
    assert run.data.tags["version.finetuning"] == "0"
    assert len(run.data.params) == 252
    assert run.data.params["section.key_249"] == "v" * 249
    assert len(run.data.params["long"]) == 6000
    assert not any("hf_x" in value for value in run.data.params.values())
    assert history(server, end.run_id, "loss") == [(10, 0.1), (20, 0.05), (30, 1 / 30)]
    assert history(server, end.run_id, "tokens_per_second") == [(10, 10.0), (20, 20.0), (30, 30.0)]
    assert math.isnan(history(server, end.run_id, "rewards/_odd_ name")[0][1])
    assert history(server, end.run_id, "inf")[0][1] > 1e300
    assert history(server, end.run_id, "eval_loss") == [(30, 0.25)]
    assert {item.path for item in server.list_artifacts(end.run_id)} == {"config", "checkpoint-final"}
    copied = {item.path for item in server.list_artifacts(end.run_id, "checkpoint-final")}
    assert copied == {"checkpoint-final/model.safetensors", "checkpoint-final/inside"}


def test_a_resumed_job_goes_on_with_its_run_and_a_fresh_one_does_not(
    mlflow_server: Any, tmp_path: Path, client: Client
) -> None:
    first = start(mlflow_server.uri, tmp_path)
    first.queue.append("params", values={"lr": "0.1", "same": "1"})
    first.queue.append("metrics", values={"loss": 2.0}, step=1)
    begun = first.finish("FAILED", wait_s=60)
    server = client(mlflow_server.uri)
    assert server.get_run(begun.run_id).info.status == "FAILED"

    again = start(mlflow_server.uri, tmp_path, resumed=True)
    again.queue.append("params", values={"lr": "0.2", "same": "1", "new": "x"})
    again.queue.append("metrics", values={"loss": 1.0}, step=2)
    resumed = again.finish("FINISHED", wait_s=60)
    assert (resumed.run_id, resumed.run_name) == (begun.run_id, begun.run_name)
    run = server.get_run(begun.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "same": "1", "new": "x"}
    assert run.data.tags["finetuning.changed_on_resume"] == "lr: 0.1 -> 0.2"
    assert history(server, begun.run_id, "loss") == [(1, 2.0), (2, 1.0)]

    fresh = start(mlflow_server.uri, tmp_path).finish("FINISHED", wait_s=60)
    assert fresh.run_id != begun.run_id

    moved = start(mlflow_server.uri, tmp_path, resumed=True, MLFLOW_EXPERIMENT_NAME="elsewhere").finish(
        "FINISHED", wait_s=60
    )
    assert moved.run_id != fresh.run_id


def test_closing_the_tracker_does_not_end_the_run(mlflow_server: Any, tmp_path: Path, client: Client) -> None:
    tracker = start(mlflow_server.uri, tmp_path)
    tracker.close()
    tracker.queue.append("metrics", values={"loss": 2.0}, step=1)
    end = tracker.finish("FINISHED", wait_s=60)
    tracker.queue.append("metrics", values={"loss": 1.0}, step=2)
    assert tracker.finish("FAILED") == end
    server = client(mlflow_server.uri)
    assert server.get_run(end.run_id).info.status == "FINISHED"
    assert history(server, end.run_id, "loss") == [(1, 2.0)]


def test_a_given_run_id_is_gone_on_with(mlflow_server: Any, tmp_path: Path, client: Client) -> None:
    server = client(mlflow_server.uri)
    run_id = server.create_run("0", run_name="made-elsewhere").info.run_id
    end = start(mlflow_server.uri, tmp_path, MLFLOW_RUN_ID=run_id).finish("KILLED", wait_s=60)
    assert (end.run_id, end.run_name) == (run_id, "made-elsewhere")
    assert server.get_run(run_id).info.status == "KILLED"


def test_a_deleted_run_costs_nothing_but_the_tracking(
    mlflow_server: Any, tmp_path: Path, client: Client, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    server = client(mlflow_server.uri)
    run_id = server.create_run("0").info.run_id
    server.delete_run(run_id)
    tracker = start(mlflow_server.uri, tmp_path, MLFLOW_RUN_ID=run_id)
    tracker.queue.append("metrics", values={"loss": 1.0}, step=1)
    eventually(lambda: "deleted" in (UploadState.read(tracker.queue.path).error or ""))
    end = tracker.finish("FINISHED", wait_s=0.1)
    assert end.error is not None
    assert "deleted" in end.error


def test_what_mlflow_refuses_is_noted_and_the_rest_arrives(mlflow_server: Any, tmp_path: Path, client: Client) -> None:
    tracker = start(mlflow_server.uri, tmp_path)
    tracker.queue.append("metrics", values={"../outside": 1.0, "loss": 2.0}, step=1)
    tracker.log_file(tmp_path / "never-there.yaml", "config")
    tracker.queue.append("metrics", values={"loss": 3.0}, step=2)
    end = tracker.finish("FINISHED", wait_s=60)
    assert end.error is None
    assert len(end.rejected) == 2
    assert end.rejected[0].startswith("metrics ../outside: ")
    assert end.rejected[1] == f"{tmp_path}/never-there.yaml: deleted before it was uploaded"
    assert history(client(mlflow_server.uri), end.run_id, "loss") == [(1, 2.0), (2, 3.0)]


def test_checkpoints_are_copied_only_where_it_is_asked_for(mlflow_server: Any, tmp_path: Path, client: Client) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_text("weights")
    server = client(mlflow_server.uri)
    for asked, expected in (("FALSE", set()), ("TRUE", {"checkpoint-1"})):
        tracker = start(mlflow_server.uri, tmp_path / asked, HF_MLFLOW_LOG_ARTIFACTS=asked)
        tracker.on_save(1, checkpoint)
        end = tracker.finish("FINISHED", wait_s=60)
        assert {item.path for item in server.list_artifacts(end.run_id)} == expected


@pytest.mark.parametrize("kind", ["file", "plain", "sqlite"])
def test_local_stores_work(kind: str, tmp_path: Path, client: Client, migrated_database: Path) -> None:
    uri = {"file": f"file://{tmp_path}/my runs", "plain": f"{tmp_path}/runs", "sqlite": f"sqlite:///{tmp_path}/m.db"}[
        kind
    ]
    if kind == "sqlite":
        (tmp_path / "m.db").write_bytes(migrated_database.read_bytes())
    note = tmp_path / "note.txt"
    note.write_text("here")
    before = dict(os.environ)
    tracker = start(uri, tmp_path / "out")
    tracker.queue.append("metrics", values={"loss": 2.0}, step=1)
    tracker.log_file(note, "notes")
    end = tracker.finish("FINISHED", wait_s=60)
    assert end.error is None
    assert dict(os.environ) == before
    store = client(resolve_tracking(TrackingOptions(uri), None, {}).uri.value)
    assert store.get_run(end.run_id).info.status == "FINISHED"
    assert history(store, end.run_id, "loss") == [(1, 2.0)]
    assert [item.path for item in store.list_artifacts(end.run_id, "notes")] == ["notes/note.txt"]
    assert Path(store.get_run(end.run_id).info.artifact_uri.removeprefix("file://")).is_relative_to(tmp_path)


@pytest.mark.slow
def test_the_suggested_command_serves_a_folder(
    tmp_path: Path, eventually: Callable[..., None], closed_port: int
) -> None:
    """As a new user types it: in a shell that has none of the variables that this package sets for itself."""
    uri = f"file://{tmp_path}/my runs"
    tracker = start(uri, tmp_path / "out")
    tracker.queue.append("metrics", values={"loss": 2.0}, step=1)
    assert tracker.finish("FINISHED", wait_s=60).error is None
    command = resolve_tracking(TrackingOptions(uri), None, {}).ui_command
    assert command is not None
    port = closed_port
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    log = tmp_path / "ui.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"{command} --port {port} --workers 1"],
            cwd=tmp_path, env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip

    def answers(path: str, **body: object) -> str | None:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode() if body else None)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            return None

    try:
        eventually(lambda: answers("/") is not None)
        assert "<title>MLflow" in (answers("/") or "")
        assert '"name": "tests"' in (answers("/api/2.0/mlflow/experiments/search", max_results=5) or "")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_training_process_never_imports_mlflow(
    mlflow_server: Any, tmp_path: Path, run_job: Callable[..., dict[str, Any]]
) -> None:
    report = run_job(mlflow_server.uri, tmp_path)
    assert report["delivered"]
    assert report["imported_mlflow"] is False
    assert report["stderr"] == ""


def test_a_directory_that_cannot_be_written_leaves_the_run_untracked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    plan = resolve_tracking(TrackingOptions("http://127.0.0.1:9"), None, {})
    assert start_mlflow(plan, tmp_path / "file", job="sft", resumed=False) is None
    assert "continues untracked" in caplog.text


def test_the_uploader_process_is_gone_after_the_run(mlflow_server: Any, tmp_path: Path) -> None:
    start(mlflow_server.uri, tmp_path).finish("FINISHED", wait_s=60)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


def test_run_file_is_json_with_the_run_id(mlflow_server: Any, tmp_path: Path) -> None:
    end = start(mlflow_server.uri, tmp_path).finish("FINISHED", wait_s=60)
    assert json.loads((tmp_path / "mlflow_run.json").read_text())["run_id"] == end.run_id
