"""A run as a pipeline, from the experiment to the final model. Start reading here.

Each step takes the values of earlier steps and returns a value of its own. What a run reports, to people, to trackers
and into its record, is up to `RunReporter`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.algorithms.algorithm import Algorithm
from finetuning.config.sections.experiment import Experiment
from finetuning.config.yaml.dump import dump_yaml
from finetuning.distributed import ProcessTopology, read_job_end_time, set_torchrun_variables
from finetuning.errors import FinetuningError
from finetuning.plan.plan import Plan
from finetuning.report.run_folder import CONFIG_NAME, final_losses, read_run_record, series_of_history
from finetuning.training.final_model import check_hub_login, initial_weights, push_to_hub, save_final_model
from finetuning.training.output_dir import (
    RunRecord,
    RunResult,
    check_free_space,
    is_complete,
    lock_output_dir,
    move_earlier_run,
    status_of,
)
from finetuning.training.preflight import check_device, check_trainer_mixin
from finetuning.training.resume.config_changes import compare_with_checkpoint
from finetuning.training.resume.find import ResumePoint, check_sharding, find_resume_point
from finetuning.training.setup import build_arguments, build_trainer, load_model, load_tokenizer, prepare
from finetuning.training.signals import StopOnSignal

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from finetuning.data.prepared import PreparedData
    from finetuning.model.fingerprint import Fingerprint
    from finetuning.training.reporter import RunReporter
    from finetuning.training.setup import LoadedModel


@dataclass(frozen=True)
class TrainingJob:
    """What to run, where, and who reports it."""

    experiment: Experiment
    algorithm: Algorithm
    plan: Plan
    """Without the number of steps, which needs the number of rows."""
    topology: ProcessTopology
    reporter: RunReporter
    workers: int
    """Processes that prepare the data."""
    callbacks: Sequence[TrainerCallback] = ()
    """Callbacks of the trainer in addition to those of the run."""
    names_checked: bool = False
    """Whether the module names of the adapter were compared with the model before loading."""

    @property
    def output_dir(self) -> Path:
        return Path(self.experiment.training_args.output_dir)

    @property
    def final_folder(self) -> Path:
        return self.output_dir / self.experiment.run_conf.final_checkpoint_name


def run_training(job: TrainingJob) -> RunResult:
    """Train, and save the final model. The output directory is locked, and its record current, until the end.

    Raises:
        GuardStopped: a value was not finite, or a verification failed.
        Interrupted: the run was stopped by a signal; a checkpoint was saved.
        FinetuningError: anything else that the user can fix.
    """
    if is_complete(job.experiment):
        _complete_record(job)
        return RunResult("already complete")
    check_trainer_mixin(job.experiment)
    if job.topology.is_distributed:
        set_torchrun_variables(job.topology)
    with _lock(job):
        if job.topology.is_main:
            check_free_space(job.experiment, job.plan.memory)
            (job.output_dir / CONFIG_NAME).write_text(dump_yaml(job.experiment), encoding="utf-8")
        record = RunRecord(job.output_dir, job.algorithm.name, writes=job.topology.is_main)
        with ExitStack() as signals, _record_end(job, record):
            result = _run_pipeline(job, record, signals)
        if result.model is not None:
            # Last: the model has its card, and the run is complete whatever becomes of the upload.
            address, error = push_to_hub(job.experiment, result.model)
            if address or error:
                record.update(hub={"address": address, "error": error})
                job.reporter.pushed(address or f"not pushed: {error}")
        return result


def _run_pipeline(job: TrainingJob, record: RunRecord, signals: ExitStack) -> RunResult:
    experiment, algorithm, reporter = job.experiment, job.algorithm, job.reporter
    check_device(experiment)
    check_hub_login(experiment)
    resume = _find_resume_point(job)
    reporter.run_started(resume)
    tokenizer = load_tokenizer(experiment)
    reporter.tokenizer_loaded(tokenizer)
    with reporter.stage("data_preparation"):
        data = prepare(experiment, algorithm, tokenizer, job.workers)
    reporter.data_prepared(data)

    plan = job.plan.with_steps(experiment, data.rows)
    arguments = build_arguments(experiment, plan)
    reporter.planned(plan, arguments)
    resume = _sync_resume_point(job, resume)
    base = _base_fingerprint(job)
    resume_terms = compare_with_checkpoint(experiment, plan, data.fingerprint, base, resume.checkpoint)

    set_seed(arguments.seed, experiment.run_conf.determinism)
    with reporter.stage("model_initialization"):
        loaded = load_model(
            experiment,
            algorithm,
            tokenizer,
            arguments,
            job.topology,
            plan.num_steps,
            check_names=not job.names_checked,
            fingerprint=base,
            has_images=data.has_images,
        )
        _keep_image_settings(experiment, data, loaded)
    record.update(**reporter.model_loaded(loaded, plan, data, resume, resume_terms))

    stop = StopOnSignal(job.output_dir, max_time=experiment.run_conf.max_time, end_time=read_job_end_time())
    calls = [stop, *job.callbacks, *reporter.callbacks()]
    trainer = build_trainer(experiment, algorithm, plan, arguments, data, tokenizer, loaded, calls, resume.checkpoint)
    resume_terms.apply(trainer)
    reporter.trainer_built(trainer, stop)
    initial = initial_weights(trainer, loaded)
    record.update(training_started=True)

    # Handled until the record is complete: after the last step the first signal lets the final model be saved.
    signals.enter_context(stop.handle_signals())
    with reporter.watch_processes(record):
        output = trainer.train(resume_from_checkpoint=str(resume.checkpoint) if resume.checkpoint else None)
    losses = final_losses(series_of_history(trainer.state.log_history), job.output_dir)
    record.update(losses=asdict(losses))
    stop.raise_if_interrupted(trainer)
    record.update(**reporter.training_ended(data, plan))

    with reporter.stage("model_publication"):
        final = save_final_model(trainer, tokenizer.tokenizer, job.final_folder, initial=initial)
    if final is not None:
        record.update(artifact=final.as_dict())
        reporter.model_saved(final)
    stop.log_late_signal()
    return RunResult("completed", final, trainer.state.global_step, losses, output.metrics.get("train_runtime"))


def _keep_image_settings(experiment: Experiment, data: PreparedData, loaded: LoadedModel) -> None:
    """Have the processor files of the trained model say how large its images were."""
    if data.has_images:
        from finetuning.model.vision import remember_image_settings

        remember_image_settings(loaded.model, experiment.data_conf.images)


def _base_fingerprint(job: TrainingJob) -> Fingerprint | None:
    """Return the fingerprint of the model in `run_conf.model`; None when it cannot be taken.

    One process reads the weights.
    """
    from finetuning.model.fingerprint import fingerprint_if_possible

    folder = Path(job.experiment.run_conf.model)
    if not job.topology.is_distributed:
        return fingerprint_if_possible(folder)
    from finetuning.training.process_sync import broadcast_from_main

    return broadcast_from_main(lambda: fingerprint_if_possible(folder))


def _find_resume_point(job: TrainingJob) -> ResumePoint:
    """Return where the run resumes, after moving what it does not continue."""
    is_main, requested = job.topology.is_main, job.experiment.run_conf.resume_from_checkpoint
    moved = move_earlier_run(job.experiment) if is_main else ()
    resume = find_resume_point(job.output_dir, requested, compares_content=is_main)
    return replace(resume, notes=(*moved, *resume.notes))


def _sync_resume_point(job: TrainingJob, resume: ResumePoint) -> ResumePoint:
    """Return the resume point of the main process, after checking that this job can load its shards."""
    if job.topology.is_distributed:
        from finetuning.training.process_sync import sync_resume_point

        resume = sync_resume_point(job.output_dir, resume)
    if resume.checkpoint is not None:
        check_sharding(resume.checkpoint, job.experiment, job.topology)
    return resume


def _lock(job: TrainingJob) -> AbstractContextManager[None]:
    return lock_output_dir(job.output_dir) if job.topology.is_main else nullcontext()


@contextmanager
def _record_end(job: TrainingJob, record: RunRecord) -> Iterator[None]:
    """Write into the record how the run in the block ended."""
    try:
        yield
    except BaseException as error:
        message = str(error) if isinstance(error, FinetuningError) else repr(error)
        record.finish(status_of(error), error=message, **job.reporter.run_ended(error))
        job.reporter.close(status_of(error))
        raise
    record.finish("completed", error=None, **job.reporter.run_ended(None))
    job.reporter.close("completed")
    if job.topology.is_distributed:
        from finetuning.training.process_sync import destroy_process_group

        destroy_process_group()


def _complete_record(job: TrainingJob) -> None:
    """Record the end of a run that saved its final model and was killed before it could do so."""
    if not job.topology.is_main or (read_run_record(job.output_dir) or {}).get("status") == "completed":
        return
    with lock_output_dir(job.output_dir):
        uploads = job.reporter.upload(job.final_folder)
        record = RunRecord(job.output_dir, job.algorithm.name, writes=True)
        record.finish("completed", error=None, found=str(job.final_folder), **uploads)


def set_seed(seed: int, determinism: str) -> None:
    """Seed all random number generators, and select deterministic algorithms as far as `determinism` asks for them."""
    import torch
    import transformers

    if determinism == "full":
        transformers.enable_full_determinism(seed)
        return
    transformers.set_seed(seed)
    if determinism == "half":
        torch.use_deterministic_algorithms(True, warn_only=True)
