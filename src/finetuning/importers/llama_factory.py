"""Translate LLaMA-Factory configs: the stages sft, dpo, kto and rm."""

from __future__ import annotations

from finetuning.config.yaml.document import ConfigDocument
from finetuning.importers.dataset_info import find_dataset_info, source_of
from finetuning.importers.shared_sections import (
    TRAINING_KEYS,
    finish,
    peft_type_of,
    put_batch_size,
    put_chat_template,
    put_keys,
    put_method,
    put_peft,
    put_quantization,
    put_training_data,
    put_validation_data,
)
from finetuning.importers.translation import Translation, Values

KEYS: dict[str, str] = {
    **TRAINING_KEYS,
    "model_name_or_path": "run_conf.model",
    "trust_remote_code": "run_conf.model_args.trust_remote_code",
    "model_revision": "run_conf.model_args.revision",
    "cache_dir": "run_conf.model_args.cache_dir",
    "resume_from_checkpoint": "run_conf.resume_from_checkpoint",
    "cutoff_len": "sft_args.max_seq_length",
    "packing": "sft_args.packing",
    "enable_liger_kernel": "training_args.use_liger_kernel",
    "loraplus_lr_ratio": "overrides.loraplus_lr_ratio",
}
"""Keys of LLaMA-Factory and the dotted keys here."""

_OTHER_KEYS = """
    stage do_train dataset eval_dataset dataset_dir val_size template pref_beta per_device_train_batch_size
    per_device_eval_batch_size gradient_accumulation_steps overwrite_output_dir overwrite_cache
    preprocessing_num_workers plot_loss train_on_prompt mask_history max_samples quantization_bit quantization_method
    finetuning_type adapter_name_or_path double_quantization flash_attn disable_gradient_checkpointing
"""
"""Keys that are read by name below, or change nothing about the result."""
_METHODS = {"sft": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward"}
_ATTENTION = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "sdpa": "sdpa", "disabled": "eager"}
_LORA_DEFAULTS = {"r": 8, "target_modules": "all-linear"}


def from_llama_factory(document: ConfigDocument, processes: int) -> Translation:
    """Translate a LLaMA-Factory config. Its datasets are described by the dataset_info.json below `dataset_dir`.

    Raises:
        ConfigError: the config has errors, or uses a stage or fine-tuning type that is not supported.
    """
    out = Translation(document)
    method = put_method(out, "stage", str(out.get("stage", "sft")), _METHODS)
    used = set(_OTHER_KEYS.split())
    peft_type = peft_type_of(out, "finetuning_type", {"lora": "LORA", "full": "NO_PEFT"}, default="lora")
    used |= put_peft(out, peft_type, defaults=_LORA_DEFAULTS, rank_key="lora_rank")
    if out.get("finetuning_type", "lora") == "lora" and not out.has("lora_alpha"):
        out.put("peft_conf.peft_kwargs.lora_alpha", 2 * out.positive_int("lora_rank", 8))
    used |= put_keys(out, KEYS, method)
    if method != "sft":
        used |= _put_preference_options(out, method)
    out.put("training_args.gradient_checkpointing", not out.boolean("disable_gradient_checkpointing", False))
    out.put("run_conf.model_args.attn_implementation", _ATTENTION.get(str(out.get("flash_attn"))))
    put_quantization(out, out.get("quantization_bit", 0), double_quant=out.boolean("double_quantization", True))
    if out.has("adapter_name_or_path"):
        out.values["peft_conf"] = {"peft_type": "PRETRAINED_PEFT", "name_or_path": out.get("adapter_name_or_path")}
    put_batch_size(out, out.get("per_device_train_batch_size", 8), processes)
    put_training_data(out, _datasets(out, "dataset", method))
    put_validation_data(out, _datasets(out, "eval_dataset", method), out.get("val_size", 0))
    template = str(out.get("template", "tokenizer_default"))
    put_chat_template(out, template)
    if template in ("chatml", "qwen"):
        out.add_note(
            "template", "there the line break after <|im_end|> is trained, too; here an answer ends with its token"
        )
    if method == "sft":
        last_only = "last" if out.boolean("mask_history", False) else "assistant"
        out.put("sft_args.train_on", "all" if out.boolean("train_on_prompt", False) else last_only)
    return finish(out, used)


def _put_preference_options(out: Translation, method: str) -> set[str]:
    out.put("training_args.beta", out.get("pref_beta"))
    out.put("training_args.max_length", out.get("cutoff_len"))
    if method != "dpo":
        return {"cutoff_len"}
    out.put("training_args.loss_type", [out.get("pref_loss")] if out.has("pref_loss") else None)
    return {"cutoff_len", "pref_loss"}


def _datasets(out: Translation, key: str, method: str) -> list[Values]:
    """Return the datasets that a key names, each as its entry in dataset_info.json describes it."""
    names = [name.strip() for item in out.as_list(key) for name in str(item).split(",")]
    info = find_dataset_info(out) if names else None
    sources = [source_of(out, key, name, info, method) for name in names]
    if out.has("max_samples"):
        limit = out.positive_int("max_samples", 1)
        sources = [source | {"max_rows": min(limit, source.get("max_rows", limit))} for source in sources]
    return sources
