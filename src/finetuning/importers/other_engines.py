"""Configs of axolotl, LLaMA-Factory and TRL to our YAML: the common keys, and a list of the rest.

The keys of axolotl, LLaMA-Factory and TRL that have a counterpart in our YAML, and its path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from finetuning.config.yaml.document import ConfigDocument
from finetuning.errors import ConfigError
from finetuning.importers.translation import Translation

_CORE = """
    num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps warmup_ratio weight_decay
    max_grad_norm  optim seed bf16 fp16 gradient_checkpointing gradient_checkpointing_kwargs logging_steps
    logging_strategy  logging_first_step eval_strategy eval_steps save_strategy save_steps save_total_limit
    load_best_model_at_end  metric_for_best_model greater_is_better adam_beta1 adam_beta2 adam_epsilon
    neftune_noise_alpha ddp_timeout  dataloader_num_workers deepspeed output_dir report_to run_name
    use_liger_kernel
"""
_TRAINING = {key: f"training_args.{key}" for key in _CORE.split()}

AXOLOTL: dict[str, str] = {
    **{key: f"training_args.{key}" for key in ("learning_rate", "weight_decay", "max_grad_norm", "seed", "deepspeed")},
    **{key: f"training_args.{key}" for key in ("warmup_steps", "warmup_ratio", "logging_steps", "save_steps")},
    **{key: f"training_args.{key}" for key in ("eval_steps", "eval_strategy", "save_strategy", "save_total_limit")},
    **{
        key: f"training_args.{key}" for key in ("gradient_checkpointing", "gradient_checkpointing_kwargs", "output_dir")
    },
    **{key: f"training_args.{key}" for key in ("max_steps", "fp16", "tf32", "neftune_noise_alpha", "adam_beta1")},
    **{key: f"training_args.{key}" for key in ("adam_beta2", "adam_epsilon", "load_best_model_at_end")},
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
LLAMA_FACTORY: dict[str, str] = {
    **_TRAINING,
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
TRL: dict[str, str] = {
    **_TRAINING,
    "model_name_or_path": "run_conf.model",
    "model_revision": "run_conf.model_args.revision",
    "trust_remote_code": "run_conf.model_args.trust_remote_code",
    "attn_implementation": "run_conf.model_args.attn_implementation",
    "torch_dtype": "run_conf.model_args.dtype",
    "dtype": "run_conf.model_args.dtype",
    "resume_from_checkpoint": "run_conf.resume_from_checkpoint",
    "packing": "sft_args.packing",
}
DPO = {key: f"training_args.{key}" for key in ["label_smoothing", "loss_weights", "precompute_ref_log_probs"]}
"""What TRL's DPO takes besides, and ours by the same names."""


_SFT_ONLY = "sft_args."
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_ATTENTION = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "sdpa": "sdpa", "disabled": "eager"}
_LLAMA_FACTORY_LORA = {"r": 8, "target_modules": "all-linear"}
_TRL_LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
_TEMPLATES = {"chatml": "chat-ml", "tokenizer_default": "keep-original", "qwen": "chat-ml"}
_AXOLOTL_FORMATS = {
    "chat_template": "messages",
    "alpaca": "alpaca",
    "completion": "text",
    "input_output": "input_output",
}


def detect_engine(document: ConfigDocument) -> str:
    """The engine whose config has these keys.

    Raises:
        ConfigError: none is told by them.
    """
    keys = set(document.values)
    if "base_model" in keys:
        return "axolotl"
    if keys & {"finetuning_type", "stage", "cutoff_len"}:
        return "llama-factory"
    if keys & {"dataset_name", "datasets", "use_peft"} and "model_name_or_path" in keys:
        return "trl"
    raise ConfigError(
        f"{document.file}: the keys do not tell which engine this is for",
        hint="Say it: --from fms-hf-tuning, axolotl, llama-factory or trl.",
    )


