"""Plan the memory of a run on a device by its rehearsal: gradient checkpointing, micro-batch, and what is left.

What a run needs in addition to weights and optimizer depends on model code, loss and attention. So nothing is
computed by a formula: the planned step is rehearsed on fake tensors (`training/rehearsal.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finetuning.errors import ConfigError, Location, ModelError
from finetuning.plan.plan import Decision, format_bytes, limit_micro_batch

if TYPE_CHECKING:
    from finetuning.config.sections.experiment import Experiment
    from finetuning.plan.plan import Plan
    from finetuning.training.rehearsal import Cost, DeviceModel
    from finetuning.training.rehearsed_model import Checkpointing, StepShape

METHODS = ("sft", "dpo")
_SHARDED = ("weights", "gradients", "optimizer")
_SHOWN_OPERATIONS = 3
_TOKENS_FOR_A_GPU = 4096
"""Fewer in a micro-batch do not fill a GPU, and recomputing activations for more rows is worth its time."""


@dataclass(frozen=True)
class Rehearsal:
    """A run on a device, as `finetuning rehearse` prints it."""

    device: str
    device_bytes: float
    rows: int
    tokens_per_row: int
    checkpointing: str
    peak_bytes: dict[str, float]
    """By category."""
    fits: bool
    largest_micro_batch: int
    """Rows; 0 if not even one fits."""
    fitting_checkpointing: str | None
    """The cheapest gradient checkpointing with which the planned micro-batch fits; None if none does."""
    step_seconds: float
    steps: int | None
    flops_per_step: float
    mfu: float
    dearest_operations: dict[str, float]
    """Share of a step's time."""
    data_dependent_operations: list[str]


def plan_memory(experiment: Experiment, plan: Plan, device: DeviceModel) -> tuple[Experiment, Plan]:
    """Return experiment and plan with the fastest gradient checkpointing that fits, and the memory that the run needs.

    A value of the config is kept. With `max_per_device_train_batch_size: auto` the micro-batch is as large as fits, up
    to the planned one.
    """
    from finetuning.training.rehearsed_model import CHECKPOINTING

    args = experiment.training_args
    is_free = "gradient_checkpointing" not in args.model_fields_set
    if args.deepspeed:
        return experiment, _undecided(plan, is_free, "memory cannot be estimated under DeepSpeed")
    try:
        shape = step_shape(experiment, plan)
        fits = _Fit(experiment, plan, shape, device)
        chosen = fits.choose(CHECKPOINTING if is_free else (shape.checkpointing,))
    except (ConfigError, ModelError) as error:
        return experiment, _undecided(plan, is_free, f"memory cannot be estimated: {error.problems[0].message}")
    decisions = list(plan.device_settings)
    if chosen.rows < plan.batch.per_device:
        plan = replace(plan, batch=limit_micro_batch(plan.batch, chosen.rows, f"what fits into {device.title}"))
    if is_free:
        value: bool | str = {"off": False, "full": True}.get(chosen.checkpointing, "selective")
        args = args.model_copy(update={"gradient_checkpointing": value})
        experiment = experiment.model_copy(update={"training_args": args})
        decisions.append(Decision("checkpointing", chosen.checkpointing, fits.explain(chosen)))
    decisions.append(Decision("memory per device", f"about {format_bytes(round(chosen.peak))}", _categories(chosen)))
    return experiment, replace(plan, device_settings=tuple(decisions), has_rehearsed_memory=True)


def _undecided(plan: Plan, is_free: bool, reason: str) -> Plan:
    if not is_free:
        return plan
    return replace(plan, device_settings=(*plan.device_settings, Decision("checkpointing", "off", reason)))


@dataclass(frozen=True)
class _Choice:
    checkpointing: Checkpointing
    rows: int
    by_category: dict[str, float]
    fits: bool

    @property
    def peak(self) -> float:
        return sum(self.by_category.values())


