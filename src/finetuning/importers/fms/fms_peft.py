"""Techniques of a job of fms-hf-tuning: LoRA, prompt tuning, aLoRA, quantised bases, kernels."""

from __future__ import annotations

from typing import Any

from finetuning.config.pretrained_config import model_config, quantised_by
from finetuning.importers.fms import keys
from finetuning.importers.translation import Translation


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
        if model_config(model) is not None and quantised_by(model) != "gptq":
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
