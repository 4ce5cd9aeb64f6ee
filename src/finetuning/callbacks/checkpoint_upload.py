"""Upload of checkpoints and of the final model to an object store, in the background of training."""

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
from finetuning.config.redaction import redact_text
from finetuning.distributed import announce_wait
from finetuning.errors import ConfigError, Location, MissingPackageError

logger = logging.getLogger(__name__)

_KEY = "run_conf.copy_checkpoints_to"
_QUEUE_SIZE = 2
FINISH_S = 600.0
"""How long the end of a run waits for each file."""
INTERRUPTED_S = 10.0
"""How long an interrupted run, which may be killed soon, waits for all files."""


class CheckpointUploader(TrainerCallback):
    """Uploads each checkpoint to `address/checkpoint-N`, its manifest last: an upload without one is incomplete.

    One thread uploads from hard links, so that deleting an old checkpoint does not affect it. When two checkpoints are
    queued, a further one is skipped with a warning. An upload that fails is a warning, too.
    """

    def __init__(self, address: str):
        self._address = address.rstrip("/")
        self._queue: queue.Queue[tuple[str, Path] | None] = queue.Queue()
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._upload_all, name="checkpoint upload", daemon=True)
        self.uploaded: list[str] = []
        self.errors: list[str] = []
        self._thread.start()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.add(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")

    def add(self, folder: Path) -> None:
        """Queue a folder in its current state, unless the queue is full."""
        if not folder.is_dir():
            return
        if self._queue.qsize() >= _QUEUE_SIZE:
            self._failed(folder.name, "earlier uploads are not done")
            return
        self.add_last(folder)

    def add_last(self, folder: Path) -> None:
        """Queue a folder in its current state, whatever is queued. Without a manifest it gets one."""
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

    def finish(self, timeout_s: float, *, per_file: bool = False) -> None:
        """Wait for queued uploads: `timeout_s` in total, or for each file with `per_file`."""
        self._queue.put(None)
        started = self._last_progress = time.monotonic()
        while self._thread.is_alive():
            left = (self._last_progress if per_file else started) + timeout_s - time.monotonic()
            if left <= 0:
                self._failed("remaining files", f"not done after {timeout_s:.0f} s")
                return
            with announce_wait(f"uploads to {redact_text(self._address)}"):
                self._thread.join(left)

    def summary(self) -> str:
        """Return the outcome in one line."""
        failed = f"; {self.errors[-1]}" if self.errors else ""
        return redact_text(f"{', '.join(self.uploaded[-2:]) or 'nothing'} to {self._address}{failed}")

    def _upload_all(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            name, links = item
            try:
                self._upload(links, f"{self._address}/{name}")
                self.uploaded.append(name)
            except Exception as error:  # noqa: BLE001  each store raises its own errors, and none may stop the run
                self._failed(name, f"{type(error).__name__}: {error}")
            finally:
                shutil.rmtree(links, ignore_errors=True)

    def _upload(self, folder: Path, address: str) -> None:
        import fsspec

        store, root = fsspec.core.url_to_fs(address)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == MANIFEST):
            target = f"{root}/{path.relative_to(folder).as_posix()}"
            store.makedirs(target.rpartition("/")[0], exist_ok=True)
            store.put_file(str(path), target)
            self._last_progress = time.monotonic()

    def _failed(self, name: str, reason: str) -> None:
        message = redact_text(f"{name} was not uploaded to {self._address}: {reason}")
        self.errors.append(message)
        logger.warning("%s", message)


def make_uploader(address: str | None, is_main: bool) -> CheckpointUploader | None:
    """Return the uploader of the main process; None without an address, and on other processes.

    Raises:
        ConfigError, MissingPackageError: as `check_address`.
    """
    if address is None or not is_main:
        return None
    check_address(address)
    return CheckpointUploader(address)


def check_address(address: str) -> None:
    """Check that checkpoints can be uploaded to addresses of this kind.

    Raises:
        ConfigError: fsspec does not know the address's scheme.
        MissingPackageError: the file system needs a package that is not installed.
    """
    import fsspec

    try:
        fsspec.get_filesystem_class(fsspec.core.split_protocol(address)[0] or "file")
    except ValueError as error:
        raise ConfigError(str(error), location=Location(key=_KEY)) from error
    except ImportError as error:
        raise MissingPackageError(
            f"{address} needs a package: {error}", location=Location(key=_KEY), hint="pip install 'finetuning[s3]'"
        ) from error


@contextmanager
def wait_for_uploads(uploader: CheckpointUploader | None, is_interrupted: Callable[[], bool]) -> Iterator[None]:
    """Wait for queued uploads at the end of the block: briefly, if the run was interrupted."""
    try:
        yield
    finally:
        if uploader is not None:
            interrupted = is_interrupted()
            uploader.finish(INTERRUPTED_S if interrupted else FINISH_S, per_file=not interrupted)
