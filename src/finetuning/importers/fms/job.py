"""Translate a JSON job of fms-hf-tuning: every key keeps its meaning, or is rejected with the reason."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from finetuning.config.pretrained_config import quantization_method, read_pretrained_config
from finetuning.config.sections.tracking import TRACKER_NAMES
from finetuning.config.yaml.document import ConfigDocument
from finetuning.importers.fms import keys
from finetuning.importers.fms.data_section import put_data, shortest_handler_limit
from finetuning.importers.translation import Readers, Translation

_TRACKERS = ("file_logger", "mlflow", "aim", "clearml", "hf_resource_scanner", "none")
_TRACKER_OPTIONS = (
    "clearml_project",
    "clearml_task",
    "scanner_output_filename",
    "run_uri_export_path",
)
_DTYPE_ALIASES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}


def from_fms(document: ConfigDocument, processes: int) -> Translation:
    """Translate a job, reading its data config and the fields of the installed trainer."""
    return to_experiment(document, default_readers(), processes=processes)


def default_readers() -> Readers:
    """Return the readers that open data config files and inspect the installed trainer."""
    from finetuning.config.sections.experiment import SFTExperiment
    from finetuning.config.validation.library_fields import installed_fields
    from finetuning.importers.fms.data_config import read_data_config

    def training_fields() -> Collection[str]:
        return installed_fields().trainer_fields(SFTExperiment.trainer_config) or frozenset()

    return Readers(read_data_config, training_fields)


def to_experiment(job: ConfigDocument, readers: Readers, *, processes: int = 1) -> Translation:
    """Translate a job to an SFT experiment, with notes on what is not carried over.

    Args:
        processes: number of processes of the whole job. One optimizer step trains on per-device batch size x
            accumulation steps x processes rows.

    Raises:
        ConfigError: the job has unknown keys or unsupported settings; all of them are listed.
    """
    out = Translation(job)
    out.reject_unknown_keys(keys.SUPPORTED | set(readers.training_fields()))
    _reject_unsupported(out)
    out.put("method", "sft")
    put_data(out, readers)
    _put_batch_sizes(out, processes)
    _put_training(out, readers.training_fields())
    _put_resume(out)
    _put_peft(out)
    _put_quantization(out)
    _put_kernels(out)
    _put_model(out)
    _put_length(out)
    _put_multipack(out, processes)
    _put_trackers(out)
    out.put("trainer_controller", out.get("trainer_controller_config_file"))
    out.put("logging_dir", out.get("logging_dir"))
    out.put("save_model_dir", out.get("save_model_dir"))
    return out.finish()


def _reject_unsupported(out: Translation) -> None:
    """Add an error for each unsupported key, unless it is switched off: jobs often state every default."""
    for key, reason in keys.UNSUPPORTED.items():
        if out.has(key) and str(out.get(key)).lower() not in keys.OFF:
            out.add_error(key, f"not supported: {reason}")
    for key, required in keys.DEPENDENT.items():
        if out.has(key):
            out.add_note(key, f"has no effect without {required}")


def _put_batch_sizes(out: Translation, processes: int) -> None:
    per_device = out.positive_int("per_device_train_batch_size", keys.BATCH_SIZE)
    accumulation = out.positive_int("gradient_accumulation_steps", 1)
    if out.values.get("data_conf", {}).get("streaming") and processes > 1:
        # fms-hf-tuning splits such a batch over the processes when the data is streamed.
        out.add_note(
            "per_device_train_batch_size", f"with streaming, {per_device} rows are split over all {processes} processes"
        )
        per_device, rest = divmod(per_device, processes)
        if rest or not per_device:
            out.add_error(
                "per_device_train_batch_size", f"with streaming, must be a multiple of the {processes} processes"
            )
    out.put("batchsize_conf.total_train_batch_size", per_device * accumulation * processes)
    out.put("batchsize_conf.max_per_device_train_batch_size", per_device)
    out.put(
        "batchsize_conf.per_device_eval_batch_size", out.positive_int("per_device_eval_batch_size", keys.BATCH_SIZE)
    )


def _put_training(out: Translation, installed: Collection[str]) -> None:
    if not out.has("output_dir"):
        out.add_error("output_dir", "is required")
    out.put("training_args.output_dir", out.get("output_dir"))
    epochs = out.get("num_train_epochs", 3.0)
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or epochs <= 0:
        out.add_error("num_train_epochs", f"must be a positive number, not {epochs!r}")
    aliases = {"eval_strategy": "evaluation_strategy"}
    for key, value in keys.TRAINING_DEFAULTS.items():
        if not out.has(aliases.get(key, key)):
            out.put(f"training_args.{key}", out.get(key, value))
    placed_elsewhere = keys.DATA | keys.MODEL | keys.RUN | keys.TRACKING | keys.LORA
    for key in out.source.values:
        if (key in keys.TRAINING or key in installed) and key not in placed_elsewhere and out.has(key):
            out.put(f"training_args.{key}", out.get(key))
    strategy = out.get("eval_strategy", out.get("evaluation_strategy", "no"))
    has_validation_data = out.has("validation_data_path") or out.has("data_config_path")
    if strategy != "no" and not has_validation_data:
        out.add_error("eval_strategy", f"{strategy} requires validation_data_path")


def _put_resume(out: Translation) -> None:
    resume = out.get("resume_from_checkpoint", "auto")
    if str(resume).lower() in ("true", "auto"):
        resume = "auto"
    elif str(resume).lower() == "false":
        resume = False
        out.add_note("resume_from_checkpoint", "an output_dir with an earlier run is an error, it is not overwritten")
    out.put("run_conf.resume_from_checkpoint", resume)


def _put_peft(out: Translation) -> None:
    method = _peft_method(out)
    if method in ("lora", "alora"):
        _put_lora(out, method)
    elif method == "pt":
        _put_prompt_tuning(out)
    elif method == "none":
        out.put("peft_conf.peft_type", "NO_PEFT")
    else:
        out.add_error("peft_method", f"must be lora, alora, pt or None, not {out.get('peft_method')!r}")
    used = {"lora": keys.LORA, "alora": keys.LORA, "pt": set(keys.PROMPT_DEFAULTS)}.get(method, set())
    for key in sorted((keys.LORA | set(keys.PROMPT_DEFAULTS)) - set(used)):
        if out.has(key):
            out.add_note(key, f"has no effect with peft_method {method}")


def _peft_method(out: Translation) -> str:
    return str(out.get("peft_method", "none")).lower()


def _put_lora(out: Translation, method: str) -> None:
    kwargs: dict[str, Any] = {key: out.get(key, default) for key, default in keys.LORA_DEFAULTS.items()}
    kwargs |= {key: out.get(key) for key in sorted(keys.LORA - set(keys.LORA_DEFAULTS)) if out.has(key)}
    modules = out.as_list("target_modules")
    # PEFT accepts all-linear only as a string; in a list it would adapt nothing but the other names. Any other string
    # is a pattern that must match full module names.
    kwargs["target_modules"] = "all-linear" if "all-linear" in modules else out.get("target_modules")
    if modules and "all-linear" in modules and len(modules) > 1:
        out.add_note(
            "target_modules", "all-linear covers all layers but the output layer; the other names are left out"
        )
    if not modules:
        del kwargs["target_modules"]
    if method == "alora":
        if not out.get("alora_invocation_string"):
            out.add_error("alora_invocation_string", "is required with peft_method: alora")
        out.put("peft_conf.alora_invocation_string", out.get("alora_invocation_string"))
    out.put("peft_conf.peft_type", "LORA")
    out.put("peft_conf.peft_kwargs", kwargs)


def _put_prompt_tuning(out: Translation) -> None:
    out.put("peft_conf.peft_type", "PROMPT_TUNING")
    kwargs = {key: out.get(key, default) for key, default in keys.PROMPT_DEFAULTS.items()}
    init = str(kwargs["prompt_tuning_init"]).upper()
    if init not in ("TEXT", "RANDOM"):
        out.add_error("prompt_tuning_init", f"must be TEXT or RANDOM, not {init}")
    kwargs["prompt_tuning_init"] = init
    if init == "TEXT":
        kwargs["tokenizer_name_or_path"] = out.get("tokenizer_name_or_path", out.get("model_name_or_path"))
    else:
        del kwargs["prompt_tuning_init_text"]
    out.put("peft_conf.peft_kwargs", kwargs)


def _put_quantization(out: Translation) -> None:
    gptq, nf4 = out.as_list("auto_gptq"), out.as_list("bnb_qlora") or out.as_list("bitsandbytes")
    if gptq and nf4:
        out.add_error("auto_gptq", "cannot be combined with bnb_qlora")
    if (gptq or nf4) and _peft_method(out) != "lora":
        out.add_error("auto_gptq" if gptq else "bnb_qlora", "requires peft_method: lora")
    if gptq:
        _check_gptq(out, gptq[0])
    if nf4:
        if nf4[0] not in ("nf4", "fp4"):
            out.add_error("bnb_qlora", "must be nf4 or fp4")
        dtype = str(out.get("torch_dtype", "bfloat16")).removeprefix("torch.")
        out.values["quant_conf"] = {
            "quantization_type": "bits-and-bytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": nf4[0],
            "bnb_4bit_compute_dtype": dtype,
        }
        if len(nf4) > 1:
            out.add_note("bnb_qlora", "the second value, no_peft_model, has no effect")


def _check_gptq(out: Translation, kernel: object) -> None:
    if kernel != "triton_v2":
        out.add_error("auto_gptq", 'must be ["triton_v2"]')
    if str(out.get("torch_dtype", "")).removeprefix("torch.") != "float16" or not out.boolean("fp16", False):
        out.add_error("auto_gptq", "requires torch_dtype: float16 and fp16: true")
    model = str(out.get("model_name_or_path"))
    if read_pretrained_config(model) is not None and quantization_method(model) != "gptq":
        out.add_error("auto_gptq", f"requires a GPTQ checkpoint; {model} is not quantized with GPTQ")
    out.add_note(
        "auto_gptq", "uses gptqmodel and the quantization config of the checkpoint: pip install 'finetuning[gptq]'"
    )


def _put_kernels(out: Translation) -> None:
    fused = out.as_list("fused_lora")
    if fused:
        if fused[0] not in ("auto_gptq", "bitsandbytes") or len(fused) < 2 or not _is_true(fused[1]):
            out.add_error("fused_lora", 'must be ["auto_gptq", true] or ["bitsandbytes", true]')
        elif not (out.has("auto_gptq") or out.has("bnb_qlora") or out.has("bitsandbytes")):
            out.add_error("fused_lora", "requires a quantized base model: auto_gptq or bnb_qlora")
        out.add_note("fused_lora", "LoRA runs without fused kernels: the same result, slower")
    fast = out.as_list("fast_kernels")
    if fast:
        if len(fast) != 3:
            out.add_error("fast_kernels", "must be a list of three booleans: loss, rms, rope")
            return
        names = ("cross_entropy", "rms_norm", "rope")
        switches = {name: _is_true(value) for name, value in zip(names, fast, strict=True)}
        out.put("training_args.use_liger_kernel", True)
        out.put("training_args.liger_kernel_config", switches | {"fused_linear_cross_entropy": False, "swiglu": False})
        out.add_note("fast_kernels", "uses Liger kernels: pip install 'finetuning[liger]'")


def _is_true(value: object) -> bool:
    return str(value).lower() == "true"


def _put_model(out: Translation) -> None:
    model = out.get("model_name_or_path")
    if not isinstance(model, str):
        out.add_error("model_name_or_path", "is required: a path or a hub id")
    out.put("run_conf.model", model)
    if out.get("tokenizer_name_or_path") != model:
        out.put("run_conf.tokenizer", out.get("tokenizer_name_or_path"))
    dtype = str(out.get("torch_dtype", "bfloat16")).removeprefix("torch.")
    out.put("run_conf.model_args.dtype", _DTYPE_ALIASES.get(dtype, dtype))
    out.put("run_conf.model_args.cache_dir", out.get("cache_dir"))
    if not out.boolean("use_flash_attn", True):
        out.put("run_conf.model_args.attn_implementation", "sdpa")
    else:
        out.put("run_conf.model_args.attn_implementation", out.get("flash_attn_implementation"))
        if not out.has("flash_attn_implementation"):
            out.add_note(
                "use_flash_attn",
                "FlashAttention is used where it is installed and verified on the model; otherwise torch's sdpa, which"
                " has its own flash kernels",
            )
    if out.positive_int("embedding_size_multiple_of", 1) != 1:
        out.add_note("embedding_size_multiple_of", "has no effect: the vocabulary grows by the new tokens only")
    if out.boolean("enable_reduce_loss_sum", False):
        out.add_note("enable_reduce_loss_sum", "has no effect: the loss is the mean over all tokens of a step")


def _put_length(out: Translation) -> None:
    limit = out.positive_int("max_seq_length", keys.MAX_SEQ_LENGTH)
    out.put("sft_args.max_seq_length", shortest_handler_limit(out, limit) if out.has("data_config_path") else limit)
    out.put("sft_args.length_handling", "truncate")
    packing, padding_free = out.boolean("packing", False), out.as_list("padding_free")
    if packing:
        out.put("sft_args.packing", True)
    if padding_free:
        if padding_free != ["huggingface"]:
            out.add_error("padding_free", 'must be ["huggingface"]')
        if packing:
            out.add_error("padding_free", "cannot be combined with packing: true")
        out.put("sft_args.batching", "padding-free")


def _put_multipack(out: Translation, processes: int) -> None:
    """Set balanced sampling. fms-hf-tuning instead fills each step with packs of an average batch's tokens."""
    if not out.has("multipack"):
        return
    if not out.has("padding_free"):
        out.add_error("multipack", "requires padding_free")
    if out.values.get("data_conf", {}).get("streaming"):
        out.add_error("multipack", "cannot be combined with streaming")
    if processes == 1:
        out.add_note("multipack", "has no effect with one process; fms-hf-tuning requires several")
        return
    out.put("training_args.train_sampling_strategy", "batch_rebalance")
    out.add_note(
        "multipack",
        "each step trains on as many rows as without it, balanced by tokens over the processes; in fms-hf-tuning the"
        " number of rows varies by step, and rows longer than an average batch are dropped",
    )


