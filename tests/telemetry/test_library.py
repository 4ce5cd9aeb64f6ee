"""Telemetry as a library: context managers, decorators and callbacks in a hand-written training loop."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from finetuning.telemetry import names
from finetuning.telemetry.config import JobIdentity, ProcessTotals, TrainingConfig
from finetuning.telemetry.error_guard import TelemetryUsageError
from finetuning.telemetry.metrics import straggler_metrics
from finetuning.telemetry.session import open_telemetry
from finetuning.telemetry.spans import Clock, export_all, export_all_but, export_only


def train(telemetry: Any, steps: int, *, start: int = 0, every: int = 50, tokens: int | None = None) -> None:
    """Run a training loop with all phases of a step."""
    with telemetry.application():
        telemetry.set_training_config(TrainingConfig(global_batch_size=4, log_every_n_train_iterations=every))
        with telemetry.training_loop(start):
            for _ in range(steps):
                with telemetry.training_iteration(tokens=tokens):
                    for phase in ("data_loading", "model_forward", "model_backward", "optimizer_update", "zero_grad"):
                        with telemetry.phase(phase):
                            pass
    telemetry.close()


def test_spans_nest_like_the_code(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry()
    with observer.application():
        for name in (names.DIST_INIT, names.DATA_LOADER_INIT, names.CHECKPOINT_LOAD, names.MODEL_INIT):
            with observer.standard_span(name):
                pass
        with observer.standard_span(names.OPTIMIZER_INIT):
            pass
        with observer.training_loop():
            with observer.training_iteration(), observer.phase(names.DATA_LOADING):
                pass
            with observer.validation_loop(), observer.validation_iteration():
                pass
            with observer.checkpoint_save(1):
                pass
        with observer.testing_loop(), observer.testing_iteration():
            pass
    observer.close()
    output = recorded(tmp_path)
    parents = {span["name"]: output.parent(span) for span in output.spans()}
    assert parents == {
        "application": None,
        "distributed_code_initialization": "application",
        "data_loader_initialization": "application",
        "checkpoint_load": "application",
        "model_initialization": "application",
        "optimizer_initialization": "application",
        "training_loop": "application",
        "training_single_iteration": "training_loop",
        "data_loading": "training_single_iteration",
        "validation_loop": "training_loop",
        "validation_single_iteration": "validation_loop",
        "checkpoint_save_sync": "training_loop",
        "testing_loop": "application",
        "testing_single_iteration": "testing_loop",
    }
    spans = {span["span_id"]: span for span in output.spans()}
    for span in spans.values():
        if span["parent_id"]:
            assert spans[span["parent_id"]]["start_ns"] <= span["start_ns"]
            assert span["end_ns"] <= spans[span["parent_id"]]["end_ns"]
    assert len({span["trace_id"] for span in spans.values()}) == 1


def test_each_span_has_one_start_and_one_stop_event_at_its_times(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    train(telemetry(), 5)
    output = recorded(tmp_path)
    assert len(output.spans()) == 2 + 5 * 6
    for span in output.spans():
        events = [event for event in output.events() if event["span_id"] == span["span_id"]]
        [start] = [event for event in events if event["name"] == "span_start"]
        [stop] = [event for event in events if event["name"] == "span_stop"]
        assert (start["time_ns"], stop["time_ns"]) == (span["start_ns"], span["end_ns"])
        assert start["attributes"]["parent_span_id"] == (span["parent_id"] or "")
        assert span["attributes"]["duration_msec"] == pytest.approx((span["end_ns"] - span["start_ns"]) / 1e6, abs=1e-3)


@pytest.mark.parametrize(
    ("steps", "every", "iterations", "intervals"),
    [(25, 10, [9, 19, 24], [10, 10, 5]), (5, 1, [0, 1, 2, 3, 4], [1] * 5), (20, 10, [9, 19], [10, 10])],
)
def test_updates_come_every_n_steps_and_at_the_end(
    telemetry: Any, recorded: Any, tmp_path: Path, steps: int, every: int, iterations: list[int], intervals: list[int]
) -> None:
    train(telemetry(export_all_but()), steps, every=every)
    updates = recorded(tmp_path).updates()
    assert [update["current_iteration"] for update in updates] == iterations
    assert [update["interval"] for update in updates] == intervals


def test_no_update_is_lost_in_a_long_loop(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    train(telemetry(export_all_but()), 300, every=1)
    assert len(recorded(tmp_path).updates()) == 300


def test_a_resumed_loop_counts_from_its_first_step(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    train(telemetry(), 15, start=17, every=10)
    output = recorded(tmp_path)
    assert output.span("training_loop")["attributes"]["train_iterations_start"] == 17
    assert output.span("training_loop")["attributes"]["train_samples_start"] == 68
    assert [update["interval"] for update in output.updates()] == [3, 10, 2]
    assert [update["current_iteration"] for update in output.updates()] == [19, 29, 31]
    assert output.updates()[-1]["num_iterations"] == 15
    assert output.updates()[-1]["num_train_samples"] == 60


def test_totals_are_the_sums_of_the_spans(telemetry: Any, ticks: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry(clock=ticks.clock())
    with observer.application():
        observer.set_training_config(TrainingConfig(global_batch_size=1, log_every_n_train_iterations=4))
        with observer.training_loop():
            for number in range(10):
                with observer.training_iteration():
                    with observer.phase("data_loading"):
                        ticks.sleep(0.05 if number == 6 else 0.002)
                    with observer.phase("model_forward"):
                        ticks.sleep(0.003)
    observer.close()
    output = recorded(tmp_path)

    def seconds(name: str) -> list[float]:
        return [(span["end_ns"] - span["start_ns"]) / 1e9 for span in output.spans(name)]

    last, steps = output.updates()[-1], seconds("training_single_iteration")
    assert last["total_iteration_time_sec"] == pytest.approx(sum(steps))
    assert last["max_iteration_time_sec"] == pytest.approx(max(steps))
    assert last["avg_iteration_time_sec"] * 10 == pytest.approx(last["total_iteration_time_sec"])
    assert last["min_iteration_time_sec"] <= last["avg_iteration_time_sec"] <= last["max_iteration_time_sec"]
    assert last["total_dataloader_time_sec"] == pytest.approx(sum(seconds("data_loading")))
    assert last["first_iteration_time_sec"] == pytest.approx(steps[0])
    first, second, _ = output.updates()
    assert second["window_avg_dataloader_time_sec"] - first["window_avg_dataloader_time_sec"] > 0.01
    assert second["data_wait_share"] > 0.7 > first["data_wait_share"]
    assert sum(steps) == pytest.approx(seconds("training_loop")[0])


def test_throughput_follows_from_the_recorded_values(telemetry: Any, ticks: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry(world_size=2, clock=ticks.clock())
    done = {"steps": 0}
    observer.measure_with(lambda: ProcessTotals(100.0 * done["steps"], 6e9 * done["steps"], 0.5 + done["steps"]))
    with observer.application():
        observer.set_training_config(
            TrainingConfig(global_batch_size=8, log_every_n_train_iterations=2, peak_tflops=1.0)
        )
        with observer.training_loop():
            for number in range(6):
                with observer.training_iteration():
                    ticks.sleep(0.03 if number == 4 else 0.004)
                    done["steps"] += 1
    observer.close()
    first, second, last = recorded(tmp_path).updates()
    total = last["total_iteration_time_sec"]
    assert last["latest_loss"] == 6.5
    assert last["train_tokens"] == 2 * 600
    assert last["avg_tokens_per_second_per_device"] == pytest.approx(600 / total)
    assert last["tokens_per_second_per_device"] == pytest.approx(200 / (2 * last["window_avg_iteration_time_sec"]))
    assert last["train_throughput_per_gpu"] == pytest.approx(36e9 / (total * 1e12))
    assert last["avg_mfu"] == pytest.approx(36e9 / (total * 1e12))
    assert last["mfu"] == pytest.approx(12e9 / (2 * last["window_avg_iteration_time_sec"] * 1e12))
    assert last["train_throughput_per_gpu_min"] < second["train_throughput_per_gpu_min"] / 2
    assert last["train_throughput_per_gpu_max"] >= second["train_throughput_per_gpu_max"]
    assert last["mfu"] < second["mfu"]
    assert first["num_train_samples"] == 16


def test_an_exception_is_recorded_once_in_the_innermost_span(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry()

    @observer.training_iteration()
    @observer.phase("model_forward")
    def step() -> float:
        return 1 / 0

    with pytest.raises(ZeroDivisionError), observer.application(), observer.training_loop():
        step()
    observer.close()
    output = recorded(tmp_path)
    assert {span["status"] for span in output.spans()} == {"ERROR"}
    error = output.events("error")[0]
    assert len(output.events("error")) == 1
    assert error["span_id"] == output.span("model_forward")["span_id"]
    assert error["attributes"]["exception_type"] == "ZeroDivisionError"
    assert "1 / 0" in error["attributes"]["exception_traceback"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_marks_the_open_spans(telemetry: Any, recorded: Any, tmp_path: Path, error: Any) -> None:
    observer = telemetry()
    with pytest.raises(error), observer.application(), observer.training_loop():
        raise error
    observer.close()
    assert [span["status"] for span in recorded(tmp_path).spans()] == ["ERROR", "ERROR"]


def test_checkpoints_are_counted_and_measured(telemetry: Any, ticks: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry(clock=ticks.clock())
    with observer.application():
        observer.set_training_config(TrainingConfig(global_batch_size=4, flops_per_sample=1e12))
        with observer.training_loop():
            for step in (1, 2, 3):
                with observer.training_iteration():
                    pass
                folder = tmp_path / f"checkpoint-{step}"
                with observer.checkpoint_save(step, folder):
                    ticks.sleep(0.003 * step)
                    folder.mkdir()
                    (folder / "weights").write_bytes(b"x" * 100 * step)
            with pytest.raises(OSError, match="full"), observer.checkpoint_save(4):
                raise OSError("full")
    observer.close()
    output = recorded(tmp_path)
    saves = output.spans("checkpoint_save_sync")
    assert [save["status"] for save in saves] == ["OK", "OK", "OK", "ERROR"]
    assert [save["attributes"]["save_checkpoint_attempt_count"] for save in saves] == [1, 2, 3, 4]
    successes = output.updates("save_checkpoint_success")
    assert [success["save_checkpoint_success_count"] for success in successes] == [1, 2, 3]
    assert [success["checkpoint_size"] for success in successes] == [100, 200, 300]
    assert [success["productive_train_iterations"] for success in successes] == [1, 2, 3]
    assert [success["productive_train_samples"] for success in successes] == [4, 8, 12]
    assert successes[2]["productive_train_tflops"] == pytest.approx(12.0)
    assert successes[2]["checkpoint_directory"] == str(tmp_path / "checkpoint-3")
    metrics = output.updates("sync_checkpoint_metrics_update")[2]
    seconds = [(save["end_ns"] - save["start_ns"]) / 1e9 for save in saves[:3]]
    assert metrics["save_checkpoint_sync_time_total_sec"] == pytest.approx(sum(seconds))
    assert metrics["save_checkpoint_sync_time_max_sec"] == pytest.approx(max(seconds))
    assert metrics["save_checkpoint_sync_time_avg_sec"] * 3 == pytest.approx(
        metrics["save_checkpoint_sync_time_total_sec"]
    )
    assert output.events("error")[0]["span_id"] == saves[3]["span_id"]


def test_an_asynchronous_save_succeeds_later(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry()
    with observer.application():
        observer.set_training_config(TrainingConfig(save_checkpoint_strategy="async"))
        with observer.training_loop():
            with observer.checkpoint_save(1):
                pass

            def finish() -> None:
                with observer.checkpoint_save_finalization():
                    observer.on_save_checkpoint_success(1, size=7)

            writer = threading.Thread(target=finish)
            writer.start()
            writer.join()
    observer.close()
    output = recorded(tmp_path)
    application = output.span("application")
    [success] = output.events("save_checkpoint_success")
    assert success["span_id"] == application["span_id"]
    assert success["attributes"]["checkpoint_strategy"] == "async"
    assert success["attributes"]["checkpoint_size"] == 7
    assert output.parent(output.span("checkpoint_save_async")) == "training_loop"
    assert output.parent(output.span("checkpoint_save_finalization")) == "application"
    assert not output.spans("checkpoint_save_sync")


def test_custom_spans_events_and_attributes(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry(export_all_but())
    with observer.application(), observer.training_loop(attributes={"my_attribute": "mine"}) as loop:
        loop.set_attribute("another", 3)
        with observer.span("my_span", {"color": "red"}) as span:
            observer.event("my_event", {"value": math.nan, "nothing": None}, span)
    observer.close()
    output = recorded(tmp_path)
    assert output.parent(output.span("my_span")) == "training_loop"
    assert output.span("my_span")["attributes"]["color"] == "red"
    assert output.span("training_loop")["attributes"]["my_attribute"] == "mine"
    assert output.span("training_loop")["attributes"]["another"] == 3
    assert output.event("my_event")["value"] == "NaN"
    assert "nothing" not in output.event("my_event")


def test_context_managers_are_decorators(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry()

    @observer.standard_span("model_initialization")
    def build() -> int:
        return 3

    @observer.application()
    def main() -> int:
        return build()

    assert main() == 3
    observer.close()
    assert recorded(tmp_path).parent(recorded(tmp_path).span("model_initialization")) == "application"


def test_callbacks_record_what_context_managers_record(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry()
    observer.on_app_start()
    observer.begin(names.MODEL_INIT)
    observer.end(names.MODEL_INIT)
    observer.on_train_start(3)
    observer.on_training_single_iteration_start()
    observer.on_training_single_iteration_end(tokens=7, loss=0.25)
    observer.on_validation_start()
    observer.on_validation_single_iteration_start()
    observer.on_validation_single_iteration_end()
    observer.on_validation_end()
    observer.on_train_end()
    observer.on_testing_start()
    observer.on_testing_end()
    observer.on_app_end()
    observer.close()
    output = recorded(tmp_path)
    assert {span["status"] for span in output.spans()} == {"OK"}
    assert output.updates()[0]["latest_loss"] == 0.25
    assert output.updates()[0]["train_tokens"] == 7
    validation = output.event("validation_metrics_update")
    assert validation["current_iteration"] == 3
    assert validation["interval"] == 1
    assert validation["avg_iteration_time_sec"] > 0
    assert output.event("testing_metrics_update")["interval"] == 1


def test_the_config_may_be_set_late_and_hold_functions(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry()
    with observer.application(), observer.training_loop():
        observer.set_training_config(
            TrainingConfig(perf_tag=lambda: ["a", "b"], global_batch_size=lambda: 2 * 4, custom_metadata={"k": "v"})
        )
        with observer.training_iteration():
            pass
    observer.close()
    output = recorded(tmp_path)
    config = output.event("update_training_telemetry_config")
    assert (config["perf_tag"], config["global_batch_size"]) == (["a", "b"], 8)
    assert config["custom_metadata"] == ["k:v"]
    assert config["checkpoint_strategy"] == "sync"
    assert output.updates()[0]["num_train_samples"] == 8
    initialization = output.event("one_logger_initialization")
    assert (initialization["session_tag"], initialization["world_size"], initialization["is_baseline_run"]) == (
        "session",
        1,
        False,
    )


@pytest.mark.parametrize(
    ("span_filter", "expected"),
    [
        (export_all_but(), {"application", "training_loop"}),
        (export_only(["model_forward"]), {"application", "model_forward"}),
        (export_all_but(["training_loop"]), {"application", "training_single_iteration", *names.ITERATION_PHASES}),
    ],
)
def test_the_filter_excludes_spans_but_no_metrics(
    telemetry: Any, recorded: Any, tmp_path: Path, span_filter: Any, expected: set[str]
) -> None:
    train(telemetry(span_filter), 3)
    output = recorded(tmp_path)
    assert {span["name"] for span in output.spans()} == expected == set(output.started())
    assert output.updates()[0]["num_iterations"] == 3
    assert output.updates()[0]["total_forward_time_sec"] > 0
    ids = {span["span_id"] for span in output.spans()}
    assert all(span["parent_id"] in ids for span in output.spans() if span["name"] != "application")


def test_a_second_start_ends_the_first_with_an_error(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    observer = telemetry()
    with observer.application():
        observer.on_train_start()
        observer.on_training_single_iteration_start()
        observer.on_train_start()
        observer.on_train_end()
    observer.close()
    output = recorded(tmp_path)
    assert [span["status"] for span in output.spans("training_loop")] == ["ERROR", "OK"]
    assert {output.parent(span) for span in output.spans("training_loop")} == {"application"}
    assert output.span("training_single_iteration")["status"] == "ERROR"


def test_time_never_goes_backward(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    wall = itertools.chain([2_000_000_000], itertools.repeat(1_000_000_000))
    train(telemetry(clock=Clock(wall_ns=lambda: next(wall))), 5)
    output = recorded(tmp_path)
    times = [record.get("time_ns") or record["end_ns"] for record in output.lines]
    assert times == sorted(times)
    assert all(span["end_ns"] >= span["start_ns"] for span in output.spans())


def test_random_generators_are_not_used(telemetry: Any, recorded: Any, tmp_path: Path) -> None:
    random.seed(1)
    before = random.getstate()
    train(telemetry(), 3)
    assert random.getstate() == before
    first = recorded(tmp_path).span("application")["trace_id"]
    random.seed(1)
    second = open_telemetry(JobIdentity("t", "j", "s"), tmp_path / "telemetry" / "other", export_all())
    train(second, 3)
    assert recorded(tmp_path, job=-1).span("application")["trace_id"] != first


def test_files_are_appended_to(telemetry: Any, tmp_path: Path) -> None:
    train(telemetry(), 1)
    path = tmp_path / "telemetry" / "job" / "rank0.jsonl"
    before = path.read_bytes()
    train(telemetry(), 1)
    assert path.read_bytes().startswith(before)
    assert len(path.read_bytes()) > len(before)


def test_an_unwritable_folder_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    observer = open_telemetry(JobIdentity("t", "j", "s"), tmp_path / "file" / "below", export_all())
    train(observer, 60)
    assert len(caplog.records) == 1
    assert "training continues" in caplog.text
    assert observer.summary()["avg_iteration_time_sec"] > 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "job"
    observer = open_telemetry(JobIdentity("t", "j", "s"), folder, export_all())
    lines = folder / "rank0.jsonl"
    full = os.open("/dev/full", os.O_WRONLY)
    for link in Path("/proc/self/fd").iterdir():
        if os.path.realpath(link) == str(lines):
            os.dup2(full, int(link.name))
    train(observer, 60)
    os.close(full)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_an_internal_error_is_marked_and_training_continues(
    telemetry: Any, recorded: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observer = telemetry(export_all_but())

    def broken() -> ProcessTotals:
        raise RuntimeError("no measure")

    observer.measure_with(broken)
    train(observer, 200, every=1)
    output = recorded(tmp_path)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    [mark] = output.updates("telemetry_data_error")
    assert mark["telemetry_data_error_type"] == "incomplete_telemetry_data"
    assert "no measure" in mark["error_message"]
    assert observer.errors.count > 200
    # A fault of one part stops no other, and the run ends well.
    assert len(output.updates()) == 200
    assert {span["status"] for span in output.spans()} == {"OK"}


def test_a_wrong_config_is_an_error_at_once() -> None:
    with pytest.raises(TelemetryUsageError, match="global_batch_size must be a number above 0"):
        TrainingConfig(global_batch_size=0)


def test_the_slowest_rank_is_named() -> None:
    samples = [[1.0, 0.1, 0.2, 1, 1, 1], [1.0, 0.1, 0.2, 1, 1, 1], [1.1, 0.7, 0.2, 1, 1, 1]]
    metrics = straggler_metrics(samples)
    assert metrics["slowest_rank"] == 2
    assert metrics["rank_dataloader_time_max_sec"] == 0.7
    assert metrics["rank_dataloader_time_median_sec"] == 0.1
    assert metrics["straggler_ratio"] == pytest.approx(3.0)


def test_every_rank_writes_its_own_file(tmp_path: Path) -> None:
    for rank in (0, 1):
        observer = open_telemetry(JobIdentity("t", "j", "s", rank=rank, world_size=2), tmp_path, export_all())
        train(observer, 1)
    for rank in (0, 1):
        first = json.loads((tmp_path / f"rank{rank}.jsonl").read_text().splitlines()[0])
        assert (first["attributes"]["rank"], first["attributes"]["world_size"]) == (rank, 2)


def test_a_launcher_may_pass_the_trace(tmp_path: Path, recorded: Any) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    observer = open_telemetry(
        JobIdentity("t", "j", "s"), tmp_path / "telemetry" / "j", export_all(), traceparent=parent
    )
    train(observer, 1)
    application = recorded(tmp_path).span("application")
    assert application["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert application["parent_id"] == "b7ad6b7169203331"
