"""Trackers other than MLflow: what they contain after a real run, and that none can block or end a run."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetuning.cli.main import main
from finetuning.config.sections import tracking as sections
from finetuning.config.sections.tracking import TrackingConfig, requested_trackers
from finetuning.config.sections.training import TrainingArgs
from finetuning.errors import EXIT_USER
from finetuning.tracking.accelerate_trackers import (
    AccelerateTracker,
    BackgroundTracker,
    TrackerRun,
    _tensorboard_dir,
)
from finetuning.tracking.hf_integrations import GuardedCallback
from finetuning.tracking.tracker import (
    LogEvent,
    StepMetrics,
    TelemetryNames,
    Tracker,
    TrackerGroup,
    read_identities,
)

METADATA = {"team": "search", "attempt": 3}


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """A series as TensorBoard itself reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of an offline run: protobuf messages in blocks of 32 KiB, each piece with checksum, length, kind."""
    from wandb.proto import wandb_internal_pb2

    [file] = folder.glob("*.wandb")
    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record
            message = b""


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def test_a_run_logs_to_all_its_trackers(run_cli: Any, sft_values: Any, write_config: Any, tmp_path: Path) -> None:
    names = ["tensorboard", "hf_resource_scanner", "file_logger"]
    config = write_config(
        sft_values(
            {
                "training_args.max_steps": 6,
                "training_args.report_to": ["wandb"],
                "tracking": {
                    "trackers": names,
                    "exp_metadata": METADATA,
                    "run_uri_export_path": str(tmp_path / "uris"),
                },
            }
        )
    )
    environ = {"WANDB_MODE": "offline", "WANDB_DIR": None, "TENSORBOARD_LOGGING_DIR": None}
    result = run_cli(["sft", config], env=environ)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text())
    assert record["tracker_errors"] == {}
    logged = [json.loads(line)["data"] for line in (out / "training_logs.jsonl").read_text().splitlines()]
    losses = [(line["step"], pytest.approx(line["value"], rel=1e-6)) for line in logged]
    assert len(losses) == 6

    assert scalars(out / "tensorboard", "train/loss") == losses
    assert scalars(out / "tensorboard", "totals/goodput")[0][0] == 6
    [parameters] = (out / "tensorboard").glob("*/hparams.yml")
    assert "exp_metadata.attempt: 3" in parameters.read_text()

    identities = record["trackers"]
    run = Path(identities["wandb"]["folder"])
    assert [
        (row["train/global_step"], row["train/loss"]) for row in wandb_history(run) if "train/loss" in row
    ] == losses
    [config] = [item.config for item in wandb_records(run) if item.WhichOneof("record_type") == "config"]
    assert ("exp_metadata.team", '"search"') in [(item.key, item.value_json) for item in config.update]

    assert json.loads((tmp_path / "uris" / "wandb_tracker.json").read_text()) == identities["wandb"]
    _check_scan(json.loads((out / "scanner_output.json").read_text()))


def _check_scan(scan: dict[str, Any]) -> None:
    times = scan["time_data"]
    order = ("step_begin", "fwd_begin", "fwd_end", "bwd_begin", "bwd_end", "opt_begin", "opt_end", "step_end")
    relative = [times[f"{name}_relative"] for name in order]
    assert relative[0] == 0
    assert relative == sorted(relative)
    assert {size.split()[1] for size in scan["mem_data"].values()} == {"KiB"}
    assert scan["tps_data"]["tokens"] > 0
    assert scan["metadata"]["step"] == 5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["tracking.trackers=[comet_ml]"], "pip install comet-ml"),
        (["training_args.report_to=[neptune]"], "pip install neptune"),
        (["tracking.trackers=[aim]"], "needs either tracking.aim_repo or tracking.aim_remote_server_ip"),
        (["tracking.trackers=[mlflow]"], "needs an address"),
        (["tracking.trackers=[wanbd]"], "wandb"),
    ],
)
def test_an_unusable_tracker_is_reported_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], sft_values: Any, write_config: Any, changes: list[str], expected: str
) -> None:
    assert main(["sft", str(write_config(sft_values())), *changes, "--dry-run"]) == EXIT_USER
    assert expected in capsys.readouterr().err


def tracker_run(output: Path, *names: str) -> TrackerRun:
    return TrackerRun(output, "tests", "mine", {"a.b": "c"}, TrackingConfig(), read_identities(output, names))


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_resumed_job_continues_the_tracker_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    identities = []
    for step in (1, 2):
        tracker = AccelerateTracker(name, tracker_run(tmp_path, name))
        tracker.on_train_begin(StepMetrics(step, 2))
        tracker.on_train_begin(StepMetrics(step, 2))
        tracker.log(LogEvent("training", StepMetrics(step, 2), {"loss": 1.0 / step}))
        tracker.log(LogEvent("validation", StepMetrics(step, 2), {"eval_loss": 2.0}))
        tracker.close()
        identities.append(read_identities(tmp_path, [name])[name])
    if name == "wandb":
        assert identities[0]["run_id"] == identities[1]["run_id"]
    else:
        assert identities[0] == identities[1]
        assert scalars(tmp_path / "tensorboard", "train/loss") == [(1, 1.0), (2, 0.5)]
        assert scalars(tmp_path / "tensorboard", "eval/loss") == [(1, 2.0), (2, 2.0)]


@pytest.mark.parametrize(
    ("args", "environ", "folder"),
    [
        ({}, {}, "./logs"),
        ({"output_dir": "out"}, {}, None),
        ({"output_dir": "out"}, {"LOGS_PATH": "/logs"}, "/logs"),
        ({}, {"TENSORBOARD_LOGGING_DIR": "/shared", "LOGS_PATH": "/logs"}, None),
        ({"output_dir": "out", "logging_dir": "mine"}, {"TENSORBOARD_LOGGING_DIR": "/shared"}, "mine"),
    ],
)
def test_the_folder_of_tensorboard_is_that_of_silogens_engine(
    args: dict[str, str], environ: dict[str, str], folder: str | None
) -> None:
    assert _tensorboard_dir(TrainingArgs(**args), environ) == folder


def test_events_go_to_the_configured_folder(tmp_path: Path) -> None:
    run = replace(tracker_run(tmp_path / "out"), tensorboard_dir=str(tmp_path / "logs"))
    tracker = AccelerateTracker("tensorboard", run)
    tracker.on_train_begin(StepMetrics(0, 1))
    tracker.log(LogEvent("training", StepMetrics(1, 1), {"loss": 1.0}))
    tracker.close()
    assert scalars(tmp_path / "logs", "train/loss") == [(1, 1.0)]


def test_all_means_the_trackers_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "find_spec", lambda name: name in ("tensorboard", "aim") or None)
    assert requested_trackers(None, "all") == ["tensorboard"]
    assert requested_trackers(TrackingConfig(aim_repo="/aim"), ["all", "wandb"]) == ["aim", "tensorboard", "wandb"]


class Stubborn(Tracker):
    """A tracker that blocks until `answer` is set, or fails at one step."""

    name = "stubborn"

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.steps: list[int] = []
        self.fails_at: int | None = None

    def on_train_begin(self, metrics: StepMetrics) -> None:
        self.answer.wait()

    def log(self, event: LogEvent) -> None:
        if event.metrics.step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.steps.append(event.metrics.step)


def log_steps(trackers: TrackerGroup, steps: range) -> None:
    for step in steps:
        trackers.call("log", LogEvent("training", StepMetrics(step, len(steps)), {"loss": 1.0}))


def test_a_tracker_that_blocks_does_not_block_training(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Stubborn()
    trackers = TrackerGroup([BackgroundTracker(tracker, close_timeout_s=0.1)])
    trackers.call("on_train_begin", StepMetrics(0, 100))
    log_steps(trackers, range(100))
    assert tracker.steps == []
    trackers.close()
    assert "no response" in trackers.failures["stubborn"]
    assert "stubborn failed" in caplog.text
    tracker.answer.set()


def test_a_slow_tracker_receives_everything_in_order() -> None:
    tracker = Stubborn()
    trackers = TrackerGroup([BackgroundTracker(tracker)])
    trackers.call("on_train_begin", StepMetrics(0, 100))
    log_steps(trackers, range(100))
    tracker.answer.set()
    trackers.close()
    assert tracker.steps == list(range(100))
    assert trackers.failures == {}


def test_a_tracker_that_fails_during_training_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Stubborn()
    tracker.fails_at = 3
    tracker.answer.set()
    trackers = TrackerGroup([BackgroundTracker(tracker)])
    trackers.call("on_train_begin", StepMetrics(0, 9))
    log_steps(trackers, range(9))
    trackers.close()
    assert tracker.steps == [0, 1, 2]
    assert trackers.failures == {"stubborn": "ConnectionError: the server is gone"}
    assert caplog.text.count("the server is gone") == 1


def test_a_failing_transformers_callback_is_disabled(scripted_run: Any) -> None:
    from transformers import TrainerCallback

    class Failing(TrainerCallback):
        logged = 0

        def on_log(self, *arguments: Any, **kwargs: Any) -> None:
            self.logged += 1
            raise ConnectionError("the server is gone")

    failing = Failing()
    failures: dict[str, str] = {}
    run = scripted_run([1.0, 2.0, 3.0], [GuardedCallback("neptune", failing, failures)])
    assert run.error is None
    assert run.state.global_step == 3
    assert failing.logged == 1
    assert failures == {"neptune": "ConnectionError: the server is gone"}


def test_a_run_total_is_reported_once() -> None:
    names = TelemetryNames()
    series = {"tokens_per_second": 5.0, "first_step_s": 2.0}
    assert names.rename(series) == {"telemetry/tokens_per_second": 5.0, "totals/first_step_s": 2.0}
    assert names.rename(series) == {"telemetry/tokens_per_second": 5.0}
    badput = {"goodput": 0.5, "badput_lost_work_s": 0.0, "badput_checkpoint_save_s": 1.0, "badput_other_s": 2.0}
    assert names.rename(badput) == {
        "totals/goodput": 0.5,
        "totals/badput_checkpoint_save_s": 1.0,
        "totals/badput_s": 3.0,
    }
