"""What the processes of a distributed run exchange outside of training: the resume point, heartbeats, the end."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from finetuning.distributed import announce_wait
from finetuning.errors import Location, StorageError
from finetuning.trainer.hooks import TrainerHooks
from finetuning.training.resume.find import ResumePoint

if TYPE_CHECKING:
    from transformers import Trainer

    from finetuning.trainer.mixin import TrainerMixin

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PROPAGATION_TIMEOUT_S = 10.0
"""How long a file that another host created may take to appear on a network file system."""


def sync_resume_point(output_dir: Path, resume: ResumePoint) -> ResumePoint:
    """Return the main process's resume point, after checking that all processes share the output directory.

    Collective: every process calls this after its process group was created.

    Raises:
        StorageError: names the hosts that see a different directory; raised on every process.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    state = PartialState()
    message = [f".shared-{uuid.uuid4().hex}", resume, socket.gethostname()]
    if state.is_main_process:
        (output_dir / message[0]).touch()
    with announce_wait("the other processes of the job, which prepare their data"):
        broadcast_object_list(message, from_process=0)
        name, resume, main_host = message
        marker = output_dir / name
        hosts = gather_object([(socket.gethostname(), _wait_for_file(marker))])
    if state.is_main_process:
        marker.unlink(missing_ok=True)
    separate = sorted({host for host, is_visible in hosts if not is_visible})
    if separate:
        raise StorageError(
            f"{output_dir} is not shared by all hosts: {', '.join(separate)} cannot see what {main_host} writes there",
            location=Location(key="training_args.output_dir"),
            hint="Choose a folder on a file system that all of them mount; all of them write and read checkpoints.",
        )
    return resume


def broadcast_from_main(compute: Callable[[], T]) -> T:
    """Return the result of `compute` on every process; only the main process calls it.

    Collective: every process calls this after its process group was created.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    message = [compute() if PartialState().is_main_process else None]
    with announce_wait("the main process of the job"):
        broadcast_object_list(message, from_process=0)
    [result] = message
    return result  # pyright: ignore[reportReturnType]


def destroy_process_group() -> None:
    """Destroy the process group, if there is one.

    torch asks for it: at interpreter exit its threads may outlive what they use, which aborts a process that succeeded.
    """
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _wait_for_file(path: Path) -> bool:
    """Return whether the file exists, or appears within the timeout."""
    deadline = time.monotonic() + _PROPAGATION_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


HEARTBEAT_FOLDER = "heartbeat"
_RECORD_BYTES = 160
"""Every heartbeat has the same size, so that overwriting the file never leaves parts of an older one."""
_PHASE_ORDER = ("data_loading", "model_forward", "model_backward")


class _Beat(TypedDict):
    phase: str
    step: int
    time: float
    """When the phase began, in seconds since the epoch."""
    alive: float
    """When the process last touched its file, in seconds since the epoch."""


class Heartbeat(TrainerHooks):
    """Write this process's phase, step and time to `heartbeat/rank-N.json`, and forward to the `inner` hooks."""

    def __init__(self, output_dir: Path, trainer: Trainer, inner: TrainerHooks):
        self._file = output_dir / HEARTBEAT_FOLDER / f"rank-{trainer.args.process_index}.json"
        self._trainer = trainer
        self._inner = inner
        self._has_failed = False

    def begin(self, name: str) -> None:
        self._write(name)
        self._inner.begin(name)

    def end(self, name: str) -> None:
        self._write(f"after {name}")
        self._inner.end(name)

    def fail(self, name: str, error: BaseException) -> None:
        self._inner.fail(name, error)

    def _write(self, phase: str) -> None:
        beat = {"phase": phase, "step": self._trainer.state.global_step + 1, "time": time.time()}
        try:
            _overwrite(self._file, json.dumps(beat))
        except OSError as error:
            if not self._has_failed:
                logger.warning("cannot write the heartbeat: %s", error)
            self._has_failed = True


def _overwrite(file: Path, text: str) -> None:
    """Replace the text by a single write: a process that is stopped leaves the old or the new one, not a mix."""
    file.parent.mkdir(exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text.ljust(_RECORD_BYTES).encode() + b"\n", 0)
    finally:
        os.close(descriptor)


def find_hung_rank(output_dir: Path, world_size: int, after_s: float) -> str | None:
    """Return which process hangs, in which phase and step, and since when; None while all make progress.

    When a process hangs, the others wait for it. The one that hangs is a process that does not run at all (stopped,
    swapped out), if there is one, and otherwise the one that is furthest behind.
    """
    beats: dict[int, _Beat] = {}
    for rank in range(world_size):
        file = output_dir / HEARTBEAT_FOLDER / f"rank-{rank}.json"
        try:
            beats[rank] = json.loads(file.read_text(encoding="utf-8")) | {"alive": file.stat().st_mtime}
        except (OSError, ValueError):
            return None
    now = time.time()
    if now - max(beat["time"] for beat in beats.values()) < after_s:
        return None

    def progress(beat: _Beat) -> tuple[int, int, float]:
        phase = beat["phase"].removeprefix("after ")
        is_after = phase != beat["phase"]
        order = 2 * _PHASE_ORDER.index(phase) + is_after if phase in _PHASE_ORDER else 2 * len(_PHASE_ORDER)
        return beat["step"], order, beat["time"]

    stopped = [rank for rank, beat in beats.items() if now - beat["alive"] >= after_s]
    rank = min(stopped or beats, key=lambda number: progress(beats[number]))
    beat = beats[rank]
    state = ", and its process does not run" if stopped else ""
    return (
        f"rank {rank} hangs: {beat['phase']} of step {beat['step']} for {now - beat['time']:.0f} s{state};"
        " the other processes wait for it"
    )


@contextmanager
def watch_heartbeats(trainer: TrainerMixin, output_dir: Path, after_s: float) -> Iterator[None]:
    """Write heartbeats in the block; the main process logs which process hangs."""
    trainer.hooks = Heartbeat(output_dir, trainer, trainer.hooks)
    rank, is_over = trainer.args.process_index, threading.Event()
    file = output_dir / HEARTBEAT_FOLDER / f"rank-{rank}.json"

    def watch() -> None:
        reported = None
        while not is_over.wait(min(after_s / 4, 10)):
            with suppress(OSError):
                os.utime(file)
            hang = find_hung_rank(output_dir, trainer.args.world_size, after_s) if rank == 0 else None
            location = hang.partition(" for ")[0] if hang else None
            if hang and location != reported:
                logger.warning("%s", hang)
            reported = location

    threading.Thread(target=watch, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
