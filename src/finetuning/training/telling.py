"""What a run says, to people and in its record, of its rows, its model and its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetuning.config.sections.experiment import Experiment
from finetuning.plan.plan import Plan
from finetuning.training.positions import check_positions
from finetuning.training.resume.config_changes import Terms
from finetuning.training.resume.find import ResumePoint

if TYPE_CHECKING:
    from transformers import Trainer

    from finetuning.data.pipeline import PreparedData
    from finetuning.training.reporter import Observer
    from finetuning.training.run import Job
    from finetuning.training.setup import PreparedModel


def what_went_in(
    experiment: Experiment, plan: Plan, data: PreparedData, prepared: PreparedModel, resume: ResumePoint
) -> dict[str, Any]:
    """What the record says before the first step."""
    return {
        "plan": plan.as_dict(),
        "data": data_values(data),
        "model": {
            "name": experiment.run_conf.model,
            "fingerprint": str(prepared.fingerprint) if prepared.fingerprint else None,
            "notes": list(prepared.notes),
            "layout": str(prepared.layout),
        },
        "resumed_from": str(resume.checkpoint) if resume.checkpoint else None,
    }


def data_values(data: PreparedData) -> dict[str, Any]:
    """The rows for the record, as far as they are known by now."""
    return {"fingerprint": data.fingerprint.digest, "rows": data.rows, "ledger": data.ledger.report()}


def tell_model(job: Job, plan: Plan, data: PreparedData, prepared: PreparedModel, terms: Terms) -> None:
    """Says what is trained, in which numbers, how rows lie in a batch, and what a resumed run does otherwise."""
    from finetuning.training.preflight import computing

    for note in terms.notes:
        job.observer.told("resumed with", note)
    if beyond := check_positions(prepared.model, job.experiment, data):
        job.observer.told("longest row", "beyond what the model was made for", warnings=beyond)
    job.observer.told("precision", *computing(job.experiment, prepared.model))
    for note in (*prepared.notes, f"rows in a batch: {prepared.layout}"):
        label, _, value = note.partition(": ") if ": " in note else ("", "", note)
        job.observer.told(label, value)
    if job.method.lays_end_to_end and data.rows is not None:
        from finetuning.data.packed import lying

        longest = job.experiment.sft_args.max_seq_length
        job.observer.told("tokens", str(lying(data.train, longest, plan.batch.per_device)))


def tell_memory(trainer: Trainer, plan: Plan, observer: Observer) -> dict[str, Any]:
    """What the run took of memory, beside its estimate, and what had to be divided on the way."""
    from finetuning.training.memory_check import divisions_of_all, measured, told

    values = measured(plan.memory, trainer.args.device) | {"divisions": divisions_of_all(trainer)}
    observer.found("memory", told(values))
    for division in values["divisions"]:
        observer.found("memory", division)
    return values
