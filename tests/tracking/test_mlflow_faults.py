"""A server that is dead, frozen, closed or mute costs training nothing, and nothing of what it is owed is lost.

Times are bounded far above what is measured, on a busy machine as well, and far below what stock MLflow takes (5 to 20
minutes).
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrix import sample

from finetuning.tracking.mlflow.queue import read_records
from finetuning.tracking.mlflow.sync import sync_run

CALL_S = 5
MEDIAN_CALL_S = 0.05
FINISH_S = 10 + 50
SHORT_WAIT = ("--wait-s", 2)
"""For jobs whose server stays away. That the default ends is shown once."""

Job = Callable[..., dict[str, Any]]
Paused = Callable[..., tuple[subprocess.Popen[str], Path]]
Finish = Callable[[subprocess.Popen[str]], dict[str, Any]]


def assert_unharmed(report: dict[str, Any], output: Path, steps: int) -> None:
    assert report["code"] == 0, report
    assert report["slowest_call_s"] < CALL_S
    assert report["median_call_s"] < MEDIAN_CALL_S
    assert report["finish_s"] < FINISH_S
    assert report["delivered"] is False
    assert report["stderr"].count("did not take everything") == 1, report["stderr"]
    assert str(output / "mlflow_queue.jsonl") in report["stderr"]
    assert f"finetuning sync {output}" in report["stderr"]
    records = list(read_records(output / "mlflow_queue.jsonl"))
    assert [record.fields["step"] for record in records if record.kind == "metrics"] == list(range(steps))
    assert records[-1].kind == "end"


def assert_arrived_once(server: Any, run_id: str | None, steps: int, status: str = "FINISHED") -> None:
    assert run_id is not None
    assert server.get_run(run_id).info.status == status
    for key in ("loss", "learning_rate"):
        assert [metric.step for metric in server.get_metric_history(run_id, key)] == list(range(steps))
    assert server.get_run(run_id).data.params == {"training_args.learning_rate": "5e-05"}


@pytest.mark.parametrize("kind", sample(["closed port", "black hole"], ["black hole"]))
def test_a_server_that_never_was_there(
    kind: str, closed_port: int, black_hole: int, tmp_path: Path, run_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = closed_port if kind == "closed port" else black_hole
    report = run_job(f"http://127.0.0.1:{port}", tmp_path, "--steps", 300)
    assert_unharmed(report, tmp_path, 300)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    [result] = sync_run(tmp_path, patience_s=1)
    assert result.error
    assert result.waiting == result.waiting_before == 303


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.full)])
def test_a_server_killed_or_frozen_in_mid_run_is_caught_up_with_once(
    number: int,
    launch_server: Callable[..., Any],
    tmp_path: Path,
    paused_job: Paused,
    finish_job: Finish,
    client: Callable[[str], Any],
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    server = launch_server()
    job, mark = paused_job(server.uri, tmp_path / "out", *SHORT_WAIT)
    store = client(server.uri)

    def half_has_arrived() -> bool:
        experiment = store.get_experiment_by_name("faults")
        runs = store.search_runs([experiment.experiment_id]) if experiment else []
        return bool(runs) and len(store.get_metric_history(runs[0].info.run_id, "loss")) == 21

    eventually(half_has_arrived)
    server.signal(number)
    mark.unlink()
    report = finish_job(job)
    assert_unharmed(report, tmp_path / "out", 40)

    if number == signal.SIGSTOP:
        server.signal(signal.SIGCONT)
    else:
        server.stop()
        server.start_again()
    [result] = sync_run(tmp_path / "out")
    assert result.error is None, result
    assert result.waiting_before > 0
    assert_arrived_once(store, result.state.run_id, 40)
    [again] = sync_run(tmp_path / "out")
    assert again.error is None
    assert again.waiting_before == 0
    assert_arrived_once(store, result.state.run_id, 40)
    assert len(store.search_runs([store.get_run(result.state.run_id).info.experiment_id])) == 1


@pytest.mark.slow
def test_a_server_that_comes_back_in_mid_run_needs_no_sync(
    launch_server: Callable[..., Any],
    tmp_path: Path,
    paused_job: Paused,
    finish_job: Finish,
    client: Callable[[str], Any],
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    server = launch_server(running=False)
    job, mark = paused_job(server.uri, tmp_path / "out")
    server.start_again()
    store = client(server.uri)
    eventually(lambda: store.get_experiment_by_name("faults") is not None)
    mark.unlink()
    report = finish_job(job)
    assert report["delivered"], report
    assert_arrived_once(store, report["run_id"], 40)


def test_a_killed_training_process_leaves_a_run_that_is_marked_and_can_be_gone_on_with(
    mlflow_server: Any,
    tmp_path: Path,
    run_job: Job,
    client: Callable[[str], Any],
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    killed = run_job(mlflow_server.uri, tmp_path, "--steps", 40, "--die-at", 19)
    assert killed["code"] == -signal.SIGKILL
    store = client(mlflow_server.uri)

    def marked() -> bool:
        experiment = store.get_experiment_by_name("faults")
        where = "attributes.status = 'KILLED'"
        return bool(experiment and store.search_runs([experiment.experiment_id], where))

    eventually(marked)
    run_job(mlflow_server.uri, tmp_path, "--resumed", "--first-step", 20, "--steps", 20)
    [result] = sync_run_when_free(tmp_path)
    assert result.error is None, result
    assert_arrived_once(store, result.state.run_id, 40)


@pytest.mark.slow
def test_what_an_unreachable_server_missed_is_delivered_by_the_resumed_job(
    launch_server: Callable[..., Any], tmp_path: Path, run_job: Job, client: Callable[[str], Any]
) -> None:
    server = launch_server(running=False)
    output = tmp_path / "out"
    assert_unharmed(run_job(server.uri, output, "--steps", 20, "--status", "FAILED", *SHORT_WAIT), output, 20)
    server.start_again()
    run_job(server.uri, output, "--resumed", "--first-step", 20, "--steps", 20)
    [result] = sync_run(output)
    assert result.error is None
    assert_arrived_once(client(server.uri), result.state.run_id, 40)


def test_a_file_store_gets_everything_once_after_a_kill(
    tmp_path: Path, run_job: Job, client: Callable[[str], Any]
) -> None:
    uri = f"file://{tmp_path}/runs"
    run_job(uri, tmp_path / "out", "--steps", 20, "--die-at", 19)
    [result] = sync_run_when_free(tmp_path / "out")
    assert result.error is None, result
    assert_arrived_once(client(uri), result.state.run_id, 20, "KILLED")


def sync_run_when_free(folder: Path) -> list[Any]:
    """The sync's results, once the orphaned uploader of a killed job has ended."""
    while True:
        results = sync_run(folder)
        if all(result.error != "the run is uploading it right now" for result in results):
            return results
        time.sleep(0.1)


@pytest.mark.slow
def test_model_files_that_did_not_arrive_are_sent_by_sync(
    launch_server: Callable[..., Any], tmp_path: Path, run_job: Job, client: Callable[[str], Any]
) -> None:
    model = tmp_path / "checkpoint-final"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights" * 1000)
    server = launch_server(running=False)
    report = run_job(server.uri, tmp_path / "out", "--artifacts", "true", "--model", model, *SHORT_WAIT)
    assert report["finish_s"] < FINISH_S
    server.start_again()
    [result] = sync_run(tmp_path / "out")
    assert result.error is None, result
    store = client(server.uri)
    copied = store.list_artifacts(result.state.run_id, "checkpoint-final")
    assert [(item.path, item.file_size) for item in copied] == [("checkpoint-final/model.safetensors", 7000)]


def test_a_folder_without_a_queue_has_nothing_to_send(tmp_path: Path) -> None:
    from finetuning.errors import ConfigError

    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="nothing to send"):
            sync_run(folder)
