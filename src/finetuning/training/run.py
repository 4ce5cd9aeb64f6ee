"""A run, from the experiment to the tuned model: the file to read first.

What a run says, to people and in its record, of its rows, its model and its memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import Algorithm, TrainingParts
from finetuning.config.sections.experiment import Experiment
from finetuning.distributed import ProcessTopology, read_job_end_time
from finetuning.errors import FinetuningError, GuardStopped, Interrupted
from finetuning.plan.plan import Plan, make_plan
from finetuning.report.run_folder import CONFIG_NAME, read_run_record
from finetuning.training.output_dir import (
    RunRecord,
    check_free_space,
    check_output_dir,
    lock_output_dir,
)
from finetuning.training.preflight import check_positions
from finetuning.training.process_sync import destroy_process_group
from finetuning.training.resume.config_changes import ResumeTerms, compare_with_checkpoint
from finetuning.training.resume.find import ResumePoint, find_resume_point

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from finetuning.data.prepared import PreparedData
    from finetuning.model.tokenizer import LoadedTokenizer
    from finetuning.training.final_model import FinalModel
    from finetuning.training.reporter import RunReporter
    from finetuning.training.setup import LoadedModel
    from finetuning.training.signals import StopOnSignal


def run_inputs(
    experiment: Experiment, plan: Plan, data: PreparedData, prepared: LoadedModel, resume: ResumePoint
) -> dict[str, Any]:
    """What the record says before the first step."""
    return {
        "plan": plan.as_dict(),
        "data": data_record(data),
        "model": {
            "name": experiment.run_conf.model,
            "fingerprint": str(prepared.fingerprint) if prepared.fingerprint else None,
            "notes": list(prepared.notes),
            "layout": str(prepared.layout),
        },
        "resumed_from": str(resume.checkpoint) if resume.checkpoint else None,
    }


def data_record(data: PreparedData) -> dict[str, Any]:
    """The rows for the record, as far as they are known by now."""
    return {"fingerprint": data.fingerprint.digest, "rows": data.rows, "statistics": data.statistics.report()}


def log_model_summary(
    job: TrainingJob, plan: Plan, data: PreparedData, prepared: LoadedModel, terms: ResumeTerms
) -> None:
    """Says what is trained, in which numbers, how rows lie in a batch, and what a resumed run does otherwise."""
    from finetuning.training.preflight import compute_precision

    for note in terms.notes:
        job.observer.told("resumed with", note)
    if beyond := check_positions(prepared.model, job.experiment, data):
        job.observer.told("longest row", "beyond what the model was made for", warnings=beyond)
    job.observer.told("precision", *compute_precision(job.experiment, prepared.model))
    for note in (*prepared.notes, f"rows in a batch: {prepared.layout}"):
        label, _, value = note.partition(": ") if ": " in note else ("", "", note)
        job.observer.told(label, value)
    if job.method.lays_end_to_end and data.rows is not None:
        from finetuning.data.statistics import padding_stats

        longest = job.experiment.sft_args.max_seq_length
        job.observer.told("tokens", str(padding_stats(data.train, longest, plan.batch.per_device)))


def log_memory(trainer: Trainer, plan: Plan, observer: RunReporter) -> dict[str, Any]:
    """What the run took of memory, beside its estimate, and what had to be divided on the way."""
    from finetuning.training.memory_check import gather_oom_retries, measure_memory, memory_summary

    values = measure_memory(plan.memory, trainer.args.device) | {"oom_retries": gather_oom_retries(trainer)}
    observer.found("memory", memory_summary(values))
    for division in values["oom_retries"]:
        observer.found("memory", division)
    return values


ALREADY_COMPLETE = "already complete"


@dataclass(frozen=True)
class TrainingJob:
    """What runs, where, and who is told: fixed from the first step of the road to the last."""

    experiment: Experiment
    method: Algorithm
    topology: ProcessTopology
    observer: RunReporter
    workers: int
    resolved_config: str
    """The experiment as YAML, defaults included."""

    @property
    def output_dir(self) -> Path:
        return Path(self.experiment.training_args.output_dir)


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and what it made; nothing when it was complete before, and on processes but the main one."""

    status: str
    artifact: FinalModel | None = None
    steps: int = 0
    final_loss: float | None = None
    training_s: float | None = None
    """Seconds of the training loop."""


def run(job: TrainingJob) -> RunResult:
    """Trains and publishes the tuned model. The output directory is claimed, and its record is true, throughout.

    Raises:
        GuardStopped: a value was not finite, or a proof failed.
        Interrupted: a signal came; a checkpoint was saved.
        FinetuningError: anything else that the user can mend.
    """
    if check_output_dir(job.experiment):
        _close_record(job)
        return RunResult(ALREADY_COMPLETE)
    if not job.topology.is_main:
        return _run_with_record(job)
    with lock_output_dir(job.output_dir):
        check_free_space(job.output_dir, job.experiment)
        (job.output_dir / CONFIG_NAME).write_text(job.resolved_config, encoding="utf-8")
        return _run_with_record(job)


