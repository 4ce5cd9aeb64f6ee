"""The events that trackers receive, from a real transformers Trainer and with a clock that the test advances."""

from __future__ import annotations

import json
import logging
import math
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import finetuning
from finetuning.tracking.callback import TrackerCallback, numeric_values
from finetuning.tracking.mlflow.queue import Queue
from finetuning.tracking.mlflow.tracker import MlflowTracker
from finetuning.tracking.tracker import LogEvent, LossLog, StepMetrics, Tracker, TrackerGroup

ARGUMENTS: Any = SimpleNamespace(output_dir="out")
CONTROL: Any = None
PACKAGE = Path(finetuning.__file__).parent


class Recorder(Tracker):
    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_train_begin(self, metrics: StepMetrics) -> None:
        self.calls.append(("begin", metrics))

    def on_step_end(self, metrics: StepMetrics) -> None:
        self.calls.append(("step", metrics))

    def log(self, event: LogEvent) -> None:
        self.calls.append((event.kind, event))

    def on_save(self, step: int, folder: Path) -> None:
        self.calls.append(("save", folder))

    def on_train_end(self, metrics: StepMetrics) -> None:
        self.calls.append(("end", metrics))

    def close(self) -> None:
        self.calls.append(("close", None))

    def of(self, kind: str) -> list[Any]:
        return [argument for name, argument in self.calls if name == kind]


class Broken(Tracker):
    name = "broken"

    def __init__(self) -> None:
        self.calls = 0

    def log(self, event: LogEvent) -> None:
        self.calls += 1
        raise RuntimeError("out of order")

    def close(self) -> None:
        raise RuntimeError("twice")


class Slope(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        guess = self.weight * x
        return {"loss": ((guess - labels) ** 2).mean(), "logits": guess}


def train(output: Path, trackers: TrackerGroup, steps: int = 6, **kwargs: Any) -> None:
    rows = [{"x": float(number), "labels": 2.0 * number} for number in range(8)]
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    tokens = iter(range(0, 10_000, 100))
    callback = TrackerCallback(trackers, count_tokens=lambda: next(tokens))
    trainer = Trainer(Slope(), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback])
    trainer.train(**kwargs)


