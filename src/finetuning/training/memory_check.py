"""Whether the longest rows fit, found out before the first step; and how much memory a run took."""

from __future__ import annotations

import resource
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetuning.config.sections.experiment import Experiment
from finetuning.errors import ConfigError, Location
from finetuning.plan.memory_estimate import MemoryEstimate
from finetuning.plan.plan import format_bytes


class MemoryCheck(TrainerCallback):
    """Has a trainer compute its longest rows once, when everything is in its place and before the first step."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        trainer = self._trainer
        validation = trainer.eval_dataset if args.eval_strategy != "no" else None
        trainer.check_memory(
            longest_rows(trainer.train_dataset, args.per_device_train_batch_size),
            longest_rows(validation, args.per_device_eval_batch_size),
        )


def check_memory_at_start(trainer: Any, experiment: Experiment) -> None:
    """Adds the check where the experiment wants it: by default on a GPU.

    Raises:
        ConfigError: the batch size shall be found out for a trainer whose batches cannot be divided.
    """
    if experiment.batchsize_conf.max_per_device_train_batch_size == "auto" and not trainer.divides_batches:
        raise ConfigError(
            "is auto, but the rows of a batch depend on one another in this loss, so that it cannot be halved",
            place=Location(key="batchsize_conf.max_per_device_train_batch_size"),
            hint="Give a number.",
        )
    wanted = experiment.run_conf.memory_check
    if wanted is True or (wanted == "auto" and trainer.args.device.type == "cuda"):
        trainer.add_callback(MemoryCheck(trainer))


def longest_rows(dataset: Any, count: int) -> list[dict[str, Any]]:
    """The rows with the most tokens, the longest first."""
    if hasattr(dataset, "longest_rows"):
        return dataset.longest_rows(count)
    if dataset is None or not hasattr(dataset, "column_names"):
        return []
    import pyarrow.compute as compute

    table = dataset.with_format("arrow")[:]
    lengths = [compute.list_value_length(table[name]) for name in table.column_names if name.endswith("_ids")]
    if not lengths:
        return []
    total = sum(length.to_numpy().astype("int64") for length in lengths)
    return [dataset[int(index)] for index in total.argsort(kind="stable")[::-1][:count]]


def gather_oom_retries(trainer: Any) -> list[str]:
    """What was divided, when and why; of a job of several processes, on which. All of them call this."""
    if trainer.args.world_size == 1:
        return list(trainer.divisions)
    from accelerate.utils import gather_object

    by_process = gather_object([trainer.divisions])
    shared = [text for text in by_process[0] if all(text in texts for texts in by_process)]
    return shared + [
        f"process {rank}, {text}" for rank, texts in enumerate(by_process) for text in texts if text not in shared
    ]


def measure_memory(estimate: MemoryEstimate | None, device: torch.device) -> dict[str, Any]:
    """Bytes that this process took at most, what they were measured by, and what the plan had estimated."""
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "peak_bytes": peak if on_gpu else peak * 1024,
        "measured_by": "allocated on the GPU" if on_gpu else "resident set of the process, libraries included",
        "estimated_bytes": estimate.total if estimate else None,
    }


def memory_summary(values: dict[str, Any]) -> str:
    """The measurement in one line, beside the estimate."""
    text = f"{format_bytes(values['peak_bytes'])} at most, {values['measured_by']}"
    if values["estimated_bytes"]:
        text += f"; the plan had at least {format_bytes(values['estimated_bytes'])}, without activations"
    return text
