"""A signal, a file or the clock ends a run at the next step, with a checkpoint."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STOP_NAME = "STOP"
_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Above every signal's number, so that processes that differ agree on one of them.
_TIME, _FILE = 1000, 1001
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
SCHEDULER_MARGIN_S = 120
"""How long before the scheduler ends the job it stops by itself."""


class StopOnSignal(TrainerCallback):
    """Saves and stops at the next step boundary after SIGTERM, SIGINT or SIGUSR1, after a time, or when a file `STOP`
    appears in the output directory; all processes agree on the step.

    `received` is the signal's number, 0 while nothing came; SIGTERM's for the clock and the file. A second signal ends
    the process at once.

    Args:
        most_time: as `run_conf.max_time` has it.
        ends_at: when the scheduler ends the job, in seconds since 1970.
    """

    def __init__(self, output_dir: Path, *, most_time: str | None = None, ends_at: float | None = None) -> None:
        self._received = 0
        self._file = output_dir / STOP_NAME
        self._most_time = most_time
        self._ends_at = ends_at
        self._deadline = float("inf")

    @property
    def received(self) -> int:
        return int(signal.SIGTERM) if self._received in (_TIME, _FILE) else self._received

    @property
    def reason(self) -> str:
        """What ended the run."""
        if self._received == _TIME:
            return f"max_time {self._most_time}" if self._most_time else "the end of the scheduler's time"
        return f"file {STOP_NAME}" if self._received == _FILE else f"signal {self._received}"

    @contextmanager
    def watching(self) -> Iterator[StopOnSignal]:
        """Handles the signals inside the block, and lets the time run."""
        if self._most_time:
            self._deadline = time.monotonic() + seconds(self._most_time)
        if self._ends_at is not None:
            left = self._ends_at - SCHEDULER_MARGIN_S - time.time()
            self._deadline = min(self._deadline, time.monotonic() + left)
        previous = {number: signal.signal(number, self._handle) for number in _WATCHED}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        for watched in _WATCHED:
            signal.signal(watched, signal.SIG_DFL)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        received = self._received or (
            _TIME if time.monotonic() >= self._deadline else _FILE if self._file.exists() else 0
        )
        if args.world_size > 1:
            flag = torch.tensor([received], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            received = int(flag)
        self._received = received
        if received == _FILE and args.should_save:
            # The file has done its work: the next run goes on.
            self._file.unlink(missing_ok=True)
        if received and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            # With a limit of one the Trainer would remove this checkpoint at its end, and keep the best alone.
            args.save_total_limit = None
            args.load_best_model_at_end = False


def seconds(text: str) -> float:
    """Seconds of a time such as `1h30m`."""
    return sum(int(number) * _SECONDS[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))
