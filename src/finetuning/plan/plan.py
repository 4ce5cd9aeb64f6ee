"""Plan a run before any weight is loaded: batch size, learning rate, number of steps and memory, with reasons."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import BitsAndBytes
from finetuning.config.sections.training import DEFAULT_LOGGING_STEPS, BatchSizeConfig, GRPOTrainingArgs, TrainingArgs
from finetuning.distributed import ProcessTopology
from finetuning.errors import ConfigError, Location, Problem
from finetuning.plan.compatibility import check_compatibility, check_packages
from finetuning.plan.features import RunContext
from finetuning.plan.memory_estimate import MemoryEstimate, estimate_memory

AUTO_ROWS = 16
"""Per-device batch size that `auto` starts from, before the memory check."""
_BATCH_KEY = "batchsize_conf.total_train_batch_size"


@dataclass(frozen=True)
class BatchPlan:
    """Batch sizes in rows, with world_size x per_device x accumulation == total; per_device_eval is for evaluation."""

    total: int
    world_size: int
    per_device: int
    accumulation: int
    per_device_eval: int
    reason: str
    warning: str | None = None


def plan_batches(config: BatchSizeConfig, world_size: int, location: Location | None = None) -> BatchPlan:
    """Choose the largest per-device batch size within the maximum that gives exactly the total batch size.

    Raises:
        ConfigError: the total is not a multiple of the world size. The message suggests the nearest multiples.

    >>> plan = plan_batches(BatchSizeConfig(total_train_batch_size=512, max_per_device_train_batch_size=4), 8)
    >>> plan.per_device, plan.accumulation
    (4, 16)
    """
    total, requested = config.total_train_batch_size, config.max_per_device_train_batch_size
    maximum = AUTO_ROWS if requested == "auto" else requested
    if total % world_size:
        lower = total - total % world_size
        nearest = " and ".join(str(candidate) for candidate in (lower, lower + world_size) if candidate)
        raise ConfigError(
            [
                Problem(
                    f"{total} rows cannot be divided among {world_size} processes;"
                    f" the nearest total{'s that can are' if lower else ' that can is'} {nearest}",
                    location or Location(key=_BATCH_KEY),
                )
            ]
        )
    rows = total // world_size
    per_device = _largest_divisor(rows, maximum)
    accumulation = rows // per_device
    return BatchPlan(
        total=total,
        world_size=world_size,
        per_device=per_device,
        accumulation=accumulation,
        per_device_eval=config.per_device_eval_batch_size or per_device,
        reason=f"the largest divisor of {total} / {world_size} = {rows} that is at most {maximum}"
        + (", halved on a GPU until the longest rows fit into memory" if requested == "auto" else ""),
        warning=_warning(total, world_size, per_device, accumulation, maximum),
    )


def limit_micro_batch(batch: BatchPlan, rows: int, why: str) -> BatchPlan:
    """Return the same total with at most as many rows per device, and more accumulation.

    >>> batch = plan_batches(BatchSizeConfig(total_train_batch_size=16, max_per_device_train_batch_size="auto"), 1)
    >>> limited = limit_micro_batch(batch, 5, "what fits into an H100")
    >>> limited.per_device, limited.accumulation
    (4, 4)
    """
    per_process = batch.total // batch.world_size
    per_device = _largest_divisor(per_process, rows)
    return replace(
        batch,
        per_device=per_device,
        accumulation=per_process // per_device,
        per_device_eval=per_device if batch.per_device_eval == batch.per_device else batch.per_device_eval,
        reason=f"the largest divisor of {batch.total} / {batch.world_size} = {per_process} up to {rows}: {why}",
    )


def _largest_divisor(number: int, maximum: int) -> int:
    return next(size for size in range(min(number, maximum), 0, -1) if number % size == 0)


def _warning(total: int, world_size: int, per_device: int, accumulation: int, maximum: int) -> str | None:
    """Return why this total leads to small batches, and better totals; None if it does not."""
    # Small batches at least double the number of forward passes.
    if accumulation < 2 * math.ceil(total / world_size / maximum):
        return None
    full = world_size * maximum
    lower = total - total % full
    better = " or ".join(
        f"{candidate} ({maximum} x {candidate // full})" for candidate in (lower, lower + full) if candidate
    )
    return (
        f"a total of {total} rows leaves only {per_device} row{'s' * (per_device > 1)} per device with {accumulation}"
        f" accumulation steps, because {total // world_size} has no larger divisor up to {maximum}."
        f" Better totals: {better}"
    )


_SHORT_RUN_STEPS = 20
"""A run of so few steps logs each of them."""


@dataclass(frozen=True)
class StepPlan:
    """Number of optimizer steps per epoch and in total."""

    rows: int | None
    """Number of training rows; None for a streaming dataset."""
    per_epoch: int | None
    total: int
    reason: str
    warning: str | None = None
    """Why a step trains on fewer rows than a batch has."""


def rows_per_epoch(rows: int, batch: BatchPlan, args: TrainingArgs) -> int:
    """Return the rows per epoch as the trainer counts them. For GRPO these are completions, of as many prompts as fill
    complete generation batches.

    Source: TRL 1.16, `GRPOTrainer._get_train_sampler` and `GRPOConfig.__post_init__`.
    """
    if not isinstance(args, GRPOTrainingArgs):
        return rows
    extra = args.model_extra or {}
    steps = extra.get("steps_per_generation") or batch.accumulation
    generated = extra.get("generation_batch_size") or batch.per_device * batch.world_size * steps
    prompts = max(generated // args.num_generations, 1)
    return rows // prompts * prompts * args.num_generations * args.num_iterations


def check_evaluation_batch(experiment: Experiment, batch: BatchPlan) -> None:
    """Check that an evaluation batch of GRPO holds complete groups of completions.

    Source: TRL 1.16, `GRPOConfig.__post_init__`.

    Raises:
        ConfigError: it does not.
    """
    args = experiment.training_args
    if not isinstance(args, GRPOTrainingArgs) or args.eval_strategy == "no":
        return
    generations = (args.model_extra or {}).get("num_generations_eval") or args.num_generations
    rows = batch.per_device_eval * batch.world_size
    if rows % generations:
        per_device = math.lcm(generations, batch.world_size) // batch.world_size
        raise ConfigError(
            f"an evaluation batch has {rows} completions ({batch.per_device_eval} per device), not a multiple of"
            f" the {generations} completions of a prompt",
            location=Location(key="batchsize_conf.per_device_eval_batch_size"),
            hint=f"Set it to {per_device} or a multiple, or set training_args.num_generations_eval.",
        )


def plan_steps(rows: int, batch: BatchPlan, args: TrainingArgs) -> StepPlan:
    """Compute the number of steps as the trainer will.

    Each process draws ceil(rows / world_size / per_device) batches per epoch. An incomplete accumulation at the end of
    an epoch counts as a step. Source: transformers 5.23, `Trainer.set_initial_training_values`.
    """
    batches = math.ceil(math.ceil(rows / batch.world_size) / batch.per_device)
    per_epoch = max(math.ceil(batches / batch.accumulation), 1)
    warnings: list[str] = []
    if 0 < rows < batch.total:
        warnings.append(
            f"{_plural(rows, 'training row')} in all, fewer than the {batch.total} of a batch"
            " (batchsize_conf.total_train_batch_size): each step trains on all of them"
        )
    if args.max_steps > 0:
        total, reason = args.max_steps, f"max_steps, {_plural(args.max_steps / per_epoch, 'epoch', '.3g')}"
    else:
        total = math.ceil(args.num_train_epochs * per_epoch)
        reason = f"{_plural(args.num_train_epochs, 'epoch')} of {_plural(per_epoch, 'step')}"
    warnings += _zero_rate_warning(args, total)
    return StepPlan(rows, per_epoch, total, reason, "; ".join(warnings) or None)


def plan_stream(args: TrainingArgs) -> StepPlan:
    """Return the steps of a run on a streaming dataset."""
    warning = "; ".join(_zero_rate_warning(args, args.max_steps)) or None
    return StepPlan(None, None, args.max_steps, "max_steps; the rows of a streaming dataset are not counted", warning)


def zero_rate_reason(rate: float, schedule: str, warmup_steps: float, num_steps: int) -> str | None:
    """Return why the learning rate is 0 in every step, as far as these say; None if it is not.

    Args:
        warmup_steps: number of steps, or, below 1, a fraction of all.
    """
    if rate == 0:
        return "training_args.learning_rate is 0"
    if num_steps == 1 and warmup_steps > 0 and schedule not in _WITHOUT_WARMUP:
        return "a warm-up (training_args.warmup_steps) begins with a learning rate of 0, and there is one step"
    return None


_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy", "cosine_warmup_with_min_lr")
"""Schedules without a warm-up, and the one that may begin with another rate than 0."""


def _zero_rate_warning(args: TrainingArgs, num_steps: int) -> list[str]:
    reason = zero_rate_reason(args.learning_rate, args.lr_scheduler_type, args.warmup_steps, num_steps)
    return [f"{reason}: training will not change the weights"] if reason else []


@dataclass(frozen=True)
class WeightsPlan:
    """The dtype of the weights in a full fine-tune, with the reason."""

    dtype: str
    reason: str
    warning: Problem | None = None
    """What this dtype loses."""


_KAHAN_OPTIMIZERS = ("stable_adamw",)
"""Optimizers that keep the rounding errors of 16-bit weights in a buffer, and add them later (Kahan summation)."""
_LARGEST_TYPICAL_WEIGHT = 0.1


def plan_weights(context: RunContext) -> WeightsPlan | None:
    """Decide the dtype of the weights of a full fine-tune; None for an adapter, which PEFT holds in float32."""
    dtype = context.trained_dtype
    if not context.trains_all_weights:
        return None
    checkpoint = context.checkpoint_dtype
    if context.raises_float16:
        warning = Problem(
            "Adam turns float16 weights into NaN within a few steps, as small gradients and its epsilon are 0 in"
            f" float16: they are trained in float32 ({_cost_of_float32(context)}) and saved in float16",
            Location(key="run_conf.model_args.dtype"),
            "Set run_conf.model_args.dtype: auto.",
        )
        return WeightsPlan("float32", "in place of float16, as Adam would turn the weights into NaN", warning)
    if dtype != "float32":
        name = "that of the checkpoint" if dtype is None else dtype
        is_configured = context.experiment.run_conf.model_args.dtype != "auto"
        return WeightsPlan(
            name, "as configured" if is_configured else "as in the checkpoint, without autocast", _rounding(context)
        )
    if context.experiment.run_conf.model_args.dtype != "auto" or checkpoint == "float32":
        return WeightsPlan(dtype, "as configured" if checkpoint != "float32" else "as in the checkpoint")
    if context.sharded_by is not None:
        return WeightsPlan(dtype, f"as {context.sharded_by} trains them under mixed precision")
    return WeightsPlan(
        dtype,
        f"from {checkpoint or 'the checkpoint'}, as small updates of 16-bit weights are rounded off;"
        f" {_cost_of_float32(context)}; run_conf.model_args.dtype: bfloat16 turns it off",
    )


def _cost_of_float32(context: RunContext) -> str:
    memory = [estimate_memory(context.experiment, dtype) for dtype in ("float32", "bfloat16")]
    if memory[0] is None or memory[1] is None:
        return "twice the memory of 16 bits for weights, gradients and optimizer"
    full, half = (format_bytes(estimate.total) for estimate in memory if estimate)
    return f"{full} instead of {half} for weights, gradients and optimizer"


def _rounding(context: RunContext) -> Problem | None:
    """Return a warning if many updates of bfloat16 weights are too small to change them.

    bfloat16 has 8 significant bits: numbers are 1/128 to 1/256 of their size apart, and a change below half of that is
    rounded off. Adam changes a weight by about the learning rate, whatever its size.
    """
    args = context.args
    compensates = args.optim.startswith(_KAHAN_OPTIMIZERS) or "kahan" in str((args.model_extra or {}).get("optim_args"))
    rate, _ = learning_rate(context.experiment)
    smallest_lost = rate * 512
    if context.trained_dtype != "bfloat16" or compensates or smallest_lost > _LARGEST_TYPICAL_WEIGHT:
        return None
    return Problem(
        "weights are trained in bfloat16, which rounds off changes below 1/512 of a weight: at a learning rate of"
        f" {rate:g}, Adam's updates of weights above about {smallest_lost:.2g} are lost",
        Location(key="run_conf.model_args.dtype"),
        f"Set run_conf.model_args.dtype: float32 ({_cost_of_float32(context)}) and training_args.bf16: true to compute"
        " in bfloat16.",
    )


@dataclass(frozen=True)
class Decision:
    """A value that was chosen automatically, with its reason."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Batch size, learning rate, memory and, once the rows are counted, the number of steps."""

    batch: BatchPlan
    learning_rate: float
    learning_rate_reason: str
    memory: MemoryEstimate | None
    weights: WeightsPlan | None = None
    """None for an adapter."""
    steps: StepPlan | None = None
    sharding_warning: Problem | None = None
    """Why the model is sharded otherwise than the launcher says."""
    device_settings: tuple[Decision, ...] = ()
    """What was chosen for the device, as `training/device_settings.py` does for GPUs."""
    has_rehearsed_memory: bool = False
    """Whether these contain the memory of a rehearsed step, activations included."""

    @property
    def warnings(self) -> list[Problem]:
        batch = Problem(self.batch.warning, Location(key=_BATCH_KEY)) if self.batch.warning else None
        weights = self.weights.warning if self.weights else None
        return [warning for warning in (batch, weights, self.sharding_warning) if warning is not None]

    @property
    def decisions(self) -> list[Decision]:
        """The decisions, one per line of the console output."""
        batch = self.batch
        decisions = [
            Decision(
                "total batch",
                f"{batch.total} = {batch.world_size} x {batch.per_device} x {batch.accumulation}",
                "processes x per-device rows x accumulation",
            ),
            Decision("per-device batch", str(batch.per_device), batch.reason),
            Decision("evaluation batch", f"{batch.per_device_eval} per device", "as configured, or as in training"),
            Decision("learning rate", f"{self.learning_rate:g}", self.learning_rate_reason),
        ]
        if self.weights:
            decisions.append(Decision("trained weights", self.weights.dtype, self.weights.reason))
        decisions += self.device_settings
        if self.steps:
            decisions.append(Decision("optimizer steps", f"{self.steps.total:,}", self.steps.reason))
        if self.memory and not self.has_rehearsed_memory:
            decisions.append(_memory_decision(self.memory))
        return decisions

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps. Only valid once the rows are counted."""
        if self.steps is None:
            raise ValueError("the plan has no steps yet: call with_steps first")
        return self.steps.total

    def logging_fields(self, args: TrainingArgs) -> dict[str, float]:
        """Return the steps between two logs and two evaluations, and whether the first step is logged.

        A short run logs every step by default.
        """
        is_short = self.steps is not None and self.steps.total <= _SHORT_RUN_STEPS
        default = 1 if is_short else DEFAULT_LOGGING_STEPS
        first = args.logging_first_step
        return {
            "logging_first_step": args.logging_strategy == "steps" if first is None else first,
            "logging_steps": args.logging_steps or default,
            "eval_steps": args.eval_steps or args.logging_steps or DEFAULT_LOGGING_STEPS,
        }

    def with_steps(self, experiment: Experiment, rows: int | None) -> Plan:
        """Return the plan of the same experiment with the steps for this many training rows."""
        return replace(self, steps=_steps(rows, self.batch, experiment))

    def with_trainable(self, trainable: int | None) -> Plan:
        """Return the plan of the same experiment with the number of parameters that the adapter trains."""
        if self.memory is None or trainable is None:
            return self
        return replace(self, memory=self.memory.with_adapter(trainable))

    def as_dict(self) -> dict[str, object]:
        """Return plain values for run.json."""
        return asdict(self)


def make_plan(
    experiment: Experiment, topology: ProcessTopology, rows: int | None = None, location: Location | None = None
) -> Plan:
    """Plan an experiment on the given processes. The plan has no steps if `rows` is None.

    Raises:
        ConfigError: the total batch size is not divisible by the number of processes, or features are incompatible.
        MissingPackageError: an optional package that the experiment needs is not installed.
    """
    batch = plan_batches(experiment.batchsize_conf, topology.world_size, location)
    check_evaluation_batch(experiment, batch)
    context = RunContext(experiment, topology, batch.accumulation)
    check_compatibility(context)
    check_packages(context)
    rate, reason = learning_rate(experiment)
    return Plan(
        batch=batch,
        learning_rate=rate,
        learning_rate_reason=reason,
        memory=estimate_memory(experiment, context.weights_dtype),
        weights=plan_weights(context),
        steps=_steps(rows, batch, experiment),
        sharding_warning=_fsdp_warning(context),
        device_settings=_quantization_defaults(experiment),
    )


def _quantization_defaults(experiment: Experiment) -> tuple[Decision, ...]:
    """Return the data type of 4-bit weights if the config does not set it: that of transformers is another."""
    conf = experiment.quant_conf
    if not isinstance(conf, BitsAndBytes) or not conf.load_in_4bit or "bnb_4bit_quant_type" in conf.model_fields_set:
        return ()
    reason = "closer to normally distributed weights than fp4, the default of transformers"
    return (
        Decision("4-bit weights", conf.bnb_4bit_quant_type, f"quant_conf.bnb_4bit_quant_type is not set; {reason}"),
    )


def _fsdp_warning(context: RunContext) -> Problem | None:
    """Return a warning if `training_args` configures FSDP, and so does the launcher, or there is only one process."""
    if not (context.args.model_extra or {}).get("fsdp"):
        return None
    if not context.topology.is_distributed:
        return Problem(
            "shards the model over several processes, and this is one: the trainer refuses to start",
            Location(key="training_args.fsdp"),
            "Start the run with `finetuning launch` or `accelerate launch`, or remove it.",
        )
    if context.topology.sharded_by != "fsdp":
        return None
    return Problem(
        "is set, and the launcher shards the model with FSDP as well: what fsdp_config does not say is taken from the"
        " launcher's config",
        Location(key="training_args.fsdp"),
        "Set fsdp in one place: remove it here, or launch with --preset ddp.",
    )


def _steps(rows: int | None, batch: BatchPlan, experiment: Experiment) -> StepPlan | None:
    args = experiment.training_args
    if experiment.data_conf.streaming:
        return plan_stream(args)
    return None if rows is None else plan_steps(rows_per_epoch(rows, batch, args), batch, args)


def learning_rate(experiment: Experiment) -> tuple[float, str]:
    """Return the learning rate after `overrides`, and how it was computed."""
    configured, overrides = experiment.training_args.learning_rate, experiment.overrides
    total = experiment.batchsize_conf.total_train_batch_size
    scale = {"none": 1.0, "sqrt": math.sqrt(total), "linear": float(total)}[overrides.lr_batch_size_scaling]
    rate = configured * overrides.lr_multiplier * scale
    if rate == configured:
        return configured, "as configured"
    parts = [f"{configured:g}"]
    if overrides.lr_multiplier != 1.0:
        parts.append(f"lr_multiplier {overrides.lr_multiplier:g}")
    if overrides.lr_batch_size_scaling != "none":
        parts.append(f"{overrides.lr_batch_size_scaling} scaling for {total} rows {scale:g}")
    return rate, " x ".join(parts)


def _plural(count: float, noun: str, spec: str = "g") -> str:
    text = format(count, spec)
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"


def _memory_decision(memory: MemoryEstimate) -> Decision:
    size = f"{memory.parameters / 1e9:.2f}B" if memory.parameters >= 1e8 else f"{memory.parameters / 1e6:.2f}M"
    trained = "an adapter of unknown size" if memory.trainable is None else f"{memory.trainable:,} trainable"
    return Decision(
        "memory per device",
        f"at least {format_bytes(memory.total)}",
        f"{size} parameters, {trained}: weights {format_bytes(memory.weights)}, gradients"
        f" {format_bytes(memory.gradients)}, optimizer {format_bytes(memory.optimizer)}; plus activations,"
        " which `finetuning rehearse` estimates for a GPU",
    )


def format_bytes(count: int) -> str:
    """Format a number of bytes with a binary unit, such as `1.5 GiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
