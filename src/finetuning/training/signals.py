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

from finetuning.distributed import REPEAT_S, read_grace
from finetuning.errors import Interrupted
from finetuning.report.run_folder import STOP_FILE

logger = logging.getLogger("finetuning")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Above every signal number: the processes of a run agree on the maximum of what each of them received.
_TIME_LIMIT, _STOP_FILE = 1000, 1001
_UNIT_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


class FirstSignal:
    """Remember the first signal. Repeats within `REPEAT_S` are the same request; a later signal ends the process.

    Except SIGHUP: a lost terminal sends it more than once.

    SIGTERM after SIGUSR1 is not a later one: schedulers announce their time limit by SIGUSR1, and repeat it by SIGTERM.
    """

    def __init__(self) -> None:
        self.number = 0
        self.is_answered = False
        """Whether what was asked for is done: further signals change nothing."""
        self._time = 0.0
        self._latest = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGHUP:
            return
        now = time.monotonic()
        announced = self._latest == signal.SIGUSR1 and number == signal.SIGTERM
        if self.number and not self.is_answered and not announced and now - self._time >= REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.number or announced:
            self._time = now
        self.number = self.number or number
        self._latest = number

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGTERM, SIGINT, SIGUSR1 and, unless it is ignored, SIGHUP in the block."""
        is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [number for number in _SIGNALS if number != signal.SIGHUP or not is_ignored]
        previous = {number: signal.signal(number, self.handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class StopOnSignal(TrainerCallback):
    """Save and stop at the next step after SIGTERM, SIGINT, SIGUSR1 or SIGHUP, a time limit, or a file `STOP`.

    All processes stop at the same step. After the last step a signal stops nothing: the final model is saved first. A
    second signal, some seconds after the first, ends the process at once, except SIGHUP, which a lost terminal may send
    twice. SIGHUP stops nothing where it is ignored, as under `nohup`.

    Args:
        max_time: a duration such as `1h30m`.
        end_time: when the scheduler ends the job, in seconds since the epoch. The run stops the scheduler's grace
            period before it.
    """

    def __init__(self, output_dir: Path, *, max_time: str | None = None, end_time: float | None = None) -> None:
        self._first = FirstSignal()
        self._received = 0
        self._file = output_dir / STOP_FILE
        self._max_time = max_time
        self._end_time = end_time
        self._deadline = float("inf")

    @property
    def received(self) -> int:
        """The signal's number; SIGTERM's for a time limit and the file; 0 while the run goes on."""
        received = self._received or self._first.number
        return int(signal.SIGTERM) if received in (_TIME_LIMIT, _STOP_FILE) else received

    @property
    def reason(self) -> str:
        if self._received == _TIME_LIMIT:
            return f"max_time {self._max_time}" if self._max_time else "the scheduler's time limit"
        return f"file {STOP_FILE}" if self._received == _STOP_FILE else f"signal {self.received}"

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle signals in the block, and start the clock of the time limit."""
        if self._max_time:
            self._deadline = time.monotonic() + parse_duration(self._max_time)
        if self._end_time is not None:
            left = self._end_time - time.time()
            # A job that is shorter than the grace period trains at least half of its time.
            self._deadline = min(self._deadline, time.monotonic() + max(left - read_grace(), left / 2))
        with self._first.installed():
            yield

    def raise_if_interrupted(self, trainer: Trainer) -> None:
        """Raise Interrupted if training ended before its last step."""
        step = trainer.state.global_step
        # What all processes agreed on: a signal of this one alone, after its last step, stops nothing.
        if not self._received or step >= trainer.state.max_steps:
            return
        is_saved = (self._file.parent / f"checkpoint-{step}").is_dir()
        self._first.is_answered = True
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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        received = self._received or self._first.number or (_TIME_LIMIT if time.monotonic() >= self._deadline else 0)
        # One process looks: on a shared file system each look is a request to its server.
        if not received and args.process_index == 0 and self._file.exists():
            received = _STOP_FILE
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
    """Let the block finish when a signal arrives in it. A second one, some seconds later, ends the process at once."""
    with FirstSignal().installed():
        yield


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as `1h30m`."""
    return sum(int(number) * _UNIT_SECONDS[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))
