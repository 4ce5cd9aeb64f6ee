"""The output directory: locked by one run at a time, protected from a second one, with the run's record `run.json`."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning import __version__
from finetuning.atomic_io import remove_staging_directories, try_lock
from finetuning.config.redaction import redacted_json
from finetuning.config.sections.experiment import Experiment
from finetuning.config.yaml.dump import dump_values
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import announce_wait
from finetuning.errors import (
    EXIT_INTERNAL,
    ConfigError,
    FinetuningError,
    GuardStopped,
    Interrupted,
    Location,
    StorageError,
)
from finetuning.plan.memory_estimate import MemoryEstimate
from finetuning.plan.plan import format_bytes
from finetuning.report.run_folder import COMPLETE_MARKER, CONFIG_NAME, RECORD_NAME, FinalLosses, read_run_record
from finetuning.training.resume.find import checkpoints_of

if TYPE_CHECKING:
    from finetuning.training.final_model import FinalModel

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers", "mlflow")
_KEY = "training_args.output_dir"
_LOCK_NAME = ".finetuning.lock"
_RENEW_S, _STALE_S = 20.0, 120.0
"""How often a run renews its lease of the output directory, and after how long without that it has ended."""
# Keys that may differ between a completed run and the same command run again.
_INCIDENTAL = (
    "run_conf.resume_from_checkpoint",
    "run_conf.on_existing_run",
    "tracking",
    "telemetry",
    "logging_dir",
    "save_model_dir",
    "final_evaluation",
)


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    status: str
    model: FinalModel | None = None
    """None if the run was already complete, and on processes other than the main one."""
    steps: int = 0
    losses: FinalLosses | None = None
    training_s: float | None = None
    """Duration of the training loop in seconds."""

    @property
    def folder(self) -> str | None:
        """The folder of the final model or adapter."""
        return self.model.folder if self.model else None

    @property
    def final_loss(self) -> float | None:
        """The last logged loss: the mean over the steps since the log before."""
        return self.losses.training if self.losses else None


class RunRecord:
    """The record of an output directory, replaced as a whole at each change of state.

    A resumed run updates the record that it finds, and adds its job to `jobs`.
    """

    def __init__(self, output_dir: Path, method: str, writes: bool):
        self._path = output_dir / RECORD_NAME
        self._writes = writes
        self._values: dict[str, object] = read_run_record(output_dir) or {}
        self._values |= {"engine": f"finetuning {__version__}", "method": method, "status": "running"}
        self._job: dict[str, object] = {
            "started": _now(),
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": installed_versions(),
            "pid": os.getpid(),
            "host": platform.node(),
        }
        jobs = self._values.get("jobs")
        self._values["jobs"] = [*(jobs if isinstance(jobs, list) else []), self._job]

    def update(self, **values: object) -> None:
        """Add values to the record and write it."""
        self._values |= values
        if not self._writes:
            return
        temporary = self._path.with_name(f".{RECORD_NAME}.partial")
        temporary.write_text(redacted_json(self._values, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self._path)

    def finish(self, status: str, **values: object) -> None:
        """Write how this job ended."""
        self._job |= {"ended": _now(), "status": status}
        self.update(status=status, **values)


def status_of(error: BaseException) -> str:
    """Return the status that a run that raised this error has in its record."""
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "interrupted"
    return "stopped by a guard" if isinstance(error, GuardStopped) else "failed"


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that affect what a run computes."""
    return {name: _installed_version(name) for name in _PACKAGES}


