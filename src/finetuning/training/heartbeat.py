"""Heartbeats of the processes of a distributed run: name the one that hangs, and end the job if it goes on.

Each process writes its phase and step to a small file now and then, and compares what others write with its own clock:
the clocks of machines differ. The main process watches all, the others the main process and themselves.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from finetuning.errors import EXIT_INTERNAL, parse_json
from finetuning.trainer.hooks import TrainerHooks

if TYPE_CHECKING:
    from transformers import Trainer

    from finetuning.trainer.mixin import TrainerMixin

logger = logging.getLogger(__name__)

HEARTBEAT_FOLDER = "heartbeat"
_RECORD_BYTES = 240
"""Every heartbeat has the same size, so that overwriting the file never leaves parts of an older one."""
_PHASE_ORDER = ("data_loading", "model_forward", "model_backward")
_SAVE = "checkpoint_save"
_MAX_PAUSE_S = 10.0
"""A process writes and reads at most this often: the files are on a file system that all machines share."""


class Beat(TypedDict):
    """What a process writes about itself."""

    phase: str
    step: int
    host: str
    changes: int
    """How often the phase has changed."""
    beats: int
    """How often this was written."""


@dataclass(frozen=True)
class Hang:
    """A process that makes no progress, while the others wait for it."""

    rank: int
    beat: Beat
    seconds: float
    is_running: bool
    """False if the process writes no heartbeats either: it is stopped, or its machine is cut off."""

    @property
    def location(self) -> str:
        """The process, phase and step."""
        return f"rank {self.rank} on host {self.beat['host']} hangs: {self.beat['phase']} of step {self.beat['step']}"

    @property
    def is_saving(self) -> bool:
        """Whether it may be writing a large checkpoint."""
        return self.is_running and self.beat["phase"] == _SAVE

    def __str__(self) -> str:
        state = "" if self.is_running else ", and its process does not run or cannot be reached"
        return f"{self.location} for {self.seconds:.0f} s{state}; the other processes wait for it"


class Heartbeat(TrainerHooks):
    """Remember this process's phase and step, and forward to the `inner` hooks. `write` is called by another thread."""

    def __init__(self, output_dir: Path, trainer: Trainer, inner: TrainerHooks):
        self._file = output_dir / HEARTBEAT_FOLDER / f"rank-{trainer.args.process_index}.json"
        self._trainer = trainer
        self._inner = inner
        self._has_failed = False
        self._first_step: int | None = None
        self.beat = Beat(phase="start", step=1, host=socket.gethostname()[:64], changes=0, beats=0)

    def begin(self, name: str) -> None:
        self._enter(name)
        self._inner.begin(name)

    def end(self, name: str) -> None:
        self._enter(f"after {name}")
        self._inner.end(name)

    def fail(self, name: str, error: BaseException) -> None:
        self._inner.fail(name, error)

    def _enter(self, phase: str) -> None:
        step, changes = self._trainer.state.global_step + 1, self.beat["changes"] + 1
        if self._first_step is None and phase == _PHASE_ORDER[0]:
            self._first_step = step
        self.beat = Beat(phase=phase, step=step, host=self.beat["host"], changes=changes, beats=0)

    @property
    def is_in_steps(self) -> bool:
        """Whether this job has completed a step and has more to do: starting and ending may take any time."""
        has_stepped = self._first_step is not None and self.beat["step"] > self._first_step
        return has_stepped and not self._trainer.control.should_training_stop

    def write(self, count: int) -> Beat:
        """Write the heartbeat for the `count`-th time, and return it. A failure is logged once."""
        beat = Beat({**self.beat, "beats": count})
        try:
            _overwrite(self._file, json.dumps(beat))
        except OSError as error:
            if not self._has_failed:
                logger.warning("cannot write the heartbeat: %s", error)
            self._has_failed = True
        return beat


def _overwrite(file: Path, text: str) -> None:
    """Replace the text by a single write: a process that is stopped leaves the old or the new one, not a mix."""
    file.parent.mkdir(exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text.ljust(_RECORD_BYTES).encode() + b"\n", 0)
    finally:
        os.close(descriptor)


