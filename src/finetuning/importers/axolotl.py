"""Translate axolotl configs: SFT, and with `rl` DPO, IPO and KTO."""

from __future__ import annotations

from typing import Any

from finetuning.config.yaml.document import ConfigDocument
from finetuning.importers.shared_sections import (
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

_SAME_NAMES = """
    learning_rate weight_decay max_grad_norm seed deepspeed warmup_steps warmup_ratio logging_steps save_steps
    eval_steps eval_strategy save_strategy save_total_limit gradient_checkpointing gradient_checkpointing_kwargs
    output_dir max_steps fp16 tf32 neftune_noise_alpha adam_beta1 adam_beta2 adam_epsilon load_best_model_at_end
"""
KEYS: dict[str, str] = {
    **{key: f"training_args.{key}" for key in _SAME_NAMES.split()},
    "num_epochs": "training_args.num_train_epochs",
    "lr_scheduler": "training_args.lr_scheduler_type",
    "optimizer": "training_args.optim",
    "base_model": "run_conf.model",
    "tokenizer_config": "run_conf.tokenizer",
    "trust_remote_code": "run_conf.model_args.trust_remote_code",
    "revision_of_model": "run_conf.model_args.revision",
    "attn_implementation": "run_conf.model_args.attn_implementation",
    "sequence_len": "sft_args.max_seq_length",
    "sample_packing": "sft_args.packing",
    "mlflow_tracking_uri": "tracking.mlflow_server_uri",
    "mlflow_experiment_name": "tracking.experiment_name",
    "mlflow_run_name": "tracking.run_name",
    "hf_mlflow_log_artifacts": "tracking.hf_mlflow_log_artifacts",
}
"""Keys of axolotl and the dotted keys here."""

_OTHER_KEYS = """
    rl datasets test_datasets val_set_size chat_template micro_batch_size gradient_accumulation_steps eval_batch_size
    bf16 flash_attention sdp_attention train_on_inputs pad_to_sequence_len dataset_prepared_path strict evals_per_epoch
    rl_beta dpo_label_smoothing load_in_8bit load_in_4bit adapter lora_modules_to_save auto_resume_from_checkpoints
    saves_per_epoch dataset_processes lora_target_linear use_wandb use_tensorboard use_mlflow wandb_project wandb_name
    wandb_mode
"""
"""Keys that are read by name below, or change nothing about the result."""
_METHODS = {"sft": "sft", "dpo": "dpo", "ipo": "dpo", "kto": "kto"}
_FORMATS = {"chat_template": "messages", "completion": "text", "input_output": "input_output"}
_ALPACA_PROMPT = (
    "Below is an instruction that describes a task"
    "{{ ', paired with an input that provides further context' if input is defined and input else '' }}."
    r" Write a response that appropriately completes the request.\n\n### Instruction:\n{{instruction}}\n\n"
    "{{ '### Input:\\n' + input + '\\n\\n' if input is defined and input else '' }}"
    r"### Response:\n{{output}}"
)
"""The text that axolotl makes of a row of `type: alpaca`, the prompt of Stanford's Alpaca."""
_DATASET_KEYS = {"path", "data_files", "type", "split", "name", "field_messages", "field", "ds_type"}


def from_axolotl(document: ConfigDocument, processes: int) -> Translation:
    """Translate an axolotl config.

    Raises:
        ConfigError: the config has errors, or uses a method or an adapter that is not supported.
    """
    out = Translation(document)
    method = put_method(out, "rl", str(out.get("rl", "sft")), _METHODS)
    used = set(_OTHER_KEYS.split())
    peft_type = peft_type_of(out, "adapter", {"lora": "LORA", "qlora": "LORA"}, default="")
    used |= put_peft(out, peft_type, all_linear=out.boolean("lora_target_linear", False))
    used |= put_keys(out, KEYS, method)
    if method != "sft":
        _put_preference_options(out, method)
        used |= {"sequence_len"}
    in_4bit = out.get("adapter") == "qlora" or out.boolean("load_in_4bit", False)
    put_quantization(out, 4 if in_4bit else 8 if out.boolean("load_in_8bit", False) else 0)
    put_batch_size(out, out.get("micro_batch_size", 1), processes)
    _put_training_options(out)
    _put_trackers(out)
    put_training_data(out, [_dataset(out, item) for item in out.as_list("datasets")])
    validation = [_dataset(out, item) for item in out.as_list("test_datasets")]
    put_validation_data(out, validation, out.get("val_set_size", 0))
    put_chat_template(out, str(out.get("chat_template", "tokenizer_default")))
    if method == "sft":
        out.put("sft_args.train_on", "all" if out.boolean("train_on_inputs", False) else "assistant")
    return finish(out, used)


def _put_preference_options(out: Translation, method: str) -> None:
    if out.get("rl") == "ipo":
        out.put("training_args.loss_type", ["ipo"])
    out.put("training_args.beta", out.get("rl_beta"))
    out.put("training_args.label_smoothing", out.get("dpo_label_smoothing") if method == "dpo" else None)
    out.put("training_args.max_length", out.get("sequence_len"))


def _put_training_options(out: Translation) -> None:
    if isinstance(out.get("gradient_checkpointing"), str):
        out.add_note("gradient_checkpointing", f"{out.get('gradient_checkpointing')} is read as true")
        out.put("training_args.gradient_checkpointing", True)
    bf16 = out.get("bf16")
    if bf16 in (True, "auto", "full", "true"):
        out.put("training_args.bf16", True)
        if bf16 == "auto":
            out.add_note("bf16", "auto is read as true; set it to false on devices without bfloat16")
    if out.boolean("flash_attention", False):
        out.put("run_conf.model_args.attn_implementation", "flash_attention_2")
    if out.boolean("auto_resume_from_checkpoints", False):
        out.put("run_conf.resume_from_checkpoint", "auto")
    for key, action in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        if out.has(key):
            out.put(f"training_args.{action}_strategy", "epoch")
            if out.get(key) != 1:
                out.add_note(
                    key,
                    f"{out.get(key)} per epoch becomes {action}_strategy: epoch, once per epoch; or set {action}_steps",
                )


def _put_trackers(out: Translation) -> None:
    uses_wandb = out.boolean("use_wandb", out.has("wandb_project")) and out.get("wandb_mode") != "disabled"
    uses_tensorboard = out.boolean("use_tensorboard", False)
    trackers = ["wandb"] * uses_wandb + ["tensorboard"] * uses_tensorboard
    out.put("tracking.trackers", trackers or None, "wandb_project")
    if uses_wandb:
        project, name = out.get("wandb_project"), out.get("wandb_name")
        out.put("tracking.experiment_name", out.get("mlflow_experiment_name", project), "wandb_project")
        out.put("tracking.run_name", out.get("mlflow_run_name", name), "wandb_name")
        if out.get("wandb_mode") == "offline":
            out.add_note("wandb_mode", "set the environment variable WANDB_MODE=offline")


def _dataset(out: Translation, item: Any) -> Values:
    if not isinstance(item, dict):
        out.add_note("datasets", f"{item!r} is not a dataset")
        return {"path": str(item)}
    kind = str(item.get("type", "chat_template"))
    source: Values = {"path": item.get("data_files") or item.get("path")}
    source |= {ours: item[theirs] for theirs, ours in (("split", "split"), ("name", "subset")) if item.get(theirs)}
    if kind == "alpaca":
        # Plain text, as there: our format of this name makes a chat of the row.
        source["data_formatter_template"] = _ALPACA_PROMPT
        if not out.boolean("train_on_inputs", False):
            source["response_template"] = r"### Response:\n"
    elif kind in _FORMATS:
        source["format"] = _FORMATS[kind]
    else:
        out.add_note("datasets", f"type {kind} is not carried over; the row format is auto-detected")
    if item.get("field_messages", "messages") != "messages":
        source["columns"] = {item["field_messages"]: "messages"}
    if item.get("field") and kind == "completion":
        source["dataset_text_field"] = item["field"]
    for key in item:
        if key not in _DATASET_KEYS:
            out.add_note("datasets", f"{key} of {source['path']} is not carried over")
    return source