def test_trackers_receive_all_events_of_a_trainer(tmp_path: Path) -> None:
    recorder = Recorder()
    trackers = TrackerGroup([recorder])
    train(tmp_path, trackers)
    trackers.close()
    assert [name for name, _ in recorder.calls] == [
        *("begin", "step", "step", "training", "step", "step", "training", "validation", "save"),
        *("step", "step", "training", "validation", "save", "summary", "end", "close"),
    ]
    first, second, third = recorder.of("training")
    assert (first.metrics.step, first.metrics.max_steps) == (2, 6)
    assert first.metrics.loss == first.values["loss"]
    assert first.metrics.learning_rate is not None
    assert first.metrics.grad_norm is not None
    assert third.metrics.tokens_seen == 300
    assert second.metrics.tokens_per_s > 0
    assert second.metrics.seconds_left > 0
    assert third.metrics.seconds_left == 0
    assert recorder.of("validation")[0].values["eval_loss"] > 0
    assert recorder.of("save") == [tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"]
    assert recorder.of("end")[0].first_step_s > 0


def test_a_failing_tracker_is_disabled_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, recorder = Broken(), Recorder()
    trackers = TrackerGroup([broken, recorder])
    with caplog.at_level(logging.WARNING):
        train(tmp_path, trackers)
        trackers.close()
        trackers.close()
    assert broken.calls == 1
    assert trackers.failures == {"broken": "RuntimeError: out of order"}
    assert [record.getMessage() for record in caplog.records if "is disabled" in record.getMessage()] == [
        "broken failed and is disabled: RuntimeError: out of order"
    ]
    assert len(recorder.of("training")) == 3
    assert len(recorder.of("close")) == 1


def test_a_logged_loss_reaches_the_mlflow_queue_in_four_calls(tmp_path: Path) -> None:
    class RecordingQueue(Queue):
        callers: list[str]

        def append(self, kind: str, **values: Any) -> None:
            frames = traceback.extract_stack()
            self.callers = [frame.name for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]

    nothing: Any = None
    queue = RecordingQueue(tmp_path / "mlflow_queue.jsonl")
    callback = TrackerCallback(TrackerGroup([MlflowTracker(nothing, queue, nothing)]))
    state: Any = SimpleNamespace(global_step=1, max_steps=2, epoch=0.5, is_world_process_zero=True)
    callback.on_log(ARGUMENTS, state, CONTROL, {"loss": 1.0})
    assert queue.callers == ["on_log", "call", "log"]  # and append, which writes


def test_other_ranks_log_nothing() -> None:
    recorder = Recorder()
    callback = TrackerCallback(TrackerGroup([recorder]), clock=lambda: 0.0)
    state: Any = SimpleNamespace(global_step=1, max_steps=2, epoch=0.5, is_world_process_zero=False)
    callback.on_train_begin(ARGUMENTS, state, CONTROL)
    callback.on_step_end(ARGUMENTS, state, CONTROL)
    callback.on_log(ARGUMENTS, state, CONTROL, logs={"loss": 1.0})
    assert recorder.calls == []


def test_throughput_excludes_the_first_step_evaluation_and_saving() -> None:
    recorder, now, tokens = Recorder(), [0.0], [0]
    callback = TrackerCallback(TrackerGroup([recorder]), count_tokens=lambda: tokens[0], clock=lambda: now[0])
    state: Any = SimpleNamespace(global_step=0, max_steps=100, epoch=0.0, is_world_process_zero=True)
    callback.on_train_begin(ARGUMENTS, state, CONTROL)
    for step in range(1, 31):
        now[0] += 60.0 if step == 1 else 2.0
        tokens[0] += 1_000
        state.global_step = step
        callback.on_step_end(ARGUMENTS, state, CONTROL)
        if step % 10 == 0:
            callback.on_log(ARGUMENTS, state, CONTROL, logs={"loss": 1.0, "epoch": 0.1})
            now[0] += 300.0
            callback.on_evaluate(ARGUMENTS, state, CONTROL)
    logs = [event.metrics for event in recorder.of("training")]
    assert [metrics.tokens_per_s for metrics in logs] == pytest.approx([500.0] * 3)
    assert [metrics.seconds_left for metrics in logs] == pytest.approx([180.0, 160.0, 140.0])
    assert {metrics.first_step_s for metrics in logs} == {60.0}
    assert logs[-1].elapsed_s == 60 + 29 * 2 + 2 * 300


def test_a_resumed_job_measures_only_its_own_steps() -> None:
    recorder, now = Recorder(), [0.0]
    callback = TrackerCallback(TrackerGroup([recorder]), clock=lambda: now[0])
    state: Any = SimpleNamespace(global_step=500, max_steps=600, epoch=0.0, is_world_process_zero=True)
    callback.on_train_begin(ARGUMENTS, state, CONTROL)
    for state.global_step in range(501, 511):
        now[0] += 3.0
        callback.on_step_end(ARGUMENTS, state, CONTROL)
    callback.on_log(ARGUMENTS, state, CONTROL, logs={"loss": 1.0})
    [event] = recorder.of("training")
    assert event.metrics.seconds_left == pytest.approx(270.0)
    assert event.metrics.tokens_per_s is None
    assert event.metrics.tokens_seen is None


def test_only_numbers_are_logged() -> None:
    logs = {"a": 1, "b": torch.tensor(2.5), "c": torch.ones(3), "d": "text", "e": math.nan, "f": None, "g": True}
    assert str(numeric_values(logs)) == "{'a': 1.0, 'b': 2.5, 'e': nan}"


def test_the_loss_log_has_one_line_per_loss_and_continues_after_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    train(tmp_path / "out", TrackerGroup([LossLog(folder)]))
    path = folder / "training_logs.jsonl"
    lines = path.read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [(line["name"], line["data"]["step"], line["data"]["epoch"]) for line in entries] == [
        ("training_loss", 2, 0.5),
        ("training_loss", 4, 1.0),
        ("validation_loss", 4, 1.0),
        ("training_loss", 6, 1.5),
        ("validation_loss", 6, 1.5),
    ]
    assert lines[0] == json.dumps(entries[0], sort_keys=True)
    assert set(entries[0]) == {"data", "name"}
    assert set(entries[0]["data"]) == {"epoch", "step", "timestamp", "value"}
    assert entries[0]["data"]["timestamp"].count("T") == 1
    assert isinstance(entries[0]["data"]["value"], float)

    with path.open("a") as stream:
        stream.write('{"data": {"epo')
    log = LossLog(folder)
    log.log(LogEvent("training", StepMetrics(7, 9), {"loss": math.nan, "epoch": 1.757}))
    assert path.read_text().splitlines()[: len(lines)] == lines
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["data"]["value"] is None
    assert last["data"]["epoch"] == 1.76
    log.close()


def test_the_loss_log_creates_its_file_with_the_first_loss(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "logs")
    log.on_train_begin(StepMetrics(0, 9))
    log.log(LogEvent("summary", StepMetrics(9, 9), {"train_loss": 1.0, "epoch": 1.0}))
    log.close()
    assert not (tmp_path / "logs").exists()
