"""Code of the user that a config names: reward functions, and methods of the trainer."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar, cast

from finetuning.errors import ConfigError, FinetuningError, Location, is_out_of_memory

if TYPE_CHECKING:
    from transformers import Trainer

T = TypeVar("T", bound="Trainer")
_MIXIN = Location(key="run_conf.trainer_mixin")
_OF_EVERY_CLASS = {*dir(type("Empty", (), {})), "__annotations__", "__firstlineno__", "__static_attributes__"} - {
    "__init__"
}


class UserErrors(AbstractContextManager["UserErrors"]):
    """Turn what the user's code raises into a ConfigError with its file and line; pass out-of-memory errors on."""

    def __init__(self, make_error: Callable[[str], ConfigError]) -> None:
        self._make_error = make_error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, FinetuningError) or is_out_of_memory(error):
            return
        last = traceback.extract_tb(trace)[-1]
        text = f"raised {type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
        raise self._make_error(text) from error


def load_object(path: str, location: Location, kind: str) -> Callable[..., object]:
    """Return the function or class at `package.module:name` or `path/to/file.py:name`.

    Args:
        kind: what it is, for error messages.

    Raises:
        ConfigError: it does not exist, or cannot be imported.
    """
    where, _, name = path.rpartition(":")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        if not Path(where).is_file() or spec is None or spec.loader is None:
            raise ConfigError(f"there is no file {where}", location=location)
        module = importlib.util.module_from_spec(spec)
        with UserErrors(lambda text: ConfigError(f"the {kind} {path} {text}", location=location)):
            spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            raise ConfigError(
                f"cannot import the {kind} {path}: {error}",
                location=location,
                hint=f"Install its package, set PYTHONPATH, or give the path of its file: path/to/file.py:{name}.",
            ) from error
    value = getattr(module, name, None)
    if not callable(value):
        names = [key for key, item in vars(module).items() if callable(item) and not key.startswith("_")]
        word = "class" if kind == "trainer mixin" else "function"
        raise ConfigError(
            f"{where} has no {word} {name}", location=location, hint=f"It has: {', '.join(names) or 'none'}."
        )
    return value


def load_trainer_mixin(path: str) -> type:
    """Return the class that `run_conf.trainer_mixin` names.

    Raises:
        ConfigError: it does not exist, cannot be imported, or is no class.
    """
    mixin = load_object(path, _MIXIN, "trainer mixin")
    if not isinstance(mixin, type):
        raise ConfigError(f"{path} is a {type(mixin).__name__}, not a class", location=_MIXIN)
    return mixin


def extend_trainer(trainer_class: type[T], path: str) -> type[T]:
    """Return the trainer with the methods of a class of the user before its own.

    Raises:
        ConfigError: the class cannot be loaded, overrides nothing, or is one of another trainer.
    """
    mixin = load_trainer_mixin(path)
    added = [base for base in mixin.__mro__ if base not in trainer_class.__mro__]
    foreign = [base for base in added if base.__module__.startswith("trl.")]
    if foreign:
        raise ConfigError(
            f"{path} is a subclass of TRL's {foreign[0].__name__}, which does not train here",
            location=_MIXIN,
            hint="Derive the class from transformers.Trainer, or from nothing; super() is the trainer of the run.",
        )
    names = {
        name for base in added for name in vars(base) if name in dir(trainer_class) and name not in _OF_EVERY_CLASS
    }
    if not names:
        raise ConfigError(
            f"{path} has no method that a trainer has",
            location=_MIXIN,
            hint="Define methods of transformers.Trainer, such as compute_loss or create_optimizer.",
        )
    attributes: dict[str, object] = {"mixin_summary": f"{path} overrides {', '.join(sorted(names))}"}
    if "compute_loss" in names and not hasattr(mixin, "supports_batch_splitting"):
        # Only its author knows whether the loss of a batch is the sum of the losses of its parts.
        attributes["supports_batch_splitting"] = False
    return cast("type[T]", type(mixin.__name__, (mixin, trainer_class), attributes))


def source_digest(path: str) -> str | None:
    """Return the sha256 of the source of an object, of the whole file where the path names one; None without source."""
    where = path.rpartition(":")[0]
    if where.endswith(".py"):
        return hashlib.sha256(Path(where).read_bytes()).hexdigest()
    try:
        source = inspect.getsource(load_object(path, Location(), "function"))
    except OSError:
        return None
    return hashlib.sha256(source.encode()).hexdigest()
