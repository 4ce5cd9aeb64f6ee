"""How many optimizer steps a run takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetuning.config.sections.grpo import GRPOTrainingArgs
from finetuning.config.sections.training import TrainingArgs
from finetuning.plan.batch_size import BatchPlan


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps in one pass over the rows, and in the whole run."""

    rows: int | None
    """None for a stream, whose rows nobody has counted."""
    per_epoch: int | None
    total: int
    reason: str


def rows_of_an_epoch(rows: int, batch: BatchPlan, args: TrainingArgs) -> int:
    """What the trainer counts in one pass over the rows: the rows themselves; for GRPO completions, of as many prompts
    as fill whole batches of generation.

    Source: TRL 1.16, `GRPOTrainer._get_train_sampler` and `GRPOConfig.__post_init__`.
    """
    if not isinstance(args, GRPOTrainingArgs):
        return rows
    extra = args.model_extra or {}
    rounds = extra.get("steps_per_generation") or batch.accumulation
    generated = extra.get("generation_batch_size") or batch.per_device * batch.world_size * rounds
    prompts = max(generated // args.num_generations, 1)
    return rows // prompts * prompts * args.num_generations * args.num_iterations


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


def plan_stream(args: TrainingArgs) -> StepPlan:
    """The steps of a run whose rows are read as it goes."""
    return StepPlan(None, None, args.max_steps, "max_steps; rows are read as training goes, and not counted before")
