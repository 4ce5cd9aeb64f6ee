"""A dry run: what a run reads before its first step, checked by the functions of the run itself, without weights."""

from __future__ import annotations

import copy
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from finetuning.config.sections.data import Concatenation, DataConfig, NoData
from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import NewPeft, PretrainedPeft
from finetuning.data.mixing import used_datasets
from finetuning.data.open_dataset import unparsed_rows
from finetuning.data.prepared import check_first_rows
from finetuning.errors import FinetuningError, Location, ModelError, Problem, first_line
from finetuning.training import preflight
from finetuning.training.final_model import check_hub_login, check_save_model_dir
from finetuning.training.output_dir import check_free_space, check_not_in_use, existing_parent, is_complete
from finetuning.training.resume.config_changes import compare_with_checkpoint
from finetuning.training.resume.find import ResumePoint, check_sharding, find_resume_point
from finetuning.training.setup import build_arguments, load_tokenizer, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from finetuning.algorithms.algorithm import Algorithm
    from finetuning.data.prepared import PreparedData
    from finetuning.distributed import ProcessTopology
    from finetuning.model.tokenizer import LoadedTokenizer
    from finetuning.plan.plan import Plan
    from finetuning.tracking.settings import TrackingPlan

MAX_ROWS = 200
"""Rows that are read of each dataset. Data that has no more is checked as a whole."""
_CONNECT_S = 2.0
_ROW_KINDS = {"sft": "sft", "kto": "unpaired", "grpo": "prompt"}
"""The kind of rows of each method; of the others `preference`."""
# Optimizers that hook into the modules of the model, or take its class into account.
_NEEDS_MODEL = ("galore", "apollo", "lomo", "layerwise", "adalomo")
_ALWAYS_UNCHECKED = (
    "whether the weights fit the config of the model, and the device memory",
    "how the model attends: causality and the isolation of rows are verified on its logits",
)


@dataclass
class DryRun:
    """What was checked, what could not be, and what is wrong."""

    checked: list[str] = field(default_factory=list[str])
    not_checked: list[str] = field(default_factory=list[str])
    facts: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Label and value of what was read."""
    warnings: list[Problem] = field(default_factory=list[Problem])
    is_complete: bool = False
    """Whether the output directory has the final model of this very run, so that nothing would be trained."""
    _errors: list[FinetuningError] = field(default_factory=list[FinetuningError])

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Collect the error of the block. An error of the network is no error of the config: it is not checked then."""
        try:
            yield
        except FinetuningError as error:
            if error.is_unreachable:
                problem = error.problems[0]
                self.not_checked.append(f"{name}: {Problem(problem.message, hint=problem.hint)}")
            else:
                self._errors.append(error)
        else:
            self.checked.append(name)

    @property
    def has_errors(self) -> bool:
        return bool(self._errors)

    def raise_errors(self) -> None:
        """Raise the first error, with the problems of all of them, if there was one."""
        if self._errors:
            first = self._errors[0]
            first.problems = tuple(dict.fromkeys(problem for error in self._errors for problem in error.problems))
            raise first


def check_before_training(
    experiment: Experiment,
    algorithm: Algorithm,
    plan: Plan,
    topology: ProcessTopology,
    tracking: TrackingPlan,
    check_adapter: Callable[[], object],
) -> DryRun:
    """Check everything that a run would be refused for before its first step, as far as no weights are needed.

    Args:
        plan: without the number of steps.
        check_adapter: looks up the modules of a new adapter, on the model without its weights.

    Raises:
        FinetuningError: the class of the first error, with all problems.
    """
    dry = DryRun(not_checked=list(_ALWAYS_UNCHECKED))
    resume = _check_output(dry, experiment, plan, topology)
    with dry.check("device"):
        preflight.check_device(experiment)
    if experiment.run_conf.trainer_mixin is not None:
        with dry.check("trainer mixin"):
            preflight.check_trainer_mixin(experiment)
    if (experiment.training_args.model_extra or {}).get("push_to_hub"):
        with dry.check("login to the Hub"):
            check_hub_login(experiment)
    arguments = _check_arguments(dry, experiment, plan)
    model, has_class = _check_model(dry, experiment, algorithm, topology)
    tokenizer, data, is_whole = _check_rows(dry, experiment, algorithm)
    if data is not None and model is not None:
        with dry.check("longest row"):
            dry.warnings += map(Problem, preflight.check_positions(model, experiment, data))
    if data is not None and is_whole and data.rows is not None:
        _check_with_rows(dry, experiment, algorithm, plan.with_steps(experiment, data.rows), arguments, data, resume)
    if isinstance(experiment.peft_conf, NewPeft) and has_class:
        with dry.check("adapter"):
            check_adapter()
    if isinstance(experiment.peft_conf, PretrainedPeft) and model is not None and tokenizer is not None:
        _check_saved_adapter(dry, experiment.peft_conf, model, tokenizer)
    _check_reporting(dry, experiment, topology, tracking)
    dry.raise_errors()
    return dry


