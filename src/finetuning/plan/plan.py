"""Everything that is decided before a weight is loaded, each decision with its reason.

How many optimizer steps a run takes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.training import GRPOTrainingArgs, TrainingArgs
from finetuning.distributed import ProcessTopology
from finetuning.errors import Location
from finetuning.plan.batch_size import BatchPlan, plan_batches
from finetuning.plan.compatibility import check_compatibility, check_packages
from finetuning.plan.features import RunContext
from finetuning.plan.lora_init import check_lora_init
from finetuning.plan.memory_estimate import MemoryEstimate, estimate_memory


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps in one pass over the rows, and in the whole run."""

    rows: int | None
    """None for a stream, whose rows nobody has counted."""
    per_epoch: int | None
    total: int
    reason: str


def rows_per_epoch(rows: int, batch: BatchPlan, args: TrainingArgs) -> int:
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


@dataclass(frozen=True)
class Decision:
    """One automatic decision: what it is about, what was decided, and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The batch, the learning rate, the memory that is known of, and, once the rows are counted, the steps."""

    batch: BatchPlan
    learning_rate: float
    learning_rate_reason: str
    memory: MemoryEstimate | None
    steps: StepPlan | None = None

    @property
    def warnings(self) -> list[str]:
        return [self.batch.warning] if self.batch.warning else []

    @property
    def decisions(self) -> list[Decision]:
        """Every decision in one line each, for people."""
        batch = self.batch
        decisions = [
            Decision(
                "total batch",
                f"{batch.total} = {batch.world_size} x {batch.per_device} x {batch.accumulation}",
                "processes x per-device rows x accumulation",
            ),
            Decision("per-device batch", str(batch.per_device), batch.reason),
            Decision("evaluation batch", f"{batch.per_device_eval} a device", "as configured, or the training one"),
            Decision("learning rate", f"{self.learning_rate:g}", self.learning_rate_reason),
        ]
        if self.steps:
            decisions.append(Decision("optimizer steps", f"{self.steps.total:,}", self.steps.reason))
        if self.memory:
            decisions.append(_memory_decision(self.memory))
        return decisions

    def as_dict(self) -> dict[str, Any]:
        """Plain values for run.json."""
        return asdict(self)


def make_plan(
    experiment: Experiment, topology: ProcessTopology, rows: int | None = None, place: Location | None = None
) -> Plan:
    """The plan of an experiment on this many processes; without steps while the number of rows is unknown.

    Raises:
        ConfigError: the total batch size cannot be reached on this many processes, or what is asked for does not go
            together.
        MissingPackageError: an optional package that the experiment needs is not installed.
    """
    batch = plan_batches(experiment.batchsize_conf, topology.world_size, place)
    setting = RunContext(experiment, topology, batch.accumulation)
    check_compatibility(setting)
    check_lora_init(setting)
    check_packages(setting)
    learning_rate, reason = _learning_rate(experiment)
    return Plan(
        batch=batch,
        learning_rate=learning_rate,
        learning_rate_reason=reason,
        memory=estimate_memory(experiment),
        steps=_steps(rows, batch, experiment),
    )


def _steps(rows: int | None, batch: BatchPlan, experiment: Experiment) -> StepPlan | None:
    args = experiment.training_args
    if experiment.data_conf.streaming:
        return plan_stream(args)
    return None if rows is None else plan_steps(rows_per_epoch(rows, batch, args), batch, args)


def _learning_rate(experiment: Experiment) -> tuple[float, str]:
    """The learning rate after `overrides`: multiplied, and scaled by the total batch size or its square root."""
    written, overrides = experiment.training_args.learning_rate, experiment.overrides
    total = experiment.batchsize_conf.total_train_batch_size
    scale = {"none": 1.0, "sqrt": math.sqrt(total), "linear": float(total)}[overrides.lr_batch_size_scaling]
    rate = written * overrides.lr_multiplier * scale
    if rate == written:
        return written, "as configured"
    parts = [f"{written:g}"]
    if overrides.lr_multiplier != 1.0:
        parts.append(f"lr_multiplier {overrides.lr_multiplier:g}")
    if overrides.lr_batch_size_scaling != "none":
        parts.append(f"{overrides.lr_batch_size_scaling} scaling by {total} rows {scale:g}")
    return rate, " x ".join(parts)


def _memory_decision(memory: MemoryEstimate) -> Decision:
    size = f"{memory.parameters / 1e9:.2f}B" if memory.parameters >= 1e8 else f"{memory.parameters / 1e6:.2f}M"
    trained = "an adapter of unknown size" if memory.trainable is None else f"{memory.trainable:,} trained"
    return Decision(
        "memory a device",
        f"at least {format_bytes(memory.total)}",
        f"{size} parameters, {trained}: weights {format_bytes(memory.weights)}, gradients"
        f" {format_bytes(memory.gradients)}, optimizer {format_bytes(memory.optimizer)}; activations come on top",
    )


def format_bytes(count: int) -> str:
    """A number of bytes for people, in powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
