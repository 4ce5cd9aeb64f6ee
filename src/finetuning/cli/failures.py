"""What programs read when a console script fails: the termination log of Kubernetes, and a JSON file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.errors import EXIT_INTERNAL, Problem

TERMINATION_LOG = "TERMINATION_LOG_FILE"
ERROR_FILE = "FINETUNING_ERROR_FILE"


@dataclass(frozen=True)
class Failure:
    """How a console script failed."""

    name: str
    """The class of the error."""
    exit_code: int
    problems: tuple[Problem, ...]

    @property
    def message(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        return {
            "class": self.name,
            "message": self.message,
            "exit_code": self.exit_code,
            "problems": [
                {
                    "file": problem.place.file,
                    "line": problem.place.line,
                    "column": problem.place.column,
                    "key": problem.place.key,
                    "message": problem.message,
                    "hint": problem.hint,
                }
                for problem in self.problems
            ],
        }


def forget(environ: Mapping[str, str] = os.environ) -> None:
    """Removes what an earlier run left in $FINETUNING_ERROR_FILE, unless a launcher has started this process."""
    if environ.get(ERROR_FILE) and not environ.get("RANK"):
        try:
            Path(environ[ERROR_FILE]).unlink(missing_ok=True)
        except OSError as error:
            _warn(ERROR_FILE, error)


def report(failure: Failure, environ: Mapping[str, str] = os.environ) -> None:
    """Tells the failure where the environment asks for it; a file that cannot be written is a warning.

    Of the processes of a job the first one speaks for all that fail alike, and each other for itself.
    """
    rank = environ.get("RANK") or "0"
    if environ.get(TERMINATION_LOG):
        path = Path(environ[TERMINATION_LOG])
        try:
            if rank == "0" or not _contains(path, failure.message):
                with path.open("a", encoding="utf-8") as file:
                    file.write(("" if rank == "0" else f"process {rank}: ") + failure.message + "\n")
        except OSError as error:
            _warn(TERMINATION_LOG, error)
    if environ.get(ERROR_FILE):
        path = Path(environ[ERROR_FILE])
        try:
            if rank == "0" or not path.exists():
                _write(path, json.dumps(failure.as_dict(), indent=2, ensure_ascii=False) + "\n", rank)
        except OSError as error:
            _warn(ERROR_FILE, error)


def told_so_far(environ: Mapping[str, str] = os.environ) -> tuple[int, bool]:
    """Bytes of the termination log, and whether there is an error file: these change when a process speaks."""
    log, error = environ.get(TERMINATION_LOG), environ.get(ERROR_FILE)
    size = Path(log).stat().st_size if log and Path(log).is_file() else 0
    return size, bool(error) and Path(error).exists()


def speak_for_processes(exit_code: int, before: tuple[int, bool], environ: Mapping[str, str] = os.environ) -> None:
    """Reports a job whose process was killed before it could say anything, where reports are asked for.

    Args:
        before: what `told_so_far` gave before the processes were started.
    """
    is_asked = environ.get(TERMINATION_LOG) or environ.get(ERROR_FILE)
    if is_asked and exit_code == EXIT_INTERNAL and told_so_far(environ) == before:
        message = "a process of the job was killed, or ended without a word; often the memory did not suffice"
        print(f"error: {message}", file=sys.stderr)
        report(Failure("InternalError", exit_code, (Problem(message),)), environ)


def _contains(path: Path, message: str) -> bool:
    return path.is_file() and message in path.read_text(encoding="utf-8", errors="replace")


def _write(path: Path, text: str, rank: str) -> None:
    staging = path.with_name(f".{path.name}.{rank}.{os.getpid()}")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)


def _warn(name: str, error: OSError) -> None:
    print(f"warning: {name}: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)