def _check_output(dry: DryRun, experiment: Experiment, plan: Plan, topology: ProcessTopology) -> ResumePoint | None:
    """Check the folders that a run writes, and return the checkpoint that it would resume from."""
    output_dir, resume = Path(experiment.training_args.output_dir), None
    with dry.check("output directory"):
        check_save_model_dir(experiment)
        dry.is_complete = is_complete(experiment)
        check_not_in_use(output_dir)
    if plan.memory is None:
        dry.not_checked.append("free disk space: the size of the model is not known")
    else:
        with dry.check("free disk space"):
            check_free_space(experiment, plan.memory)
    if str(experiment.run_conf.resume_from_checkpoint).lower() != "false":
        with dry.check("checkpoint to resume from"):
            resume = find_resume_point(output_dir, experiment.run_conf.resume_from_checkpoint)
            if resume.checkpoint:
                # A dry run of a job's config without its launcher does not know how the job shards.
                if topology.is_distributed or topology.sharded_by:
                    check_sharding(resume.checkpoint, experiment, topology)
                dry.facts.append(("resumes from", str(resume.checkpoint)))
                dry.not_checked.append("whether the weights and states of the checkpoint load")
            dry.warnings += map(Problem, resume.notes)
    return resume


def _check_arguments(dry: DryRun, experiment: Experiment, plan: Plan) -> TrainingArguments | None:
    """Build the arguments of the trainer, and its optimizer and schedule on a model of one weight."""
    if plan.batch.world_size > 1:
        dry.not_checked.append("training arguments, optimizer and schedule: building them connects the processes")
        return None
    arguments = None
    with dry.check("training arguments"):
        arguments = build_arguments(experiment, plan)
    if arguments is None:
        return None
    args = experiment.training_args
    is_sharded = args.deepspeed or (args.model_extra or {}).get("fsdp") or preflight.fsdp_needs_gpus()
    if is_sharded or any(name in args.optim for name in _NEEDS_MODEL):
        dry.not_checked.append("optimizer and schedule: they are made of the model")
        return arguments
    with dry.check("optimizer and schedule"):
        _build_optimizer(arguments)
    return arguments


def _build_optimizer(arguments: TrainingArguments) -> None:
    import torch
    from transformers import Trainer

    from finetuning.trainer.mixin import TrainingLoopMixin

    class OptimizerCheck(TrainingLoopMixin, Trainer):
        """Makes the optimizer and the schedule, with the errors of a run."""

    arguments = copy.copy(arguments)
    arguments.use_liger_kernel, arguments.eval_strategy, arguments.label_smoothing_factor = False, "no", 0.0
    # The Trainer creates its output directory.
    with tempfile.TemporaryDirectory() as arguments.output_dir:
        trainer: Any = OptimizerCheck(model=torch.nn.Linear(1, 1), args=arguments)
        trainer.create_optimizer_and_scheduler(num_training_steps=max(arguments.max_steps, 100))


def _check_model(
    dry: DryRun, experiment: Experiment, algorithm: Algorithm, topology: ProcessTopology
) -> tuple[PreTrainedModel | None, bool]:
    """Check the files of the model. Return it without weights, and whether its modules can be looked up."""
    from finetuning.model.load import CAUSAL_LM, SEQUENCE_CLASSIFICATION, check_score_head, loading_arguments
    from finetuning.model.module_summary import build_on_meta

    head = SEQUENCE_CLASSIFICATION if algorithm.has_score_head else CAUSAL_LM
    run_conf, source = experiment.run_conf, None
    with dry.check("model files"):
        if algorithm.has_score_head:
            check_score_head(run_conf)
        source, _ = loading_arguments(
            run_conf, experiment.quant_conf, topology=topology, sharded_by=topology.sharded_by, head=head
        )
    if source is None:
        return None, dry.has_errors
    try:
        return build_on_meta(source, run_conf.model_args, head), True
    except ModelError as error:
        dry.not_checked.append(f"adapter and longest row: {error.problems[0].message}")
        return None, False


def _check_rows(
    dry: DryRun, experiment: Experiment, algorithm: Algorithm
) -> tuple[LoadedTokenizer | None, PreparedData | None, bool]:
    """Take the first rows through format, template and mask. Return the tokenizer, the rows, and whether they are all.

    Streams are read as in the run: up to the first block.
    """
    tokenizer, data, is_whole = None, None, False
    with dry.check("tokenizer and chat template"):
        tokenizer = load_tokenizer(experiment)
        dry.facts.append(("tokenizer", str(tokenizer)))
        dry.warnings += map(Problem, tokenizer.warnings)
    if tokenizer is None:
        kind = _ROW_KINDS.get(algorithm.name, "preference")
        with dry.check("the format of the first rows"):
            check_first_rows(experiment.data_conf, kind, getattr(experiment, "sft_args", None))
        return None, None, False
    with dry.check("rows"):
        is_whole = bool(experiment.data_conf.prepared) or not _has_more_rows(experiment.data_conf)
        conf = experiment.data_conf if is_whole or experiment.data_conf.streaming else _head_of(experiment.data_conf)
        conf = conf.model_copy(update={"cache": "off"})
        data = prepare(experiment.model_copy(update={"data_conf": conf}), algorithm, tokenizer, 1)
        lines = data.statistics.lines()
        dry.facts += [("rows read" if number == 0 else "", line.strip()) for number, line in enumerate(lines)]
    if data is not None:
        dry.checked[-1] = "all rows" if is_whole else f"the first {MAX_ROWS} rows of each dataset"
        if not is_whole:
            dry.not_checked.append(f"the rows after the first {MAX_ROWS} of a dataset, and how many are left of them")
    return tokenizer, data, is_whole