def from_axolotl(document: ConfigDocument, processes: int) -> Translation:
    """An axolotl config: SFT, or DPO, KTO and their like by `rl`."""
    out = Translation(document)
    method = _method(out, "rl", str(out.get("rl", "sft")), {"sft": "sft", "dpo": "dpo", "ipo": "dpo", "kto": "kto"})
    if out.get("rl") == "ipo":
        out.put("training_args.loss_type", ["ipo"])
    used = {"rl", "datasets", "test_datasets", "val_set_size", "chat_template", "micro_batch_size"}
    used |= {"gradient_accumulation_steps", "eval_batch_size", "bf16", "flash_attention", "sdp_attention"}
    used |= {"train_on_inputs", "pad_to_sequence_len", "dataset_prepared_path", "strict", "evals_per_epoch"}
    used |= {"rl_beta", "dpo_label_smoothing"}
    used |= {"load_in_8bit", "load_in_4bit", "adapter", "lora_modules_to_save", "auto_resume_from_checkpoints"}
    used |= {"saves_per_epoch", "dataset_processes"}
    used |= _peft(out, {"lora": "LORA", "qlora": "LORA"}, "adapter", linear=out.truth("lora_target_linear", False))
    used |= {"lora_target_linear"}
    used |= _mapped(out, AXOLOTL, method)
    if method != "sft":
        out.put("training_args.beta", out.get("rl_beta"))
        out.put("training_args.label_smoothing", out.get("dpo_label_smoothing") if method == "dpo" else None)
        out.put("training_args.max_length", out.get("sequence_len"))
        used |= {"sequence_len"}
    if isinstance(out.get("gradient_checkpointing"), str):
        out.note("gradient_checkpointing", f"{out.get('gradient_checkpointing')} is taken for true")
        out.put("training_args.gradient_checkpointing", True)
    in_4bit = out.get("adapter") == "qlora" or out.truth("load_in_4bit", False)
    _quantise(out, 4 if in_4bit else 8 if out.truth("load_in_8bit", False) else 0)
    _batch(out, out.get("micro_batch_size", 1), processes)
    bf16 = out.get("bf16")
    if bf16 in (True, "auto", "full", "true"):
        out.put("training_args.bf16", True)
        if bf16 == "auto":
            out.note("bf16", "auto is taken for true; set it to false where the device has no bfloat16")
    if out.truth("flash_attention", False):
        out.put("run_conf.model_args.attn_implementation", "flash_attention_2")
    if out.truth("auto_resume_from_checkpoints", False):
        out.put("run_conf.resume_from_checkpoint", "auto")
    for key, action in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        if out.has(key):
            out.put(f"training_args.{action}_strategy", "epoch")
            if out.get(key) != 1:
                out.note(key, f"{out.get(key)} times a pass: {action}_strategy: epoch is once; or set {action}_steps")
    _datasets(out, [_axolotl_dataset(out, one) for one in out.items("datasets")])
    size = out.get("val_set_size", 0)
    _validation(out, [_axolotl_dataset(out, one) for one in out.items("test_datasets")], size)
    _template(out, str(out.get("chat_template", "tokenizer_default")))
    if method == "sft":
        out.put("sft_args.train_on", "all" if out.truth("train_on_inputs", False) else "assistant")
    return _rest(out, used)


def _axolotl_dataset(out: Translation, one: Any) -> dict[str, Any]:
    if not isinstance(one, dict):
        out.note("datasets", f"{one!r} is no dataset")
        return {"path": str(one)}
    kind = str(one.get("type", "chat_template"))
    source: dict[str, Any] = {"path": one.get("data_files") or one.get("path")}
    source |= {ours: one[theirs] for theirs, ours in (("split", "split"), ("name", "subset")) if one.get(theirs)}
    source |= {"format": _AXOLOTL_FORMATS[kind]} if kind in _AXOLOTL_FORMATS else {}
    if kind not in _AXOLOTL_FORMATS:
        out.note("datasets", f"type {kind} is left out: the shape of the rows is told from them")
    if one.get("field_messages", "messages") != "messages":
        source["columns"] = {one["field_messages"]: "messages"}
    if one.get("field") and kind == "completion":
        source["dataset_text_field"] = one["field"]
    known = {"path", "data_files", "type", "split", "name", "field_messages", "field", "ds_type"}
    for key in one:
        if key not in known:
            out.note("datasets", f"{key} of {source['path']} is not carried over")
    return source