@cache
def _installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def is_complete(experiment: Experiment) -> bool:
    """Return whether the output directory holds the final model of this very experiment, so nothing is left to train.

    Raises:
        StorageError: the directory is not writable, or holds another run that this one would mix with.
    """
    output_dir, run_conf = Path(experiment.training_args.output_dir), experiment.run_conf
    existing = existing_parent(output_dir)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise StorageError(f"{output_dir} is not writable (user id {os.getuid()})", location=Location(key=_KEY))
    final = output_dir / run_conf.final_checkpoint_name
    has_final = final.is_dir() and any(final.iterdir())
    if str(run_conf.resume_from_checkpoint).lower() == "false":
        existing_runs = [path.name for path in checkpoints_of(output_dir)[:1]] + [final.name] * has_final
        if existing_runs and run_conf.on_existing_run == "error":
            raise StorageError(
                f"{output_dir} holds an earlier run ({', '.join(existing_runs)})",
                location=Location(key=_KEY),
                hint="Set run_conf.resume_from_checkpoint: auto to resume it, run_conf.on_existing_run: move to keep it"
                " in a subfolder, or choose another output_dir.",
            )
        return False
    if not has_final:
        return False
    changes = _changes(experiment, output_dir / CONFIG_NAME)
    # The final model is written atomically. A run that was killed after that has nothing left to do but to record it.
    if _training_started(output_dir) and (output_dir / CONFIG_NAME).is_file() and not changes:
        return True
    if run_conf.on_existing_run == "move":
        return False
    why = f"saved with a different config: {'; '.join(changes)}" if changes else "and no completed run is recorded"
    raise StorageError(
        f"{final} already exists, {why}",
        location=Location(key="run_conf.final_checkpoint_name"),
        hint="Choose another final_checkpoint_name to resume from the last checkpoint, or another output_dir.",
    )


def move_earlier_run(experiment: Experiment) -> tuple[str, ...]:
    """Move what an earlier run saved, and this one does not continue, to a new folder `earlier-N`. Return notes on it.

    From scratch, these are its checkpoints and its final model. A run that trains further continues from the
    checkpoints, and needs the place of the final model only.
    """
    output_dir, run_conf = Path(experiment.training_args.output_dir), experiment.run_conf
    if run_conf.on_existing_run != "move":
        return ()
    final = output_dir / run_conf.final_checkpoint_name
    moved = [final] if final.is_dir() and any(final.iterdir()) else []
    if str(run_conf.resume_from_checkpoint).lower() == "false":
        moved += checkpoints_of(output_dir)
    if not moved:
        return ()
    numbers = [path.name.rpartition("-")[2] for path in output_dir.glob("earlier-*")]
    target = output_dir / f"earlier-{1 + max((int(number) for number in numbers if number.isdecimal()), default=0)}"
    target.mkdir()
    for path in moved:
        os.rename(path, target / path.name)
    (output_dir / COMPLETE_MARKER).unlink(missing_ok=True)
    return (f"{', '.join(path.name for path in moved)} of an earlier run moved to {target}",)


