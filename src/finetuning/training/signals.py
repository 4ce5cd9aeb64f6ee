"""A signal ends a run at the next step, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """Saves and stops at the next step boundary after SIGTERM or SIGINT; all processes agree on the step.

    `received` is the signal's number, 0 while none came. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.received = 0

    @contextmanager
    def watching(self) -> Iterator[StopOnSignal]:
        """Handles the signals inside the block."""
        previous = {number: signal.signal(number, self._handle) for number in _WATCHED}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for watched in _WATCHED:
            signal.signal(watched, signal.SIG_DFL)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        received = self.received
        if args.world_size > 1:
            flag = torch.tensor([received], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            received = self.received = int(flag)
        if received and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            # With a limit of one the Trainer would remove this checkpoint at its end, and keep the best alone.
            args.save_total_limit = None
            args.load_best_model_at_end = False