def from_llama_factory(document: ConfigDocument, processes: int) -> Translation:
    """A LLaMA-Factory config. Its datasets are names of its own list: the paths are left to fill in."""
    out = Translation(document)
    stages = {"sft": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward"}
    method = _method(out, "stage", str(out.get("stage", "sft")), stages)
    used = {"stage", "do_train", "dataset", "eval_dataset", "dataset_dir", "val_size", "template", "pref_beta"}
    used |= {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
    used |= {"overwrite_output_dir", "overwrite_cache", "preprocessing_num_workers", "plot_loss", "train_on_prompt"}
    used |= {"max_samples", "quantization_bit", "quantization_method", "finetuning_type", "adapter_name_or_path"}
    used |= _peft(
        out,
        {"lora": "LORA", "full": "NO_PEFT"},
        "finetuning_type",
        linear=False,
        rank="lora_rank",
        defaults=_LLAMA_FACTORY_LORA,
    )
    if out.get("finetuning_type", "lora") == "lora" and not out.has("lora_alpha"):
        out.put("peft_conf.peft_kwargs.lora_alpha", 2 * out.number("lora_rank", 8))
    used |= _mapped(out, LLAMA_FACTORY, method)
    used |= {"double_quantization", "flash_attn", "disable_gradient_checkpointing"}
    if method != "sft":
        out.put("training_args.beta", out.get("pref_beta"))
        out.put("training_args.loss_type", [out.get("pref_loss")] if method == "dpo" and out.has("pref_loss") else None)
        out.put("training_args.max_length", out.get("cutoff_len"))
        used |= {"cutoff_len"} | ({"pref_loss"} if method == "dpo" else set())
    out.put("training_args.gradient_checkpointing", not out.truth("disable_gradient_checkpointing", False))
    out.put("run_conf.model_args.attn_implementation", _ATTENTION.get(str(out.get("flash_attn"))))
    _quantise(out, out.get("quantization_bit", 0), double=out.truth("double_quantization", True))
    if out.has("adapter_name_or_path"):
        out.values["peft_conf"] = {"peft_type": "PRETRAINED_PEFT", "name_or_path": out.get("adapter_name_or_path")}
    _batch(out, out.get("per_device_train_batch_size", 8), processes)
    names = [name.strip() for one in out.items("dataset") for name in str(one).split(",")]
    limit = {"max_rows": out.get("max_samples")} if out.has("max_samples") else {}
    _datasets(out, [{"path": _listed(out, name)} | limit for name in names])
    others = [name.strip() for one in out.items("eval_dataset") for name in str(one).split(",")]
    _validation(out, [{"path": _listed(out, name)} for name in others], out.get("val_size", 0))
    _template(out, str(out.get("template", "tokenizer_default")))
    if method == "sft":
        out.put("sft_args.train_on", "all" if out.truth("train_on_prompt", False) else "assistant")
    return _rest(out, used)


def _listed(out: Translation, name: str) -> str:
    out.note("dataset", f"{name} is a name of dataset_info.json; put the path of its file in its place")
    return name


def from_trl(document: ConfigDocument, processes: int) -> Translation:
    """The YAML of `trl sft`, `trl dpo` and their like; which of them, the keys tell, and else SFT is taken."""
    out = Translation(document)
    told = "dpo" if out.has("beta") or out.get("loss_type", "nll") not in ("nll", "dft") else "sft"
    out.put("method", told)
    if told == "dpo":
        out.note("method", "DPO, as beta or loss_type tell")
    used = {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "datasets", "use_peft"}
    used |= {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "beta"}
    used |= {"loss_type", "max_length", "load_in_4bit", "load_in_8bit", "assistant_only_loss", "completion_only_loss"}
    used |= {"bnb_4bit_quant_type", "use_bnb_nested_quant", "lora_task_type"}
    if out.truth("use_peft", False):
        used |= _peft(out, {}, "", linear=False, defaults=_TRL_LORA)
    else:
        out.put("peft_conf.peft_type", "NO_PEFT")
    used |= _mapped(out, TRL | (DPO if told == "dpo" else {}), told)
    bits = 4 if out.truth("load_in_4bit", False) else 8 if out.truth("load_in_8bit", False) else 0
    _quantise(out, bits, double=out.truth("use_bnb_nested_quant", False), kind=out.get("bnb_4bit_quant_type", "nf4"))
    for key, value in (("learning_rate", 1e-6 if told == "dpo" else 2e-5), ("gradient_checkpointing", True)):
        out.put(f"training_args.{key}", out.get(key, value))
    out.put("training_args.bf16", out.truth("bf16", not out.truth("fp16", False)))
    _batch(out, out.get("per_device_train_batch_size", 8), processes)
    split = {"split": out.get("dataset_train_split")} if out.has("dataset_train_split") else {}
    subset = {"subset": out.get("dataset_config")} if out.has("dataset_config") else {}
    named = [{"path": out.get("dataset_name")} | split | subset] if out.has("dataset_name") else []
    _datasets(out, named or [_trl_dataset(out, one) for one in out.items("datasets")])
    wants = out.get("eval_strategy", "no") != "no" and out.has("dataset_name")
    held = [{"path": out.get("dataset_name"), "split": out.get("dataset_test_split", "test")} | subset] if wants else []
    _validation(out, held, 0)
    _template(out, "tokenizer_default")
    if told == "dpo":
        out.put("training_args.beta", out.get("beta"))
        out.put("training_args.loss_type", out.get("loss_type"))
        out.put("training_args.max_length", out.get("max_length", 1024))
    else:
        out.put("sft_args.max_seq_length", out.get("max_length", 1024))
        out.put("sft_args.length_handling", "truncate")
        trained = {"assistant": "assistant_only_loss", "completions": "completion_only_loss"}
        out.put("sft_args.train_on", next((ours for ours, key in trained.items() if out.truth(key, False)), None))
    return _rest(out, used)


def _trl_dataset(out: Translation, one: Any) -> dict[str, Any]:
    told = one if isinstance(one, dict) else {"path": str(one)}
    source = {"path": told.get("data_files") or told.get("path")}
    source |= {ours: told[theirs] for theirs, ours in (("split", "split"), ("name", "subset")) if told.get(theirs)}
    for key in told.keys() - {"path", "data_files", "split", "name"}:
        out.note("datasets", f"{key} of {source['path']} is not carried over: {told[key]}")
    return source


def _method(out: Translation, key: str, given: str, known: Mapping[str, str]) -> str:
    if given not in known:
        out.wrong(key, f"{given} cannot be imported; these can: {', '.join(known)}")
    method = known.get(given, "sft")
    out.put("method", method)
    return method


def _mapped(out: Translation, table: Mapping[str, str], method: str) -> set[str]:
    for key, path in table.items():
        value = out.get(key)
        if value is not None and _fits(path, method):
            out.put(path, _DTYPES.get(str(value), value) if path.endswith(".dtype") else value)
    return {key for key, path in table.items() if _fits(path, method)}


def _fits(path: str, method: str) -> bool:
    return method == "sft" or not path.startswith(_SFT_ONLY)


def _peft(
    out: Translation,
    kinds: Mapping[str, str],
    key: str,
    *,
    linear: bool,
    rank: str = "lora_r",
    defaults: Mapping[str, Any] | None = None,
) -> set[str]:
    names = {rank: "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_dora": "use_dora"}
    names |= {"use_rslora": "use_rslora", "lora_target": "target_modules", "lora_target_modules": "target_modules"}
    names |= {"additional_target": "modules_to_save", "lora_modules_to_save": "modules_to_save"}
    names |= {"peft_use_dora": "use_dora", "peft_use_rslora": "use_rslora"}
    kind = kinds.get(str(out.get(key, "lora" if key == "finetuning_type" else "")), "NO_PEFT") if key else "LORA"
    if key and out.has(key) and out.get(key) not in kinds:
        out.wrong(key, f"{out.get(key)} cannot be imported; these can: {', '.join(kinds)}")
    out.put("peft_conf.peft_type", kind)
    if kind == "NO_PEFT":
        return set(names)
    kwargs = dict(defaults or {}) | {ours: out.get(theirs) for theirs, ours in names.items() if out.has(theirs)}
    targets = kwargs.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        kwargs["target_modules"] = [name.strip() for name in targets.split(",")]
    elif linear or targets in ("all", "all-linear", ["all-linear"]):
        kwargs["target_modules"] = "all-linear"
    out.put("peft_conf.peft_kwargs", kwargs)
    return set(names)


def _quantise(out: Translation, bits: Any, *, double: bool = True, kind: str = "nf4") -> None:
    if bits == 4:
        out.values["quant_conf"] = {
            "quantization_type": "bits-and-bytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_compute_dtype": "float16" if out.truth("fp16", False) else "bfloat16",
            "bnb_4bit_use_double_quant": double,
        }
    elif bits == 8:
        out.values["quant_conf"] = {"quantization_type": "bits-and-bytes", "load_in_8bit": True}
    elif bits:
        out.note("quantization_bit", f"{bits} is not carried over, only 4 and 8; see quant_conf")


def _batch(out: Translation, per_device: Any, processes: int) -> None:
    steps = out.number("gradient_accumulation_steps", 1)
    if isinstance(per_device, bool) or not isinstance(per_device, int) or per_device < 1:
        raise ConfigError(f"the per-device batch must be a whole number from 1, not {per_device!r}")
    out.put("batchsize_conf.total_train_batch_size", per_device * steps * processes)
    out.put("batchsize_conf.max_per_device_train_batch_size", per_device)
    out.put(
        "batchsize_conf.per_device_eval_batch_size", out.get("per_device_eval_batch_size", out.get("eval_batch_size"))
    )


def _datasets(out: Translation, sources: list[dict[str, Any]]) -> None:
    if not sources:
        out.note("datasets", "none is named; put the path of your file in its place")
        sources = [{"path": "train.jsonl"}]
    out.put("data_conf.training_data", {"type": "CONCATENATION", "datasets": sources})


def _validation(out: Translation, sources: list[dict[str, Any]], share: Any) -> None:
    data: dict[str, Any] = {"type": "NONE"}
    if sources:
        data = {"type": "CONCATENATION", "datasets": sources}
    elif isinstance(share, float) and 0 < share < 1:
        data = {"type": "AUTO_SPLIT", "ratio": share}
    elif share:
        out.note("val_set_size", f"{share} rows: a share of the rows is needed instead, or a file of their own")
    out.put("data_conf.validation_data", data)


def _template(out: Translation, name: str) -> None:
    template = _TEMPLATES.get(name)
    if template is None:
        out.note("template", f"{name} is left out: the tokenizer's own chat template is used")
    out.put("data_conf.chat_template_name", template or "keep-original")


def _rest(out: Translation, used: set[str]) -> Translation:
    for key, value in out.source.values.items():
        if key not in used and value is not None and value not in ("", [], {}):
            out.note(str(key), f"is not carried over: {value}")
    return out.finished()


ENGINES: dict[str, Callable[[ConfigDocument, int], Translation]] = {
    "axolotl": from_axolotl,
    "llama-factory": from_llama_factory,
    "trl": from_trl,
}
"""For each engine, the function that reads its config."""