def _has_more_rows(conf: DataConfig) -> bool:
    """Return whether a dataset has more rows than are read of it."""
    if conf.streaming:
        return True
    sources = used_datasets(conf.training_data, "data_conf.training_data")
    if isinstance(conf.validation_data, Concatenation):
        sources += used_datasets(conf.validation_data, "data_conf.validation_data")
    return any(sum(1 for _ in islice(unparsed_rows(source, key), MAX_ROWS + 1)) > MAX_ROWS for key, source in sources)


def _head_of(conf: DataConfig) -> DataConfig:
    """Return the config of the first rows of each dataset, whose losses say nothing about those of the whole."""

    def head(data: Any) -> Any:
        sources = [
            source.model_copy(update={"max_rows": min(source.max_rows or MAX_ROWS, MAX_ROWS)})
            for source in data.datasets
        ]
        return data.model_copy(update={"datasets": sources})

    validation = conf.validation_data
    update = {
        "training_data": head(conf.training_data),
        "validation_data": head(validation) if isinstance(validation, Concatenation) else NoData(type="NONE"),
        "max_lost_fraction": 1.0,
    }
    return conf.model_copy(update=update)


def _check_with_rows(
    dry: DryRun,
    experiment: Experiment,
    algorithm: Algorithm,
    plan: Plan,
    arguments: Any,
    data: PreparedData,
    resume: ResumePoint | None,
) -> None:
    """Check what depends on all rows: the prompts of a batch, and the checkpoint to resume from."""
    from finetuning.model.fingerprint import can_fingerprint, compute_fingerprint

    if algorithm.name == "grpo" and arguments is not None:
        from finetuning.algorithms.grpo import check_num_prompts

        with dry.check("prompts of a batch"):
            check_num_prompts(data.rows or 0, arguments.generation_batch_size // arguments.num_generations)
    if resume is not None and resume.checkpoint is not None:
        with dry.check("changes since the checkpoint"):
            folder = Path(experiment.run_conf.model)
            base = compute_fingerprint(folder) if can_fingerprint(folder) else None
            resume_terms = compare_with_checkpoint(experiment, plan, data.fingerprint, base, resume.checkpoint)
            dry.facts += [("resumed with", note) for note in resume_terms.notes]


def _check_saved_adapter(dry: DryRun, conf: PretrainedPeft, model: PreTrainedModel, tokenizer: LoadedTokenizer) -> None:
    from finetuning.model.peft.adapter_files import check_adapter_base
    from finetuning.model.peft.adapters import find_adapter

    with dry.check("saved adapter"):
        source = find_adapter(conf, len(tokenizer.new_tokens))
        if source.folder is not None:
            check_adapter_base(model, source.folder, Location(key="peft_conf.name_or_path"))


def _check_reporting(dry: DryRun, experiment: Experiment, topology: ProcessTopology, tracking: TrackingPlan) -> None:
    """Check controllers and the addresses that a run writes to. A tracker that does not answer is a warning."""
    from finetuning.training.reporter import ControllerCallbacks

    with dry.check("controllers and guard"):
        ControllerCallbacks(experiment).callbacks()
    if getattr(experiment.telemetry, "otlp", None) is not None:
        from finetuning.telemetry.exporters import require_otlp

        with dry.check("exporter of telemetry"):
            require_otlp()
    address = experiment.run_conf.copy_checkpoints_to
    if address is not None:
        from finetuning.callbacks.checkpoint_upload import check_address

        with dry.check("upload address"):
            check_address(address)
    if tracking.enabled and topology.is_main:
        problem = _tracker_problem(str(tracking.uri.value))
        if problem is None:
            dry.checked.append("tracker address")
        else:
            dry.warnings.append(
                Problem(f"MLflow: {problem}. The run continues and keeps its metrics for `finetuning sync`")
            )


def _tracker_problem(uri: str) -> str | None:
    """Return why MLflow's address cannot be used now; None if it can, or is of a kind that is not looked at."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            with socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_S):
                return None
        except OSError as error:
            return f"{parts.hostname}:{port} does not answer ({first_line(error)})"
    if parts.scheme in ("file", "sqlite"):
        path = Path(unquote(parts.path).replace("//", "/", 1))
        folder = existing_parent(path if parts.scheme == "file" else path.parent)
        return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} is not writable"
    return None
