"""Copies of whole checkpoints and of the tuned model at an object store, made beside the training and never waited for
in it."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetuning.atomic_io import MANIFEST, staging_path, write_manifest
from finetuning.config.redaction import strip_user_info
from finetuning.errors import ConfigError, Location, MissingPackageError

logger = logging.getLogger(__name__)

_KEY = "run_conf.copy_checkpoints_to"
_WAITING = 2
FINISH_S = 600.0
"""How long the end of a run waits for a file that is under way."""
INTERRUPTED_S = 10.0
"""How long a run that was told to end, whose time is short, waits for all of them."""


class CheckpointUploader(TrainerCallback):
    """Copies each published checkpoint to `address/checkpoint-N`, its manifest last: a copy without one is not whole.

    One thread copies, from hard links that the removal of old checkpoints does not touch. When it falls behind by two,
    a checkpoint is left out, and that is said. A copy that fails is a warning.
    """

    def __init__(self, address: str):
        self._address = address.rstrip("/")
        self._queue: queue.Queue[tuple[str, Path] | None] = queue.Queue()
        self._moved = time.monotonic()
        self._thread = threading.Thread(target=self._copy_all, name="checkpoint copies", daemon=True)
        self.copied: list[str] = []
        self.failures: list[str] = []
        self._thread.start()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.add(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def add(self, folder: Path) -> None:
        """Has a folder copied, as it is now, unless others wait already."""
        if not folder.is_dir():
            return
        if self._queue.qsize() >= _WAITING:
            self._failed(folder.name, "the copies before it are not done")
            return
        self.add_last(folder)

    def add_last(self, folder: Path) -> None:
        """Has a folder copied, as it is now, after those that wait. It gets a manifest, where it has none."""
        links = staging_path(folder.with_name(f"{folder.name}.copying"))
        try:
            shutil.rmtree(links, ignore_errors=True)
            shutil.copytree(folder, links, copy_function=os.link)
            if not (links / MANIFEST).exists():
                write_manifest(links)
        except OSError as error:
            self._failed(folder.name, str(error))
            return
        self._queue.put((folder.name, links))

    def finish(self, most_s: float, *, for_each: bool = False) -> None:
        """Waits so long for the copies that are under way; for each file of them, where it is said."""
        self._queue.put(None)
        started = self._moved = time.monotonic()
        while self._thread.is_alive():
            left = (self._moved if for_each else started) + most_s - time.monotonic()
            if left <= 0:
                self._failed("what is left", f"not done after {most_s:.0f} s")
                return
            self._thread.join(left)

    def told(self) -> str:
        """The outcome, in one line."""
        failed = f"; {self.failures[-1]}" if self.failures else ""
        return strip_user_info(f"{', '.join(self.copied[-2:]) or 'nothing'} to {self._address}{failed}")

    def _copy_all(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            name, links = item
            try:
                self._copy(links, f"{self._address}/{name}")
                self.copied.append(name)
            except Exception as error:  # noqa: BLE001  every store has errors of its own, and none may end a run
                self._failed(name, f"{type(error).__name__}: {error}")
            finally:
                shutil.rmtree(links, ignore_errors=True)

    def _copy(self, folder: Path, address: str) -> None:
        import fsspec

        store, root = fsspec.core.url_to_fs(address)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == MANIFEST):
            target = f"{root}/{path.relative_to(folder).as_posix()}"
            store.makedirs(target.rpartition("/")[0], exist_ok=True)
            store.put_file(str(path), target)
            self._moved = time.monotonic()

    def _failed(self, name: str, reason: str) -> None:
        told = strip_user_info(f"{name} is not copied to {self._address}: {reason}")
        self.failures.append(told)
        logger.warning("%s", told)


def make_uploader(address: str | None, is_main: bool) -> CheckpointUploader | None:
    """The copier of the main process; None where nothing is to be copied.

    Raises:
        ConfigError: no file system is known by the address's scheme.
        MissingPackageError: the file system needs a package that is not installed.
    """
    if address is None or not is_main:
        return None
    import fsspec

    try:
        fsspec.get_filesystem_class(fsspec.core.split_protocol(address)[0] or "file")
    except ValueError as error:
        raise ConfigError(str(error), place=Location(key=_KEY)) from error
    except ImportError as error:
        raise MissingPackageError(
            f"{address} needs a package: {error}", place=Location(key=_KEY), hint="pip install 'finetuning[s3]'"
        ) from error
    return CheckpointUploader(address)


@contextmanager
def wait_for_uploads(copies: CheckpointUploader | None, is_interrupted: Callable[[], bool]) -> Iterator[None]:
    """Waits at the end of the block for what it has had copied: shortly, where the run was told to end."""
    try:
        yield
    finally:
        if copies is not None:
            is_short = is_interrupted()
            copies.finish(INTERRUPTED_S if is_short else FINISH_S, for_each=not is_short)
