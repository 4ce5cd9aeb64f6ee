"""What fails around telemetry: exporters, several processes, and the code that calls it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace.export import SpanExportResult

from finetuning.telemetry import exporters, names
from finetuning.telemetry.config import JobIdentity, ProcessTotals, TrainingConfig, plain_value
from finetuning.telemetry.error_guard import TelemetryErrors, TelemetryUsageError
from finetuning.telemetry.exporters import JsonlWriter, OtlpExport, RetryingSpanExporter
from finetuning.telemetry.goodput import session_goodput
from finetuning.telemetry.metrics import JobProgress, ProgressFile, read_progress
from finetuning.telemetry.session import open_telemetry
from finetuning.telemetry.spans import export_all, export_all_but, export_only


class FakeExporter:
    """An exporter that is away between two times of a clock, and rejects batches that contain `bad`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.away = (0.0, 0.0)
        self.received: list[Any] = []
        self.calls = 0
        self.is_closed = False

    def export(self, batch: list[Any]) -> SpanExportResult:
        self.calls += 1
        if self.away[0] <= self.now < self.away[1] or "bad" in batch:
            return SpanExportResult.FAILURE
        self.received += batch
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.is_closed = True


@pytest.fixture
def fake() -> FakeExporter:
    return FakeExporter()


@pytest.fixture
def retrying(fake: FakeExporter) -> RetryingSpanExporter:
    return RetryingSpanExporter(fake, TelemetryErrors(), clock=lambda: fake.now)


