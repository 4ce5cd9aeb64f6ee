"""What a run prints: in a terminal of 80 columns, in a log file, and on other ranks."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from finetuning.report.console import _substitute_caches, is_live, open_console
from finetuning.report.run_folder import FinalLosses
from finetuning.report.terminal import (
    LineProgress,
    LiveProgress,
    NextCommand,
    OutputFile,
    RunSummary,
    SummaryLine,
    print_end,
    print_start,
    print_warning,
    progress_tracker,
)
from finetuning.tracking.tracker import LogEvent, StepMetrics, Tracker

METRICS = StepMetrics(
    step=20,
    max_steps=100,
    epoch=0.4,
    loss=1.23456,
    learning_rate=5e-5,
    grad_norm=0.81234,
    tokens_seen=10_000,
    tokens_per_s=12_345.6,
    seconds_left=185.0,
)
LONG_PATH = Path("/data") / "/".join(["a-very-long-folder-name"] * 6)


def log_file() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return open_console(file=stream), stream


def terminal(width: int = 80) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=width, highlight=False, _environ={"TERM": "xterm"}), stream


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def send_all_events(tracker: Tracker) -> None:
    tracker.on_train_begin(StepMetrics(0, 100))
    tracker.on_step_end(StepMetrics(1, 100))
    tracker.log(LogEvent("training", METRICS, {"loss": 1.23456}))
    tracker.log(LogEvent("validation", METRICS, {"eval_loss": 1.5, "eval_other_loss": 2.5, "eval_runtime": 3.0}))
    tracker.on_save(20, LONG_PATH)
    tracker.log(LogEvent("summary", METRICS, {"train_loss": 1.0}))
    tracker.on_train_end(METRICS)
    tracker.close()


def test_a_log_file_gets_one_line_per_log() -> None:
    console, stream = log_file()
    tracker = progress_tracker(console)
    assert type(tracker) is LineProgress
    send_all_events(tracker)
    assert stream.getvalue().splitlines() == [
        "training starts: 100 steps",
        "step  20/100  epoch 0.40  loss 1.2346  lr 5e-05  grad 0.812  12,346 tokens/s  3m 05s left",
        "step 20: validation loss 1.5000, other loss 2.5000",
        f"checkpoint saved: {LONG_PATH}",
        "training ended at step 20 of 100 after 0.0s",
    ]


def test_unknown_values_are_a_dash() -> None:
    console, stream = log_file()
    LineProgress(console).log(LogEvent("training", StepMetrics(1, 9), {}))
    assert stream.getvalue() == "step 1/9  epoch –  loss –  lr –  – tokens/s  – left\n"


def test_a_resumed_run_says_at_which_step_it_continues() -> None:
    console, stream = log_file()
    LineProgress(console).on_train_begin(StepMetrics(50, 100))
    assert stream.getvalue() == "training starts: step 51 of 100, resumed after step 50\n"


@pytest.mark.parametrize("width", [80, 40])
def test_a_terminal_gets_a_bar_that_fits_and_is_removed(width: int) -> None:
    console, stream = terminal(width)
    tracker = progress_tracker(console)
    assert type(tracker) is LiveProgress
    send_all_events(tracker)
    text = plain(stream.getvalue())
    assert "━" in text
    assert "3m 05s left" in text
    bars = [line for line in re.split(r"[\r\n]", text) if "━" in line or "tokens/s" in line]
    assert bars
    assert all(len(line) <= width for line in bars)
    assert "step 20: validation loss 1.5000" in text
    assert stream.getvalue().endswith("after 0.0s\n")
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h")


def test_an_interrupted_run_restores_the_cursor() -> None:
    console, stream = terminal()
    tracker = LiveProgress(console)
    tracker.on_train_begin(StepMetrics(0, 100))
    tracker.close()
    tracker.close()
    assert "\x1b[?25h" in stream.getvalue()


def test_other_ranks_write_nothing() -> None:
    stream = io.StringIO()
    console = open_console(is_main=False, file=stream)
    send_all_events(progress_tracker(console))
    print_start(console, "title", [SummaryLine("model", "m")])
    print_end(console, RunSummary("done", True))
    assert stream.getvalue() == ""


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert not is_live(console)


START = [
    SummaryLine("model", "models/[tiny]"),
    SummaryLine(
        "batch", "16 = 1 process x 8 rows x 2", "the largest per-device size within the maximum of 8 that divides 16"
    ),
]


def test_the_start_summary_in_a_log_file() -> None:
    console, stream = log_file()
    print_start(console, "Fine-tuning", START)
    assert stream.getvalue() == (
        "Fine-tuning\n"
        "  model  models/[tiny]\n"
        "  batch  16 = 1 process x 8 rows x 2  (the largest per-device size within the maximum of 8 that divides 16)\n"
        "\n"
    )


def test_the_start_summary_fits_the_terminal() -> None:
    console, stream = terminal()
    print_start(console, "Fine-tuning", START)
    lines = plain(stream.getvalue()).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[1].split() == ["model", "models/[tiny]"]
    assert " ".join(" ".join(lines[2:]).split()) == f"batch {START[1].value} ({START[1].reason})"
    assert lines[3].startswith("         ")


@pytest.mark.parametrize("make", [log_file, terminal])
def test_the_summary_summary_does_not_wrap_paths_and_commands(make: type) -> None:
    console, stream = make()
    command = f"merge_adapter models/tiny {LONG_PATH} merged"
    print_end(
        console,
        RunSummary(
            headline="Done: the model is saved",
            good=True,
            outputs=[OutputFile("final model", LONG_PATH)],
            losses=FinalLosses(0.65912, (91, 100)),
            training_s=185,
            first_step_s=0.7,
            total_s=203,
            facts=[("MLflow", "http://host/#/experiments/1/runs/2")],
            warnings=["3 rows were left out"],
            commands=[NextCommand(command, "merge the adapter")],
        ),
    )
    assert plain(stream.getvalue()).splitlines() == [
        "",
        "Done: the model is saved",
        "  final loss   0.6591, mean over steps 91 to 100",
        "  time         3m 23s (training 3m 05s, first step 0.7s)",
        f"  final model  {LONG_PATH}",
        "  MLflow       http://host/#/experiments/1/runs/2",
        "  warning: 3 rows were left out",
        "",
        "Next",
        "  # merge the adapter",
        f"  {command}",
    ]


def test_long_values_of_the_summary_summary_are_wrapped_between_words() -> None:
    value = "485.0 MiB at most, resident set of the process, libraries included; the plan had at least 671.2 KiB"
    summary = RunSummary(headline="Done", good=True, facts=[("memory", value)], warnings=[f"{value} {value}"])
    console, stream = terminal()
    print_end(console, summary)
    _, _, *lines = plain(stream.getvalue()).splitlines()
    assert all(len(line) <= 80 for line in lines)
    words = f"memory {value} warning: {value} {value}".split()
    assert " ".join(lines).split() == words
    assert lines[1].startswith("          ")
    console, stream = log_file()
    print_end(console, summary)
    assert f"  memory  {value}\n" in stream.getvalue()


def test_no_word_is_broken_in_a_terminal() -> None:
    path = "/a/very/long/path/" + "to-a-folder-whose-name-goes-on/" * 4
    console, stream = terminal()
    lines = [SummaryLine("model", path, "as configured"), SummaryLine("batch-size", "a-b " * 40)]
    print_start(console, "Fine-tuning", lines)
    print_warning(console, f"the folder {path} is not writable, and neither is its well-known parent")
    text = plain(stream.getvalue())
    assert text.count(path) == 2
    assert all(len(line) <= 80 for line in text.splitlines() if path not in line)
    assert set(text.split()) >= {"a-b", "well-known", "configured)"}


@pytest.mark.parametrize("home", ["missing", "not writable", "usable"])
def test_libraries_get_a_place_for_their_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("os.path.expanduser", lambda path: path if home == "missing" else str(tmp_path / "home"))
    monkeypatch.setattr("os.access", lambda path, mode: home == "usable")
    (tmp_path / "home").mkdir()
    variables = _substitute_caches({"TRITON_CACHE_DIR": "/kept"})
    if home == "usable":
        assert not {"HOME", "HF_HOME"} & set(variables)
        return
    folder = tmp_path / "temporary" / f"finetuning-{os.getuid()}"
    assert variables["HF_HOME"] == str(folder / "huggingface") and folder.is_dir()
    assert "TRITON_CACHE_DIR" not in variables
    assert ("HOME" in variables) == (home == "missing")
    assert caplog.text.count("libraries keep their caches in") == 1


def test_downloads_that_can_be_read_stay_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "huggingface").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "HF_HOME" not in _substitute_caches({"XDG_CACHE_HOME": str(tmp_path)})


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert _substitute_caches(os.environ)["USER"] == str(os.getuid())
