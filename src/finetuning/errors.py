"""The exceptions of the package and the exit code of each.

FinetuningError                exit code
├── ConfigError                1    the YAML, an override or a command-line option
├── DataError                  1    a data file, a row, a chat template
├── ModelError                 1    a model, tokenizer or adapter, on disk or on the hub
├── CheckpointError            1    a checkpoint that cannot be resumed from
├── StorageError               1    a directory that is not empty, not writable or full
├── MissingPackageError        1    an optional package that this run needs
├── UsageError                 2    the command line: an unknown subcommand or option
├── GuardStopped               3    a guard stopped the run: non-finite or exploded loss, failed verification
├── InternalError              203  out of memory, or a bug in the engine
│   └── CommunicationError     203  the processes of a job cannot reach each other
└── Interrupted                128 + the signal's number, a checkpoint saved

argparse also ends a console script with 2 if the command line is wrong.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

EXIT_OK = 0
EXIT_USER = 1
EXIT_USAGE = 2
EXIT_GUARD = 3
EXIT_INTERNAL = 203

LOST_CONNECTION = "LostConnection"
"""The name of a failure that follows from the end of another process."""


@dataclass(frozen=True)
class Location:
    """A position in the user's input: file, line and column (from 1), dotted config key.

    `element` is the number of an element, from 1, in an array of which several elements are on one line.
    """

    file: str | None = None
    line: int | None = None
    column: int | None = None
    key: str | None = None
    element: int | None = None

    def __str__(self) -> str:
        position = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        if self.element is not None:
            position = f"{position} (element {self.element})"
        return ": ".join(part for part in (position, self.key) if part)


@dataclass(frozen=True)
class Problem:
    """A problem: message, location, and a hint on how to fix it."""

    message: str
    location: Location = Location()
    hint: str | None = None

    def __str__(self) -> str:
        location = str(self.location)
        text = f"{location}: {self.message}" if location else self.message
        if not self.hint:
            return text
        return f"{text} {self.hint}" if text.endswith((".", "?", "!", ":")) else f"{text}. {self.hint}"


class FinetuningError(Exception):
    """Base class. Holds one or more problems and an exit code; the console scripts print it without a traceback."""

    exit_code = EXIT_USER
    is_unreachable = False
    """Whether a server could not be reached, so that nothing is known to be wrong with the input."""

    def __init__(self, message: str | Sequence[Problem], *, location: Location | None = None, hint: str | None = None):
        if isinstance(message, str):
            self.problems: tuple[Problem, ...] = (Problem(message, location or Location(), hint),)
        else:
            self.problems = tuple(message)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ConfigError(FinetuningError):
    """The YAML, an override or a command-line option is invalid. Holds all problems of the file."""


class DataError(FinetuningError):
    """A data file, a row or a chat template is invalid."""


class ModelError(FinetuningError):
    """A model, tokenizer or adapter is missing, corrupt or incompatible."""


class CheckpointError(FinetuningError):
    """A checkpoint cannot be resumed from."""


class StorageError(FinetuningError):
    """A directory is not empty, not writable or full."""


class MissingPackageError(FinetuningError):
    """An optional package that this run needs is not installed."""


class UsageError(FinetuningError):
    """The command line names a subcommand or an option that does not exist."""

    exit_code = EXIT_USAGE


class GuardStopped(FinetuningError):
    """A guard stopped the run: non-finite value, exploded loss or failed verification."""

    exit_code = EXIT_GUARD


class InternalError(FinetuningError):
    """Out of memory, or a bug in the engine."""

    exit_code = EXIT_INTERNAL


class CommunicationError(InternalError):
    """The processes of a job cannot reach each other."""


class Interrupted(FinetuningError):
    """A signal ended the run after it saved a checkpoint."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


# torch raises a plain RuntimeError when the CPU's allocator or cuBLAS runs out of memory.
_OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch or Python ran out of memory, on a device or on the CPU.

    torch's own class is recognized by its name: the console scripts ask without importing torch.
    """
    if any(base.__name__ in ("OutOfMemoryError", "MemoryError") for base in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that has text, or the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def reading(
    problem: str,
    error_class: type[FinetuningError] = ModelError,
    *,
    location: Location | None = None,
    hint: str | None = None,
) -> Iterator[None]:
    """Turn whatever a parser raises on input from outside into `error_class`, whose message is "PROBLEM: why".

    Wraps every call that parses a file, a template or a row that this package did not write in this process. Parsers
    raise whatever their code runs into, so a list of exception types is never complete. Our own errors, a device that
    is out of memory, and a full disk are not errors of the input: they are raised as they are.
    """
    try:
        yield
    except BaseException as error:
        if is_input_error(error):
            raise error_class(f"{problem}: {_describe(error)}", location=location, hint=hint) from error
        raise


def is_input_error(error: BaseException) -> bool:
    """Return whether an error, raised while input from outside was parsed, is one of that input; see `reading`."""
    # torch's class and that of a panic in Rust (safetensors, tokenizers), which is no Exception, are known by name.
    name = type(error).__name__
    if isinstance(error, FinetuningError) or name == "OutOfMemoryError":
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return False
    return isinstance(error, Exception) or name == "PanicException"


def _describe(error: BaseException) -> str:
    """Return the first lines of an error's message; with its class where they alone say too little."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])[:500]
    if not text:
        return type(error).__name__
    says_too_little = isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError | AssertionError)
    return f"{type(error).__name__}: {text}" if says_too_little else text


class RepeatedKeyError(ValueError):
    """A JSON object has a key twice. Python's reader keeps the last one, and the value of the first would vanish."""


def unique_keys(pairs: list[tuple[str, T]]) -> dict[str, T]:
    """Return a JSON object, as the `object_pairs_hook` of Python's json.

    Raises:
        RepeatedKeyError: a key is there twice.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RepeatedKeyError(f"the key {json.dumps(repeated, ensure_ascii=False)} is twice in one object")
    return values


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text from outside.

    Raises:
        ValueError: it is no JSON, or its lists and objects are nested deeper than Python's own parser goes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Call it within `reading`.

    Raises:
        Exception: the file cannot be read, or holds something else.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value
