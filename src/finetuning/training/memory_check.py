"""Memory: a check before the first step that the longest rows fit, and the peak at the end of a run."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetuning.config.sections.experiment import Experiment
from finetuning.distributed import announce_wait
from finetuning.errors import ConfigError, Location
from finetuning.plan.memory_estimate import MemoryEstimate
from finetuning.plan.plan import format_bytes

if TYPE_CHECKING:
    from finetuning.trainer.mixin import TrainerMixin


class MemoryUsage(TypedDict):
    """Peak memory of this process in bytes, and what the plan estimated."""

    peak_bytes: int
    measured_by: str
    estimated_bytes: int | None
    oom_retries: list[str]


class MemoryCheckCallback(TrainerCallback):
    """Compute the longest rows once, after everything is allocated and before the first step."""

    def __init__(self, trainer: TrainerMixin):
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


def check_memory_at_start(trainer: TrainerMixin, experiment: Experiment) -> None:
    """Add the check if the experiment asks for it: by default on a GPU.

    Raises:
        ConfigError: the micro-batch is to be determined for a loss that does not allow splitting batches.
    """
    if experiment.batchsize_conf.max_per_device_train_batch_size == "auto" and not trainer.supports_batch_splitting:
        raise ConfigError(
            "auto is not supported for this loss: the rows of a batch depend on each other, so it cannot be split",
            location=Location(key="batchsize_conf.max_per_device_train_batch_size"),
            hint="Set a number.",
        )
    requested = experiment.run_conf.memory_check
    if requested is True or (requested == "auto" and trainer.args.device.type == "cuda"):
        trainer.add_callback(MemoryCheckCallback(trainer))


def longest_rows(dataset: Any, count: int) -> list[dict[str, Any]]:
    """Return the rows with the most tokens, longest first."""
    if hasattr(dataset, "longest_rows"):
        return dataset.longest_rows(count)
    if dataset is None or not hasattr(dataset, "column_names"):
        return []
    import numpy as np
    import pyarrow.compute as compute

    table = dataset.with_format("arrow")[:]
    columns = [table[name] for name in table.column_names if name.endswith("_ids")]
    list_lengths: Any = compute.list_value_length  # pyright: ignore[reportAttributeAccessIssue]
    lengths = [list_lengths(column).to_numpy().astype("int64") for column in columns]
    if not lengths:
        return []
    longest_first = np.sum(lengths, axis=0).argsort(kind="stable")[::-1]
    return [dataset[int(index)] for index in longest_first[:count]]


def gather_oom_retries(trainer: TrainerMixin) -> list[str]:
    """Return what was split when memory ran out, with the rank if only some processes did. Collective."""
    if trainer.args.world_size == 1:
        return list(trainer.oom_retries)
    from accelerate.utils import gather_object

    with announce_wait("the other processes to end their training"):
        by_process = gather_object([trainer.oom_retries])
    common = [text for text in by_process[0] if all(text in texts for texts in by_process)]
    return common + [
        f"process {rank}, {text}" for rank, texts in enumerate(by_process) for text in texts if text not in common
    ]


def measure_memory(trainer: TrainerMixin, estimate: MemoryEstimate | None) -> MemoryUsage:
    """Return the peak memory of this process, and the out-of-memory retries of all. Collective."""
    device = trainer.args.device
    if device.type == "cuda":
        peak, measured_by = torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    else:
        # ru_maxrss is in KiB on Linux.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        measured_by = "resident set of the process, libraries included"
    return {
        "peak_bytes": peak,
        "measured_by": measured_by,
        "estimated_bytes": estimate.total if estimate else None,
        "oom_retries": gather_oom_retries(trainer),
    }


def memory_summary(usage: MemoryUsage) -> str:
    """Return the measurement and the estimate in one line."""
    text = f"peak {format_bytes(usage['peak_bytes'])}, {usage['measured_by']}"
    if usage["estimated_bytes"]:
        text += f"; estimated at least {format_bytes(usage['estimated_bytes'])}, without activations"
    return text