def test_a_collector_that_was_away_gets_everything(
    fake: FakeExporter, retrying: RetryingSpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    fake.away = (5.0, 17.0)
    for second in range(60):
        fake.now = float(second)
        retrying.export([second])
    retrying.shutdown()
    assert sorted(fake.received) == list(range(60))
    assert (retrying.lost, fake.is_closed) == (0, True)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 3
    assert "did not respond" in texts[0]
    assert "is paused" in texts[1]
    assert "works again after" in texts[2]


def test_what_waits_for_a_collector_is_bounded_and_the_rest_is_counted(
    fake: FakeExporter, retrying: RetryingSpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporters, "_QUEUE_SIZE", 10)
    fake.away = (0.0, 1000.0)
    for second in range(50):
        fake.now = float(second)
        retrying.export([second])
    assert retrying.lost == 40
    assert fake.calls < 12
    fake.now = 2000.0
    retrying.shutdown()
    assert len(fake.received) == 10


def test_a_rejected_batch_does_not_hold_up_the_others(fake: FakeExporter, retrying: RetryingSpanExporter) -> None:
    for second in range(100):
        fake.now = float(second)
        retrying.export(["bad"] if second == 20 else [second])
    assert len(fake.received) == 99
    assert retrying.lost == 1


def test_closing_takes_the_documented_time_for_all_threads_together() -> None:
    started = time.monotonic()
    assert not exporters._run_within(0.3, [lambda: time.sleep(2), lambda: time.sleep(2)])
    assert time.monotonic() - started < 0.55


class _RejectsEverySecond(BaseHTTPRequestHandler):
    """Answers 400 to every second request."""

    count = 0

    def do_POST(self) -> None:
        type(self).count += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(400 if type(self).count % 2 else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Do not log requests."""


@pytest.fixture
def rejecting_collector() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _RejectsEverySecond)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_collector_that_rejects_data_ends_no_local_log(
    rejecting_collector: str, recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setattr(exporters, "_BATCH_INTERVAL_MS", 10)
    monkeypatch.setattr(exporters, "_FIRST_PAUSE_S", 0.01)
    errors = TelemetryErrors()
    otlp = OtlpExport(rejecting_collector, {}, 2.0, errors)
    observer = open_telemetry(
        JobIdentity("t", "j", "s"), tmp_path / "telemetry" / "job", export_all(), otlp=otlp, errors=errors
    )
    with observer.application():
        observer.set_training_config(TrainingConfig(log_every_n_train_iterations=1))
        with observer.training_loop():
            for _ in range(90):
                with observer.training_iteration():
                    time.sleep(0.003)
    observer.close()
    output = recorded(tmp_path)
    assert errors.count > 5
    assert len(output.updates()) == len(output.spans("training_single_iteration")) == 90
    assert output.span("application")["status"] == "OK"
    assert session_goodput(tmp_path).disruptions == 0
    marks = [mark["error_message"] for mark in output.updates("telemetry_data_error")]
    assert sum("did not respond" in mark for mark in marks) == 1
    assert len(marks) == len(set(marks)) <= 4


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_disk_that_was_full_is_written_to_again(tmp_path: Path) -> None:
    errors = TelemetryErrors()
    writer = JsonlWriter(tmp_path / "rank0.jsonl", errors, {}, 1, retry_s=0.0)
    kept = os.dup(writer._descriptor)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._descriptor)
    for number in range(5):
        writer.write({"type": "event", "number": number})
    os.dup2(kept, writer._descriptor)
    writer.write({"type": "event", "number": 5})
    writer.close()
    for descriptor in (kept, full):
        os.close(descriptor)
    lines = [json.loads(line) for line in (tmp_path / "rank0.jsonl").read_text().splitlines()]
    assert [line.get("number") for line in lines] == [None, 5]
    assert writer.lost == 5
    assert "5 lines were lost" in errors.messages[-1]


def test_every_exception_is_recorded(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry()
    ids = set()
    with observer.application():
        for number in range(50):
            # Each is freed before the next one is made, which then has its address.
            error = ValueError(number)
            ids.add(id(error))
            for _ in range(2):
                observer.recorder.error(error)
            del error
    observer.close()
    assert len(ids) < 25
    messages = [event["attributes"]["exception_message"] for event in recorded(tmp_path).events("error")]
    assert messages == [str(number) for number in range(50)]


def run_with_filter(tmp_path: Path, ticks: Any, name: str, span_filter: Any) -> Any:
    observer = open_telemetry(
        JobIdentity("t", name, "s"), tmp_path / name / "telemetry" / "job", span_filter, clock=ticks.clock()
    )
    with observer.application():
        with observer.standard_span(names.CHECKPOINT_LOAD):
            ticks.sleep(2)
        with observer.training_loop():
            for step in range(1, 4):
                with observer.training_iteration():
                    ticks.sleep(1)
                with observer.checkpoint_save(step):
                    ticks.sleep(0.5)
            with observer.validation_loop(), observer.validation_iteration():
                ticks.sleep(3)
    observer.close()
    return session_goodput(tmp_path / name)


def test_goodput_does_not_depend_on_what_is_exported(tmp_path: Path, ticks: Any) -> None:
    everything = run_with_filter(tmp_path, ticks, "all", export_all())
    nothing = run_with_filter(tmp_path, ticks, "none", export_only([]))
    assert (nothing.disruptions, nothing.kept_steps) == (0, 3)
    assert nothing.badput_s["checkpoint_save"] == pytest.approx(1.5)
    assert nothing.badput_s["checkpoint_load"] == pytest.approx(2)
    assert nothing.badput_s["evaluation"] == pytest.approx(3)
    assert nothing.productive_s == pytest.approx(3)
    for name in ("checkpoint_save", "checkpoint_load", "evaluation", "lost_work", "initialization"):
        assert nothing.badput_s[name] == pytest.approx(everything.badput_s[name]), name


def test_a_process_that_hangs_is_known_to_be_alive(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path / "rank0.progress", interval_s=0.02)
    file.write(JobProgress(step=3), force=True)
    before = read_progress(tmp_path / "rank0.progress")
    time.sleep(0.2)
    hung = read_progress(tmp_path / "rank0.progress")
    file.close()
    assert hung.step == before.step == 3
    assert hung.time_ns - before.time_ns > 50_000_000
    assert hung.marked_ns == before.marked_ns


def distributed_loop(telemetry: Any, config: TrainingConfig, ticks: Any, start: int = 0, **ends: Any) -> None:
    observer = telemetry(world_size=4, clock=ticks.clock())
    with observer.application():
        observer.set_training_config(config)
        with observer.training_loop(start):
            for _ in range(6):
                observer.on_training_single_iteration_start()
                ticks.sleep(0.5)
                observer.on_training_single_iteration_end(**ends)
            with observer.checkpoint_save(start + 6):
                pass
    observer.close()


def test_numbers_are_over_all_processes_unless_they_say_per_device(
    telemetry: Any, ticks: Any, recorded: Any, tmp_path: Path
) -> None:
    config = TrainingConfig(
        global_batch_size=32, seq_length=128, flops_per_sample=1e12, log_every_n_train_iterations=2, peak_tflops=100.0
    )
    distributed_loop(telemetry, config, ticks, start=10)
    output = recorded(tmp_path)
    last = output.updates()[-1]
    assert last["train_tokens"] == 6 * 32 * 128
    assert last["tokens_per_second"] == pytest.approx(32 * 128 / 0.5)
    assert last["tokens_per_second_per_device"] == pytest.approx(32 * 128 / 0.5 / 4)
    assert last["total_flops"] == 6 * 32e12
    assert last["train_throughput_per_gpu"] == pytest.approx(6 * 32e12 / (3.0 * 1e12 * 4))
    assert last["mfu"] == pytest.approx(last["train_throughput_per_gpu"] / 100)
    overall = [update["completed_floating_point_operations_overall"] for update in output.updates()]
    assert overall == [12 * 32e12, 14 * 32e12, 16 * 32e12]
    assert output.span("training_loop")["attributes"]["completed_floating_point_operations_overall"] == 10 * 32e12
    assert output.event("save_checkpoint_success")["productive_train_tflops"] == pytest.approx(16 * 32.0)


def test_tokens_of_one_process_count_for_all(telemetry: Any, ticks: Any, recorded: Any, tmp_path: Path) -> None:
    distributed_loop(telemetry, TrainingConfig(flops_per_token=1e9), ticks, start=100, tokens=100)
    last = recorded(tmp_path).updates()[-1]
    assert last["train_tokens"] == 6 * 100 * 4
    assert last["tokens_per_second"] == pytest.approx(4 * last["tokens_per_second_per_device"]) == pytest.approx(800)
    assert last["total_flops"] == 6 * 100 * 4 * 1e9
    assert last["completed_floating_point_operations_overall"] == 106 * 400e9


def test_the_overall_counter_never_falls(telemetry: Any, ticks: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry(clock=ticks.clock())
    with observer.application():
        observer.set_training_config(TrainingConfig(flops_per_token=1.0, log_every_n_train_iterations=1))
        with observer.training_loop(1000):
            for tokens in (1000, 10, 10, 10):
                with observer.training_iteration(tokens=tokens):
                    ticks.sleep(1)
    observer.close()
    overall = [item["completed_floating_point_operations_overall"] for item in recorded(tmp_path).updates()]
    assert overall == sorted(overall)


def test_what_was_not_measured_is_left_out(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry()
    with observer.application(), observer.training_loop():
        for _ in range(3):
            with observer.training_iteration(), observer.phase(names.MODEL_FORWARD):
                pass
        with observer.validation_loop():
            pass
        with observer.checkpoint_save(3):
            pass
    observer.close()
    output = recorded(tmp_path)
    [update] = output.updates()
    assert "avg_forward_time_sec" in update
    unmeasured = [name for name in update if any(part in name for part in ("data", "backward", "optimizer", "zero"))]
    assert unmeasured == []
    assert observer.sample()[1] == -1
    assert "productive_validation_iterations_sec" not in output.event("save_checkpoint_success")
    assert "avg_iteration_time_sec" not in output.event("validation_metrics_update")


def test_a_second_training_loop_counts_from_zero(telemetry: Any, ticks: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry(clock=ticks.clock())
    with observer.application():
        for _ in range(2):
            with observer.training_loop():
                for _ in range(4):
                    with observer.training_iteration(tokens=100):
                        ticks.sleep(1)
    observer.close()
    first, second = recorded(tmp_path).updates()
    for name in ("tokens_per_second", "avg_tokens_per_second", "train_tokens", "num_iterations"):
        assert first[name] == second[name], name
    goodput = session_goodput(tmp_path)
    assert (goodput.kept_steps, goodput.lost_steps, goodput.productive_s) == (8, 0, pytest.approx(8))


def test_a_retried_loop_measures_its_own_tokens(telemetry: Any, ticks: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry(clock=ticks.clock())
    seen = {"tokens": 0.0}
    observer.measure_with(lambda: ProcessTotals(tokens=seen["tokens"], flops=seen["tokens"] * 10))
    with observer.application():
        for _ in range(2):
            # The first loop does not end: training starts again after running out of memory.
            observer.on_train_start()
            for _ in range(4):
                with observer.training_iteration():
                    seen["tokens"] += 100
                    ticks.sleep(1)
        observer.on_train_end()
    observer.close()
    [update] = recorded(tmp_path).updates()
    assert (update["train_tokens"], update["total_flops"]) == (400, 4000)
    assert update["tokens_per_second"] == pytest.approx(100)
    goodput = session_goodput(tmp_path)
    assert (goodput.kept_steps, goodput.lost_steps) == (4, 4)
    assert goodput.badput_s["lost_work"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("flag", "missing"),
    [
        ("is_train_iterations_enabled", "training_metrics_update"),
        ("is_validation_iterations_enabled", "validation_metrics_update"),
        ("is_test_iterations_enabled", "testing_metrics_update"),
        ("is_save_checkpoint_enabled", "save_checkpoint_success"),
    ],
)
def test_what_is_not_enabled_is_not_recorded(
    telemetry: Any, recorded: Any, tmp_path: Path, flag: str, missing: str
) -> None:
    observer = telemetry()
    with observer.application():
        observer.set_training_config(TrainingConfig(**{flag: False}, log_every_n_train_iterations=1))
        with observer.training_loop():
            with observer.training_iteration(tokens=3):
                pass
            with observer.validation_loop(), observer.validation_iteration():
                pass
            with observer.checkpoint_save(1):
                pass
        with observer.testing_loop(), observer.testing_iteration():
            pass
    observer.close()
    output = recorded(tmp_path)
    updates = {
        "training_metrics_update": "training_single_iteration",
        "validation_metrics_update": "validation_single_iteration",
        "testing_metrics_update": "testing_single_iteration",
        "save_checkpoint_success": None,
    }
    for event, span in updates.items():
        assert bool(output.events(event)) == (event != missing)
        assert span is None or bool(output.spans(span)) == (event != missing)
    assert session_goodput(tmp_path).kept_steps == 1


def test_throughput_that_is_not_enabled_is_left_out(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry()
    with observer.application():
        observer.set_training_config(TrainingConfig(is_log_throughput_enabled=lambda: False, flops_per_token=1.0))
        with observer.training_loop(), observer.training_iteration(tokens=3):
            pass
    observer.close()
    [update] = recorded(tmp_path).updates()
    assert update["train_tokens"] == 3
    assert not [name for name in update if "per_second" in name or "flops" in name or "throughput" in name]


def test_wrong_use_is_an_error_at_once(telemetry: Any) -> None:
    observer = telemetry()
    with observer.application():
        with pytest.raises(TypeError, match="train_iteration_start"), observer.training_loop(train_iteration_start=3):
            pass
        with pytest.raises(TypeError, match="token"):
            observer.on_training_single_iteration_end(token=3)
        with pytest.raises(TelemetryUsageError, match="did you mean 'model_forward'"), observer.phase("model_foward"):
            pass
        with pytest.raises(TelemetryUsageError, match="no standard span"), observer.standard_span("mine"):
            pass
        with pytest.raises(TypeError, match="seq_len"):
            TrainingConfig(seq_len=3)
        with pytest.raises(TelemetryUsageError, match="sync"):
            TrainingConfig(save_checkpoint_strategy="later")
    observer.close()
    assert observer.errors.messages == []


@pytest.mark.parametrize("make", [export_only, export_all_but])
def test_a_typing_error_in_a_filter_is_an_error(make: Any) -> None:
    for wrong in ("model_foward", "Training_Lop", "trainingloop"):
        with pytest.raises(TelemetryUsageError, match="did you mean"):
            make([wrong])
    with pytest.raises(TelemetryUsageError, match="a list"):
        make("model_forward")
    assert make is not export_only or make(["my_span", "model_forward_2"])("my_span")
    assert make is export_only or not make(["TESTING_SINGLE_ITERATION"])("testing_single_iteration")


def test_scalars_of_numpy_and_torch_are_numbers(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    import torch

    observer = telemetry()
    with observer.application():
        observer.set_training_config(
            TrainingConfig(
                global_batch_size=np.int64(4),
                seq_length=torch.tensor(8),
                perf_tag=["a", "b"],
                custom_metadata={"nodes": 3, "rate": np.float32(0.5)},
            )
        )
        with observer.training_loop():
            observer.on_training_single_iteration_start()
            observer.on_training_single_iteration_end(tokens=np.int32(32), loss=torch.tensor(0.5))
            values = {"a": np.float32(0.5), "b": torch.tensor(3), "c": np.array([1, 2]), "d": [1, 2.5], "e": Path("x")}
            observer.event("mine", values)
    observer.close()
    output = recorded(tmp_path)
    [update] = output.updates()
    assert (update["train_tokens"], update["latest_loss"], update["num_train_samples"]) == (32, 0.5, 4)
    mine = output.event("mine")
    assert {key: mine[key] for key in "abcde"} == {"a": 0.5, "b": 3, "c": [1, 2], "d": [1.0, 2.5], "e": "x"}
    config = output.event("update_training_telemetry_config")
    assert (config["perf_tag"], config["custom_metadata"]) == (["a", "b"], ["nodes:3", "rate:0.5"])
    assert plain_value(np.array([[1, 2]])) == ["[1, 2]"]


def test_the_config_is_completed_when_training_starts(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer, values = telemetry(), {}
    with observer.application():
        observer.set_training_config(
            TrainingConfig(
                perf_tag="p", global_batch_size=lambda: values["batch"], seq_length=lambda: values.get("length")
            )
        )
        values |= {"batch": 4, "length": 8}
        with observer.training_loop(), observer.training_iteration():
            pass
        del values["batch"]
        with pytest.raises(TelemetryUsageError, match="global_batch_size: its function raised"):
            observer.on_train_start()
    observer.close()
    output = recorded(tmp_path)
    configs = output.updates("update_training_telemetry_config")
    assert [config.get("global_batch_size") for config in configs] == [None, 4]
    assert output.updates()[0]["train_tokens"] == 32


def test_ranks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    identity = JobIdentity("t", "j", "s")
    assert (identity.rank, identity.local_rank, identity.world_size) == (3, 1, 8)
    assert JobIdentity("t", "j", "s", world_size=2).rank == 3
    assert identity.node_name
    monkeypatch.delenv("WORLD_SIZE")
    assert (JobIdentity("t", "j", "s").rank, JobIdentity("t", "j", "s").world_size) == (3, 1)


def test_processes_with_one_path_write_different_files(tmp_path: Path) -> None:
    first, second = (open_telemetry(JobIdentity("t", "j", "s"), tmp_path, export_all()) for _ in range(2))
    for observer in (first, second):
        with observer.application():
            pass
    for observer in (first, second):
        observer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rank0.2.jsonl",
        "rank0.2.progress",
        "rank0.jsonl",
        "rank0.progress",
    ]
    for name in ("rank0.jsonl", "rank0.2.jsonl"):
        assert sum('"type":"resource"' in line for line in (tmp_path / name).read_text().splitlines()) == 1


def test_a_forked_process_writes_a_file_of_its_own(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "rank0.jsonl", TelemetryErrors(), {}, 1)
    writer.write({"type": "event", "pid": os.getpid()})
    child = multiprocessing.get_context("fork").Process(target=lambda: writer.write({"type": "event", "pid": 0}))
    child.start()
    child.join()
    writer.write({"type": "event", "pid": os.getpid()})
    writer.close()
    parent = [json.loads(line) for line in (tmp_path / "rank0.jsonl").read_text().splitlines()]
    assert [line.get("pid") for line in parent] == [None, os.getpid(), os.getpid()]
    assert (tmp_path / f"rank0.{child.pid}.jsonl").exists()
