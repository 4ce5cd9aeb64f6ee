"""What all console scripts share: an error becomes a message and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

from finetuning.cli.failures import Failure, forget, report
from finetuning.errors import EXIT_INTERNAL, EXIT_OK, EXIT_USER, FinetuningError, Problem

EXIT_SIGINT = 130
DEBUG_OPTION = "--debug"
DEBUG_VARIABLE = "FINETUNING_DEBUG"

# By name, so that an error can be told apart without importing the libraries that define it.
_OUT_OF_MEMORY_NAMES = frozenset({"OutOfMemoryError", "MemoryError"})
_LOST_NAMES = frozenset({"DistNetworkError", "DistStoreError", "DistBackendError"})


def run(main_function: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """The exit code of `main_function(arguments)`; its errors are told on stderr, one line per problem.

    `--debug` is taken out of the arguments; it, or FINETUNING_DEBUG=1, shows the traceback of an error. Of an error
    that is no FinetuningError the traceback is always kept in a file, whose path is told. TERMINATION_LOG_FILE and
    FINETUNING_ERROR_FILE name files that get the errors, too.
    """
    forget()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG_OPTION in arguments or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != DEBUG_OPTION]
    try:
        return main_function(arguments) or EXIT_OK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        report(Failure("Interrupted", EXIT_SIGINT, (Problem("interrupted"),)))
        return EXIT_SIGINT
    except FinetuningError as error:
        if debug:
            traceback.print_exc()
        for problem in error.problems:
            _tell(str(problem))
        report(Failure(type(error).__name__, error.exit_code, error.problems))
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
    report(Failure(name, exit_code, (Problem(message),)))
    return exit_code


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's MemoryError and for the out-of-memory errors of torch, on a device or on the CPU."""
    if any(base.__name__ in _OUT_OF_MEMORY_NAMES for base in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


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
