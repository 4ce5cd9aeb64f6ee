"""What each process of a job is doing, in a file of its own, so that the one that hangs can be named.

What the processes of a job must have in common before they train, and how they part."""

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
from typing import Any, TypeVar

from finetuning.errors import Location, StorageError
from finetuning.trainer.hooks import TrainerHooks
from finetuning.training.resume.find import ResumePoint

logger = logging.getLogger(__name__)

FOLDER = "heartbeat"
_LENGTH = 160
_ORDER = ("data_loading", "model_forward", "model_backward")


class Heartbeat(TrainerHooks):
    """Writes the part that this process is in, its step and the time into `heartbeat/rank-N.json`, and tells `inner`,
    too."""

    def __init__(self, output_dir: Path, trainer: Any, inner: TrainerHooks):
        self._file = output_dir / FOLDER / f"rank-{trainer.args.process_index}.json"
        self._trainer = trainer
        self._inner = inner
        self._broken = False

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
            if not self._broken:
                logger.warning("the heartbeat cannot be written: %s", error)
            self._broken = True


def _overwrite(file: Path, text: str) -> None:
    """Puts a text in the place of another at once: a process that is frozen leaves one or the other."""
    file.parent.mkdir(exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text.ljust(_LENGTH).encode() + b"\n", 0)
    finally:
        os.close(descriptor)


def find_hung_rank(output_dir: Path, world_size: int, after_s: float) -> str | None:
    """Which process hangs, in which part of which step and since when; None while all move.

    When one hangs, the others wait for it: it is one that does not run at all, if there is such a one, or else the one
    that is furthest behind.
    """
    beats = {}
    for rank in range(world_size):
        file = output_dir / FOLDER / f"rank-{rank}.json"
        try:
            beats[rank] = json.loads(file.read_text(encoding="utf-8")) | {"alive": file.stat().st_mtime}
        except (OSError, ValueError):
            return None
    now = time.time()
    if now - max(beat["time"] for beat in beats.values()) < after_s:
        return None

    def progress(beat: dict[str, Any]) -> tuple[int, int, float]:
        phase = beat["phase"].removeprefix("after ")
        place = 2 * _ORDER.index(phase) + (phase != beat["phase"]) if phase in _ORDER else 2 * len(_ORDER)
        return beat["step"], place, beat["time"]

    frozen = [rank for rank, beat in beats.items() if now - beat["alive"] >= after_s]
    rank = min(frozen or beats, key=lambda number: progress(beats[number]))
    beat = beats[rank]
    state = ", and its process does not run" if frozen else ""
    return (
        f"rank {rank} hangs: {beat['phase']} of step {beat['step']} for {now - beat['time']:.0f} s{state};"
        " the other processes wait for it"
    )


@contextmanager
def watch_heartbeats(trainer: Any, output_dir: Path, after_s: float) -> Iterator[None]:
    """Lets every process of a job write its heartbeat inside the block, and touch it while it runs at all; the main one
    names who hangs. Nothing for a job of one process."""
    if trainer.args.world_size == 1:
        yield
        return
    trainer.phases = Heartbeat(output_dir, trainer, trainer.phases)
    rank, ended = trainer.args.process_index, threading.Event()
    own = output_dir / FOLDER / f"rank-{rank}.json"

    def watch() -> None:
        told = None
        while not ended.wait(min(after_s / 4, 10)):
            with suppress(OSError):
                os.utime(own)
            found = find_hung_rank(output_dir, trainer.args.world_size, after_s) if rank == 0 else None
            who = found.partition(" for ")[0] if found else None
            if found and who != told:
                logger.warning("%s", found)
            told = who

    threading.Thread(target=watch, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


_Answer = TypeVar("_Answer")

_PATIENCE_S = 10.0
"""How long a file that another machine has made may take to appear on a network's filesystem."""


def sync_resume_point(output_dir: Path, resume: ResumePoint, world_size: int) -> ResumePoint:
    """The main process's checkpoint, once every process has been seen to share its output directory.

    Collective: every process of the job comes here, after its process group was made.

    Raises:
        StorageError: names the machines that have a directory of their own instead; on every process.
    """
    if world_size == 1:
        return resume
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    state = PartialState()
    told = [f".meeting-{uuid.uuid4().hex}", resume, socket.gethostname()]
    if state.is_main_process:
        (output_dir / told[0]).touch()
    broadcast_object_list(told, from_process=0)
    marker, resume, main_host = output_dir / told[0], *told[1:]
    strangers = [host for host, sees in gather_object([(socket.gethostname(), _appears(marker))]) if not sees]
    if state.is_main_process:
        marker.unlink(missing_ok=True)
    if strangers:
        raise StorageError(
            f"{output_dir} is not one folder for all machines: {', '.join(sorted(set(strangers)))} cannot see what"
            f" {main_host} writes there",
            place=Location(key="training_args.output_dir"),
            hint="Name a folder on a filesystem that all of them mount; checkpoints are written and read by all.",
        )
    return resume


def broadcast_from_main(find_out: Callable[[], _Answer], world_size: int) -> _Answer:
    """What the main process finds out, on every process; `find_out` is called on no other.

    Collective: every process of the job comes here, after its process group was made.
    """
    if world_size == 1:
        return find_out()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    told = [find_out() if PartialState().is_main_process else None]
    broadcast_object_list(told, from_process=0)
    return told[0]


def destroy_process_group(world_size: int) -> None:
    """Ends the process group. Left to the interpreter's exit, its threads may outlive what they belong to, which aborts
    a process whose work is done (torch's documentation of `destroy_process_group` asks for it)."""
    if world_size == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _appears(marker: Path) -> bool:
    """Whether a file is there, or comes soon."""
    until = time.monotonic() + _PATIENCE_S
    while not marker.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
