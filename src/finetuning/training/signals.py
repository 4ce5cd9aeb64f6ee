"""Stop a run at the next step, with a checkpoint: on a signal, at a time limit, or when a file `STOP` appears."""

from __future__ import annotations

import logging
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetuning.errors import Interrupted

logger = logging.getLogger("finetuning")

STOP_FILE = "STOP"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Above every signal number: the processes of a run agree on the maximum of what each of them received.
_TIME_LIMIT, _STOP_FILE = 1000, 1001
_UNIT_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
SCHEDULER_MARGIN_S = 120
"""How long before the scheduler's time limit the run stops."""


class StopOnSignal(TrainerCallback):
    """Save and stop at the next step after SIGTERM, SIGINT or SIGUSR1, a time limit, or a file `STOP` in `output_dir`.

    All processes stop at the same step. After the last step a signal stops nothing: the final model is saved first. A
    second signal ends the process at once.

    Args:
        max_time: a duration such as `1h30m`.
        end_time: when the scheduler ends the job, in seconds since the epoch.
    """

    def __init__(self, output_dir: Path, *, max_time: str | None = None, end_time: float | None = None) -> None:
        self._received = 0
        self._file = output_dir / STOP_FILE
        self._max_time = max_time
        self._end_time = end_time
        self._deadline = float("inf")

    @property
    def received(self) -> int:
        """The signal's number; SIGTERM's for a time limit and the file; 0 while the run goes on."""
        return int(signal.SIGTERM) if self._received in (_TIME_LIMIT, _STOP_FILE) else self._received

    @property
    def reason(self) -> str:
        if self._received == _TIME_LIMIT:
            return f"max_time {self._max_time}" if self._max_time else "the scheduler's time limit"
        return f"file {STOP_FILE}" if self._received == _STOP_FILE else f"signal {self._received}"

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle signals in the block, and start the clock of the time limit."""
        if self._max_time:
            self._deadline = time.monotonic() + parse_duration(self._max_time)
        if self._end_time is not None:
            left = self._end_time - SCHEDULER_MARGIN_S - time.time()
            self._deadline = min(self._deadline, time.monotonic() + left)
        previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def raise_if_interrupted(self, trainer: Trainer) -> None:
        """Raise Interrupted if training ended before its last step."""
        step = trainer.state.global_step
        if not self.received or step >= trainer.state.max_steps:
            return
        is_saved = (self._file.parent / f"checkpoint-{step}").is_dir()
        saved = f"checkpoint-{step} is saved" if is_saved else "no checkpoint of this step could be saved"
        raise Interrupted(
            f"stopped by {self.reason} at step {step}: {saved}. Run the same command with"
            " run_conf.resume_from_checkpoint: auto to resume from"
            f" {'it' if is_saved else 'the newest valid checkpoint'}",
            self.received,
        )

    def log_late_signal(self) -> None:
        """Log that a signal arrived too late to stop training."""
        if self.received:
            logger.warning("%s after the last step: the final model was saved, and the run is complete", self.reason)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        for handled in _SIGNALS:
            signal.signal(handled, signal.SIG_DFL)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        received = self._received or (
            _TIME_LIMIT if time.monotonic() >= self._deadline else _STOP_FILE if self._file.exists() else 0
        )
        if args.world_size > 1:
            flag = torch.tensor([received], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            received = int(flag)
        self._received = received
        if received == _STOP_FILE and args.should_save:
            # The next run must not stop at once.
            self._file.unlink(missing_ok=True)
        if received and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            # At its end the Trainer would remove this checkpoint if the limit is 1 and another one is the best.
            args.save_total_limit = None
            args.load_best_model_at_end = False


@contextmanager
def finish_despite_signal() -> Iterator[None]:
    """Let the block finish when a signal arrives in it. A second signal ends the process at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        for handled in _SIGNALS:
            signal.signal(handled, signal.SIG_DFL)

    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as `1h30m`."""
    return sum(int(number) * _UNIT_SECONDS[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))
