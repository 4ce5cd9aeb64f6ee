"""The translation of an experiment into the trainer's own config class."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from finetuning.config.sections.experiment import Experiment
from finetuning.distributed import announce_wait
from finetuning.errors import ConfigError, Location
from finetuning.plan.plan import Plan

if TYPE_CHECKING:
    import transformers

# Progress, tracking and the check for non-finite losses are ours.
_FIXED = {
    "report_to": "none",
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "no",
    "label_names": ["labels"],
}
# Fields that our trainer has and the config class does not.
_OWN_FIELDS = {"sft": ("activation_offloading",)}


def build_arguments(experiment: Experiment, plan: Plan) -> transformers.TrainingArguments:
    """Return an instance of the experiment's `trainer_config` class.

    Raises:
        ConfigError: the class rejects a value.
    """
    import torch

    module, _, name = experiment.trainer_config.partition(":")
    args = experiment.training_args
    fields: dict[str, Any] = {field: getattr(args, field) for field in type(args).model_fields}
    for field in _OWN_FIELDS.get(experiment.method_name, ()):
        del fields[field]
    fields |= args.model_extra or {}
    fields |= _FIXED | {
        "learning_rate": plan.learning_rate,
        "per_device_train_batch_size": plan.batch.per_device,
        "per_device_eval_batch_size": plan.batch.per_device_eval,
        "gradient_accumulation_steps": plan.batch.accumulation,
        "deepspeed": _deepspeed_config(args.deepspeed, plan),
        "full_determinism": experiment.run_conf.determinism == "full" or bool(fields.get("full_determinism")),
    }
    if not torch.accelerator.is_available():
        # Without it transformers rejects bfloat16, and accelerate creates no process group on a machine without GPUs,
        # so that each process would train by itself.
        fields["use_cpu"] = True
    if args.max_steps > 0 and args.num_train_epochs <= 0:
        fields.pop("num_train_epochs")
    # In a distributed run this creates the process group.
    waits = announce_wait("the other processes of the job to connect") if plan.batch.world_size > 1 else nullcontext()
    try:
        with waits:
            arguments = getattr(importlib.import_module(module), name)(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(str(error), location=Location(key="training_args")) from error
    if experiment.data_conf.streaming:
        # With dispatch_batches the main process would read for all, and cannot slice padding-free batches.
        arguments.accelerator_config.dispatch_batches = False
    if plan.batch.world_size == 1:
        # A single process uses a single device: torch.nn.DataParallel would give each visible GPU its own batch.
        arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _deepspeed_config(config: str | dict[str, object] | None, plan: Plan) -> str | dict[str, object] | None:
    """Return DeepSpeed's config; an inline one gets the batch size fields that DeepSpeed requires."""
    if not isinstance(config, dict):
        return config
    return config | {
        "train_batch_size": plan.batch.total,
        "train_micro_batch_size_per_gpu": plan.batch.per_device,
        "gradient_accumulation_steps": plan.batch.accumulation,
    }
