"""What MLflow receives in addition to curves: data, jobs below one run, tags, the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.sections.tracking import TrackingConfig
from finetuning.errors import ConfigError
from finetuning.tracking.mlflow.sync import add_to_run, sync_run
from finetuning.tracking.mlflow.tracker import start_mlflow
from finetuning.tracking.settings import TrackingOptions, TrackingPlan, resolve_tracking

Client = Callable[[str], Any]
Eventually = Callable[[Callable[[], bool]], None]
PARENT = "mlflow.parentRunId"


def plan(uri: str, section: TrackingConfig | None = None, **environ: str) -> TrackingPlan:
    return resolve_tracking(TrackingOptions(uri, "jobs"), section, environ)


def jobs_below(server: Any, parent_id: str) -> list[Any]:
    experiment = server.get_run(parent_id).info.experiment_id
    result = server.search_runs([experiment], f"tags.`{PARENT}` = '{parent_id}'")
    return sorted(result, key=lambda run: run.info.start_time)


def test_data_and_tags_arrive(mlflow_server: Any, tmp_path: Path, client: Client) -> None:
    section = TrackingConfig(exp_metadata={"team": "mine", "attempt": 3})
    asked = plan(mlflow_server.uri, section, MLFLOW_TAGS='{"team": "theirs", "cost": {"center": 7}}')
    tracker = start_mlflow(asked, tmp_path, job="sft", resumed=False)
    rows = {
        "name": "rows.jsonl",
        "digest": "abc",
        "source_type": "local",
        "source": json.dumps({"uri": "/data/rows.jsonl"}),
        "schema": "{}",
        "profile": json.dumps({"num_rows": 7}),
        "context": "training",
    }
    tracker.queue.append("datasets", values=[rows, {**rows, "context": "validation", "digest": "x" * 99}])
    end = tracker.finish("FINISHED", wait_s=60)
    assert end.error is None
    run = client(mlflow_server.uri).get_run(end.run_id)
    tags = run.data.tags
    assert (tags["team"], tags["attempt"], tags["cost"]) == ("mine", "3", '{"center": 7}')
    reported = [(item.tags[0].value, item.dataset.name, item.dataset.profile) for item in run.inputs.dataset_inputs]
    assert reported == [("training", "rows.jsonl", '{"num_rows": 7}')]
    state = json.loads((tmp_path / "mlflow_run.json").read_text())
    assert [message.partition(":")[0] for message in state["rejected"]] == ["dataset rows.jsonl"]

    # What an evaluation finds after the run has ended.
    results = tmp_path / "evaluations" / "held-out.json"
    results.parent.mkdir()
    results.write_text("{}")
    name = "evaluation/held-out.jsonl/exact/adapter"
    assert add_to_run(tmp_path, {name: 0.75}, [results], step=9) is None
    run = client(mlflow_server.uri).get_run(end.run_id)
    assert (run.data.metrics[name], run.info.status) == (0.75, "FINISHED")
    assert [file.path for file in client(mlflow_server.uri).list_artifacts(end.run_id, "evaluations")] == [
        "evaluations/held-out.json"
    ]


def test_nothing_is_added_to_a_run_that_is_not_tracked(tmp_path: Path) -> None:
    assert add_to_run(tmp_path, {"a": 1.0}, [], step=1) is None
    assert list(tmp_path.iterdir()) == []


def test_each_job_of_a_session_is_a_child_of_one_run(
    mlflow_server: Any, tmp_path: Path, run_job: Any, client: Client, eventually: Eventually
) -> None:
    """The first job is killed; the second one goes on. Both stand below one run, which ends as the second does."""
    arguments = (mlflow_server.uri, tmp_path, "--tracking", '{"resumed_jobs": "child runs", "run_name": "night"}')
    run_job(*arguments, "--steps", 20, "--die-at", 9)
    server = client(mlflow_server.uri)
    first = tmp_path / "mlflow_run.json"
    eventually(lambda: first.exists() and bool(run_id := json.loads(first.read_text())["run_id"]) and (
        server.get_run(run_id).info.status == "KILLED"))  # fmt: skip
    killed = server.get_run(json.loads(first.read_text())["run_id"])
    run_job(*arguments, "--resumed", "--first-step", 10, "--steps", 10)
    sync_run(tmp_path)  # what a busy machine has not sent in the job's last ten seconds
    second_id = json.loads(first.read_text())["run_id"]

    parent_id = killed.data.tags[PARENT]
    assert [run.info.run_name for run in jobs_below(server, parent_id)] == ["night job 1", "night job 2"]
    assert [run.info.status for run in jobs_below(server, parent_id)] == ["KILLED", "FINISHED"]
    assert jobs_below(server, parent_id)[1].info.run_id == second_id
    parent = server.get_run(parent_id)
    assert (parent.info.run_name, parent.info.status) == ("night", "FINISHED"), "the first job's late end is not its"
    assert [metric.step for metric in server.get_metric_history(second_id, "loss")] == list(range(10, 20))


def test_a_run_is_nested_in_the_named_run(mlflow_server: Any, tmp_path: Path, client: Client) -> None:
    server = client(mlflow_server.uri)
    parent = server.create_run(server.get_experiment_by_name("Default").experiment_id).info.run_id
    asked = plan(mlflow_server.uri, TrackingConfig(parent_run_id=parent))
    tracker = start_mlflow(asked, tmp_path, job="sft", resumed=False)
    end = tracker.finish("FINISHED", wait_s=60)
    assert server.get_run(end.run_id).data.tags[PARENT] == parent
    assert end.run_id != parent


@pytest.mark.parametrize(
    "environ", [{"MLFLOW_PARENT_RUN_ID": "p"}, {"MLFLOW_NESTED_RUN": "true", "MLFLOW_RUN_ID": "p"}]
)
def test_the_environment_names_a_run_to_stand_below(environ: dict[str, str]) -> None:
    asked = plan("http://m", **environ)
    assert (asked.parent_run_id.value, asked.run_id.value) == ("p", None)


def test_the_machine_is_measured_while_the_run_lasts(
    mlflow_server: Any, tmp_path: Path, paused_job: Any, finish_job: Any, client: Client, eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    server = client(mlflow_server.uri)
    curve = "system/system_memory_usage_percentage"

    def job(*arguments: Any) -> dict[str, Any]:
        process, mark = paused_job(mlflow_server.uri, tmp_path, *arguments)
        before = len(steps())
        eventually(lambda: len(steps()) >= before + 3)
        mark.unlink()
        return finish_job(process)

    def steps() -> list[int]:
        path = tmp_path / "mlflow_run.json"
        run_id = json.loads(path.read_text())["run_id"] if path.exists() else None
        return [metric.step for metric in server.get_metric_history(run_id, curve)] if run_id else []

    assert job()["delivered"]
    first = steps()
    assert job("--resumed", "--first-step", 0)["delivered"]
    assert steps()[: len(first)] == first
    assert steps() == sorted(steps())
    run = server.get_run(json.loads((tmp_path / "mlflow_run.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0
    assert {"loss", "system/disk_usage_percentage"} <= set(run.data.metrics)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TAGS: expected a JSON object"):
        plan("http://m", MLFLOW_TAGS="team=search")
    with pytest.raises(ConfigError, match="includes mlflow, which needs an address"):
        resolve_tracking(TrackingOptions(), TrackingConfig(trackers=["mlflow"]), {})
    assert not resolve_tracking(
        TrackingOptions(), TrackingConfig(trackers=["mlflow"]), {"DISABLE_MLFLOW_INTEGRATION": "true"}
    ).enabled
