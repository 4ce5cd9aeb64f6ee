"""`finetuning rehearse`: the memory and the time of a run on a device, computed on fake tensors before it runs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import run_command
from finetuning.errors import ConfigError, Location

if TYPE_CHECKING:
    from finetuning.config.sections.experiment import Experiment
    from finetuning.plan.plan import Plan
    from finetuning.training.rehearsal import Checkpointing, Cost, DeviceModel, StepShape

_METHODS = ("sft", "dpo")
_MODES: tuple[Checkpointing, ...] = ("off", "full")
"""Of gradient checkpointing, the cheapest first."""
_SHARDED = ("weights", "gradients", "optimizer")
_SHOWN_OPERATIONS = 3


@dataclass(frozen=True)
class Rehearsal:
    """What `finetuning rehearse` prints."""

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    return run_command(_rehearse, argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    from finetuning.training.rehearsal import DEVICES

    parser = argparse.ArgumentParser(
        prog="finetuning rehearse",
        description="Foresee the memory and the time of a run on a device: one optimizer step of the run's own model,"
        " adapter and loss on tensors without values, for micro-batches of the longest rows that the config allows."
        " Loads no weights and needs no GPU. Times are estimates by the device's data sheet.",
    )
    parser.add_argument("config", type=Path, help="path of the experiment's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that override the file's")
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100", help="the device (default: h100)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="number of processes (default: 1)")
    parser.add_argument("--exact", action="store_true", help="compute all layers instead of one and two of each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _rehearse(argv: Sequence[str]) -> int:
    options = build_parser().parse_intermixed_args(argv)
    from finetuning.cli.errors import locate_errors
    from finetuning.cli.info import read_experiment
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.data.prepared import count_training_rows
    from finetuning.distributed import ProcessTopology
    from finetuning.plan.plan import make_plan
    from finetuning.report.console import quiet_libraries
    from finetuning.training.rehearsal import DEVICES

    if options.processes < 1:
        raise ConfigError(f"--processes {options.processes}: must be at least 1")
    quiet_libraries()
    document = apply_overrides(read_document(options.config), options.overrides)
    with locate_errors(document):
        experiment = read_experiment(document)
        plan = make_plan(experiment, ProcessTopology(world_size=options.processes))
        rows = count_training_rows(experiment.data_conf, unpaired=False).rows
        plan = plan.with_steps(experiment, rows)
        result = rehearse_run(experiment, plan, DEVICES[options.device], exact=options.exact)
    if options.json:
        print(json.dumps(asdict(result), indent=2))
    else:
        print("\n".join(lines(result)))
    return 0


def rehearse_run(experiment: Experiment, plan: Plan, device: DeviceModel, *, exact: bool = False) -> Rehearsal:
    """Return the rehearsal of a run on a device.

    Raises:
        ConfigError: the method or the weights are not supported.
    """
    from finetuning.training.rehearsal import USABLE_MEMORY, rehearse

    shape = step_shape(experiment, plan)
    costs = {mode: rehearse(experiment, replace(shape, checkpointing=mode), device, exact=exact) for mode in _MODES}
    cost = costs[shape.checkpointing]
    shards = plan.batch.world_size if _is_sharded(experiment) else 1
    peak = {name: size / shards if name in _SHARDED else size for name, size in cost.peak.items()}
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
        fitting_checkpointing=next((mode for mode in _MODES if costs[mode].peak_bytes <= usable + saved), None),
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
    from finetuning.distributed import ProcessTopology
    from finetuning.model.varlen_attention import SDPA_VARLEN
    from finetuning.plan.attention import TORCH_VARLEN
    from finetuning.plan.features import RunContext
    from finetuning.training.rehearsal import StepShape

    method, args = experiment.method_name, experiment.training_args
    if method not in _METHODS:
        raise ConfigError(
            f"{method} cannot be rehearsed, only {' and '.join(_METHODS)}", location=Location(key="method")
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
    return StepShape(
        method=method,
        row_lengths=(length,) * rows,
        num_labels=rows * (length - 1),
        padded=padded,
        checkpointing="full" if args.gradient_checkpointing else "off",
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        weights=getattr(torch, dtype or "float32"),
        attention="sdpa_causal" if padded else flat_attention,
        micro_batches=plan.batch.accumulation,
        optimizer_states=2 if "adam" in args.optim else 1,
        max_labels_at_once=at_once,
        labels_per_chunk=per_chunk,
        fused_loss=for_gpu,
        for_gpu=for_gpu,
    )


def _is_sharded(experiment: Experiment) -> bool:
    args = experiment.training_args
    return bool(args.deepspeed or (args.model_extra or {}).get("fsdp"))


def _largest_micro_batch(
    experiment: Experiment, shape: StepShape, device: DeviceModel, cost: Cost, available: float, *, exact: bool
) -> int:
    """Return how many rows fit: memory is a line in their number, through the planned one and one row more."""
    from finetuning.training.rehearsal import rehearse

    rows = len(shape.row_lengths)
    longer = replace(
        shape,
        row_lengths=(*shape.row_lengths, shape.row_lengths[0]),
        num_labels=shape.num_labels * (rows + 1) // rows,
    )
    per_row = rehearse(experiment, longer, device, exact=exact).peak_bytes - cost.peak_bytes
    return max(rows + math.floor((available - cost.peak_bytes) / per_row), 0) if per_row > 0 else rows


def _dearest(cost: Cost) -> dict[str, float]:
    total = sum(cost.by_operation.values()) or 1.0
    ranked = sorted(cost.by_operation.items(), key=lambda item: -item[1])
    return {name: seconds / total for name, seconds in ranked[:_SHOWN_OPERATIONS]}


def lines(result: Rehearsal) -> list[str]:
    """Return the rehearsal as a table."""
    from finetuning.plan.plan import format_bytes

    peak = sum(result.peak_bytes.values())
    table = [
        ("device", result.device),
        ("micro-batch", f"{result.rows} rows of {result.tokens_per_row:,} tokens"),
        ("peak memory", f"{format_bytes(round(peak))} of {format_bytes(round(result.device_bytes))}"),
        *((f"  {name}", format_bytes(round(size))) for name, size in result.peak_bytes.items()),
        ("fits", "yes" if result.fits else "no"),
        (
            "largest micro-batch",
            f"{result.largest_micro_batch} rows with gradient checkpointing {result.checkpointing}",
        ),
        (
            "checkpointing",
            f"{result.fitting_checkpointing} is the cheapest that fits"
            if result.fitting_checkpointing
            else "the micro-batch does not fit with any",
        ),
        ("time per step", f"about {result.step_seconds:.3g} s"),
        *([("time of the run", _duration(result.step_seconds * result.steps))] if result.steps else []),
        ("FLOPs per step", f"{result.flops_per_step / 1e12:,.1f} TFLOP, MFU {100 * result.mfu:.0f} %"),
        ("dearest operations", ", ".join(f"{name} {100 * s:.0f} %" for name, s in result.dearest_operations.items())),
        ("GPU waits for", "; ".join(result.data_dependent_operations) or "nothing in a step"),
    ]
    width = max(len(name) for name, _ in table)
    return [f"{name:<{width}}  {value}" for name, value in table]


def _duration(seconds: float) -> str:
    """
    >>> _duration(90.0), _duration(9000.0)
    ('about 2 min', 'about 2.5 h')
    """
    return f"about {seconds / 3600:.1f} h" if seconds >= 3600 else f"about {max(round(seconds / 60), 1)} min"
