from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from finetuning.cli.errors import run_command
from finetuning.errors import ConfigError, GuardStopped, Interrupted, Location, Problem


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
