"""The only file that spells the trainers' own field names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finetuning.config.sections.experiment import Experiment
from finetuning.errors import ConfigError, Location
from finetuning.plan.plan import Plan

if TYPE_CHECKING:
    import transformers

# Ours to decide: progress, tracking and the finite guard are the engine's.
_FIXED = {
    "report_to": "none",
    "disable_tqdm": True,
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "no",
    "label_names": ["labels"],
}
# Fields of a trainer of ours, which the config class of transformers does not know.
_OURS = {"sft": ("activation_offloading",)}


def build_arguments(experiment: Experiment, plan: Plan, arguments_class: str) -> transformers.TrainingArguments:
    """The trainer's config object, made from ours and the plan.

    Args:
        arguments_class: `module:class` of the trainer's config.

    Raises:
        ConfigError: the trainer's own checks refuse a value.
    """
    import torch

    module, _, name = arguments_class.partition(":")
    args = experiment.training_args
    fields: dict[str, Any] = {field: getattr(args, field) for field in type(args).model_fields}
    for ours in _OURS.get(experiment.method_name, ()):
        del fields[ours]
    fields |= args.model_extra or {}
    fields |= _FIXED | {
        "learning_rate": plan.learning_rate,
        "per_device_train_batch_size": plan.batch.per_device,
        "per_device_eval_batch_size": plan.batch.per_device_eval,
        "gradient_accumulation_steps": plan.batch.accumulation,
        "deepspeed": _deepspeed(args.deepspeed, plan),
        "full_determinism": experiment.run_conf.determinism == "full" or bool(fields.get("full_determinism")),
    }
    if not torch.accelerator.is_available():
        # Or transformers refuses bfloat16, and accelerate finds no device for a process group, so that each of several
        # processes trains by itself.
        fields["use_cpu"] = True
    if args.max_steps > 0 and args.num_train_epochs <= 0:
        fields.pop("num_train_epochs")
    try:
        built = getattr(importlib.import_module(module), name)(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(str(error), place=Location(key="training_args")) from error
    if experiment.data_conf.streaming:
        # One process that reads for all could not cut batches apart whose rows lie end to end.
        built.accelerator_config.dispatch_batches = False
    if plan.batch.world_size == 1:
        # One process computes on one device: several visible GPUs would each get a batch of their own.
        built._n_gpu = min(built.n_gpu, 1)
    return built


def _deepspeed(config: str | dict[str, Any] | None, plan: Plan) -> str | dict[str, Any] | None:
    """DeepSpeed's inline config with the batch fields that it wants written into it."""
    if not isinstance(config, dict):
        return config
    return config | {
        "train_batch_size": plan.batch.total,
        "train_micro_batch_size_per_gpu": plan.batch.per_device,
        "gradient_accumulation_steps": plan.batch.accumulation,
    }