def _close_record(job: TrainingJob) -> None:
    """Says of a run that has published its tuned model, and was killed before it could say so, that it is complete."""
    if not job.topology.is_main or (read_run_record(job.output_dir) or {}).get("status") == "completed":
        return
    from finetuning.callbacks.checkpoint_upload import make_uploader, wait_for_uploads

    final = job.output_dir / job.experiment.run_conf.final_checkpoint_name
    with lock_output_dir(job.output_dir):
        copies = make_uploader(job.experiment.run_conf.copy_checkpoints_to, is_main=True)
        with wait_for_uploads(copies, lambda: False):
            if copies:
                copies.add_last(final)
        RunRecord(job.output_dir, job.method.name, writes=True).finish("completed", error=None, found=str(final))


def _run_with_record(job: TrainingJob) -> RunResult:
    """The road, with its end written into the record however it ends."""
    record = RunRecord(job.output_dir, job.method.name, writes=job.topology.is_main)
    try:
        result = _run_pipeline(job, record)
    except BaseException as error:
        status = (
            "interrupted"
            if isinstance(error, Interrupted | KeyboardInterrupt)
            else "stopped by a guard"
            if isinstance(error, GuardStopped)
            else "failed"
        )
        told = str(error) if isinstance(error, FinetuningError) else repr(error)
        record.finish(status, error=told, **job.observer.measured(error))
        job.observer.close(status)
        raise
    measured = job.observer.measured(None)
    record.finish(result.status, error=None, tracker_errors=job.observer.failures, **measured)
    job.observer.close(result.status)
    destroy_process_group(job.topology.world_size)
    return result


@dataclass(frozen=True)
class _Start:
    """What stands before the model is loaded."""

    tokenizer: LoadedTokenizer
    data: PreparedData
    plan: Plan
    arguments: TrainingArguments
    resume: ResumePoint
    terms: ResumeTerms


def _start(job: TrainingJob) -> _Start:
    from finetuning.training.arguments import build_arguments
    from finetuning.training.preflight import check_device
    from finetuning.training.setup import load_tokenizer, prepare

    experiment, observer = job.experiment, job.observer
    check_device(experiment)
    resume = find_resume_point(job.output_dir, experiment.run_conf.resume_from_checkpoint)
    observer.resuming(resume)

    tokenizer = load_tokenizer(experiment)
    observer.told("tokenizer", str(tokenizer), warnings=tokenizer.warnings)
    with observer.stage("data_preparation"):
        data = prepare(experiment, job.method, tokenizer, job.workers)
    observer.prepared(data)

    plan = make_plan(experiment, job.topology, rows=data.rows)
    arguments = build_arguments(experiment, plan, job.method.arguments)
    observer.planned(plan, arguments)
    return _Start(tokenizer, data, plan, arguments, *_sync_resume_point(job, plan, data, resume))


def _run_pipeline(job: TrainingJob, record: RunRecord) -> RunResult:
    with _infrequent_gc():
        from finetuning.callbacks.checkpoint_upload import make_uploader, wait_for_uploads
        from finetuning.training.memory_check import check_memory_at_start
        from finetuning.training.resume.stream_state import attach_stream_state
        from finetuning.training.setup import end_of_turn, load_model
        from finetuning.training.signals import StopOnSignal

        start = _start(job)
    experiment, observer = job.experiment, job.observer
    tokenizer, data, plan, arguments = start.tokenizer, start.data, start.plan, start.arguments
    resume, terms = start.resume, start.terms
    _seed(arguments.seed, experiment.run_conf.determinism)

    with observer.stage("model_initialization"):
        prepared = load_model(
            experiment, job.method, tokenizer, arguments, job.topology, job.output_dir, total_steps=plan.steps.total
        )
    log_model_summary(job, plan, data, prepared, terms)
    record.update(**run_inputs(experiment, plan, data, prepared, resume))
    ending = end_of_turn(experiment, tokenizer)
    stop = StopOnSignal(job.output_dir, most_time=experiment.run_conf.max_time, ends_at=read_job_end_time())
    address = experiment.run_conf.copy_checkpoints_to
    uploader = make_uploader(address, job.topology.is_main) if address else None
    trainer = _build_trainer(job, arguments, data, tokenizer, prepared, ending, [stop, *filter(None, [uploader])])
    terms.bind(trainer)
    attach_stream_state(trainer, data, plan.batch.total, job.output_dir, resume.checkpoint)
    check_memory_at_start(trainer, experiment)
    observer.watch(trainer)
    initial = prepared.initial or _digests(trainer.model)
    record.update(completed_training=True)
    with wait_for_uploads(uploader, lambda: bool(stop.received)) if uploader else nullcontext():
        seconds = _train(trainer, stop, resume, experiment.run_conf.name_hung_after)
        record.update(memory=log_memory(trainer, plan, observer), data=data_record(data))
        artifact = _publish(job, trainer, tokenizer, prepared, ending, initial)
        if artifact is not None:
            record.update(artifact=artifact.as_dict())
            observer.published(artifact)
            if uploader:
                uploader.add_last(Path(artifact.folder))
    if uploader:
        observer.found("copied", uploader.summary())
        record.update(uploaded_checkpoints=uploader.uploaded, upload_errors=uploader.errors)
    return RunResult("completed", artifact, trainer.state.global_step, _last_loss(trainer), seconds)