def _put_trackers(out: Translation) -> None:
    trackers = out.as_list("trackers") or ["file_logger"]
    for tracker in trackers:
        if tracker not in {*_TRACKERS, *TRACKER_NAMES}:
            out.add_error("trackers", f"unknown tracker {tracker!r}; supported: {', '.join(_TRACKERS[:-1])}")
    other_trackers = [
        tracker for tracker in trackers if tracker in TRACKER_NAMES and tracker not in ("mlflow", "file_logger")
    ]
    out.put("tracking.trackers", other_trackers or None)
    if "mlflow" in trackers:
        if not out.has("mlflow_tracking_uri"):
            out.add_error("trackers", "mlflow requires mlflow_tracking_uri")
        out.put("tracking.mlflow_server_uri", out.get("mlflow_tracking_uri"))
    if "mlflow" in trackers or other_trackers:
        names = [out.get(f"{name}_experiment") for name in ("mlflow", "aim") if name in trackers]
        experiment = next((name for name in names if name), None)
        if len({name or out.get("experiment", keys.EXPERIMENT) for name in names}) > 1:
            out.add_note("aim_experiment", f"all trackers use the same experiment name: {experiment}")
        out.put("tracking.experiment_name", experiment or out.get("experiment", keys.EXPERIMENT))
        out.put("tracking.run_name", out.get("run_name"))
    for key in _TRACKER_OPTIONS:
        out.put(f"tracking.{key}", out.get(key))
    _put_aim(out)
    if "aim" in trackers and not any(out.has(key) for key in ("aim_repo", "aim_url", "aim_remote_server_ip")):
        out.add_error("trackers", "aim requires aim_repo, or aim_remote_server_ip and aim_remote_server_port")
    if out.get("training_logs_filename", "training_logs.jsonl") != "training_logs.jsonl":
        out.add_note("training_logs_filename", "the file is always named training_logs.jsonl")
    _put_metadata(out)


def _put_aim(out: Translation) -> None:
    """Set where Aim logs to: a server with its port wins over aim_url, which wins over aim_repo."""
    repo = out.get("aim_url", out.get("aim_repo"))
    if out.has("aim_remote_server_ip") and (out.has("aim_remote_server_port") or not repo):
        out.put("tracking.aim_remote_server_ip", out.get("aim_remote_server_ip"))
        out.put("tracking.aim_remote_server_port", out.positive_int("aim_remote_server_port", 53800))
    else:
        out.put("tracking.aim_repo", repo)


def _put_metadata(out: Translation) -> None:
    """Set the parameters logged to every tracker: a JSON object, or text that holds one."""
    metadata = out.get("exp_metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = [metadata]
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        out.add_error("exp_metadata", "must be a JSON object")
        return
    scalars = (str, int, float, bool)
    params = {str(key): value if isinstance(value, scalars) else json.dumps(value) for key, value in metadata.items()}
    out.put("tracking.exp_metadata", params or None)
