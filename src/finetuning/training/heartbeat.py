"""What each process of a job is doing, in a file of its own, so that the one that hangs can be named."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetuning.algorithms.phases import Phases

logger = logging.getLogger(__name__)

FOLDER = "heartbeat"
_ORDER = ("data_loading", "model_forward", "model_backward")


class Heartbeat(Phases):
    """Writes the part that this process is in, its step and the time into `heartbeat/rank-N.json`, and tells `inner`,
    too."""

    def __init__(self, output_dir: Path, trainer: Any, inner: Phases):
        self._file = output_dir / FOLDER / f"rank-{trainer.args.process_index}.json"
        self._trainer = trainer
        self._inner = inner
        self._file.parent.mkdir(parents=True, exist_ok=True)
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
            self._file.write_text(json.dumps(beat) + "\n", encoding="utf-8")
        except OSError as error:
            if not self._broken:
                logger.warning("the heartbeat cannot be written: %s", error)
            self._broken = True


def silent(output_dir: Path, world_size: int, after_s: float) -> str | None:
    """Which process hangs, in which part of which step and since when; None while all move.

    When one hangs, the others wait for it: it is the one that is furthest behind.
    """
    beats = {}
    for rank in range(world_size):
        try:
            beats[rank] = json.loads((output_dir / FOLDER / f"rank-{rank}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
    if time.time() - max(beat["time"] for beat in beats.values()) < after_s:
        return None

    def progress(beat: dict[str, Any]) -> tuple[int, int, float]:
        phase = beat["phase"].removeprefix("after ")
        place = 2 * _ORDER.index(phase) + (phase != beat["phase"]) if phase in _ORDER else 2 * len(_ORDER)
        return beat["step"], place, beat["time"]

    rank = min(beats, key=lambda number: progress(beats[number]))
    beat = beats[rank]
    return (
        f"rank {rank} hangs: {beat['phase']} of step {beat['step']} for {time.time() - beat['time']:.0f} s;"
        " the other processes wait for it"
    )


@contextmanager
def watched(trainer: Any, output_dir: Path, after_s: float) -> Iterator[None]:
    """Lets every process of a job write its heartbeat inside the block; the main one names who hangs. Nothing for a job
    of one process."""
    if trainer.args.world_size == 1:
        yield
        return
    trainer.phases = Heartbeat(output_dir, trainer, trainer.phases)
    ended = threading.Event()

    def watch() -> None:
        told = None
        while not ended.wait(min(after_s / 2, 10)):
            found = silent(output_dir, trainer.args.world_size, after_s)
            who = found.partition(" for ")[0] if found else None
            if found and who != told:
                logger.warning("%s", found)
            told = who

    if trainer.args.process_index == 0:
        threading.Thread(target=watch, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
