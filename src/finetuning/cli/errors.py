"""What all console scripts share: an error becomes a message and an exit code, never a traceback.

What programs read when a console script fails: the termination log of Kubernetes, and a JSON file.

Errors that name a key of a config, told by where the user gave it: a line of the file, an override, a flag."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetuning.config.yaml.document import ConfigDocument, dotted
from finetuning.errors import EXIT_INTERNAL, EXIT_OK, EXIT_USER, FinetuningError, Problem, is_out_of_memory

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


def reset_error_file(environ: Mapping[str, str] = os.environ) -> None:
    """Removes what an earlier run left in $FINETUNING_ERROR_FILE, unless a launcher has started this process."""
    if environ.get(ERROR_FILE) and not environ.get("RANK"):
        try:
            Path(environ[ERROR_FILE]).unlink(missing_ok=True)
        except OSError as error:
            _warn(ERROR_FILE, error)


def report_failure(failure: Failure, environ: Mapping[str, str] = os.environ) -> None:
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


def reported_errors(environ: Mapping[str, str] = os.environ) -> tuple[int, bool]:
    """Bytes of the termination log, and whether there is an error file: these change when a process speaks."""
    log, error = environ.get(TERMINATION_LOG), environ.get(ERROR_FILE)
    size = Path(log).stat().st_size if log and Path(log).is_file() else 0
    return size, bool(error) and Path(error).exists()


def report_for_processes(exit_code: int, before: tuple[int, bool], environ: Mapping[str, str] = os.environ) -> None:
    """Reports a job whose process was killed before it could say anything, where reports are asked for.

    Args:
        before: what `reported_errors` gave before the processes were started.
    """
    is_asked = environ.get(TERMINATION_LOG) or environ.get(ERROR_FILE)
    if is_asked and exit_code == EXIT_INTERNAL and reported_errors(environ) == before:
        message = "a process of the job was killed, or ended without a word; often the memory did not suffice"
        print(f"error: {message}", file=sys.stderr)
        report_failure(Failure("InternalError", exit_code, (Problem(message),)), environ)


def _contains(path: Path, message: str) -> bool:
    return path.is_file() and message in path.read_text(encoding="utf-8", errors="replace")


def _write(path: Path, text: str, rank: str) -> None:
    staging = path.with_name(f".{path.name}.{rank}.{os.getpid()}")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)


def _warn(name: str, error: OSError) -> None:
    print(f"warning: {name}: {error.filename} cannot be written: {error.strerror}", file=sys.stderr)


EXIT_SIGINT = 130
DEBUG_OPTION = "--debug"
DEBUG_VARIABLE = "FINETUNING_DEBUG"

# By name, so that an error can be told apart without importing the libraries that define it.
_LOST_NAMES = frozenset({"DistNetworkError", "DistStoreError", "DistBackendError"})


def run_command(main_function: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """The exit code of `main_function(arguments)`; its errors are told on stderr, one line per problem.

    `--debug` is taken out of the arguments; it, or FINETUNING_DEBUG=1, shows the traceback of an error. Of an error
    that is no FinetuningError the traceback is always kept in a file, whose path is told. TERMINATION_LOG_FILE and
    FINETUNING_ERROR_FILE name files that get the errors, too.
    """
    reset_error_file()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG_OPTION in arguments or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != DEBUG_OPTION]
    try:
        return main_function(arguments) or EXIT_OK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        report_failure(Failure("Interrupted", EXIT_SIGINT, (Problem("interrupted"),)))
        return EXIT_SIGINT
    except FinetuningError as error:
        if debug:
            traceback.print_exc()
        for problem in error.problems:
            _tell(str(problem))
        report_failure(Failure(type(error).__name__, error.exit_code, error.problems))
        return error.exit_code
    except BrokenPipeError:
        # The reader of a pipe went away; the null device keeps the interpreter from failing once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_USER
    except Exception as error:  # noqa: BLE001  the last frame before the user's terminal
        return _tell_unforeseen(error, debug)


def _tell_unforeseen(error: Exception, debug: bool) -> int:
    """The exit code of an error that no room of ours raised: a full disk, no memory, or a defect."""
    if debug:
        traceback.print_exc()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        message = f"no room left on the disk{where}. Free some space, or choose another output directory."
        return _tell_failure("StorageError", EXIT_USER, message)
    if is_lost_connection(error):
        # The process that was lost speaks for itself, or was killed; this one has nothing to add.
        message = f"the connection to another process of the job was lost: {_first_line(error)}"
        return _tell_failure("InternalError", EXIT_INTERNAL, message)
    if is_out_of_memory(error):
        name, message = "OutOfMemory", f"out of memory: {_first_line(error)}"
    else:
        name, message = "InternalError", f"internal error: {type(error).__name__}: {_first_line(error)}"
    code = _tell_failure(name, EXIT_INTERNAL, message)
    _tell_traceback_file(error)
    return code


def _tell_failure(name: str, exit_code: int, message: str) -> int:
    _tell(message)
    report_failure(Failure(name, exit_code, (Problem(message),)))
    return exit_code


def is_lost_connection(error: BaseException) -> bool:
    """True for what gloo, NCCL and torch's stores raise when the process at the other end has gone."""
    if any(base.__name__ in _LOST_NAMES for base in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error) and "by peer" in str(error)


def _tell(message: str) -> None:
    """One line per problem; only an excerpt of the user's file, which is indented, keeps its lines and its caret."""
    lines = message.splitlines()
    print(
        "error: " + "".join(f"\n{line}" if line.startswith("    ") else f" {line}" for line in lines)[1:],
        file=sys.stderr,
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no message)"


def _tell_traceback_file(error: BaseException) -> None:
    """Writes the traceback into a new file under the temporary directory and tells its path."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        handle, path = tempfile.mkstemp(prefix="finetuning-traceback-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as problem:
        print(f"error: the traceback could not be kept: {problem}", file=sys.stderr)
        return
    print(f"error: the traceback is in {path}; please report it. {DEBUG_OPTION} shows it.", file=sys.stderr)


@contextmanager
def locate_errors(document: ConfigDocument) -> Iterator[None]:
    """Errors of the block that name a key of the config say its line, too, or what stands for the key."""
    try:
        yield
    except FinetuningError as error:
        error.problems = tuple(_located(problem, document) for problem in error.problems)
        raise


def _located(problem: Problem, document: ConfigDocument) -> Problem:
    """The problem with the place that its key was given at; as it is, when it says its file itself."""
    if problem.place.key is None or problem.place.file is not None:
        return replace(problem, hint=_said(problem.hint, document))
    parts = problem.place.key.replace("[", ".").replace("]", "").split(".")
    path = tuple(int(part) if part.isdecimal() else part for part in parts)
    return replace(problem, place=document.location_of(path), hint=_said(problem.hint, document))


def _said(hint: str | None, document: ConfigDocument) -> str | None:
    """The hint with the flag in place of each key that a flag stands for."""
    for path, mark in document.marks.items():
        if hint and mark.source is not None and len(path) > 1:
            hint = re.sub(rf"(?<![\w.]){re.escape(dotted(path))}(?!\w|\.\w)", str(mark.source), hint)
    return hint