@contextmanager
def _infrequent_gc() -> Iterator[None]:
    """Collect garbage rarely in the block, and exclude what is alive at its end from later collections.

    Imports create hundreds of thousands of objects that live as long as the process. Scanning them repeatedly takes
    a fifth of the CPU time before the first step. A model must not be loaded in the block: it could never be freed.
    """
    before = gc.get_threshold()
    gc.set_threshold(1_000_000, *before[1:])
    try:
        yield
        gc.freeze()
    finally:
        gc.set_threshold(*before)


def _sync_resume_point(
    job: TrainingJob, plan: Plan, data: PreparedData, resume: ResumePoint
) -> tuple[ResumePoint, ResumeTerms]:
    """Where all processes of the job go on from, and on what terms."""
    from finetuning.training.process_sync import sync_resume_point

    resume = sync_resume_point(job.output_dir, resume, job.topology.world_size)
    return resume, compare_with_checkpoint(job.experiment, plan, data.fingerprint, resume.checkpoint)


def _build_trainer(
    job: TrainingJob,
    arguments: TrainingArguments,
    data: PreparedData,
    tokenizer: LoadedTokenizer,
    prepared: LoadedModel,
    ending: str | None,
    callbacks: list[TrainerCallback],
) -> Trainer:
    trainer = job.method.build_trainer(
        TrainingParts(
            experiment=job.experiment,
            arguments=arguments,
            data=data,
            tokenizer=tokenizer,
            model=prepared.model,
            peft_config=prepared.peft_config,
            load_reference=prepared.load_reference,
            layout=prepared.layout,
            callbacks=[*callbacks, *job.observer.callbacks()],
            end_of_turn=ending,
        )
    )
    trainer.loraplus_lr_ratio = job.experiment.overrides.loraplus_lr_ratio
    return trainer


def _train(trainer: Trainer, stop: StopOnSignal, resume: ResumePoint, hung_after_s: float) -> float | None:
    """Seconds of the training loop, gone through to its end.

    Raises:
        Interrupted: a signal came before the last step; a checkpoint of that step was saved.
    """
    from finetuning.training.process_sync import watch_heartbeats

    with stop.watching(), watch_heartbeats(trainer, Path(trainer.args.output_dir), hung_after_s):
        output = trainer.train(resume_from_checkpoint=str(resume.checkpoint) if resume.checkpoint else None)
    step = trainer.state.global_step
    if stop.received and step < trainer.state.max_steps:
        is_saved = Path(trainer.args.output_dir, f"checkpoint-{step}").is_dir()
        saved = f"checkpoint-{step} is saved" if is_saved else "no checkpoint of it could be saved"
        raise Interrupted(
            f"{stop.reason} at step {step}: {saved}; the same command with run_conf.resume_from_checkpoint: auto goes"
            f" on from {'it' if is_saved else 'the newest whole one'}",
            stop.received,
        )
    return output.metrics.get("train_runtime")


def _publish(
    job: TrainingJob,
    trainer: Trainer,
    tokenizer: LoadedTokenizer,
    prepared: LoadedModel,
    ending: str | None,
    initial: dict[str, str],
) -> FinalModel | None:
    from finetuning.training.final_model import publish_final

    with job.observer.stage("model_publication"):
        return publish_final(
            trainer,
            tokenizer.tokenizer,
            job.output_dir / job.experiment.run_conf.final_checkpoint_name,
            end_of_turn=ending,
            base_fingerprint=prepared.fingerprint,
            initial=initial,
            vocabulary=prepared.vocabulary,
        )


def _last_loss(trainer: Trainer) -> float | None:
    """The loss of the last log; that of the whole run would be pulled up by its first steps."""
    return next((entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry), None)


def _seed(seed: int, determinism: str) -> None:
    import torch
    import transformers

    if determinism == "full":
        transformers.enable_full_determinism(seed)
        return
    transformers.set_seed(seed)
    if determinism == "half":
        torch.use_deterministic_algorithms(True, warn_only=True)


def _digests(model: object) -> dict[str, str]:
    """Digests of an adapter that the trainer has put on; none for a model without."""
    from finetuning.model.peft.adapter_files import adapter_digests
    from finetuning.model.save import is_peft_model

    return adapter_digests(model) if is_peft_model(model) else {}
