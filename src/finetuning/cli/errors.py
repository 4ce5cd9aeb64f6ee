"""Error handling of the console scripts: messages instead of tracebacks, exit codes, and files for other programs.

`run_command` wraps every console script. `locate_errors` adds file and line to errors that name a key of a config.
`report_failure` writes the termination log of Kubernetes and a JSON file.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NoReturn, TextIO

from finetuning.config.redaction import redact_text, redacted_json
from finetuning.config.yaml.document import ConfigDocument, dotted
from finetuning.errors import (
    EXIT_INTERNAL,
    EXIT_OK,
    EXIT_USER,
    LOST_CONNECTION,
    CommunicationError,
    FinetuningError,
    Location,
    Problem,
    StorageError,
    first_line,
    is_out_of_memory,
    parse_json,
)

TERMINATION_LOG = "TERMINATION_LOG_FILE"
ERROR_FILE = "FINETUNING_ERROR_FILE"


@dataclass(frozen=True)
class Failure:
    """The failure of a console script. Secrets in its texts are redacted when they are written."""

    name: str
    """Class name of the error."""
    exit_code: int
    problems: tuple[Problem, ...]
    is_transient: bool = False
    """Whether another attempt may succeed: a connection was lost, or the device or file system failed."""

    @property
    def message(self) -> str:
        return redact_text("\n".join(str(problem) for problem in self.problems))

    def as_dict(self) -> dict[str, object]:
        return {
            "class": self.name,
            "message": self.message,
            "exit_code": self.exit_code,
            "transient": self.is_transient,
            "problems": [
                {
                    "file": problem.location.file,
                    "line": problem.location.line,
                    "column": problem.location.column,
                    "key": problem.location.key,
                    "message": problem.message,
                    "hint": problem.hint,
                }
                for problem in self.problems
            ],
        }


def reset_error_file(environ: Mapping[str, str] = os.environ) -> None:
    """Delete $FINETUNING_ERROR_FILE of an earlier run, unless this process was started by a launcher."""
    if environ.get(ERROR_FILE) and not environ.get("RANK"):
        try:
            Path(environ[ERROR_FILE]).unlink(missing_ok=True)
        except OSError as error:
            _warn(ERROR_FILE, error)


def report_failure(failure: Failure, environ: Mapping[str, str] = os.environ) -> None:
    """Write the failure to the files that the environment names; a file that cannot be written is a warning.

    Rank 0 always reports. Other ranks append to the termination log only if their error is a different one. They write
    the JSON file only if it does not exist, and rank 0 does so for a transient error: it often follows from another's.
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
            if (rank == "0" and not failure.is_transient) or not path.exists():
                _write(path, redacted_json(failure.as_dict(), indent=2, ensure_ascii=False) + "\n", rank)
        except OSError as error:
            _warn(ERROR_FILE, error)


def reported_errors(environ: Mapping[str, str] = os.environ) -> tuple[int, bool]:
    """Return the size of the termination log in bytes and whether the error file exists: reports change them."""
    log, error = environ.get(TERMINATION_LOG), environ.get(ERROR_FILE)
    size = Path(log).stat().st_size if log and Path(log).is_file() else 0
    return size, bool(error) and Path(error).exists()


