"""`finetuning rehearse`: the memory and the time of a run on a device, computed on fake tensors before it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import Parser, run_command
from finetuning.errors import ConfigError

if TYPE_CHECKING:
    from finetuning.training.memory_plan import Rehearsal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    return run_command(_rehearse, argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommand."""
    from finetuning.training.rehearsal import DEVICES

    parser = Parser(
        prog="finetuning rehearse",
        description="Estimate the memory and time of a run on a device: compute one optimizer step of the run's own"
        " model, adapter and loss on fake tensors, for micro-batches of the longest rows that the config allows. Loads"
        " no weights and needs no GPU. Times are estimated from the device's data sheet.",
    )
    parser.add_argument("config", type=Path, help="path of the experiment's YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="values that override the file's"
    )
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100", help="the device (default: h100)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="number of processes (default: 1)")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="compute all layers instead of extrapolating from one and two of each kind",
    )
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
    from finetuning.training.memory_plan import rehearse_run
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
