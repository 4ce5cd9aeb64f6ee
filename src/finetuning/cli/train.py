"""The subcommands that train: check the config, plan, and run."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finetuning.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from finetuning.algorithms.algorithm import Algorithm
    from finetuning.config.sections.experiment import Experiment
    from finetuning.config.sections.training import FinalEvaluation
    from finetuning.config.yaml.document import ConfigDocument
    from finetuning.distributed import ProcessTopology
    from finetuning.plan.plan import Decision, Plan
    from finetuning.tracking.settings import TrackingPlan
    from finetuning.training.output_dir import RunResult

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True)
class _CheckedConfig:
    """A config that was read, checked and planned."""

    document: ConfigDocument
    experiment: Experiment
    algorithm: Algorithm
    topology: ProcessTopology
    tracking: TrackingPlan
    plan: Plan


def train(
    parse_options: Callable[[Sequence[str]], argparse.Namespace],
    argv: Sequence[str],
    callbacks: Sequence[TrainerCallback] = (),
    document: ConfigDocument | None = None,
    on_result: Callable[[RunResult], None] | None = None,
) -> int:
    """Check the config, then train or, with `--dry-run`, print the plan. Return the exit code.

    Args:
        callbacks: of the trainer, in addition to those of the run.
        document: the config, if it is not read from the file that the arguments name.
        on_result: called with how the run ended; not in a dry run.
    """
    options = parse_options(argv)
    _check_options(options)
    checked = _check_config(options, document)
    experiment, algorithm, topology = checked.experiment, checked.algorithm, checked.topology
    from finetuning.cli.errors import locate_errors, report_internal_error, survive_lost_output
    from finetuning.report.console import configure_logging

    survive_lost_output()
    # Before the imports below: the libraries read these settings when they are imported.
    configure_logging(options.logging_level.upper(), is_main=topology.is_main)
    with locate_errors(checked.document):
        evaluation = _final_evaluation(checked)
        if options.dry_run:
            if topology.is_main:
                _dry_run(checked)
            return 0

        with _gc_paused():
            from finetuning.training.final_model import check_save_model_dir, copy_to_save_model_dir
            from finetuning.training.reporter import RunReporter
            from finetuning.training.run import TrainingJob, run_training
            from finetuning.training.signals import finish_despite_signal

            names_checked = not _look_up_modules(checked).text.startswith(_NOT_LOOKED_UP)
        check_save_model_dir(experiment)
        reporter = RunReporter(
            experiment, algorithm.name, topology, checked.tracking, report_error=report_internal_error
        )
        workers = options.num_preprocess_workers
        job = TrainingJob(
            experiment, algorithm, checked.plan, topology, reporter, workers, callbacks, names_checked=names_checked
        )
        result = run_training(job)
        if topology.is_main:
            with finish_despite_signal():
                copy_to_save_model_dir(experiment)
        reporter.print_result(result)
        if evaluation is not None and result.model is not None:
            from finetuning.cli.evaluate import evaluate_final_model

            reporter.release_trainer()
            evaluate_final_model(job.output_dir, evaluation)
    if on_result is not None:
        on_result(result)
    return 0


def _final_evaluation(checked: _CheckedConfig) -> FinalEvaluation | None:
    """Return what the main process evaluates after training. Its rows are read now, so that errors come first."""
    evaluation: FinalEvaluation | None = getattr(checked.experiment, "final_evaluation", None)
    if evaluation is None or not checked.topology.is_main:
        return None
    from finetuning.cli.evaluate import read_scored_rows

    read_scored_rows(evaluation.data, evaluation.score, "final_evaluation.data")
    return evaluation


def _check_config(options: argparse.Namespace, document: ConfigDocument | None) -> _CheckedConfig:
    """Read, check and plan the config, and print its warnings."""
    from finetuning.algorithms import ALGORITHMS
    from finetuning.cli.errors import locate_errors
    from finetuning.config.validation.validate import read_controllers, validate
    from finetuning.config.yaml.document import dotted
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.distributed import find_launch_mistake, has_gpu_driver, read_topology
    from finetuning.plan.attention import replace_unavailable_attention
    from finetuning.plan.plan import make_plan
    from finetuning.tracking.settings import TrackingOptions, resolve_tracking

    algorithm = ALGORITHMS[options.method]
    document = document or read_document(options.config)
    if options.overrides:
        document = apply_overrides(document, options.overrides)
    validated = validate(document, algorithm.experiment)
    experiment, attention_warning = replace_unavailable_attention(validated.experiment)
    attention_location = document.location_of(("run_conf", "model_args", "attn_implementation"))
    read_controllers(experiment.trainer_controller)
    topology = read_topology()
    settings: Sequence[Decision] = ()
    if has_gpu_driver():
        from finetuning.training.device_settings import with_gpu_defaults

        experiment, settings = with_gpu_defaults(experiment, topology)
    tracking = resolve_tracking(
        TrackingOptions(options.mlflow_server_uri, options.experiment_name, options.hf_mlflow_log_artifacts),
        experiment.tracking,
        os.environ,
    )
    location = document.location_of(("batchsize_conf", "total_train_batch_size"))
    with locate_errors(validated.document):
        plan = make_plan(experiment, topology, location=location)
        plan = replace(plan, device_settings=(*settings, *plan.device_settings))
        if has_gpu_driver():
            from finetuning.training.device_settings import with_memory_plan

            experiment, plan = with_memory_plan(experiment, plan)
        elif plan.memory is not None and plan.memory.parameters >= _WORTH_A_PROBE:
            from finetuning.training.device_settings import with_faster_dtype

            experiment, settings = with_faster_dtype(experiment, topology)
            plan = make_plan(experiment, topology, location=location)
            plan = replace(plan, device_settings=(*settings, *plan.device_settings))
    if topology.is_main:
        launch_mistake = find_launch_mistake()
        launch = [Problem(launch_mistake)] if launch_mistake else []
        attention = [Problem(attention_warning, attention_location)] if attention_warning else []
        # What the user of another engine has not written is no reason for a warning.
        defaults = {dotted(path) for path in document.defaults}
        planned = [warning for warning in plan.warnings if warning.location.key not in defaults]
        _print_warnings([*launch, *validated.warnings, *attention, *planned], validated.document)
    return _CheckedConfig(validated.document, experiment, algorithm, topology, tracking, plan)


_WORTH_A_PROBE = 8_000_000
"""Parameters of a model whose faster data type is worth the time of finding it, which is less than a second."""


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


_NOT_LOOKED_UP = "not looked up"


@dataclass(frozen=True)
class _AdapterModules:
    """What a new adapter trains, or why that was not looked up; empty if nothing had to be looked up."""

    text: str = ""
    trained: int | None = None
    """The number of trained parameters; None if they are not counted."""


def _look_up_modules(checked: _CheckedConfig, *, always: bool = False) -> _AdapterModules:
    """Compare the module names of a new adapter with the model, and print a warning for each that matches nothing.

    Args:
        always: by default torch and transformers are imported only if the headers of the checkpoint do not show that
            every name exists.

    Raises:
        ModelError: no target module exists, PEFT rejects the adapter, or a reward model has no class with a score.
        ConfigError: embeddings of new tokens would not be trained.
    """
    from finetuning.config.pretrained_config import find_pretrained_config
    from finetuning.config.sections.model import NewPeft
    from finetuning.plan.memory_estimate import has_adapter_modules

    run_conf, peft_conf = checked.experiment.run_conf, checked.experiment.peft_conf
    if checked.algorithm.has_score_head:
        from finetuning.model.load import check_score_head

        check_score_head(run_conf)
    if not isinstance(peft_conf, NewPeft):
        return _AdapterModules()
    has_modules = has_adapter_modules(checked.experiment)
    has_config = find_pretrained_config(run_conf.model) is not None
    new_ids: list[int] = []
    if checked.algorithm.trainer_adds_adapter and has_config:
        from finetuning.training.setup import find_new_ids

        new_ids = find_new_ids(checked.experiment)
    if has_modules and not new_ids and not always:
        return _AdapterModules()
    if not has_config:
        return _AdapterModules(
            f"{_NOT_LOOKED_UP}: the config of {run_conf.model} is not on this machine; checked after loading"
        )
    from finetuning.model.load import CAUSAL_LM, SEQUENCE_CLASSIFICATION
    from finetuning.model.module_summary import look_up_modules

    head = SEQUENCE_CLASSIFICATION if checked.algorithm.has_score_head else CAUSAL_LM
    lookup = look_up_modules(run_conf, peft_conf, head=head, new_ids=new_ids)
    if new_ids:
        from finetuning.training.preflight import check_new_tokens

        check_new_tokens(lookup.trained_rows, len(new_ids), checked.algorithm)
    if checked.topology.is_main:
        _print_warnings(lookup.warnings, checked.document)
    return _AdapterModules("; ".join(lookup.notes), lookup.trained)


def _print_warnings(warnings: Sequence[Problem], document: ConfigDocument) -> None:
    from finetuning.cli.errors import locate, print_wrapped

    for warning in warnings:
        print_wrapped(f"warning: {locate(warning, document)}", sys.stderr)


def _dry_run(checked: _CheckedConfig) -> None:
    """Check what a run would check before its first step, and print the plan.

    Raises:
        FinetuningError: the run would be refused.
    """
    from finetuning.training.dry_run import check_before_training

    modules = _AdapterModules()

    def check_adapter() -> None:
        nonlocal modules
        modules = _look_up_modules(checked, always=True)

    dry = check_before_training(
        checked.experiment, checked.algorithm, checked.plan, checked.topology, checked.tracking, check_adapter
    )
    _print_warnings(dry.warnings, checked.document)
    _print_plan(checked, modules)
    _print_facts([*dry.facts, ("checked", "; ".join(dry.checked)), *(("not checked", why) for why in dry.not_checked)])
    if dry.is_complete:
        print("The run is complete: its final model is saved, and nothing would be trained.")
    else:
        print("No problem was found in what was checked. Nothing was trained: --dry-run.")


def _print_plan(checked: _CheckedConfig, modules: _AdapterModules) -> None:
    from finetuning.data.prepared import count_training_rows
    from finetuning.plan.plan import Decision

    experiment = checked.experiment
    count = count_training_rows(experiment.data_conf, unpaired=experiment.method_name == "kto")
    plan = checked.plan.with_trainable(modules.trained).with_steps(experiment, count.rows)
    if plan.steps is not None and plan.steps.warning:
        _print_warnings([Problem(plan.steps.warning)], checked.document)
    decisions = [
        *plan.decisions,
        *([Decision("adapter", modules.text, "module names of peft_kwargs")] if modules.text else []),
        Decision("training rows", "unknown" if count.rows is None else f"{count.rows:,}", count.reason),
        Decision("tracking", str(checked.tracking), "command line over file over environment"),
        Decision("output", experiment.training_args.output_dir, "training_args.output_dir"),
    ]
    _print_facts([(decision.name, f"{decision.value}  ({decision.reason})") for decision in decisions])


_LABEL_WIDTH = len("memory per device")


def _print_facts(facts: Sequence[tuple[str, str]]) -> None:
    from finetuning.cli.errors import print_wrapped

    for label, value in facts:
        print_wrapped(f"{label:<{_LABEL_WIDTH}}  {value}", sys.stdout, _LABEL_WIDTH + 2)
