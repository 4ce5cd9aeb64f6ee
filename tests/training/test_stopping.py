"""What ends a run other than its last step: a file, the clock, a scheduler's signal."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from finetuning.distributed import DEFAULT_GRACE_S, GRACE_VARIABLE, REPEAT_S, read_grace, read_job_end_time
from finetuning.errors import ConfigError, Interrupted
from finetuning.training.heartbeat import Beat, Hang, HeartbeatMonitor, read_beat
from finetuning.training.signals import STOP_FILE, FirstSignal, StopOnSignal, finish_despite_signal, parse_duration


def test_a_time_limit_saves_and_goes_on_the_next_time(train: Any, sft_values: Any) -> None:
    changes = {"run_conf.resume_from_checkpoint": "auto", "training_args.max_steps": 400}
    with pytest.raises(Interrupted, match=r"max_time 1s at step \d+: checkpoint-\d+ is saved") as end:
        train(sft_values({**changes, "run_conf.max_time": "1s"}))
    assert end.value.exit_code == 143
    out = Path(sft_values()["training_args"]["output_dir"])
    assert len(list(out.glob("checkpoint-*"))) == 1


def test_the_end_of_the_schedulers_time_and_a_file_stop_a_run(
    train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(sft_values()["training_args"]["output_dir"])
    out.mkdir()
    (out / "STOP").touch()
    with pytest.raises(Interrupted, match="file STOP at step 1: checkpoint-1 is saved") as end:
        train(sft_values())
    assert end.value.exit_code == 143
    assert not (out / "STOP").exists(), "the next run goes on"
    # The job is shorter than the grace period: half of its time is left to train.
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time()))
    with pytest.raises(Interrupted, match="the scheduler's time limit at step 2"):
        train(sft_values({"run_conf.resume_from_checkpoint": "auto"}))


@pytest.mark.parametrize(("left", "until_stop"), [(1000, 700), (600, 300), (400, 200), (300, 150), (0, 0)])
def test_a_run_stops_the_grace_period_before_the_scheduler_does(
    clock: list[float], tmp_path: Path, left: float, until_stop: float
) -> None:
    stop = StopOnSignal(tmp_path, end_time=time.time() + left)
    with stop.handle_signals():
        assert stop._deadline == pytest.approx(until_stop, abs=5)


def test_times_are_read() -> None:
    assert parse_duration("1h30m") == 5400
    assert parse_duration("2d") == 172800
    assert read_job_end_time({}) is None
    assert read_job_end_time({"SLURM_JOB_END_TIME": "soon"}) is None


def beat(phase: str, step: int, changes: int, beats: int) -> Beat:
    return Beat(phase=phase, step=step, host=f"host-{step}", changes=changes, beats=beats)


def test_who_hangs_is_the_one_that_is_furthest_behind() -> None:
    monitor = HeartbeatMonitor()
    assert monitor.find_hang(100, 5) is None
    for now in (100, 120, 140):
        monitor.update(0, beat("model_backward", 7, 30, now), now)
        monitor.update(1, beat("model_forward", 7, 29, now), now)
    assert monitor.find_hang(140, 60) is None
    hang = monitor.find_hang(140, 5)
    assert hang is not None and str(hang).startswith("rank 1 on host host-7 hangs: model_forward of step 7 for 40 s;")
    monitor.update(2, beat("after model_backward", 6, 28, 1), 101)
    hang = monitor.find_hang(140, 30)
    assert hang is not None and "hangs: after model_backward of step 6 for 39 s, and its process does not" in str(hang)
    monitor.update(2, beat("after model_backward", 6, 28, 2), 140)
    hang = monitor.find_hang(140, 30)
    assert hang is not None and hang.rank == 2 and hang.is_running
    monitor.update(0, beat("data_loading", 8, 31, 141), 141)
    assert monitor.find_hang(142, 5) is None, "one of them makes progress"


def test_heartbeats_of_an_earlier_job_and_those_that_cannot_be_read_are_no_hang(tmp_path: Path) -> None:
    monitor = HeartbeatMonitor()
    monitor.update(0, read_beat(tmp_path, 0), 0)
    assert monitor.find_hang(1000, 5) is None
    monitor.update(0, beat("model_forward", 90, 500, 70), 0)
    monitor.update(0, beat("model_forward", 90, 500, 70), 9)
    monitor.update(0, beat("model_forward", 90, 500, 1), 10)
    assert monitor.find_hang(14, 5) is None, "it was started again"


def test_a_save_is_named_and_not_ended_unless_its_process_is_stopped() -> None:
    saving = beat("checkpoint_save", 3, 9, 9)
    assert Hang(0, saving, 999, is_running=True).is_saving
    assert not Hang(0, saving, 999, is_running=False).is_saving
    assert not Hang(0, beat("model_forward", 3, 9, 9), 999, is_running=True).is_saving


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("finetuning.training.signals.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals by which the process would have ended."""
    numbers: list[int] = []
    monkeypatch.setattr("finetuning.training.signals.signal.raise_signal", numbers.append)
    monkeypatch.setattr("finetuning.training.signals.signal.signal", lambda *_: None)
    return numbers


TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@pytest.mark.parametrize(
    ("signals", "number", "ends"),
    [
        ([(0, TERM)], TERM, []),
        # The scheduler signals every process, and the launcher forwards it.
        ([(0, USR1), (0.1, USR1), (REPEAT_S - 0.1, TERM)], USR1, []),
        ([(0, TERM), (REPEAT_S, TERM)], TERM, [TERM]),
        # The time limit that SIGUSR1 has announced.
        ([(0, USR1), (290, TERM)], USR1, []),
        ([(0, USR1), (290, TERM), (291, TERM)], USR1, []),
        ([(0, USR1), (290, TERM), (300, TERM)], USR1, [TERM]),
        ([(0, TERM), (20, USR1)], TERM, [USR1]),
        ([(0, INT), (20, INT)], INT, [INT]),
    ],
)
def test_signals_within_some_seconds_are_one(
    clock: list[float], ended: list[int], signals: list[tuple[float, int]], number: int, ends: list[int]
) -> None:
    first = FirstSignal()
    for clock[0], signal_number in signals:
        first.handle(signal_number, None)
    assert (first.number, ended) == (number, ends)


def test_a_signal_after_the_checkpoint_was_saved_changes_nothing(clock: list[float], ended: list[int]) -> None:
    first = FirstSignal()
    first.handle(USR1, None)
    first.is_answered = True
    clock[0] = 60
    first.handle(TERM, None)
    first.handle(INT, None)
    assert (first.number, ended) == (USR1, [])


def test_only_the_main_process_looks_for_the_stop_file(tmp_path: Path) -> None:
    stop, state, control = StopOnSignal(tmp_path), TrainerState(), TrainerControl()
    (tmp_path / STOP_FILE).touch()
    for process, expected in ((1, 0), (0, 143)):
        arguments = SimpleNamespace(world_size=1, process_index=process, should_save=process == 0)
        stop.on_step_end(arguments, state, control)  # pyright: ignore[reportArgumentType]
        assert (128 + stop.received if stop.received else 0) == expected


def test_the_grace_period_is_read() -> None:
    assert read_grace({}) == DEFAULT_GRACE_S
    assert read_grace({GRACE_VARIABLE: "42"}) == 42
    for text in ("0", "-1", "soon", "1.5"):
        with pytest.raises(ConfigError, match=f"{GRACE_VARIABLE}='{text}' is not a positive whole number"):
            read_grace({GRACE_VARIABLE: text})


@pytest.fixture
def stop(tmp_path: Path) -> StopOnSignal:
    return StopOnSignal(tmp_path)


def test_a_lost_terminal_stops_like_a_signal_and_may_be_lost_twice(stop: StopOnSignal) -> None:
    before = signal.getsignal(signal.SIGHUP)
    with stop.handle_signals():
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == signal.SIGHUP and stop.reason == "signal 1"
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_lost_terminal_is_ignored_under_nohup(stop: StopOnSignal) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.handle_signals(), finish_despite_signal():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert stop.received == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_the_final_save_survives_a_lost_terminal() -> None:
    with finish_despite_signal():
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
