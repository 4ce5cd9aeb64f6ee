"""The output directory: one run at a time, and never a second run over the first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetuning.errors import Place, StorageError
from finetuning.publish import remove_leftovers
from finetuning.training.record import read_record
from finetuning.training.resume import checkpoints_of

_KEY = "training_args.output_dir"
_LOCK = ".finetuning.lock"


def check_output_dir(output_dir: Path, final_name: str, resume: bool | str) -> bool:
    """True when the run that the directory holds is complete and is asked to go on: there is nothing left to do.

    Raises:
        StorageError: it cannot be written, or holds another run's work that a fresh start would mix with.
    """
    existing = output_dir
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise StorageError(f"{output_dir} cannot be written (user id {os.getuid()})", place=Place(key=_KEY))
    fresh = resume is False or (isinstance(resume, str) and resume.lower() == "false")
    final = output_dir / final_name
    record = read_record(output_dir)
    if not fresh:
        return final.is_dir() and any(final.iterdir()) and (record or {}).get("status") == "completed"
    held = [path.name for path in checkpoints_of(output_dir)[:1]] + [final.name] * final.is_dir()
    if held:
        raise StorageError(
            f"{output_dir} holds an earlier run ({', '.join(held)})",
            place=Place(key=_KEY),
            hint="Set run_conf.resume_from_checkpoint: auto to go on with it, choose another output_dir, or remove it.",
        )
    return False


@contextmanager
def claimed(output_dir: Path) -> Iterator[Path]:
    """The directory, made if need be, locked against a second run, and cleared of what a killed run left half made.

    Raises:
        StorageError: another process is running in it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = open(output_dir / _LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise StorageError(f"{output_dir} cannot be written: {error.strerror}", place=Place(key=_KEY)) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise StorageError(
                f"another run ({lock.read().strip() or 'unknown'}) is working in {output_dir}", place=Place(key=_KEY)
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        remove_leftovers(output_dir)
        yield output_dir
