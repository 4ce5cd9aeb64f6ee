"""The output directory: one run at a time, and never a second run over the first.

run.json: what went in, what came out, what was proven."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetuning import __version__
from finetuning.atomic_io import remove_staging_directories
from finetuning.config.sections.experiment import Experiment
from finetuning.config.yaml.dump import dump_values
from finetuning.config.yaml.reader import read_document
from finetuning.errors import ConfigError, FinetuningError, Interrupted, Location, StorageError
from finetuning.plan.memory_estimate import estimate_memory
from finetuning.plan.plan import format_bytes
from finetuning.report.run_folder import CONFIG_NAME, RECORD_NAME, read_run_record
from finetuning.training.resume.find import checkpoints_of

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers", "mlflow")


class RunRecord:
    """The record of one output directory, rewritten whole at each change of state.

    A resumed job goes on with the record that it finds and adds itself to `jobs`.
    """

    def __init__(self, output_dir: Path, method: str, writes: bool):
        self._path = output_dir / RECORD_NAME
        self._writes = writes
        self.values: dict[str, Any] = read_run_record(output_dir) or {"jobs": []}
        self.values |= {"engine": f"finetuning {__version__}", "method": method, "status": "running"}
        self._job: dict[str, Any] = {
            "started": _now(),
            "command": sys.argv,
            "python": platform.python_version(),
            "packages": installed_versions(),
            "pid": os.getpid(),
            "host": platform.node(),
        }
        self.values["jobs"] = [*self.values.get("jobs", []), self._job]

    def update(self, **values: Any) -> None:
        """Adds values to the record and writes it."""
        self.values |= values
        self._write()

    def finish(self, status: str, **values: Any) -> None:
        """Writes the end of this job: completed, stopped, interrupted or failed."""
        self._job |= {"ended": _now(), "status": status}
        self.update(status=status, **values)

    def _write(self) -> None:
        if not self._writes:
            return
        temporary = self._path.with_name(f".{RECORD_NAME}.partial")
        temporary.write_text(json.dumps(self.values, indent=2, default=str) + "\n", encoding="utf-8")
        temporary.replace(self._path)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


_KEY = "training_args.output_dir"
_LOCK = ".finetuning.lock"
# What may differ between a complete run and its command typed again.
_INCIDENTAL = ("run_conf.resume_from_checkpoint", "tracking", "telemetry", "logging_dir", "save_model_dir")


def check_output_dir(experiment: Experiment) -> bool:
    """True when the run that the directory holds has its tuned model and is asked to go on: nothing is left to train.

    Raises:
        StorageError: it cannot be written, or holds another run's work that this one would mix with.
    """
    output_dir, run_conf = Path(experiment.training_args.output_dir), experiment.run_conf
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise StorageError(f"{output_dir} cannot be written (user id {os.getuid()})", place=Location(key=_KEY))
    final = output_dir / run_conf.final_checkpoint_name
    has_final = final.is_dir() and any(final.iterdir())
    if run_conf.resume_from_checkpoint is False or str(run_conf.resume_from_checkpoint).lower() == "false":
        held = [path.name for path in checkpoints_of(output_dir)[:1]] + [final.name] * has_final
        if held:
            raise StorageError(
                f"{output_dir} holds an earlier run ({', '.join(held)})",
                place=Location(key=_KEY),
                hint="Set run_conf.resume_from_checkpoint: auto to go on with it, choose another output_dir, or remove"
                " it.",
            )
        return False
    if not has_final:
        return False
    changed = _changed(experiment, output_dir / CONFIG_NAME)
    # A tuned model appears whole: a run that was killed since has nothing left but to say so.
    if _has_trained(output_dir) and (output_dir / CONFIG_NAME).is_file() and not changed:
        return True
    why = f"another config: {'; '.join(changed)}" if changed else "a run that is not recorded as complete"
    raise StorageError(
        f"{final} is there already, made by {why}",
        place=Location(key="run_conf.final_checkpoint_name"),
        hint="Choose another final_checkpoint_name to train on from the last checkpoint, or another output_dir.",
    )


def check_free_space(output_dir: Path, experiment: Experiment) -> None:
    """Nothing, when the disk has room for a checkpoint and the tuned model, as far as their size is known.

    Raises:
        StorageError: says how much is needed, and how much is there.
    """
    memory = estimate_memory(experiment)
    if memory is None:
        return
    saves = experiment.training_args.save_strategy != "no"
    needed, free = memory.trained_bytes + memory.checkpoint_bytes * saves, shutil.disk_usage(output_dir).free
    if free < needed:
        raise StorageError(
            f"{output_dir} is on a disk with {format_bytes(free)} left;"
            f" {'a checkpoint and ' * saves}the tuned model need about {format_bytes(needed)}",
            place=Location(key=_KEY),
        )


@contextmanager
def lock_output_dir(output_dir: Path) -> Iterator[Path]:
    """The directory, made if need be, locked against a second run, and cleared of what a killed run left half made.

    A directory that was made here is removed again when the run fails before there is a checkpoint.

    Raises:
        StorageError: another process is running in it.
    """
    is_new = not output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = open(output_dir / _LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise StorageError(f"{output_dir} cannot be written: {error.strerror}", place=Location(key=_KEY)) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise StorageError(
                f"another run ({lock.read().strip() or 'unknown'}) is working in {output_dir}", place=Location(key=_KEY)
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        remove_staging_directories(output_dir)
        try:
            yield output_dir
        except FinetuningError as error:
            remove_staging_directories(output_dir)
            if is_new and not isinstance(error, Interrupted) and not _has_trained(output_dir):
                shutil.rmtree(output_dir, ignore_errors=True)
            raise


def _has_trained(output_dir: Path) -> bool:
    return (read_run_record(output_dir) or {}).get("completed_training", False)


def _changed(experiment: Experiment, resolved: Path) -> list[str]:
    """What differs between the experiment and the one whose resolved config is in a file, one phrase a key."""
    try:
        before = _flat(read_document(resolved).values)
    except (OSError, ConfigError):
        return []
    now = _flat(dump_values(experiment))
    return [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not key.startswith(_INCIDENTAL)
    ]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, Mapping) and values:
        return {
            inner: value
            for key, item in values.items()
            for inner, value in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: values}
