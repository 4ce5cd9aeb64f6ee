"""The verbs that train: check, plan, run, tell."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from finetuning.errors import ConfigError, Problem

if TYPE_CHECKING:
    from finetuning.algorithms import Algorithm
    from finetuning.config.sections.experiment import Experiment
    from finetuning.distributed import ProcessTopology
    from finetuning.tracking.settings import TrackingPlan

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def train(options: argparse.Namespace) -> int:
    """Runs what the command line asks for; returns the exit code."""
    from finetuning.algorithms import METHODS
    from finetuning.cli.errors import locate_errors
    from finetuning.config.validation.validate import read_controllers, validate
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.distributed import read_topology
    from finetuning.plan.plan import make_plan
    from finetuning.tracking.settings import TrackingOptions, resolve_tracking

    if options.logging_level.upper() not in LEVELS:
        raise ConfigError(f"--logging-level {options.logging_level}: choose one of {', '.join(LEVELS)}")
    if options.num_preprocess_workers < 1:
        raise ConfigError(f"--num-preprocess-workers {options.num_preprocess_workers}: must be at least 1")
    method = METHODS[options.method]
    document = apply_overrides(read_document(options.config), options.overrides)
    validated = validate(document, method.experiment)
    experiment = validated.experiment
    read_controllers(experiment.trainer_controller)
    topology = read_topology()
    tracking = resolve_tracking(
        TrackingOptions(options.mlflow_server_uri, options.experiment_name, options.hf_mlflow_log_artifacts),
        experiment.tracking,
        os.environ,
    )
    place = document.location_of(("batchsize_conf", "total_train_batch_size"))
    with locate_errors(validated.document):
        plan = make_plan(experiment, topology, place=place)
    warnings = [*validated.warnings, *(Problem(text, place) for text in plan.warnings)]
    if topology.is_main:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    with locate_errors(validated.document):
        if not options.dry_run:
            return _run(experiment, method, options, topology, tracking)
        if topology.is_main:
            _show_plan(experiment, topology, str(tracking))
        return 0


def _show_plan(experiment: Experiment, topology: ProcessTopology, tracking: str) -> None:
    from finetuning.data.prepared import count_training_rows
    from finetuning.plan.plan import Decision, make_plan

    count = count_training_rows(experiment.data_conf, unpaired=experiment.method_name == "kto")
    plan = make_plan(experiment, topology, rows=count.rows)
    decisions = [
        *plan.decisions,
        Decision("training rows", "unknown" if count.rows is None else f"{count.rows:,}", count.reason),
        Decision("tracking", tracking, "command line over file over environment"),
        Decision("output", experiment.training_args.output_dir, "training_args.output_dir"),
    ]
    width = max(len(decision.name) for decision in decisions)
    for decision in decisions:
        print(f"{decision.name:<{width}}  {decision.value}  ({decision.reason})")
    print("The config is right. Nothing was trained: --dry-run.")


def _run(
    experiment: Experiment,
    method: Algorithm,
    options: argparse.Namespace,
    topology: ProcessTopology,
    tracking: TrackingPlan,
) -> int:
    from finetuning.config.yaml.dump import dump_yaml
    from finetuning.report.console import configure_logging
    from finetuning.training.final_model import check_save_model_dir, copy_to_save_model_dir
    from finetuning.training.reporter import RunReporter
    from finetuning.training.run import TrainingJob, run

    check_save_model_dir(experiment)
    configure_logging(options.logging_level.upper(), is_main=topology.is_main)
    observer = RunReporter(experiment, method.name, topology, tracking)
    result = run(
        TrainingJob(
            experiment=experiment,
            method=method,
            topology=topology,
            observer=observer,
            workers=options.num_preprocess_workers,
            resolved_config=dump_yaml(experiment),
        )
    )
    if topology.is_main:
        copy_to_save_model_dir(experiment)
    observer.closing(result.status, result.steps, result.final_loss, result.training_s)
    return 0
