"""Checks before training starts: what the device supports, model positions for the longest row, aLoRA invocations."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sized
from functools import partial
from typing import TYPE_CHECKING, Any

from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import Dtype, NewPeft
from finetuning.errors import ConfigError, DataError, Location, ModelError, Problem
from finetuning.model.hardware import Device, check_device_map, explain_missing_gpu, training_device
from finetuning.plan.compatibility import NEEDS_GPU
from finetuning.plan.features import RunContext
from finetuning.plan.memory_estimate import estimate_memory
from finetuning.plan.plan import format_bytes

if TYPE_CHECKING:
    import datasets
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from finetuning.algorithms.algorithm import Algorithm
    from finetuning.data.prepared import PreparedData
    from finetuning.distributed import ProcessTopology

logger = logging.getLogger("finetuning")

_ALTERNATIVES = {
    "bf16": "Set bf16: false; fp16: true if the device supports it.",
    "fp16": "Set fp16: false; bf16: true if the device supports it.",
    "tf32": "Remove it.",
}
_DTYPE_KEYS = {"bf16": ("bf16", "bf16_full_eval"), "fp16": ("fp16",), "tf32": ("tf32",)}


def check_device(experiment: Experiment, device: Device | None = None) -> None:
    """Check that the device supports the requested dtypes, attention and GPU-only options.

    Raises:
        ConfigError: lists everything that it does not support.
        ModelError: the attention implementation does not exist, or needs another device.
        MissingPackageError: the attention implementation is not installed.
    """
    args = experiment.training_args
    extra = args.model_extra or {}
    missing_gpu = None if device or extra.get("use_cpu") else explain_missing_gpu()
    if missing_gpu is not None:
        logger.warning("%s. This run uses the CPU", missing_gpu)
    check_precision(experiment, device)
    device = device or training_device(bool(extra.get("use_cpu")))
    if device.kind == "cpu" and fsdp_needs_gpus():
        raise ConfigError(
            "the accelerate config shards the model with FSDP and loads it to GPUs (fsdp_sync_module_states), and this"
            " machine has none",
            hint="Remove the config file of accelerate, or FSDP from it, to train on the CPU.",
        )
    _check_attention(experiment, device)
    _check_compiler(experiment, device)
    check_device_map(experiment.run_conf.model_args.device_map, Location(key="run_conf.model_args.device_map"))
    requested = [key for key in NEEDS_GPU if getattr(args, key, None) or extra.get(key)]
    if requested and device.kind == "cpu":
        raise ConfigError(
            [
                Problem(
                    f"is true, but needs a GPU: {NEEDS_GPU[key][0]}",
                    Location(key=f"training_args.{key}"),
                    NEEDS_GPU[key][1],
                )
                for key in requested
            ]
        )


def check_trainer_mixin(experiment: Experiment) -> None:
    """Load the class of `run_conf.trainer_mixin`, if there is one, so that it is refused before any data is read.

    Raises:
        ConfigError: it does not exist, cannot be imported, or is no class.
    """
    if experiment.run_conf.trainer_mixin is not None:
        from finetuning.trainer.user_code import load_trainer_mixin

        load_trainer_mixin(experiment.run_conf.trainer_mixin)


def fsdp_needs_gpus(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether accelerate's plugin for FSDP1 will look for a GPU, as its launcher set the environment."""

    def is_set(name: str) -> bool:
        return environ.get(name, "").lower() in ("true", "1")

    is_fsdp1 = is_set("ACCELERATE_USE_FSDP") and environ.get("FSDP_VERSION", "1") != "2"
    return is_fsdp1 and (is_set("FSDP_SYNC_MODULE_STATES") or is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"))


def _check_attention(experiment: Experiment, device: Device) -> None:
    implementation = experiment.run_conf.model_args.attn_implementation
    if implementation is None:
        return
    from finetuning.model.load import usable_attn_implementation

    # Its result is used when the model is loaded. Called here, it refuses and warns in `--dry-run` as well.
    usable_attn_implementation(implementation)
    if implementation == "flex_attention" and device.kind == "cpu":
        raise ConfigError(
            "flex_attention has no backward pass on a CPU",
            location=Location(key="run_conf.model_args.attn_implementation"),
            hint="Use sdpa on a CPU.",
        )


def _check_compiler(experiment: Experiment, device: Device, environ: Mapping[str, str] = os.environ) -> None:
    """Check that what `training_args.torch_compile` asks for can be compiled here.

    Raises:
        ConfigError: inductor finds no compiler, or the layers cannot be compiled on a CPU.
    """
    args = experiment.training_args
    extra = args.model_extra or {}
    names = [name for name in ("torch_compile_backend", "torch_compile_mode") if extra.get(name) is not None]
    if not args.torch_compile and not names:
        return
    key = f"training_args.{'torch_compile' if args.torch_compile else names[0]}"
    if args.torch_compile == "layers" and experiment.method_name == "grpo":
        raise ConfigError(
            "is layers, but grpo samples with the model: each length of its key-value cache would be compiled",
            location=Location(key=key),
            hint="Set torch_compile: false.",
        )
    if args.torch_compile == "layers" and device.kind == "cpu" and args.gradient_checkpointing:
        raise ConfigError(
            "is layers, but on a CPU attention is a loop over rows, which is not compiled: with gradient checkpointing"
            " nothing of a layer would be",
            location=Location(key=key),
            hint="Set gradient_checkpointing: false, or torch_compile: false.",
        )
    if (extra.get("torch_compile_backend") or "inductor") != "inductor":
        return
    # inductor writes C++ for a CPU; for a GPU, Triton compiles a launcher in C.
    language, variable, usual = ("C++", "CXX", ("g++",)) if device.kind == "cpu" else ("C", "CC", ("gcc", "clang"))
    commands = (environ[variable],) if environ.get(variable) else usual
    if not any(shutil.which(command) for command in commands):
        raise ConfigError(
            f"torch.compile needs a compiler for {language}, and there is no {' or '.join(commands)}",
            location=Location(key=key),
            hint=f"Install one (on Debian: build-essential), set {variable} to its path, or set torch_compile: false.",
        )


def check_precision(experiment: Experiment, device: Device | None = None) -> None:
    """Check that the device computes in the requested dtypes. `finetuning doctor` shows what it supports.

    Raises:
        ConfigError: lists every dtype that it does not support, with the reason.
    """
    args = experiment.training_args
    extra = args.model_extra or {}
    requested = {
        key: dtype for dtype, keys in _DTYPE_KEYS.items() for key in keys if getattr(args, key, None) or extra.get(key)
    }
    if not requested:
        return
    device = device or training_device(bool(extra.get("use_cpu")))
    capabilities = {key: device.support_for(dtype) for key, dtype in requested.items()}
    problems = [
        Problem(
            f"is true, but {device.name} does not support {requested[key]}: {capability.note}",
            Location(key=f"training_args.{key}"),
            _ALTERNATIVES[requested[key]],
        )
        for key, capability in capabilities.items()
        if not capability.is_supported
    ]
    if problems:
        raise ConfigError(problems)


def compute_precision(experiment: Experiment, model: PreTrainedModel, device: Device | None = None) -> tuple[str, str]:
    """Return the dtype that the run computes in, and a hint at a faster one that the device supports, if any."""
    args = experiment.training_args
    weights = str(model.dtype).removeprefix("torch.")
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    if autocast:
        return f"{autocast} by autocast, weights in {weights}", ""
    if args.deepspeed or weights != "float32":
        return weights, ""
    device = device or training_device(bool((args.model_extra or {}).get("use_cpu")))
    capability = device.support_for("bf16")
    if not capability.is_supported or capability.note.startswith("emulated"):
        return weights, ""
    return weights, f"{device.name} supports bfloat16; set training_args.bf16 to use it"


_ADDS_ROUTER_LOSS = ("dpo", "kto", "grpo")
"""Methods whose trainer adds the router's loss whatever the model's config says."""


def describe_router_loss(experiment: Experiment, model: PreTrainedModel) -> tuple[str, str] | None:
    """Return whether the loss contains the load balancing loss of a mixture of experts, and how to change that.

    None for models that have no such loss, and for reward models, which train without it.
    """
    config: Any = model.config.get_text_config()
    if not hasattr(config, "output_router_logits") or experiment.method_name == "reward":
        return None
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    key, is_part = "run_conf.model_args.output_router_logits: true", bool(config.output_router_logits)
    if experiment.method_name in _ADDS_ROUTER_LOSS:
        extra: Mapping[str, object] = experiment.training_args.model_extra or {}
        configured = extra.get("router_aux_loss_coef")
        coefficient = coefficient if configured is None else configured
        key, is_part = "training_args.router_aux_loss_coef", bool(coefficient)
    return (f"part of the loss, times {coefficient:g}", "") if is_part else ("not part of the loss", f"{key} adds it")


def choose_dtype(context: RunContext, arguments: TrainingArguments) -> tuple[Dtype, torch.dtype | None, list[str]]:
    """Return the dtype to load the model in, the dtype to save it in at the end if it is another, and notes.

    float32 was chosen without knowing the device. Where only 16 bits fit, the model stays in bfloat16.
    """
    dtype, checkpoint = context.weights_dtype, context.checkpoint_dtype
    saved = "float16" if context.raises_float16 else checkpoint
    is_raised = context.experiment.run_conf.model_args.dtype in ("auto", "float16") and dtype == "float32"
    if not is_raised or not context.trains_all_weights or context.sharded_by or saved in (None, "float32"):
        return dtype, None, []
    if checkpoint == "bfloat16" and not arguments.fp16:
        excess = partial(_excess_of_float32, context, arguments)
        if context.topology.is_distributed:
            from finetuning.training.process_sync import broadcast_from_main

            reason = broadcast_from_main(excess)
        else:
            reason = excess()
        if reason is not None:
            logger.warning("weights are trained in bfloat16, which rounds off small updates: %s", reason)
            return "bfloat16", None, [f"dtype of the weights: bfloat16, as {reason}"]
    import torch

    note = f"dtype of the weights: float32 in training, {saved} in the final model"
    return dtype, getattr(torch, str(saved)), [note]


def _excess_of_float32(context: RunContext, arguments: TrainingArguments) -> str | None:
    """Return why float32 weights do not fit into the device if bfloat16 weights do; None otherwise."""
    device = training_device(arguments.use_cpu)
    full, half = (estimate_memory(context.experiment, dtype) for dtype in ("float32", "bfloat16"))
    if device.memory is None or full is None or half is None or not half.total <= device.memory < full.total:
        return None
    return f"float32 needs at least {format_bytes(full.total)}, and {device.name} has {format_bytes(device.memory)}"


def verify_causality(
    model: PreTrainedModel, topology: ProcessTopology, arguments: TrainingArguments, autocast: torch.dtype | None
) -> str:
    """Return a note that the model is causal, or why that is not verified.

    Raises:
        ModelError: it is not, or it takes rows of some lengths only. Raised on every process.
    """
    from finetuning.model.varlen_attention import check_causality, check_row_lengths

    if arguments.deepspeed or topology.sharded_by == "deepspeed":
        return "causality: not verified under DeepSpeed, which may have partitioned the weights"

    def check() -> ModelError | str | None:
        try:
            check_row_lengths(model)
            return check_causality(model, autocast)
        except ModelError as error:
            return error

    if topology.is_distributed:
        from finetuning.training.process_sync import broadcast_from_main

        # Under FSDP with `cpu_ram_efficient_loading` only the main process holds the weights at this point.
        result = broadcast_from_main(check)
    else:
        result = check()
    if isinstance(result, ModelError):
        raise result
    if result is not None:
        return f"causality: not verified, as the model computes no logits here: {result}"
    return "causality: no token changes the logits of earlier ones, verified on this model"


def unavailable_attention(name: str) -> str | None:
    """Return why transformers would not use an installed package: it would download a kernel from the Hub instead."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    checks = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    return None if name not in checks or checks[name]() else "transformers does not support the installed version"


def check_new_tokens(trained_rows: Iterable[str] | None, num_new: int, algorithm: Algorithm) -> None:
    """Check that the adapter trains the output embeddings of new tokens.

    TRL multiplies by the output weights itself, which bypasses PEFT's wrapper of single embedding rows.

    Args:
        trained_rows: names of the embeddings of which the adapter trains single rows.

    Raises:
        ConfigError: they would not be trained.
    """
    names = list(trained_rows or ())
    if num_new and names:
        raise ConfigError(
            f"the chat template adds {num_new} tokens, whose output embeddings an adapter does not train under"
            f" {algorithm.name}",
            location=Location(key="data_conf.chat_template_name"),
            hint="Train them by sft first, or add the embeddings to peft_conf.peft_kwargs:"
            f" modules_to_save: [{', '.join(names)}].",
        )


_LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embeddings")


def check_positions(model: Any, experiment: Any, data: PreparedData) -> tuple[str, ...]:
    """Return a warning if a row is longer than the model's context length.

    Raises:
        ConfigError: a row is longer than the model's learned position embeddings.
    """
    key = "sft_args.max_seq_length" if hasattr(experiment, "sft_args") else "training_args.max_length"
    if isinstance(data.train, Sized):
        is_stream, longest = False, _longest_row(data.train)
    else:
        is_stream, longest = True, experiment.sft_args.max_seq_length
    if longest is None:
        return ()
    learned = _num_learned_positions(model)
    if learned is not None and longest > learned:
        has = "of a stream may have" if is_stream else "has"
        raise ConfigError(
            f"a row {has} {longest} tokens, but the model has {learned} learned positions",
            location=Location(key=key),
            hint=f"Set it to {learned} or less.",
        )
    context_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if learned is None and not is_stream and isinstance(context_length, int) and longest > context_length:
        return (f"a row has {longest} tokens, more than the model's context length of {context_length} ({key})",)
    return ()


def _longest_row(dataset: Any) -> int | None:
    """Return the most tokens in a row (a prompt with its longer answer); None for rows without token ids."""
    import numpy as np

    from finetuning.data.arrow import row_lengths

    if "input_ids" in dataset.column_names:
        return int(row_lengths(dataset).max())
    answers = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in dataset.column_names]
    if not answers or "prompt_ids" not in dataset.column_names:
        return None
    longer = np.maximum.reduce([row_lengths(dataset, name) for name in answers])
    return int((row_lengths(dataset, "prompt_ids") + longer).max())


def _num_learned_positions(model: nn.Module) -> int | None:
    from torch import nn

    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in _LEARNED_POSITIONS and isinstance(module, nn.Embedding):
            # OPT and BART reserve the first positions for padding.
            return module.num_embeddings - getattr(module, "offset", 0)
    return None


_INVOCATION_KEY, _INVOCATION_IDS = "peft_conf.alora_invocation_string", "alora_invocation_tokens"


def uses_invocation(experiment: Experiment) -> bool:
    """Return whether the adapter is an aLoRA, which is active only after its invocation tokens."""
    conf = experiment.peft_conf
    return isinstance(conf, NewPeft) and bool(
        conf.alora_invocation_string is not None or conf.peft_kwargs.get(_INVOCATION_IDS)
    )


def resolve_invocation(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> Experiment:
    """Return the experiment with its invocation string as token ids; unchanged without such a string.

    Raises:
        ConfigError: the string has no token, the ids are set as well, or the adapter is not LoRA.
    """
    conf = experiment.peft_conf
    if not isinstance(conf, NewPeft) or conf.alora_invocation_string is None:
        return experiment
    if conf.peft_type.upper() != "LORA":
        raise ConfigError(f"is only valid for LORA, not for {conf.peft_type}", location=Location(key=_INVOCATION_KEY))
    if _INVOCATION_IDS in conf.peft_kwargs:
        raise ConfigError(
            f"cannot be combined with peft_kwargs.{_INVOCATION_IDS}",
            location=Location(key=_INVOCATION_KEY),
            hint="Remove one of them.",
        )
    ids = tokenizer.encode(conf.alora_invocation_string, add_special_tokens=False)
    if not ids:
        raise ConfigError("has no token", location=Location(key=_INVOCATION_KEY))
    conf = conf.model_copy(update={"peft_kwargs": {**conf.peft_kwargs, _INVOCATION_IDS: ids}})
    return experiment.model_copy(update={"peft_conf": conf})


def check_alora_invocation(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> None:
    """Check that each row contains the invocation tokens: an aLoRA learns nothing from other rows.

    Raises:
        DataError: states how many rows do not.
    """
    conf = resolve_invocation(experiment, tokenizer).peft_conf
    ids: Any = conf.peft_kwargs.get(_INVOCATION_IDS) if isinstance(conf, NewPeft) else None
    splits: list[Any] = [split for split in (data.train, data.validation) if split] if ids else []
    for rows in splits:
        column = "input_ids" if "input_ids" in rows.column_names else "prompt_ids"
        missing = sum(not contains_ids(row, ids) for row in _token_ids(rows, column))
        if missing:
            where = "the rows" if column == "input_ids" else "the prompts"
            raise DataError(
                f"{missing:,} of {len(rows):,} rows never activate the adapter: {where} do not contain"
                f" {tokenizer.decode(ids)!r} as the tokens {ids}",
                location=Location(key=_INVOCATION_KEY),
                hint="Choose a string that starts and ends at token borders, such as the start of an assistant turn in"
                " the chat template.",
            )


def _token_ids(rows: datasets.Dataset, column: str) -> list[list[int]]:
    return rows[column][:]


def contains_ids(row: list[int], ids: list[int]) -> bool:
    """Return whether the row contains the ids as a contiguous sequence."""
    import numpy as np

    if len(row) < len(ids):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(row), len(ids))
    return bool((windows == np.asarray(ids)).all(axis=1).any())