def read_failure(error_file: Path) -> Failure | None:
    """Return the failure that a process reported in $FINETUNING_ERROR_FILE; None if none did. Problems are omitted."""
    try:
        values = parse_json(error_file.read_text(encoding="utf-8"))
        problems = (Problem(values["message"]),)
        return Failure(values["class"], values["exit_code"], problems, values["transient"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def report_for_processes(
    exit_code: int, before: tuple[int, bool], killed: str | None, environ: Mapping[str, str] = os.environ
) -> None:
    """Report a job whose process was killed before it could report an error itself.

    Args:
        before: the result of `reported_errors` before the processes were started.
        killed: which process was killed, if it is known.
    """
    if exit_code != EXIT_INTERNAL or (killed is None and reported_errors(environ) != before):
        return
    message = killed or "a process of the job ended without an error of its own: it was stopped, or killed"
    print(f"error: {message}", file=sys.stderr)
    # What the other processes reported follows from it.
    reset_error_file(environ)
    report_failure(Failure("InternalError", exit_code, (Problem(message),), is_transient=True), environ)


def _contains(path: Path, message: str) -> bool:
    return path.is_file() and message in path.read_text(encoding="utf-8", errors="replace")


def _write(path: Path, text: str, rank: str) -> None:
    staging = path.with_name(f".{path.name}.{rank}.{os.getpid()}")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)


def _warn(name: str, error: OSError) -> None:
    print(f"warning: {name}: cannot write {error.filename}: {error.strerror}", file=sys.stderr)


_LOST_READER = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""Errors of writing to a pipe without a reader, or to a terminal that is gone."""
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RedactedStream(io.TextIOBase):
    """A standard stream that redacts secrets, whoever writes to it: our console, a logger or a library."""

    survives_lost_reader = False
    """Whether what is written is discarded once nobody can read it; by default writing raises then."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str, /) -> int:
        with self._discard_if_lost():
            self._stream.write(redact_text(text))
        return len(text)

    def flush(self) -> None:
        with self._discard_if_lost():
            self._stream.flush()

    @contextmanager
    def _discard_if_lost(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.survives_lost_reader or error.errno not in (*_LOST_READER, *_FULL_DISK):
                raise
            discard_output(self._stream)
            if error.errno in _FULL_DISK:
                # On the other stream, if this is the full one.
                name = "standard error" if self is sys.stderr else "standard output"
                reason = f"warning: {name} cannot be written ({error.strerror}): the run goes on without it"
                print(reason, file=sys.stdout if self is sys.stderr else sys.stderr)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """Do nothing: the stream belongs to the process."""

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._stream.errors

    @property
    def buffer(self) -> BinaryIO:
        """The binary stream, which nothing redacts."""
        return self._stream.buffer


def discard_output(stream: TextIO) -> None:
    """Let a standard stream discard what is written to it, and what is in its buffer."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def survive_lost_output() -> None:
    """Let this command go on when the terminal or the pipe that its output goes to is gone, or the disk is full."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, RedactedStream):
            stream.survives_lost_reader = True


def open_closed_descriptors() -> None:
    """Open standard descriptors that whoever started the process has closed, on the null device.

    The next files that are opened would otherwise get their numbers, and libraries that write to descriptor 1 or 2
    would write into these files.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)


def _redacted(stream: TextIO | None, descriptor: int) -> RedactedStream:
    """Return a stream that redacts; Python has None for a standard stream that was closed before it started."""
    if stream is None:
        stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process lives
    return RedactedStream(stream)


_USER_ERRNOS = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
        errno.EIO, errno.ESTALE,
    }
)  # fmt: skip
"""Errors of the file system that depend on the user's files and permissions."""
EXIT_SIGINT = 130
DEBUG_OPTION = "--debug"
DEBUG_VARIABLE = "FINETUNING_DEBUG"

# By class name, so that errors are recognized without importing the libraries that define them.
_LOST_CONNECTION_NAMES = frozenset({"DistNetworkError", "DistStoreError", "DistBackendError"})


def run_command(main_function: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call `main_function(arguments)` and return its exit code; errors are printed to stderr, one line per problem.

    `--debug` is removed from the arguments. It, or FINETUNING_DEBUG=1, prints the traceback of an error. The traceback
    of an unexpected error is always written to a temporary file. Errors are also written to the files that
    TERMINATION_LOG_FILE and FINETUNING_ERROR_FILE name. Secrets are redacted in all of them and in all other output.
    """
    open_closed_descriptors()
    reset_error_file()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG_OPTION in arguments or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != DEBUG_OPTION]
    with redirect_stdout(_redacted(sys.stdout, 1)), redirect_stderr(_redacted(sys.stderr, 2)):
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
                _print_error(str(problem))
            is_transient = isinstance(error, CommunicationError)
            report_failure(Failure(type(error).__name__, error.exit_code, error.problems, is_transient))
            return error.exit_code
        except BrokenPipeError:
            # The reader of stdout is gone. Without the redirection the interpreter would fail again when it flushes.
            discard_output(sys.stdout)
            return EXIT_USER
        except Exception as error:  # noqa: BLE001 - the outermost frame of a console script
            return _report_unexpected(error, debug)


def _report_unexpected(error: Exception, debug: bool) -> int:
    """Report an error that is not a FinetuningError, such as a full disk or a bug, and return its exit code."""
    if debug:
        traceback.print_exc()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        message = f"no space left on the disk{where}. Free some space, or choose another output directory."
        return _report("StorageError", EXIT_USER, message)
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        message = "a file became larger than this process may write. Raise its limit (ulimit -f), or that of the disk."
        return _report("StorageError", EXIT_USER, message)
    if isinstance(error, OSError) and error.errno in _USER_ERRNOS and error.filename is not None:
        message = f"{error.filename}: {error.strerror}. Check the path and its permissions"
        if error.errno in (errno.EACCES, errno.EPERM):
            message += f" for user {os.getuid()}, group {os.getgid()}"
        message += "."
        return _report("StorageError", EXIT_USER, message)
    if is_lost_connection(error):
        # The lost process reports its own error, or was killed. A traceback of this one would not help.
        message = f"the connection to another process of the job was lost: {first_line(error)}"
        return _report(LOST_CONNECTION, EXIT_INTERNAL, message, is_transient=True)
    if is_out_of_memory(error):
        name, message = "OutOfMemory", f"out of memory: {first_line(error)}"
    else:
        name, message = "InternalError", f"internal error: {type(error).__name__}: {first_line(error)}"
    # torch reports failed devices and kernels as plain RuntimeErrors.
    is_transient = name == "InternalError" and isinstance(error, OSError | RuntimeError)
    is_transient = is_transient and not isinstance(error, NotImplementedError | RecursionError)
    code = _report(name, EXIT_INTERNAL, message, is_transient=is_transient)
    _save_traceback(error)
    return code


def _report(name: str, exit_code: int, message: str, *, is_transient: bool = False) -> int:
    _print_error(message)
    report_failure(Failure(name, exit_code, (Problem(message),), is_transient))
    return exit_code


def report_internal_error(message: str) -> int:
    """Print and report an error that another attempt may not meet, and return its exit code."""
    return _report("InternalError", EXIT_INTERNAL, message, is_transient=True)


def positive_int(text: str) -> int:
    """Return a positive integer; the type of an argument of a parser.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


class Parser(argparse.ArgumentParser):
    """A parser whose error about an unknown option names the nearest one."""

    def add_overrides(self) -> None:
        """Add the values that follow a config. With a default, argparse calls them optional in its errors."""
        self.add_argument(
            "overrides", nargs="*", default=[], metavar="key.path=value", help="values that override the file's"
        )

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with code 2."""
        if match := re.match(r"unrecognized arguments: (?:.* )?(--[\w-]+)", message):
            hint = near_option(match[1], self)
            message += f". {hint}" if hint else ""
        super().error(message)


def near_option(name: str, parser: argparse.ArgumentParser) -> str | None:
    """Return `Did you mean "…"?` with the option of a similar name, or None."""
    from finetuning.config.validation.suggestions import nearest

    options = re.findall(r"(?<![\w-])--([a-z][\w-]*)", parser.format_help())
    match = nearest(name.lstrip("-"), options, cutoff=0.5)
    return None if match is None else f'Did you mean "--{match}"?'


def check_output_file(path: Path, option: str) -> None:
    """Check that a file can be written, before anything is computed for it.

    Raises:
        StorageError: its folder does not exist or is not writable, or it is a folder itself.
    """
    from finetuning.config.validation.suggestions import near_file

    folder, where = path.expanduser().absolute().parent, Location(key=f"{option} {path}")
    if not folder.is_dir():
        there_is = "is not a folder" if folder.exists() else "does not exist"
        raise StorageError(f"{path.parent} {there_is}", location=where, hint=near_file(path.parent, folders_only=True))
    if path.is_dir():
        raise StorageError("is a folder; name a file", location=where)
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise StorageError(f"not writable for user {os.getuid()}, group {os.getgid()}", location=where)


def method_argument(text: str) -> str:
    """Return the name of a method; the type of an argument of a parser.

    Raises:
        argparse.ArgumentTypeError: there is no such method; names the nearest.
    """
    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.validation.suggestions import did_you_mean

    if text in ALGORITHMS:
        return text
    hint = did_you_mean(text, ALGORITHMS) or f"Methods: {', '.join(ALGORITHMS)}."
    if text.endswith((".yaml", ".yml")):
        hint = f"Put the method before the config. {hint}"
    raise argparse.ArgumentTypeError(f'unknown method "{text}". {hint}')


def is_lost_connection(error: BaseException) -> bool:
    """Return whether gloo, NCCL or a store of torch raised the error because the other process is gone."""
    if any(base.__name__ in _LOST_CONNECTION_NAMES for base in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error) and "by peer" in str(error)


def _print_error(message: str) -> None:
    """Print a problem in one line; only excerpts of the user's file, which are indented, stay on their own lines."""
    lines = message.splitlines()
    text = "error: " + "".join(f"\n{line}" if line.startswith("    ") else f" {line}" for line in lines)[1:]
    print_wrapped(text, sys.stderr)


def print_wrapped(text: str, stream: TextIO, indent: int = 0) -> None:
    """Print text; in a terminal without breaking a word, which the terminal itself would do at its last column.

    Indented lines, such as excerpts of a file, are printed as they are.

    Args:
        indent: spaces before the second and later lines of a line that is wrapped.
    """
    if stream.isatty():
        from finetuning.report.console import wrap_words

        width = shutil.get_terminal_size().columns
        lines = text.split("\n")
        text = "\n".join(line if line.startswith("    ") else wrap_words(line, width, indent) for line in lines)
    print(text, file=stream)


def _save_traceback(error: BaseException) -> None:
    """Write the traceback to a new file in the temporary directory and print its path."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        handle, path = tempfile.mkstemp(prefix="finetuning-traceback-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(redact_text(text))
    except OSError as problem:
        print(f"error: cannot save the traceback: {problem}", file=sys.stderr)
        return
    print(f"error: the traceback is in {path}; please report it. {DEBUG_OPTION} shows it.", file=sys.stderr)


@contextmanager
def locate_errors(document: ConfigDocument) -> Iterator[None]:
    """Add file and line, or the override or flag, to errors of the block that name a key of the config."""
    try:
        yield
    except FinetuningError as error:
        error.problems = tuple(locate(problem, document) for problem in error.problems)
        raise


def locate(problem: Problem, document: ConfigDocument) -> Problem:
    """Return the problem with the location of its key, unless it has a file already."""
    if problem.location.key is None or problem.location.file is not None:
        return replace(problem, hint=_replace_keys_by_flags(problem.hint, document))
    parts = problem.location.key.replace("[", ".").replace("]", "").split(".")
    path = tuple(int(part) if part.isdecimal() else part for part in parts)
    return replace(problem, location=document.location_of(path), hint=_replace_keys_by_flags(problem.hint, document))


def _replace_keys_by_flags(hint: str | None, document: ConfigDocument) -> str | None:
    """Return the hint with flags, or keys of another engine's config, in place of the keys that they set."""
    for path, mark in document.marks.items():
        if hint and mark.source is not None and len(path) > 1 and dotted(path) in hint:
            source = mark.source.key or str(mark.source)
            hint = re.sub(rf"(?<![\w.]){re.escape(dotted(path))}(?!\w|\.\w)", lambda _, source=source: source, hint)
    return hint
