"""Translate the YAML files of `trl sft` and `trl dpo`."""

from __future__ import annotations

from typing import Any

from finetuning.config.yaml.document import ConfigDocument
from finetuning.importers.shared_sections import (
    TRAINING_KEYS,
    finish,
    put_batch_size,
    put_chat_template,
    put_keys,
    put_peft,
    put_quantization,
    put_training_data,
    put_validation_data,
)
from finetuning.importers.translation import Translation, Values

KEYS: dict[str, str] = {
    **TRAINING_KEYS,
    "model_name_or_path": "run_conf.model",
    "model_revision": "run_conf.model_args.revision",
    "trust_remote_code": "run_conf.model_args.trust_remote_code",
    "attn_implementation": "run_conf.model_args.attn_implementation",
    "torch_dtype": "run_conf.model_args.dtype",
    "dtype": "run_conf.model_args.dtype",
    "resume_from_checkpoint": "run_conf.resume_from_checkpoint",
    "packing": "sft_args.packing",
}
"""Keys of TRL and the dotted keys here."""
DPO_KEYS = {key: f"training_args.{key}" for key in ("label_smoothing", "loss_weights", "precompute_ref_log_probs")}
"""Keys that only DPO takes."""

_OTHER_KEYS = """
    dataset_name dataset_config dataset_train_split dataset_test_split datasets use_peft per_device_train_batch_size
    per_device_eval_batch_size gradient_accumulation_steps beta loss_type max_length load_in_4bit load_in_8bit
    assistant_only_loss completion_only_loss bnb_4bit_quant_type use_bnb_nested_quant lora_task_type
"""
"""Keys that are read by name below, or change nothing about the result."""
_LORA_DEFAULTS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
_SFT_LOSSES = ("nll", "dft")


def from_trl(document: ConfigDocument, processes: int) -> Translation:
    """Translate a config of TRL, which does not name the method: `beta` or a DPO loss make it DPO, else it is SFT.

    Raises:
        ConfigError: the config has errors.
    """
    out = Translation(document)
    is_dpo = out.has("beta") or out.get("loss_type", "nll") not in _SFT_LOSSES
    method = "dpo" if is_dpo else "sft"
    out.put("method", method)
    if is_dpo:
        out.add_note("method", "DPO, detected from beta or loss_type")
    used = set(_OTHER_KEYS.split())
    if out.boolean("use_peft", False):
        used |= put_peft(out, "LORA", defaults=_LORA_DEFAULTS)
    else:
        out.put("peft_conf.peft_type", "NO_PEFT")
    used |= put_keys(out, KEYS | (DPO_KEYS if is_dpo else {}), method)
    bits = 4 if out.boolean("load_in_4bit", False) else 8 if out.boolean("load_in_8bit", False) else 0
    put_quantization(
        out,
        bits,
        double_quant=out.boolean("use_bnb_nested_quant", False),
        quant_type=out.get("bnb_4bit_quant_type", "nf4"),
    )
    # TRL's own defaults, which differ from transformers'.
    for key, value in (("learning_rate", 1e-6 if is_dpo else 2e-5), ("gradient_checkpointing", True)):
        out.put(f"training_args.{key}", out.get(key, value))
    out.put("training_args.bf16", out.boolean("bf16", not out.boolean("fp16", False)))
    put_batch_size(out, out.get("per_device_train_batch_size", 8), processes)
    _put_data(out)
    put_chat_template(out, "tokenizer_default")
    if is_dpo:
        out.put("training_args.beta", out.get("beta"))
        out.put("training_args.loss_type", out.get("loss_type"))
        out.put("training_args.max_length", out.get("max_length", 1024))
    else:
        _put_sft_options(out)
    return finish(out, used)


def _put_data(out: Translation) -> None:
    subset = {"subset": out.get("dataset_config")} if out.has("dataset_config") else {}
    if not out.has("dataset_name"):
        put_training_data(out, [_dataset(out, item) for item in out.as_list("datasets")])
        put_validation_data(out, [], 0)
        return
    path = {"path": out.get("dataset_name")}
    split = {"split": out.get("dataset_train_split")} if out.has("dataset_train_split") else {}
    put_training_data(out, [path | split | subset])
    evaluates = out.get("eval_strategy", "no") != "no"
    put_validation_data(out, [path | {"split": out.get("dataset_test_split", "test")} | subset] if evaluates else [], 0)


def _put_sft_options(out: Translation) -> None:
    out.put("sft_args.max_seq_length", out.get("max_length", 1024))
    out.put("sft_args.length_handling", "truncate")
    if out.boolean("assistant_only_loss", False):
        out.put("sft_args.train_on", "assistant")
    elif out.boolean("completion_only_loss", False):
        out.put("sft_args.train_on", "completions")


def _dataset(out: Translation, item: Any) -> Values:
    values = item if isinstance(item, dict) else {"path": str(item)}
    source: Values = {"path": values.get("data_files") or values.get("path")}
    source |= {ours: values[theirs] for theirs, ours in (("split", "split"), ("name", "subset")) if values.get(theirs)}
    for key in values.keys() - {"path", "data_files", "split", "name"}:
        out.add_note("datasets", f"{key} of {source['path']} is not carried over: {values[key]}")
    return source
