from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from finetuning.cli.errors import (
    LOST_CONNECTION,
    read_failure,
    report_for_processes,
    reported_errors,
    run_command,
)
from finetuning.errors import (
    CommunicationError,
    ConfigError,
    GuardStopped,
    InternalError,
    Interrupted,
    Location,
    Problem,
)


class OutOfMemoryError(RuntimeError):
    """The name that torch gives its own."""


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def main(arguments: list[str]) -> int:
        raise error

    return main


def test_the_result_is_the_exit_code_and_none_is_success() -> None:
    assert run_command(lambda arguments: None, []) == 0
    assert run_command(lambda arguments: 3, []) == 3


def test_each_problem_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError(
        [Problem("unknown key 'a'", Location("x.yaml", 3, 5, "a")), Problem("two\nlines", hint="Do it.")]
    )
    assert run_command(raising(error), []) == 1
    assert capsys.readouterr().err == "error: x.yaml:3:5: a: unknown key 'a'\nerror: two lines. Do it.\n"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (GuardStopped("not finite"), 3, "error: not finite"),
        (Interrupted("saved", 15), 143, "error: saved"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            1,
            "error: no space left on the disk while writing /x/y",
        ),
        (MemoryError(), 203, "error: out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate"), 203, "error: out of memory: CUDA out of memory"),
        (ValueError("surprise\nmore"), 203, "error: internal error: ValueError: surprise\n"),
    ],
)
def test_exit_codes(error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(error), []) == code
    stderr = capsys.readouterr().err
    assert stderr.startswith(text)
    assert "Traceback" not in stderr


def test_the_traceback_of_an_unexpected_error_is_saved(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", os.fspath(tmp_path))
    run_command(raising(ZeroDivisionError("by zero")), [])
    path = re.search(r"the traceback is in (\S+);", capsys.readouterr().err).group(1)
    assert "ZeroDivisionError: by zero" in Path(path).read_text()


def test_debug_prints_the_traceback_and_is_removed_from_the_arguments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        seen.append(arguments)
        raise ConfigError("wrong")

    assert run_command(main, ["sft", "--debug", "x.yaml"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("FINETUNING_DEBUG", "1")
    run_command(main, ["sft"])
    assert "Traceback" in capsys.readouterr().err
    assert seen == [["sft", "x.yaml"], ["sft"]]


@pytest.mark.parametrize(
    ("error", "name", "is_transient"),
    [
        (RuntimeError("CUDA error: uncorrectable ECC error"), "InternalError", True),
        (OSError(errno.ETIMEDOUT, "timed out"), "InternalError", True),
        (CommunicationError("cannot connect"), "CommunicationError", True),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), LOST_CONNECTION, True),
        (MemoryError(), "OutOfMemory", False),
        (InternalError("out of memory at micro-batch 1"), "InternalError", False),
        (TypeError("a bug"), "InternalError", False),
        (NotImplementedError("no kernel"), "InternalError", False),
        (ConfigError("wrong"), "ConfigError", False),
    ],
)
def test_a_launcher_learns_whether_another_attempt_may_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, name: str, is_transient: bool
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("FINETUNING_ERROR_FILE", str(file))
    run_command(raising(error), [])
    failure = read_failure(file)
    assert failure is not None and (failure.name, failure.is_transient) == (name, is_transient)


def test_the_error_of_another_process_is_not_replaced_by_the_connection_that_it_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("FINETUNING_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", "1")
    run_command(raising(TypeError("a bug")), [])
    monkeypatch.setenv("RANK", "0")
    run_command(raising(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")), [])
    failure = read_failure(file)
    assert failure is not None and failure.message == "internal error: TypeError: a bug"
    assert read_failure(tmp_path / "none") is None
    file.write_text("{}")
    assert read_failure(file) is None


def test_a_killed_process_is_named_before_the_connections_that_it_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("FINETUNING_ERROR_FILE", str(file))
    before = reported_errors()
    run_command(raising(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")), [])
    report_for_processes(203, before, "rank 1 on host b was killed by signal 9 (SIGKILL)")
    assert capsys.readouterr().err.endswith("error: rank 1 on host b was killed by signal 9 (SIGKILL)\n")
    failure = read_failure(file)
    assert failure is not None and failure.message.startswith("rank 1 on host b was killed")
    report_for_processes(203, before, None)
    report_for_processes(1, before, None)
    assert capsys.readouterr().err == "", "another process has reported its own error"
