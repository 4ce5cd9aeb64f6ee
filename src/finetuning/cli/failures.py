"""What programs read when a console script fails: the termination log of Kubernetes, and a JSON file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.errors import Problem

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


def was_reported(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a process of the job has written the error file; True where none is asked for."""
    return not environ.get(ERROR_FILE) or Path(environ[ERROR_FILE]).exists()


def _contains(path: Path, message: str) -> bool:
    return path.is_file() and message in path.read_text(encoding="utf-8", errors="replace")


def _write(path: Path, text: str, rank: str) -> None:
    staging = path.with_name(f".{path.name}.{rank}.{os.getpid()}")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)


def _warn(name: str, error: OSError) -> None:
    print(f"warning: {name}: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)