class _Fit:
    """Finds what fits into a device, rehearsing no more than it has to."""

    def __init__(self, experiment: Experiment, plan: Plan, shape: StepShape, device: DeviceModel):
        from finetuning.training.rehearsal import USABLE_MEMORY

        self._experiment, self._plan, self._shape, self._device = experiment, plan, shape, device
        self._usable = device.memory * USABLE_MEMORY
        self._rejected: dict[str, float] = {}

    def choose(self, modes: tuple[Checkpointing, ...]) -> _Choice:
        """Return the first of the modes that fits; the last one if none does."""
        is_auto = self._experiment.batchsize_conf.max_per_device_train_batch_size == "auto"
        planned = len(self._shape.row_lengths)
        enough = min(planned, -(-_TOKENS_FOR_A_GPU // self._shape.row_lengths[0])) if is_auto else planned
        choice = None
        for mode in modes:
            choice = self._at(mode, planned)
            if not choice.fits and is_auto:
                choice = self._shrunk(choice)
            if choice.fits and choice.rows >= enough:
                return choice
            self._rejected[mode] = choice.peak
        assert choice is not None
        return choice

    def _at(self, mode: Checkpointing, rows: int) -> _Choice:
        from finetuning.training.rehearsal import rehearse

        shape = replace(with_rows(self._shape, rows), checkpointing=mode)
        cost = rehearse(self._experiment, shape, self._device)
        peak = sharded_peak(self._experiment, self._plan, cost)
        return _Choice(mode, rows, peak, sum(peak.values()) <= self._usable)

    def _shrunk(self, choice: _Choice) -> _Choice:
        """Return the choice with as many rows as fit: memory is a line in their number."""
        fewer = self._at(choice.checkpointing, 1)
        per_row = (choice.peak - fewer.peak) / max(choice.rows - 1, 1)
        rows = 1 + math.floor((self._usable - fewer.peak) / per_row) if per_row > 0 and fewer.fits else 1
        rows = min(rows, choice.rows)
        return fewer if rows == 1 else self._at(choice.checkpointing, rows)

    def explain(self, choice: _Choice) -> str:
        """Return why this was chosen, in bytes."""
        has = f"of {format_bytes(round(self._device.memory))}"
        tried = "; ".join(f"{mode} needs {format_bytes(round(peak))}" for mode, peak in self._rejected.items())
        if not choice.fits:
            return f"{tried} {has}: none fits, and the micro-batch is halved until it does"
        rows = f"{choice.rows} rows of {self._shape.row_lengths[0]:,} tokens"
        what = f"{rows} need {format_bytes(round(choice.peak))} {has}"
        return f"the fastest that fits: {what}" + (f"; {tried}" if tried else "")


def _categories(choice: _Choice) -> str:
    sizes = (f"{name} {format_bytes(round(size))}" for name, size in choice.by_category.items())
    return f"rehearsed with checkpointing {choice.checkpointing}: {', '.join(sizes)}"


def with_rows(shape: StepShape, rows: int) -> StepShape:
    """Return the shape of a micro-batch of as many rows, each as long as the first."""
    planned = len(shape.row_lengths)
    return replace(
        shape,
        row_lengths=shape.row_lengths[:1] * rows,
        num_labels=shape.num_labels // planned * rows,
        # Fewer rows at a time need more micro-batches for a step.
        micro_batches=shape.micro_batches if rows >= planned else -(-shape.micro_batches * planned // rows),
    )


def sharded_peak(experiment: Experiment, plan: Plan, cost: Cost) -> dict[str, float]:
    """Return the peak by category on one of the run's processes."""
    shards = plan.batch.world_size if _is_sharded(experiment) else 1
    parts = [
        {name: size / shards if name in _SHARDED else size for name, size in sizes.items()}
        for sizes in cost.peaks.values()
    ]
    return max(parts, key=lambda sizes: sum(sizes.values()))


def rehearse_run(experiment: Experiment, plan: Plan, device: DeviceModel, *, exact: bool = False) -> Rehearsal:
    """Return the rehearsal of a run on a device.

    Raises:
        ConfigError: the method or the weights are not supported.
    """
    from finetuning.training.rehearsal import USABLE_MEMORY, rehearse
    from finetuning.training.rehearsed_model import CHECKPOINTING

    shape = step_shape(experiment, plan)
    costs = {
        mode: rehearse(experiment, replace(shape, checkpointing=mode), device, exact=exact) for mode in CHECKPOINTING
    }
    cost = costs[shape.checkpointing]
    peak = sharded_peak(experiment, plan, cost)
    usable, saved = device.memory * USABLE_MEMORY, cost.peak_bytes - sum(peak.values())
    step = plan.batch.accumulation * cost.seconds + cost.update_seconds
    # What checkpointing computes twice is not progress.
    useful = costs["off"].flops * plan.batch.accumulation
    return Rehearsal(
        device=device.title,
        device_bytes=device.memory,
        rows=len(shape.row_lengths),
        tokens_per_row=max(shape.row_lengths),
        checkpointing=shape.checkpointing,
        peak_bytes=peak,
        fits=sum(peak.values()) <= usable,
        largest_micro_batch=_largest_micro_batch(experiment, shape, device, cost, usable + saved, exact=exact),
        fitting_checkpointing=next((mode for mode in CHECKPOINTING if costs[mode].peak_bytes <= usable + saved), None),
        step_seconds=step,
        steps=plan.steps.total if plan.steps else None,
        flops_per_step=cost.flops * plan.batch.accumulation,
        mfu=useful / step / device.half,
        dearest_operations=_dearest(cost),
        data_dependent_operations=[str(operation) for operation in cost.operations],
    )


def step_shape(experiment: Experiment, plan: Plan, *, for_gpu: bool = True) -> StepShape:
    """Return the shape of the largest micro-batch that a config allows: every row as long as it may be, all trained.

    Raises:
        ConfigError: the method is not supported.
    """
    import torch

    from finetuning.algorithms.sft import chunk_sizes
    from finetuning.config.pretrained_config import find_pretrained_config
    from finetuning.config.sections.model import NoPeft
    from finetuning.distributed import ProcessTopology
    from finetuning.model.varlen_attention import SDPA_VARLEN
    from finetuning.plan.attention import TORCH_VARLEN
    from finetuning.plan.features import RunContext
    from finetuning.training.rehearsed_model import StepShape

    method, args = experiment.method_name, experiment.training_args
    if method not in METHODS:
        raise ConfigError(
            f"{method} cannot be rehearsed, only {' and '.join(METHODS)}", location=Location(key="method")
        )
    context = RunContext(experiment, ProcessTopology(), plan.batch.accumulation)
    dtype = context.checkpoint_dtype if context.weights_dtype == "auto" else context.weights_dtype
    sft = getattr(experiment, "sft_args", None)
    length = int(sft.max_seq_length if sft else getattr(args, "max_length", None) or 2048)
    rows, padded = plan.batch.per_device, sft is None or sft.batching == "padded"
    vocabulary = (find_pretrained_config(experiment.run_conf.model) or {}).get("vocab_size")
    vocabulary = vocabulary if isinstance(vocabulary, int) else 32_000
    at_once, per_chunk = chunk_sizes(sft.logits_at_once, vocabulary) if sft else (math.inf, 0)
    if sft and sft.logits_at_once == "auto" and for_gpu:
        at_once = -1
    flat_attention = TORCH_VARLEN if for_gpu else SDPA_VARLEN
    precomputes = bool((args.model_extra or {}).get("precompute_ref_log_probs"))
    return StepShape(
        method=method,
        row_lengths=(length,) * rows,
        num_labels=rows * (length - 1),
        padded=padded,
        checkpointing=_checkpointing_of(experiment),
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        weights=getattr(torch, dtype or "float32"),
        attention="sdpa_causal" if padded else flat_attention,
        micro_batches=plan.batch.accumulation,
        optimizer_states=2 if "adam" in args.optim else 1,
        fused_update="fused" in args.optim,
        max_labels_at_once=at_once,
        labels_per_chunk=per_chunk,
        fused_loss=for_gpu,
        has_reference=method == "dpo" and isinstance(experiment.peft_conf, NoPeft) and not precomputes,
        for_gpu=for_gpu,
    )


def _checkpointing_of(experiment: Experiment) -> Checkpointing:
    value = experiment.training_args.gradient_checkpointing
    return "selective" if value == "selective" else "full" if value else "off"


def _is_sharded(experiment: Experiment) -> bool:
    args = experiment.training_args
    return bool(args.deepspeed or (args.model_extra or {}).get("fsdp"))


def _largest_micro_batch(
    experiment: Experiment, shape: StepShape, device: DeviceModel, cost: Cost, available: float, *, exact: bool
) -> int:
    """Return how many rows fit: memory is a line in their number, through the planned one and one row more."""
    from finetuning.training.rehearsal import rehearse

    rows = len(shape.row_lengths)
    per_row = rehearse(experiment, with_rows(shape, rows + 1), device, exact=exact).peak_bytes - cost.peak_bytes
    return max(rows + math.floor((available - cost.peak_bytes) / per_row), 0) if per_row > 0 else rows


def _dearest(cost: Cost) -> dict[str, float]:
    total = sum(cost.by_operation.values()) or 1.0
    ranked = sorted(cost.by_operation.items(), key=lambda item: -item[1])
    return {name: seconds / total for name, seconds in ranked[:_SHOWN_OPERATIONS]}
