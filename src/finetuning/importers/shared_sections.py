"""Sections of our YAML that are filled the same way from axolotl, LLaMA-Factory and TRL configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetuning.errors import ConfigError
from finetuning.importers.translation import Translation, Values

_TRAINING_ARGUMENTS = """
    num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps warmup_ratio weight_decay
    max_grad_norm  optim seed bf16 fp16 gradient_checkpointing gradient_checkpointing_kwargs logging_steps
    logging_strategy  logging_first_step eval_strategy eval_steps save_strategy save_steps save_total_limit
    load_best_model_at_end  metric_for_best_model greater_is_better adam_beta1 adam_beta2 adam_epsilon
    neftune_noise_alpha ddp_timeout  dataloader_num_workers deepspeed output_dir report_to run_name
    use_liger_kernel
"""
TRAINING_KEYS = {key: f"training_args.{key}" for key in _TRAINING_ARGUMENTS.split()}
"""Fields of transformers' TrainingArguments, which LLaMA-Factory and TRL take by the same names."""

_LORA_KEYS = {
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "additional_target": "modules_to_save",
    "lora_modules_to_save": "modules_to_save",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_TEMPLATES = {"chatml": "chat-ml", "tokenizer_default": "keep-original"}
_SOURCES = {"qwen": "trl/qwen2_5"}
"""Templates whose text is that of one in TRL's package: LLaMA-Factory's, with its default system prompt and tools."""
_CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


def put_method(out: Translation, key: str, name: str, methods: Mapping[str, str]) -> str:
    """Set `method` from the other engine's name of it, and return it."""
    if name not in methods:
        out.add_error(key, f"{name} cannot be imported; supported: {', '.join(methods)}")
    method = methods.get(name, "sft")
    out.put("method", method)
    return method


def put_keys(out: Translation, paths: Mapping[str, str], method: str) -> set[str]:
    """Copy the keys that have a counterpart, and return their names.

    Args:
        paths: for each key of the source, the dotted key here. Those in `sft_args` are copied for SFT only.
    """
    paths = {key: path for key, path in paths.items() if method == "sft" or not path.startswith("sft_args.")}
    for key, path in paths.items():
        value = out.get(key)
        if value is not None:
            out.put(path, _DTYPES.get(str(value), value) if path.endswith(".dtype") else value)
    return set(paths)


def peft_type_of(out: Translation, key: str, peft_types: Mapping[str, str], default: str) -> str:
    """Return our `peft_type` for the value of a key; NO_PEFT, and an error, for one that is not supported."""
    if out.has(key) and out.get(key) not in peft_types:
        out.add_error(key, f"{out.get(key)} cannot be imported; supported: {', '.join(peft_types)}")
    return peft_types.get(str(out.get(key, default)), "NO_PEFT")


def put_peft(
    out: Translation,
    peft_type: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    rank_key: str = "lora_r",
    all_linear: bool = False,
) -> set[str]:
    """Set `peft_conf`, and return the names of the keys it is read from.

    Args:
        defaults: the other engine's LoRA defaults that differ from PEFT's.
        all_linear: target all linear layers, whatever the target modules say.
    """
    names = {rank_key: "r"} | _LORA_KEYS
    out.put("peft_conf.peft_type", peft_type)
    if peft_type == "NO_PEFT":
        return set(names)
    kwargs = dict(defaults or {}) | {name: out.get(key) for key, name in names.items() if out.has(key)}
    targets = kwargs.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        kwargs["target_modules"] = [name.strip() for name in targets.split(",")]
    elif all_linear or targets in ("all", "all-linear", ["all-linear"]):
        kwargs["target_modules"] = "all-linear"
    out.put("peft_conf.peft_kwargs", kwargs)
    return set(names)


def put_quantization(out: Translation, bits: object, *, double_quant: bool = True, quant_type: str = "nf4") -> None:
    """Set `quant_conf` for bitsandbytes at 4 or 8 bits; 0 is no quantization."""
    if bits == 4:
        out.values["quant_conf"] = {
            "quantization_type": "bits-and-bytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quant_type,
            "bnb_4bit_compute_dtype": "float16" if out.boolean("fp16", False) else "bfloat16",
            "bnb_4bit_use_double_quant": double_quant,
        }
    elif bits == 8:
        out.values["quant_conf"] = {"quantization_type": "bits-and-bytes", "load_in_8bit": True}
    elif bits:
        out.add_note("quantization_bit", f"{bits} bits are not carried over, only 4 and 8; see quant_conf")


def put_batch_size(out: Translation, per_device: object, processes: int) -> None:
    """Set `batchsize_conf` to the rows that one optimizer step had over there.

    Raises:
        ConfigError: the per-device batch size is not a positive integer.
    """
    steps = out.positive_int("gradient_accumulation_steps", 1)
    if isinstance(per_device, bool) or not isinstance(per_device, int) or per_device < 1:
        raise ConfigError(f"the per-device batch size must be a positive integer, not {per_device!r}")
    out.put("batchsize_conf.total_train_batch_size", per_device * steps * processes)
    out.put("batchsize_conf.max_per_device_train_batch_size", per_device)
    out.put(
        "batchsize_conf.per_device_eval_batch_size", out.get("per_device_eval_batch_size", out.get("eval_batch_size"))
    )


def put_training_data(out: Translation, sources: Sequence[Values]) -> None:
    """Set `data_conf.training_data`; without sources it gets a placeholder."""
    if not sources:
        out.add_note("datasets", "no dataset is named; replace train.jsonl with the path of your file")
        sources = [{"path": "train.jsonl"}]
    out.put("data_conf.training_data", {"type": "CONCATENATION", "datasets": list(sources)})


def put_validation_data(out: Translation, sources: Sequence[Values], fraction: object) -> None:
    """Set `data_conf.validation_data` to the sources, or else to a fraction of the training data."""
    data: Values = {"type": "NONE"}
    if sources:
        data = {"type": "CONCATENATION", "datasets": list(sources)}
    elif isinstance(fraction, float) and 0 < fraction < 1:
        data = {"type": "AUTO_SPLIT", "ratio": fraction}
    elif fraction:
        out.add_note("val_set_size", f"{fraction} rows: use a fraction of the rows instead, or a separate file")
    out.put("data_conf.validation_data", data)


def put_chat_template(out: Translation, name: str) -> None:
    """Set the chat template; one that we do not have leaves the tokenizer's own."""
    if name in _SOURCES:
        out.put("data_conf.chat_template", _SOURCES[name], "template")
        out.put("data_conf.special_tokens", _CHATML_TOKENS, "template")
        return
    template = _TEMPLATES.get(name)
    if template is None:
        out.add_note("template", f"{name} is not available; the tokenizer's own chat template is used")
    out.put("data_conf.chat_template_name", template or "keep-original")


def finish(out: Translation, used: set[str]) -> Translation:
    """Return the translation with a note for each key that was not used.

    Raises:
        ConfigError: the source has errors.
    """
    for key, value in out.source.values.items():
        if key not in used and value is not None and value not in ("", [], {}):
            out.add_note(str(key), f"not carried over: {value}")
    return out.finish()
