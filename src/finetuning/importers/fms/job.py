"""A job of fms-hf-tuning to our YAML: every key means here what it meant there, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from finetuning.config.yaml.document import Document
from finetuning.importers.fms import keys
from finetuning.importers.fms.data_section import handlers_limit
from finetuning.importers.fms.fms_data import put_data
from finetuning.importers.fms.fms_peft import put_peft
from finetuning.importers.fms.fms_trackers import put_trackers
from finetuning.importers.translation import Translation

__all__ = ["Readers", "to_experiment"]


@dataclass(frozen=True)
class Readers:
    """What other rooms know, and a job may ask for."""

    data_config: Callable[[str], Mapping[str, Any]]
    """Path of a data config: the values of `data_conf`."""
    training_fields: Callable[[], Collection[str]] = frozenset
    """Names of the installed trainer's fields."""


def to_experiment(job: Document, readers: Readers, *, processes: int = 1) -> Translation:
    """The values of our YAML, of the method sft, and notes on what could not be carried over.

    Args:
        processes: of the whole job; the batch of one step is per-device batch x accumulation x processes.

    Raises:
        ConfigError: every unknown key, with the nearest known one, and everything that is refused.
    """
    out = Translation(job)
    out.refuse_unknown(keys.KNOWN | set(readers.training_fields()))
    _refuse(out)
    out.put("method", "sft")
    put_data(out, readers)
    _put_batches(out, processes)
    _put_training(out, readers.training_fields())
    put_peft(out)
    _put_model(out)
    _put_length(out)
    _put_multipack(out, processes)
    put_trackers(out)
    out.put("trainer_controller", out.get("trainer_controller_config_file"))
    out.put("logging_dir", out.get("logging_dir"))
    out.put("save_model_dir", out.get("save_model_dir"))
    return out.finished()


def _refuse(out: Translation) -> None:
    """What cannot be done here, unless it is switched off, as jobs that state every default have it."""
    for key, why in keys.REFUSED.items():
        if out.has(key) and str(out.get(key)).lower() not in keys.OFF:
            out.wrong(key, f"cannot be honoured: {why}")
    for key, other in keys.BESIDE.items():
        if out.has(key):
            out.note(key, f"changes nothing without {other}")


def _put_batches(out: Translation, processes: int) -> None:
    per_device = out.number("per_device_train_batch_size", keys.BATCH_SIZE)
    accumulation = out.number("gradient_accumulation_steps", 1)
    if out.values.get("data_conf", {}).get("streaming") and processes > 1:
        # Of a stream, each process takes its part of such a batch.
        out.note("per_device_train_batch_size", f"{per_device} rows of a stream are spread over all processes")
        per_device, rest = divmod(per_device, processes)
        if rest or not per_device:
            out.wrong("per_device_train_batch_size", f"of a stream must be a multiple of the {processes} processes")
    out.put("batchsize_conf.total_train_batch_size", per_device * accumulation * processes)
    out.put("batchsize_conf.max_per_device_train_batch_size", per_device)
    out.put("batchsize_conf.per_device_eval_batch_size", out.number("per_device_eval_batch_size", keys.BATCH_SIZE))


def _put_training(out: Translation, installed: Collection[str]) -> None:
    if not out.has("output_dir"):
        out.wrong("output_dir", "a job needs output_dir")
    out.put("training_args.output_dir", out.get("output_dir"))
    epochs = out.get("num_train_epochs", 3.0)
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or epochs <= 0:
        out.wrong("num_train_epochs", f"must be a number above 0, not {epochs!r}")
    renamed = {"eval_strategy": "evaluation_strategy"}
    for key, value in keys.TRAINING_DEFAULTS.items():
        if not out.has(renamed.get(key, key)):
            out.put(f"training_args.{key}", out.get(key, value))
    taken = keys.DATA | keys.MODEL | keys.RUN | keys.TRACKING | keys.LORA
    for key in out.source.values:
        if (key in keys.TRAINING or key in installed) and key not in taken and out.has(key):
            out.put(f"training_args.{key}", out.get(key))
    strategy = out.get("eval_strategy", out.get("evaluation_strategy", "no"))
    validates = out.has("validation_data_path") or out.has("data_config_path")
    if strategy != "no" and not validates:
        out.wrong("eval_strategy", f"is {strategy}, but there is no validation_data_path")
    resume = out.get("resume_from_checkpoint", "auto")
    if str(resume).lower() in ("true", "auto"):
        resume = "auto"
    elif str(resume).lower() == "false":
        resume = False
        out.note("resume_from_checkpoint", "an output_dir that holds an earlier run is refused, not trained over")
    out.put("run_conf.resume_from_checkpoint", resume)


def _put_model(out: Translation) -> None:
    model = out.get("model_name_or_path")
    if not isinstance(model, str):
        out.wrong("model_name_or_path", "a job needs model_name_or_path, a path or a hub id")
    out.put("run_conf.model", model)
    if out.get("tokenizer_name_or_path") != model:
        out.put("run_conf.tokenizer", out.get("tokenizer_name_or_path"))
    dtype = str(out.get("torch_dtype", "bfloat16")).removeprefix("torch.")
    aliases = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
    out.put("run_conf.model_args.dtype", aliases.get(dtype, dtype))
    out.put("run_conf.model_args.cache_dir", out.get("cache_dir"))
    if not out.truth("use_flash_attn", True):
        out.put("run_conf.model_args.attn_implementation", "sdpa")
    else:
        out.put("run_conf.model_args.attn_implementation", out.get("flash_attn_implementation"))
        if not out.has("flash_attn_implementation"):
            out.note(
                "use_flash_attn",
                "FlashAttention where it is installed and proven on the model; else torch's sdpa, which has flash"
                " kernels of its own",
            )
    if out.number("embedding_size_multiple_of", 1) != 1:
        out.note("embedding_size_multiple_of", "a vocabulary grows by its new tokens alone")
    if out.truth("enable_reduce_loss_sum", False):
        out.note("enable_reduce_loss_sum", "the loss is always a mean over all tokens of a step")


def _put_length(out: Translation) -> None:
    limit = out.number("max_seq_length", keys.MAX_SEQ_LENGTH)
    out.put("sft_args.max_seq_length", handlers_limit(out, limit) if out.has("data_config_path") else limit)
    out.put("sft_args.length_handling", "truncate")
    packing, padding_free = out.truth("packing", False), out.items("padding_free")
    if packing:
        out.put("sft_args.packing", True)
    if padding_free:
        if padding_free != ["huggingface"]:
            out.wrong("padding_free", 'has one method, ["huggingface"]')
        if packing:
            out.wrong("padding_free", "does not go with packing: true")
        out.put("sft_args.batching", "padding-free")


def _put_multipack(out: Translation, processes: int) -> None:
    """Rows laid end to end, shared out by their tokens. There, packs of a mean batch's tokens make up the steps."""
    if not out.has("multipack"):
        return
    if not out.has("padding_free"):
        out.wrong("multipack", "needs padding_free")
    if out.values.get("data_conf", {}).get("streaming"):
        out.wrong("multipack", "does not go with streaming")
    if processes == 1:
        out.note("multipack", "changes nothing on one process; there it needs several")
        return
    out.put("training_args.train_sampling_strategy", "batch_rebalance")
    out.note(
        "multipack",
        "each step trains on as many rows as without it, shared out so that the processes compute about as much;"
        " there their number differs from step to step, and rows longer than a mean batch are left out",
    )
