"""Translate a JSON job of fms-hf-tuning: every key keeps its meaning, or is rejected with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from finetuning.config.pretrained_config import find_pretrained_config, quantization_method, read_pretrained_config
from finetuning.config.sections.data import MissingPadTokenStrategy
from finetuning.config.sections.tracking import TRACKER_NAMES
from finetuning.config.yaml.document import ConfigDocument, YamlValue
from finetuning.errors import parse_json
from finetuning.importers.fms import keys
from finetuning.importers.fms.data_section import put_data, put_length_filter, shortest_handler_limit
from finetuning.importers.translation import Readers, Translation
from finetuning.model.peft.lora_support import lora_init, used_options

_TRACKERS = ("file_logger", "mlflow", "aim", "clearml", "hf_resource_scanner", "none")
_TRACKER_OPTIONS = (
    "clearml_project",
    "clearml_task",
    "scanner_output_filename",
    "run_uri_export_path",
    "training_logs_filename",
)
_LENGTH_OF_RUN = ("training_args.num_train_epochs", "training_args.max_steps")
_NUMBER = r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?"
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
    out = Translation(_with_plain_values(job))
    out.reject_unknown_keys(keys.SUPPORTED | set(readers.training_fields()))
    _reject_unsupported(out)
    out.put("method", "sft")
    put_data(out, readers)
    _put_batch_sizes(out, processes)
    _put_training(out, readers.training_fields())
    _put_peft(out)
    _put_quantization(out)
    _put_kernels(out)
    _put_model(out)
    _put_length(out)
    _put_multipack(out, processes)
    _put_trackers(out)
    out.put("trainer_controller", out.get("trainer_controller_config_file"), "trainer_controller_config_file")
    out.put("logging_dir", out.get("logging_dir"))
    out.put("save_model_dir", out.get("save_model_dir"))
    _note_vllm_limits(out)
    for key in ("num_train_dataset_shards", "num_eval_dataset_shards"):
        out.positive_int(key, 1)
    for key in (*keys.TRAINING, *readers.training_fields()):
        out.sources.setdefault(f"training_args.{key}", key)
    _put_resume(out)
    return out.finish()


def _with_plain_values(job: ConfigDocument) -> ConfigDocument:
    """Return the job with numbers, booleans and null that were written as text, as jobs and flags have them."""

    def plain(value: YamlValue) -> YamlValue:
        if isinstance(value, list):
            return [plain(item) for item in value]
        if not isinstance(value, str):
            return value
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        return parse_json(value) if re.fullmatch(_NUMBER, value) else value

    values = {key: value if key in keys.TEXTS else plain(value) for key, value in job.values.items()}
    return replace(job, values=values)


def _reject_unsupported(out: Translation) -> None:
    """Add an error for each unsupported key, unless it is switched off: jobs often state every default."""
    for key, reason in keys.UNSUPPORTED.items():
        if is_on(out, key):
            out.add_error(key, f"not supported: {reason}")
    for key, required in keys.DEPENDENT.items():
        if out.has(key) and not _is_default(out, key) and not is_on(out, required):
            out.add_note(key, f"has no effect without {required}")


def is_on(out: Translation, key: str) -> bool:
    """Return whether a switch of a job is on."""
    return out.has(key) and str(out.get(key)).lower() not in keys.OFF


def _is_default(out: Translation, key: str) -> bool:
    return key in keys.DEFAULTS and out.get(key) == keys.DEFAULTS[key]


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
    source = "per_device_train_batch_size"
    out.put("batchsize_conf.total_train_batch_size", per_device * accumulation * processes, source)
    out.put("batchsize_conf.max_per_device_train_batch_size", per_device, source)
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
    aliases = {"eval_strategy": "evaluation_strategy", "optim": "adafactor"}
    for key, value in keys.TRAINING_DEFAULTS.items():
        if key not in aliases or out.has(key) or not is_on(out, aliases[key]):
            out.put(f"training_args.{key}", out.get(key, value))
    placed_elsewhere = keys.DATA | keys.MODEL | keys.RUN | keys.TRACKING | keys.LORA
    for key in out.source.values:
        if _is_default(out, str(key)):
            continue
        if (key in keys.TRAINING or key in installed) and key not in placed_elsewhere and out.has(key):
            out.put(f"training_args.{key}", out.get(key))
    if out.values.get("data_conf", {}).get("streaming"):
        _put_stream_strategies(out)
        if is_on(out, "do_dataprocessing_only"):
            out.add_error("do_dataprocessing_only", "cannot be combined with streaming, which prepares no rows")
    strategy = out.get("eval_strategy", out.get("evaluation_strategy", "no"))
    has_validation_data = out.has("validation_data_path") or out.has("data_config_path")
    if strategy != "no" and not has_validation_data:
        out.add_error("eval_strategy", f"{strategy} requires validation_data_path")


def _put_stream_strategies(out: Translation) -> None:
    """Replace strategies per epoch, whose length is not known for a stream: once at the end, and every 500 logs."""
    arguments = out.values["training_args"]
    steps = out.positive_int("max_steps", 1)
    for name in ("logging", "save", "eval"):
        if arguments.get(f"{name}_strategy") != "epoch":
            continue
        out.put(f"training_args.{name}_strategy", "steps")
        if not out.has(f"{name}_steps"):
            out.put(f"training_args.{name}_steps", min(steps, 500) if name == "logging" else steps)
        if out.has(f"{name}_strategy"):
            out.add_note(f"{name}_strategy", f"a stream has no known epochs: every {name}_steps steps")


def _put_resume(out: Translation) -> None:
    """Set how the run resumes. As there, it may be longer than the run that saved the checkpoint."""
    resume = out.get("resume_from_checkpoint", "auto")
    if str(resume).lower() in ("true", "auto"):
        resume = "auto"
    elif str(resume).lower() == "false":
        resume = False
        out.add_note("resume_from_checkpoint", "what an earlier run left in output_dir moves to a folder earlier-N")
    out.put("run_conf.resume_from_checkpoint", resume)
    out.put("run_conf.on_existing_run", "move", "resume_from_checkpoint")
    allowed = [*_LENGTH_OF_RUN]
    for key in out.as_list("allow_changed"):
        allowed += [path for path, source in out.sources.items() if source == key] or [str(key)]
    out.put("run_conf.allow_changed", [*dict.fromkeys(allowed)])


def _put_peft(out: Translation) -> None:
    method = _peft_method(out)
    if method in ("lora", "alora"):
        _put_lora(out, method)
    elif method == "pt":
        _put_prompt_tuning(out)
    elif method == "none":
        out.put("peft_conf.peft_type", "NO_PEFT", "peft_method")
    else:
        out.add_error("peft_method", f"must be lora, alora, pt or None, not {out.get('peft_method')!r}")
    used = {"lora": keys.LORA, "alora": keys.LORA, "pt": set(keys.PROMPT_DEFAULTS)}.get(method, set())
    for key in sorted((keys.LORA | set(keys.PROMPT_DEFAULTS)) - set(used)):
        if out.has(key) and not _is_default(out, key):
            out.add_note(key, f"has no effect with peft_method {method}")


def _peft_method(out: Translation) -> str:
    return str(out.get("peft_method", "none")).lower()


def _put_lora(out: Translation, method: str) -> None:
    kwargs: dict[str, Any] = {key: out.get(key, default) for key, default in keys.LORA_DEFAULTS.items()}
    kwargs |= {key: out.get(key) for key in sorted(keys.LORA - set(keys.LORA_DEFAULTS)) if out.has(key)}
    modules = out.as_list("target_modules")
    # PEFT accepts all-linear only as a string; in a list it would adapt nothing but the other names. Any other string
    # is a pattern that must match full module names.
    if len(modules) == 1 and re.fullmatch(r"[\w.-]+(\s+[\w.-]+)+", str(modules[0])):
        modules = str(modules[0]).split()
        out.add_note("target_modules", f"read as the list {modules}")
    is_pattern = isinstance(out.get("target_modules"), str) and len(modules) == 1
    kwargs["target_modules"] = "all-linear" if "all-linear" in modules else modules[0] if is_pattern else modules
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
    _put_peft_kwargs(out, "LORA", kwargs)


def _put_peft_kwargs(out: Translation, peft_type: str, kwargs: dict[str, Any]) -> None:
    out.put("peft_conf.peft_type", peft_type, "peft_method")
    out.put("peft_conf.peft_kwargs", kwargs, "peft_method")
    out.sources |= {f"peft_conf.peft_kwargs.{key}": key for key in kwargs}


def _put_prompt_tuning(out: Translation) -> None:
    kwargs = {key: out.get(key, default) for key, default in keys.PROMPT_DEFAULTS.items()}
    init = str(kwargs["prompt_tuning_init"]).upper()
    if init not in ("TEXT", "RANDOM"):
        out.add_error("prompt_tuning_init", f"must be TEXT or RANDOM, not {init}")
    kwargs["prompt_tuning_init"] = init
    if init == "TEXT":
        kwargs["tokenizer_name_or_path"] = out.get("tokenizer_name_or_path", out.get("model_name_or_path"))
    else:
        del kwargs["prompt_tuning_init_text"]
    _put_peft_kwargs(out, "PROMPT_TUNING", kwargs)


def converts_for_vllm(out: Translation) -> bool:
    """Return whether the adapter is converted for vLLM after training. Without LoRA there is nothing to convert."""
    return _peft_method(out) == "lora" and out.boolean("lora_post_process_for_vllm", False)


def _note_vllm_limits(out: Translation) -> None:
    """Note, before training, that the adapter will not be converted for vLLM."""
    key = "lora_post_process_for_vllm"
    if not out.boolean(key, False):
        return
    if not converts_for_vllm(out):
        out.add_note(key, f"has no effect with peft_method {_peft_method(out)}")
        return
    kwargs = out.values["peft_conf"]["peft_kwargs"]
    options = [option for option in used_options(kwargs) if option.vllm != "yes"]
    limits = [f"{option.label} ({option.field})" for option in options]
    if not lora_init(kwargs).is_convertible and lora_init(kwargs).changes_base:
        limits.append(f"{lora_init(kwargs).label} initialization (init_lora_weights)")
    if limits:
        out.add_note(
            key,
            f"vLLM serves no adapter with {', '.join(limits)}: the adapter stays as it is trained; merge_adapter makes"
            " a model of it",
        )


def check_new_embeddings(out: Translation) -> None:
    """Check that the rows of new tokens can be written for vLLM, which appends them to those of the base model.

    Raises:
        ConfigError: the new tokens have rows in the base model already, its spare ones.
    """
    tokens = out.as_list("add_special_tokens")
    model = str(out.get("model_name_or_path"))
    config = find_pretrained_config(model) or {}
    text_config = config.get("text_config")
    rows = (text_config if isinstance(text_config, dict) else config).get("vocab_size")
    if not tokens or not isinstance(rows, int):
        return
    from finetuning.model.tokenizer import load_tokenizer

    name = str(out.get("tokenizer_name_or_path", model))
    loaded = load_tokenizer(
        name, template_source=None, needs_template=False, special_tokens=tokens, key=None,
        missing_pad_token_strategy=MissingPadTokenStrategy.EOS_REPURPOSE, cache_dir=out.get("cache_dir"),
    )  # fmt: skip
    ids = [loaded.tokenizer.convert_tokens_to_ids(token) for token in loaded.new_tokens]
    if ids and min(ids) != rows:
        out.add_error(
            "lora_post_process_for_vllm",
            f"cannot be combined with add_special_tokens here: vLLM appends new tokens to the {rows} rows of the base"
            f" model, and the first new token has id {min(ids)}",
            "Remove lora_post_process_for_vllm, and merge the adapter after training: merge_adapter.",
        )
        out.finish()


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
        out.sources["quant_conf"] = "bnb_qlora" if out.has("bnb_qlora") else "bitsandbytes"
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
        switches |= {"fused_linear_cross_entropy": False, "swiglu": False}
        out.put("training_args.use_liger_kernel", True, "fast_kernels")
        out.put("training_args.liger_kernel_config", switches, "fast_kernels")
        out.add_note("fast_kernels", "uses Liger kernels: pip install 'finetuning[liger]'")


def _is_true(value: object) -> bool:
    return str(value).lower() == "true"


def _put_model(out: Translation) -> None:
    model = out.get("model_name_or_path")
    if not isinstance(model, str):
        out.add_error("model_name_or_path", "is required: a path or a hub id")
    out.put("run_conf.model", model, "model_name_or_path")
    if out.get("tokenizer_name_or_path") != model:
        out.put("run_conf.tokenizer", out.get("tokenizer_name_or_path"), "tokenizer_name_or_path")
    dtype = str(out.get("torch_dtype", "bfloat16")).removeprefix("torch.")
    out.put("run_conf.model_args.dtype", _DTYPE_ALIASES.get(dtype, dtype), "torch_dtype")
    out.put("run_conf.model_args.cache_dir", out.get("cache_dir"))
    attention = "run_conf.model_args.attn_implementation"
    if not out.boolean("use_flash_attn", True):
        out.put(attention, "sdpa", "use_flash_attn")
    else:
        out.put(attention, out.get("flash_attn_implementation"), "flash_attn_implementation")
        if out.has("use_flash_attn") and not out.has("flash_attn_implementation"):
            out.add_note(
                "use_flash_attn",
                "FlashAttention is used where it is installed and verified on the model; otherwise torch's sdpa, which"
                " has its own flash kernels",
            )
    multiple = out.positive_int("embedding_size_multiple_of", 1)
    out.put("run_conf.embedding_size_multiple_of", multiple if multiple != 1 else None)
    if out.boolean("enable_reduce_loss_sum", False):
        out.add_note("enable_reduce_loss_sum", "has no effect: the loss is the mean over all tokens of a step")


def _put_length(out: Translation) -> None:
    limit = out.positive_int("max_seq_length", keys.MAX_SEQ_LENGTH)
    put_length_filter(out, shortest_handler_limit(out, limit) if out.has("data_config_path") else limit)
    packing, padding_free = out.boolean("packing", False), out.as_list("padding_free")
    if packing:
        out.put("sft_args.packing", True)
    if padding_free:
        if padding_free != ["huggingface"]:
            out.add_error("padding_free", 'must be ["huggingface"]')
        if packing:
            out.add_error("padding_free", "cannot be combined with packing: true")
        out.put("sft_args.batching", "padding-free", "padding_free")


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
    out.put("training_args.train_sampling_strategy", "batch_rebalance", "multipack")
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
        out.put("tracking.mlflow_server_uri", out.get("mlflow_tracking_uri"), "mlflow_tracking_uri")
    if "mlflow" in trackers or other_trackers:
        names = [out.get(f"{name}_experiment") for name in ("mlflow", "aim") if name in trackers]
        experiment = next((name for name in names if name), None)
        if len({name or out.get("experiment", keys.EXPERIMENT) for name in names}) > 1:
            out.add_note("aim_experiment", f"all trackers use the same experiment name: {experiment}")
        named = [
            f"{name}_experiment" for name in ("mlflow", "aim") if name in trackers and out.has(f"{name}_experiment")
        ]
        source = named[0] if named else "experiment"
        out.put("tracking.experiment_name", experiment or out.get("experiment", keys.EXPERIMENT), source)
        out.put("tracking.run_name", out.get("run_name"))
    for key in _TRACKER_OPTIONS:
        out.put(f"tracking.{key}", out.get(key))
    _put_aim(out)
    if "aim" in trackers and not any(out.has(key) for key in ("aim_repo", "aim_url", "aim_remote_server_ip")):
        out.add_error("trackers", "aim requires aim_repo, or aim_remote_server_ip and aim_remote_server_port")
    _put_metadata(out)


def _put_aim(out: Translation) -> None:
    """Set where Aim logs to: a server with its port wins over aim_url, which wins over aim_repo."""
    repo = out.get("aim_url", out.get("aim_repo"))
    if out.has("aim_remote_server_ip") and (out.has("aim_remote_server_port") or not repo):
        out.put("tracking.aim_remote_server_ip", out.get("aim_remote_server_ip"))
        out.put("tracking.aim_remote_server_port", out.positive_int("aim_remote_server_port", 53800))
    else:
        out.put("tracking.aim_repo", repo, "aim_url" if out.has("aim_url") else None)


def _put_metadata(out: Translation) -> None:
    """Set the parameters logged to every tracker: a JSON object, or text that holds one."""
    metadata = out.get("exp_metadata")
    if isinstance(metadata, str):
        try:
            metadata = parse_json(metadata)
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
