"""How many optimizer steps a run takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetuning.config.training import TrainingArgs
from finetuning.plan.batch import BatchPlan


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps in one pass over the rows, and in the whole run."""

    rows: int
    per_epoch: int
    total: int
    reason: str


def plan_steps(rows: int, batch: BatchPlan, args: TrainingArgs) -> StepPlan:
    """The trainer's own arithmetic, done before the trainer exists.

    Each process draws ceil(rows / world_size / per_device) batches an epoch; a last, shorter accumulation counts as
    a step. Source: transformers 5.23, `Trainer.set_initial_training_values`.
    """
    batches = math.ceil(math.ceil(rows / batch.world_size) / batch.per_device)
    per_epoch = max(math.ceil(batches / batch.accumulation), 1)
    if args.max_steps > 0:
        return StepPlan(rows, per_epoch, args.max_steps, f"max_steps, {args.max_steps / per_epoch:.3g} epochs")
    total = math.ceil(args.num_train_epochs * per_epoch)
    return StepPlan(rows, per_epoch, total, f"{args.num_train_epochs:g} epochs of {per_epoch} steps")
