"""The subcommands that train: check the config, plan, and run."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from finetuning.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from finetuning.config.sections.experiment import Experiment
    from finetuning.plan.plan import Plan

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def train(
    parse_options: Callable[[Sequence[str]], argparse.Namespace],
    argv: Sequence[str],
    callbacks: Sequence[TrainerCallback] = (),
) -> int:
    """Check the config, then train or, with `--dry-run`, print the plan. Return the exit code.

    Args:
        callbacks: of the trainer, in addition to those of the run.
    """
    options = parse_options(argv)
    from finetuning.algorithms import ALGORITHMS
    from finetuning.cli.errors import locate_errors
    from finetuning.config.validation.validate import read_controllers, validate
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.distributed import read_topology
    from finetuning.plan.attention import replace_unavailable_attention
    from finetuning.plan.plan import make_plan
    from finetuning.tracking.settings import TrackingOptions, resolve_tracking

    _check_options(options)
    algorithm = ALGORITHMS[options.method]
    document = read_document(options.config)
    if options.overrides:
        document = apply_overrides(document, options.overrides)
    validated = validate(document, algorithm.experiment)
    experiment, attention_warning = replace_unavailable_attention(validated.experiment)
    attention_location = document.location_of(("run_conf", "model_args", "attn_implementation"))
    read_controllers(experiment.trainer_controller)
    topology = read_topology()
    tracking = resolve_tracking(
        TrackingOptions(options.mlflow_server_uri, options.experiment_name, options.hf_mlflow_log_artifacts),
        experiment.tracking,
        os.environ,
    )
    location = document.location_of(("batchsize_conf", "total_train_batch_size"))
    with locate_errors(validated.document):
        plan = make_plan(experiment, topology, location=location)
        if topology.is_main:
            attention = [Problem(attention_warning, attention_location)] if attention_warning else []
            for warning in [*validated.warnings, *attention, *(Problem(text, location) for text in plan.warnings)]:
                print(f"warning: {warning}", file=sys.stderr)
        if options.dry_run:
            if topology.is_main:
                _print_plan(experiment, plan, str(tracking))
            return 0

        from finetuning.report.console import configure_logging

        # Before the imports below: the libraries read these settings when they are imported.
        configure_logging(options.logging_level.upper(), is_main=topology.is_main)

        with _gc_paused():
            from finetuning.training.final_model import check_save_model_dir, copy_to_save_model_dir
            from finetuning.training.reporter import RunReporter
            from finetuning.training.run import TrainingJob, run_training

        check_save_model_dir(experiment)
        reporter = RunReporter(experiment, algorithm.name, topology, tracking)
        workers = options.num_preprocess_workers
        job = TrainingJob(experiment, algorithm, plan, topology, reporter, workers, callbacks)
        result = run_training(job)
        if topology.is_main:
            copy_to_save_model_dir(experiment)
        reporter.print_result(result)
    return 0


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Pause garbage collection in the block, and exclude what is alive at its end from later collections.

    For imports only: they create hundreds of thousands of objects that live as long as the process. Scanning them
    repeatedly takes about a tenth of the CPU time before the first step.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _check_options(options: argparse.Namespace) -> None:
    if options.logging_level.upper() not in LEVELS:
        raise ConfigError(f"--logging-level {options.logging_level}: choose one of {', '.join(LEVELS)}")
    if options.num_preprocess_workers < 1:
        raise ConfigError(f"--num-preprocess-workers {options.num_preprocess_workers}: must be at least 1")


def _print_plan(experiment: Experiment, plan: Plan, tracking: str) -> None:
    from finetuning.data.prepared import count_training_rows
    from finetuning.plan.plan import Decision

    count = count_training_rows(experiment.data_conf, unpaired=experiment.method_name == "kto")
    decisions = [
        *plan.with_steps(experiment, count.rows).decisions,
        Decision("training rows", "unknown" if count.rows is None else f"{count.rows:,}", count.reason),
        Decision("tracking", tracking, "command line over file over environment"),
        Decision("output", experiment.training_args.output_dir, "training_args.output_dir"),
    ]
    width = max(len(decision.name) for decision in decisions)
    for decision in decisions:
        print(f"{decision.name:<{width}}  {decision.value}  ({decision.reason})")
    print("The config is valid. Nothing was trained: --dry-run.")
