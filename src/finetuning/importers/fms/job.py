"""A job of fms-hf-tuning to our YAML: every key means here what it meant there, or is refused with the reason.

Techniques of a job of fms-hf-tuning: LoRA, prompt tuning, aLoRA, quantised bases, kernels.

The trackers of an fms-hf-tuning job, and what they are told besides."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from finetuning.config.pretrained_config import quantization_method, read_pretrained_config
from finetuning.config.sections.tracking import TRACKER_NAMES
from finetuning.config.yaml.document import ConfigDocument
from finetuning.importers.fms import keys
from finetuning.importers.fms.data_section import handlers_limit, put_data
from finetuning.importers.translation import Readers, Translation


def put_peft(out: Translation) -> None:
    """`peft_conf`, `quant_conf` and the kernels."""
    method = str(out.get("peft_method", "none")).lower()
    if method in ("lora", "alora"):
        _put_lora(out, method)
    elif method == "pt":
        out.put("peft_conf.peft_type", "PROMPT_TUNING")
        given = {key: out.get(key, default) for key, default in keys.PROMPT_DEFAULTS.items()}
        init = str(given["prompt_tuning_init"]).upper()
        if init not in ("TEXT", "RANDOM"):
            out.wrong("prompt_tuning_init", f"must be TEXT or RANDOM, not {init}")
        given["prompt_tuning_init"] = init
        if init == "TEXT":
            given["tokenizer_name_or_path"] = out.get("tokenizer_name_or_path", out.get("model_name_or_path"))
        else:
            del given["prompt_tuning_init_text"]
        out.put("peft_conf.peft_kwargs", given)
    elif method == "none":
        out.put("peft_conf.peft_type", "NO_PEFT")
    else:
        out.wrong("peft_method", f"must be lora, alora, pt or None, not {out.get('peft_method')!r}")
    mine = {"lora": keys.LORA, "alora": keys.LORA, "pt": set(keys.PROMPT_DEFAULTS)}.get(method, set())
    for key in sorted((keys.LORA | set(keys.PROMPT_DEFAULTS)) - set(mine)):
        if out.has(key):
            out.note(key, f"changes nothing with peft_method {method}")
    _put_quantisation(out, method)
    _put_kernels(out)


def _put_lora(out: Translation, method: str) -> None:
    kwargs: dict[str, Any] = {key: out.get(key, default) for key, default in keys.LORA_DEFAULTS.items()}
    kwargs |= {key: out.get(key) for key in sorted(keys.LORA - set(keys.LORA_DEFAULTS)) if out.has(key)}
    modules = out.items("target_modules")
    # PEFT takes all-linear as text only, and would adapt nothing but the other names of a list. Other text is a
    # pattern that whole names are matched with.
    kwargs["target_modules"] = "all-linear" if "all-linear" in modules else out.get("target_modules")
    if modules and "all-linear" in modules and len(modules) > 1:
        out.note(
            "target_modules", "all-linear stands for all of them but the output layer; the other names are left out"
        )
    if not modules:
        del kwargs["target_modules"]
    if method == "alora":
        if not out.get("alora_invocation_string"):
            out.wrong("alora_invocation_string", "aLoRA needs a text that invokes it")
        out.put("peft_conf.alora_invocation_string", out.get("alora_invocation_string"))
    out.put("peft_conf.peft_type", "LORA")
    out.put("peft_conf.peft_kwargs", kwargs)


def _put_quantisation(out: Translation, method: str) -> None:
    gptq, nf4 = out.items("auto_gptq"), out.items("bnb_qlora") or out.items("bitsandbytes")
    if gptq and nf4:
        out.wrong("auto_gptq", "does not go with bnb_qlora")
    if (gptq or nf4) and method != "lora":
        out.wrong("auto_gptq" if gptq else "bnb_qlora", "needs peft_method: lora")
    if gptq:
        if gptq[0] != "triton_v2":
            out.wrong("auto_gptq", 'has one kernel, ["triton_v2"]')
        if str(out.get("torch_dtype", "")).removeprefix("torch.") != "float16" or not out.truth("fp16", False):
            out.wrong("auto_gptq", "needs torch_dtype: float16 and fp16: true")
        model = str(out.get("model_name_or_path"))
        if read_pretrained_config(model) is not None and quantization_method(model) != "gptq":
            out.wrong("auto_gptq", f"needs a GPTQ checkpoint, and {model} is none")
        out.note(
            "auto_gptq", "the checkpoint's own GPTQ settings are used, by gptqmodel: pip install 'finetuning[gptq]'"
        )
    if nf4:
        if nf4[0] not in ("nf4", "fp4"):
            out.wrong("bnb_qlora", "must be nf4 or fp4")
        dtype = str(out.get("torch_dtype", "bfloat16")).removeprefix("torch.")
        out.values["quant_conf"] = {
            "quantization_type": "bits-and-bytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": nf4[0],
            "bnb_4bit_compute_dtype": dtype,
        }
        if len(nf4) > 1:
            out.note("bnb_qlora", "its second value, no_peft_model, changes nothing")


def _put_kernels(out: Translation) -> None:
    fused = out.items("fused_lora")
    if fused:
        if fused[0] not in ("auto_gptq", "bitsandbytes") or len(fused) < 2 or not _true(fused[1]):
            out.wrong("fused_lora", 'must be ["auto_gptq", true] or ["bitsandbytes", true]')
        elif not (out.has("auto_gptq") or out.has("bnb_qlora") or out.has("bitsandbytes")):
            out.wrong("fused_lora", "needs a quantised base: auto_gptq or bnb_qlora")
        out.note("fused_lora", "LoRA is computed without fused kernels: the same numbers, less speed")
    fast = out.items("fast_kernels")
    if fast:
        if len(fast) != 3:
            out.wrong("fast_kernels", "needs three switches: loss, rms, rope")
            return
        names = ("cross_entropy", "rms_norm", "rope")
        switches = {name: _true(value) for name, value in zip(names, fast, strict=True)}
        out.put("training_args.use_liger_kernel", True)
        out.put("training_args.liger_kernel_config", switches | {"fused_linear_cross_entropy": False, "swiglu": False})
        out.note("fast_kernels", "Liger's kernels are used: pip install 'finetuning[liger]'")


def _true(value: Any) -> bool:
    return str(value).lower() == "true"


_KNOWN = ("file_logger", "mlflow", "aim", "clearml", "hf_resource_scanner", "none")
_CARRIED = (
    "clearml_project",
    "clearml_task",
    "scanner_output_filename",
    "run_uri_export_path",
)


def put_trackers(out: Translation) -> None:
    """`tracking`, from `trackers` and the keys of each."""
    trackers = out.items("trackers") or ["file_logger"]
    known = list(dict.fromkeys([*_KNOWN, *TRACKER_NAMES]))
    for tracker in trackers:
        if tracker not in known:
            out.wrong("trackers", f"there is no tracker {tracker!r}; they are {', '.join(_KNOWN[:-1])}")
    others = [tracker for tracker in trackers if tracker in TRACKER_NAMES and tracker not in ("mlflow", "file_logger")]
    out.put("tracking.trackers", others or None)
    if "mlflow" in trackers and not out.has("mlflow_tracking_uri"):
        out.wrong("trackers", "mlflow needs mlflow_tracking_uri")
    if "mlflow" in trackers:
        out.put("tracking.mlflow_server_uri", out.get("mlflow_tracking_uri"))
    if "mlflow" in trackers or others:
        own = [out.get(f"{name}_experiment") for name in ("mlflow", "aim") if name in trackers]
        experiment = next((name for name in own if name), None)
        if len({name or out.get("experiment", keys.EXPERIMENT) for name in own}) > 1:
            out.note("aim_experiment", f"all trackers are told one name: {experiment}")
        out.put("tracking.experiment_name", experiment or out.get("experiment", keys.EXPERIMENT))
        out.put("tracking.run_name", out.get("run_name"))
    for key in _CARRIED:
        out.put(f"tracking.{key}", out.get(key))
    _put_aim(out)
    if "aim" in trackers and not any(out.has(key) for key in ("aim_repo", "aim_url", "aim_remote_server_ip")):
        out.wrong("trackers", "aim needs aim_repo, or aim_remote_server_ip and aim_remote_server_port")
    if out.get("training_logs_filename", "training_logs.jsonl") != "training_logs.jsonl":
        out.note("training_logs_filename", "the file is called training_logs.jsonl")
    _put_metadata(out)


def _put_aim(out: Translation) -> None:
    """The server with its port counts first, then the address, then the folder."""
    if out.has("aim_remote_server_ip") and (out.has("aim_remote_server_port") or not _aim_repo(out)):
        out.put("tracking.aim_remote_server_ip", out.get("aim_remote_server_ip"))
        out.put("tracking.aim_remote_server_port", out.number("aim_remote_server_port", 53800))
    else:
        out.put("tracking.aim_repo", _aim_repo(out))


def _aim_repo(out: Translation) -> str | None:
    return out.get("aim_url", out.get("aim_repo"))


def _put_metadata(out: Translation) -> None:
    """Names and values for every tracker: a JSON object, or one written as text."""
    metadata = out.get("exp_metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = [metadata]
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        out.wrong("exp_metadata", "must be a JSON object")
        return
    plain = (str, int, float, bool)
    told = {str(key): value if isinstance(value, plain) else json.dumps(value) for key, value in metadata.items()}
    out.put("tracking.exp_metadata", told or None)


def to_experiment(job: ConfigDocument, readers: Readers, *, processes: int = 1) -> Translation:
    """The values of our YAML, of the method sft, and notes on what could not be carried over.

    Args:
        processes: of the whole job; the batch of one step is per-device batch x accumulation x processes.

    Raises:
        ConfigError: every unknown key, with the nearest known one, and everything that is refused.
    """
    out = Translation(job)
    out.refuse_unknown(keys.SUPPORTED | set(readers.training_fields()))
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