def read_beat(output_dir: Path, rank: int) -> Beat | None:
    """Return the heartbeat of a process; None if it cannot be read."""
    try:
        return parse_json((output_dir / HEARTBEAT_FOLDER / f"rank-{rank}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class _Seen:
    beat: Beat
    changed: float
    """When the phase was seen to change last, by this process's clock."""
    written: float
    """When the heartbeat was seen to change last."""


class HeartbeatMonitor:
    """Heartbeats by rank, with the times at which this process saw them change."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def update(self, rank: int, beat: Beat | None, now: float) -> None:
        """Take note of what a process has written; None is what cannot be read."""
        if beat is None:
            return
        last = self._seen.get(rank)
        if last is None or beat["beats"] < last.beat["beats"]:
            self._seen[rank] = _Seen(beat, now, now)
            return
        changed = now if beat["changes"] != last.beat["changes"] else last.changed
        written = now if beat["beats"] != last.beat["beats"] else last.written
        self._seen[rank] = _Seen(beat, changed, written)

    def find_hang(self, now: float, after_s: float) -> Hang | None:
        """Return which process hangs, None while any of them makes progress.

        When a process hangs, the others wait for it. The one that hangs is a process that writes no heartbeats
        (stopped, cut off), if there is one, and otherwise the one that is furthest behind.
        """
        if not self._seen or now - max(seen.changed for seen in self._seen.values()) < after_s:
            return None
        stopped = [rank for rank, seen in self._seen.items() if now - seen.written >= after_s]
        rank = min(stopped or self._seen, key=lambda number: _progress(self._seen[number]))
        seen = self._seen[rank]
        return Hang(rank, seen.beat, now - seen.changed, is_running=not stopped)


def _progress(seen: _Seen) -> tuple[int, int, float]:
    phase = seen.beat["phase"].removeprefix("after ")
    is_after = phase != seen.beat["phase"]
    order = 2 * _PHASE_ORDER.index(phase) + is_after if phase in _PHASE_ORDER else 2 * len(_PHASE_ORDER)
    return seen.beat["step"], order, seen.changed


@contextmanager
def watch_heartbeats(
    trainer: TrainerMixin, output_dir: Path, after_s: float, report: Callable[[str], None]
) -> Iterator[None]:
    """Write heartbeats in the block. Name a process that hangs, and end this one if it hangs for as long again.

    The main process names it after `after_s`, and ends after twice that time. The others do so somewhat later, in case
    the main process itself hangs or cannot be reached. A hang is only named in the first step, after the last one, and
    where a process that runs saves a checkpoint: these may take long, and the collectives of the others have a timeout
    of their own (`ddp_timeout`).

    Args:
        report: called with the reason before this process ends with exit code 203.
    """
    rank, is_over = trainer.args.process_index, threading.Event()
    heartbeat = trainer.hooks = Heartbeat(output_dir, trainer, trainer.hooks)
    pause_s = min(after_s / 4, _MAX_PAUSE_S)
    watched_ranks = range(1, trainer.args.world_size) if rank == 0 else (0,)
    end_after_s = 2 * after_s + (0 if rank == 0 else 2 * pause_s)

    def watch() -> None:
        monitor, named, count = HeartbeatMonitor(), None, 0
        # The first is written at once: a process that stops before is not known to the others.
        while not is_over.wait(pause_s if count else 0):
            count += 1
            monitor.update(rank, heartbeat.write(count), time.monotonic())
            for watched_rank in watched_ranks:
                monitor.update(watched_rank, read_beat(output_dir, watched_rank), time.monotonic())
            hang = monitor.find_hang(time.monotonic(), after_s)
            if hang and hang.location != named and rank == 0:
                logger.warning("%s", hang)
            named = hang.location if hang else None
            may_end = heartbeat.is_in_steps and not is_over.is_set()
            if hang and hang.seconds >= end_after_s and not hang.is_saving and may_end:
                report(f"{hang}. The job ends: it made no progress for {hang.seconds:.0f} s")
                sys.stderr.flush()
                # The main thread is in a collective that does not return.
                os._exit(EXIT_INTERNAL)

    threading.Thread(target=watch, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