def existing_parent(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def check_free_space(experiment: Experiment, memory: MemoryEstimate | None) -> None:
    """Check that a checkpoint and the final model fit on the disk, as far as their size is known.

    Raises:
        StorageError: states how much is needed, and how much is free.
    """
    if memory is None:
        return
    output_dir = Path(experiment.training_args.output_dir)
    saves_checkpoints = experiment.training_args.save_strategy != "no"
    needed = memory.trained_bytes + memory.checkpoint_bytes * saves_checkpoints
    free = shutil.disk_usage(existing_parent(output_dir)).free
    if free < needed:
        raise StorageError(
            f"{output_dir}: {format_bytes(free)} free; {'a checkpoint and ' * saves_checkpoints}the final model need"
            f" about {format_bytes(needed)}",
            location=Location(key=_KEY),
        )


@contextmanager
def lock_output_dir(output_dir: Path) -> Iterator[None]:
    """Create the directory if necessary, lock it, and remove incomplete files of a killed run.

    The lock file names the run, which renews it as a lease, for file systems without locks and machines that died.

    A directory that was created here is removed when the run fails before training starts.

    Raises:
        StorageError: another process holds the lock.
    """
    is_new = not output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = open(output_dir / _LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise StorageError(f"{output_dir} is not writable: {error.strerror}", location=Location(key=_KEY)) from error
    with lock:
        is_locked = try_lock(lock.fileno())
        lock.seek(0)
        holder = lock.read().strip()
        if is_locked is not True:
            _take_over(output_dir, holder, is_locked is False)
        lock.seek(0)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename} since {_now()}")
        lock.flush()
        remove_staging_directories(output_dir)
        try:
            with _renewed(output_dir / _LOCK_NAME):
                yield
            lock.truncate(0)
        except FinetuningError as error:
            lock.truncate(0)
            remove_staging_directories(output_dir)
            if is_new and not isinstance(error, Interrupted) and not _training_started(output_dir):
                shutil.rmtree(output_dir, ignore_errors=True)
            raise


def _take_over(output_dir: Path, holder: str, is_locked: bool) -> None:
    """Return if the run that holds the lease of an output directory has ended, or there is none.

    A run renews its lease, so one on another machine that does not has ended: its machine may have died with the lock.

    Args:
        holder: what the lock file says.
        is_locked: whether the file is locked, which says more than the lease on this machine; False if the file system
            has no locks.

    Raises:
        StorageError: another run uses the directory.
    """
    match = re.match(r"process (\d+) on (\S+)", holder)
    refused = _in_use(output_dir, holder)
    if not match:
        if is_locked:
            raise refused
        return
    pid, is_here = int(match[1]), match[2] == os.uname().nodename
    if is_here and (is_locked or _is_running(pid)):
        raise refused
    if is_here:
        return
    with announce_wait(f"{holder}, which may still use {output_dir}"):
        lease = output_dir / _LOCK_NAME
        renewed = lease.stat().st_mtime
        while _file_system_time(output_dir) - renewed < _STALE_S:
            time.sleep(_RENEW_S / 10)
            if lease.stat().st_mtime != renewed:
                raise refused
    logger.warning("%s was in use by %s, which has not been heard of for %d s", output_dir, holder, _STALE_S)


def _is_running(pid: int) -> bool:
    """Return whether another process of this machine has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # In a container the first process always has the same id: a predecessor's is this one's.
    return pid != os.getpid()


def _file_system_time(folder: Path) -> float:
    """Return the time of the file system, which may be that of a server."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".finetuning-") as probe:
        return os.stat(probe.name).st_mtime


@contextmanager
def _renewed(lease: Path) -> Iterator[None]:
    """Renew the lease in the block. If another run takes it over, end this process: two would mix their files."""
    content, is_over = lease.read_text(encoding="utf-8"), threading.Event()

    def renew() -> None:
        while not is_over.wait(_RENEW_S):
            try:
                if lease.read_text(encoding="utf-8") != content and not is_over.is_set():
                    logger.error("another run has taken over %s: this run stops", lease.parent)
                    os._exit(EXIT_INTERNAL)
                os.utime(lease)
            except OSError as error:
                logger.warning("cannot renew %s: %s", lease, error)

    threading.Thread(target=renew, name="lease", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def check_not_in_use(output_dir: Path) -> None:
    """Raise StorageError if a run of this machine holds the lock of the directory. Creates nothing."""
    if (output_dir / _LOCK_NAME).is_file():
        with open(output_dir / _LOCK_NAME, encoding="utf-8") as lock:
            if try_lock(lock.fileno(), shared=True) is False:
                raise _in_use(output_dir, lock.read())


def _in_use(output_dir: Path, holder: str) -> StorageError:
    return StorageError(
        f"another run ({holder.strip() or 'unknown'}) is using {output_dir}", location=Location(key=_KEY)
    )


def _training_started(output_dir: Path) -> bool:
    return bool((read_run_record(output_dir) or {}).get("training_started"))


def _changes(experiment: Experiment, resolved_config: Path) -> list[str]:
    """Return what differs between the experiment and a resolved config on disk, a phrase per key."""
    try:
        before = _flatten(read_document(resolved_config).values)
    except (OSError, ConfigError):
        return [f"{resolved_config.name} cannot be read"]
    now = _flatten(dump_values(experiment))
    return [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(_INCIDENTAL)
    ]


def _flatten(values: object, prefix: str = "") -> dict[str, object]:
    if isinstance(values, Mapping) and values:
        return {
            inner: value
            for key, item in values.items()
            for inner, value in _flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: values}
