"""Features of an experiment that can be incompatible with each other, grouped by axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetuning.config.pretrained_config import find_pretrained_config, pretrained_dtype, quantization_method
from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import BitsAndBytes, Dtype, NewPeft, NoPeft, PretrainedPeft, TorchAO
from finetuning.config.sections.training import TrainingArgs
from finetuning.distributed import ProcessTopology

VIRTUAL_TOKEN_ADAPTERS = ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
"""Adapter types that prepend virtual tokens to the sequence."""
TOKENWISE_ADAPTERS = (
    "ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
    "LORA", "MISS", "OFT", "OSF", "PVERA", "RANDLORA", "ROAD",  # PEFT's name
    "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
"""Adapters that treat each token independently: the only ones that padding-free batches are compatible with."""
INCOMPATIBLE_WITH_8BIT = (
    "ADAMSS", "DEFT", "DELORA", "FROD", "GLORA", "HRA", "OSF", "PSOFT", "SHIRA", "SUPERTUNING", "TINYLORA",
)  # fmt: skip
INCOMPATIBLE_WITH_4BIT = (*INCOMPATIBLE_WITH_8BIT, "LOHA", "LOKR", "PEANUT")
"""Adapter types that compute with the values of the base weights, which are not available for quantized weights."""
TORCHAO_ADAPTERS = ("LORA",)
"""Adapter types that are known to train on torchao weights."""
GPTQ_ADAPTERS = ("ADALORA", "BOFT", "LN_TUNING", "LORA", "MISS", "OFT", "SHADOW", "TRAINABLE_TOKENS", "VERA")
"""Adapter types that PEFT implements for GPTQ layers, or that do not touch those layers."""


@dataclass(frozen=True)
class RunContext:
    """An experiment and the processes that it runs on."""

    experiment: Experiment
    topology: ProcessTopology
    accumulation: int

    @property
    def args(self) -> TrainingArgs:
        return self.experiment.training_args

    @property
    def adapter(self) -> str:
        """The `peft.PeftType` of a new adapter; empty if no new adapter is trained."""
        conf = self.experiment.peft_conf
        return conf.peft_type.upper() if isinstance(conf, NewPeft) else ""

    @property
    def peft_kwargs(self) -> Mapping[str, object]:
        """The arguments of a new adapter's PEFT config; empty if no new adapter is trained."""
        conf = self.experiment.peft_conf
        return conf.peft_kwargs if isinstance(conf, NewPeft) else {}

    @property
    def sharded_by(self) -> str | None:
        """`fsdp` or `deepspeed`, as set by the launcher or the config; None without sharding."""
        if self.topology.sharded_by:
            return self.topology.sharded_by
        passed_on = self.args.model_extra or {}
        return "deepspeed" if self.args.deepspeed else "fsdp" if passed_on.get("fsdp") else None

    @property
    def checkpoint_quantization(self) -> str | None:
        """Quantization method of the checkpoint, such as `gptq`; None if unquantized or not in a local folder."""
        return quantization_method(self.experiment.run_conf.model)

    @property
    def trains_all_weights(self) -> bool:
        """Whether the weights of the model itself are trained, not those of an adapter."""
        return isinstance(self.experiment.peft_conf, NoPeft)

    @property
    def uses_autocast(self) -> bool:
        return self.args.bf16 or self.args.fp16

    @property
    def checkpoint_dtype(self) -> str | None:
        """The dtype of the checkpoint, such as `bfloat16`; None if its config is not on this machine or names none."""
        return pretrained_dtype(find_pretrained_config(self.experiment.run_conf.model))

    @property
    def raises_float16(self) -> bool:
        """Whether the config asks for float16 weights, and they are trained and so held in float32."""
        in_half = self.experiment.run_conf.model_args.dtype == "float16"
        return in_half and self.trains_all_weights and self.sharded_by != "deepspeed"

    @property
    def weights_dtype(self) -> Dtype:
        """The dtype that the model is loaded in; `auto` for that of the checkpoint.

        With `run_conf.model_args.dtype: auto`, weights that are trained are held in float32 wherever 16 bits would lose
        what they learn and float32 costs no more than memory: under loss scaling (fp16), which needs it, under autocast
        (bf16), and in place of float16, whose weights Adam turns into NaN. DeepSpeed keeps a float32 copy itself.
        """
        configured = self.experiment.run_conf.model_args.dtype
        if self.raises_float16:
            return "float32"
        if configured != "auto":
            return configured
        if self.args.fp16:
            return "float32"
        if self.trains_all_weights and self.sharded_by != "deepspeed":
            return "float32" if self.args.bf16 or self.checkpoint_dtype == "float16" else "auto"
        return "auto"

    @property
    def trained_dtype(self) -> str | None:
        """The dtype that trained weights of the model have in the optimizer step; None if unknown or for an adapter."""
        if not self.trains_all_weights:
            return None
        # accelerate casts what FSDP trains under mixed precision to float32, and DeepSpeed keeps a float32 copy.
        if self.sharded_by == "deepspeed" or (self.sharded_by == "fsdp" and self.uses_autocast):
            return "float32"
        return self.checkpoint_dtype if self.weights_dtype == "auto" else self.weights_dtype


@dataclass(frozen=True)
class Feature:
    """A feature on an axis: its name in messages and tables, the config key that enables it, and a test for it."""

    axis: str
    name: str
    key: str
    has: Callable[[RunContext], bool]


def _quantized(bits: str) -> Callable[[RunContext], bool]:
    return lambda run: isinstance(run.experiment.quant_conf, BitsAndBytes) and getattr(run.experiment.quant_conf, bits)


def _sft(name: str, value: object) -> Callable[[RunContext], bool]:
    return lambda run: getattr(getattr(run.experiment, "sft_args", None), name, None) == value


def _method(name: str) -> Feature:
    return Feature("method", name, "method", lambda run: run.experiment.method_name == name)


def _is_alora(run: RunContext) -> bool:
    conf = run.experiment.peft_conf
    if not isinstance(conf, NewPeft) or run.adapter != "LORA":
        return False
    return bool(conf.alora_invocation_string or conf.peft_kwargs.get("alora_invocation_tokens"))


def _initialized_by(*names: str | bool) -> Callable[[RunContext], bool]:
    return lambda run: run.adapter == "LORA" and run.peft_kwargs.get("init_lora_weights", True) in names


def _has_reference(run: RunContext) -> bool:
    method = run.experiment.method_name
    return method in ("dpo", "kto") or (method == "grpo" and bool(getattr(run.args, "beta", 0)))


def _is_not_lora(run: RunContext) -> bool:
    """Return whether no LoRA is trained. The type of a pretrained adapter is not known from the config."""
    return run.adapter != "LORA" and not isinstance(run.experiment.peft_conf, PretrainedPeft)


def _lacks_torchao_support(run: RunContext) -> bool:
    return run.adapter not in (*TORCHAO_ADAPTERS, *VIRTUAL_TOKEN_ADAPTERS, "")


def _lacks_gptq_support(run: RunContext) -> bool:
    return run.adapter not in (*GPTQ_ADAPTERS, *VIRTUAL_TOKEN_ADAPTERS, "")


def _is_dora(run: RunContext) -> bool:
    return run.adapter == "LORA" and bool(run.peft_kwargs.get("use_dora"))


def _trains_fp16(run: RunContext) -> bool:
    """Return whether adapter weights are in float16: under sharding. Without it, PEFT creates them in float32."""
    in_half = run.experiment.run_conf.model_args.dtype == "float16"
    return in_half and not run.trains_all_weights and run.sharded_by is not None


_INIT = "peft_conf.peft_kwargs.init_lora_weights"
_TYPE, _QUANT, _OPTIM = "peft_conf.peft_type", "quant_conf.quantization_type", "training_args.optim"
FULL_FINE_TUNING = Feature(
    "adapter", "full fine-tuning", _TYPE, lambda run: isinstance(run.experiment.peft_conf, NoPeft)
)
LORA = Feature("adapter", "LoRA", _TYPE, lambda run: run.adapter == "LORA" and not _is_alora(run))
ALORA = Feature("adapter", "aLoRA", "peft_conf.peft_kwargs.alora_invocation_tokens", _is_alora)
ADALORA = Feature("adapter", "AdaLoRA", _TYPE, lambda run: run.adapter == "ADALORA")
PREFIX = Feature("adapter", "prefix tuning", _TYPE, lambda run: run.adapter == "PREFIX_TUNING")
VIRTUAL = Feature("adapter", "virtual tokens", _TYPE, lambda run: run.adapter in VIRTUAL_TOKEN_ADAPTERS)
NO_4BIT_SUPPORT = Feature(
    "adapter", "adapters without 4-bit support", _TYPE, lambda run: run.adapter in INCOMPATIBLE_WITH_4BIT
)
NO_8BIT_SUPPORT = Feature(
    "adapter", "adapters without 8-bit support", _TYPE, lambda run: run.adapter in INCOMPATIBLE_WITH_8BIT
)
NOT_TOKENWISE = Feature(
    "adapter",
    "adapters that mix tokens",
    _TYPE,
    lambda run: run.adapter not in (*TOKENWISE_ADAPTERS, *VIRTUAL_TOKEN_ADAPTERS, ""),
)
PISSA = Feature("adapter", "PiSSA", _INIT, _initialized_by("pissa"))
OLORA = Feature("adapter", "OLoRA", _INIT, _initialized_by("olora"))
WEIGHT_BASED_INIT = Feature(
    "adapter", "weight-based LoRA initialization", _INIT, _initialized_by("pissa", "olora", "orthogonal")
)
DORA = Feature("adapter", "DoRA", "peft_conf.peft_kwargs.use_dora", _is_dora)
RANDOM_INIT = Feature("adapter", "random LoRA initialization", _INIT, _initialized_by(False))
REWARD = Feature("method", "reward", "method", lambda run: run.experiment.method_name == "reward")
REFERENCE_MODEL = Feature("method", "reference model (dpo, kto, grpo with beta)", "method", _has_reference)
QUANT_8BIT = Feature("weights", "8-bit quantization", _QUANT, _quantized("load_in_8bit"))
QUANT_4BIT = Feature("weights", "4-bit quantization", _QUANT, _quantized("load_in_4bit"))
TORCHAO = Feature("weights", "torchao", _QUANT, lambda run: isinstance(run.experiment.quant_conf, TorchAO))
NO_TORCHAO_SUPPORT = Feature("adapter", "adapters without torchao support", _TYPE, _lacks_torchao_support)
GPTQ = Feature("weights", "GPTQ", "run_conf.model", lambda run: run.checkpoint_quantization == "gptq")
NO_GPTQ_SUPPORT = Feature("adapter", "adapters without GPTQ support", _TYPE, _lacks_gptq_support)
QUANTIZED_ON_LOAD = Feature(
    "quantization",
    "quantization on load",
    _QUANT,
    lambda run: isinstance(run.experiment.quant_conf, (BitsAndBytes, TorchAO)),
)
FLOAT16_TRAINABLE = Feature("weights", "sharded adapter weights in float16", "run_conf.model_args.dtype", _trains_fp16)
FSDP = Feature("sharding", "FSDP", "training_args.fsdp", lambda run: run.sharded_by == "fsdp")
DEEPSPEED = Feature("sharding", "DeepSpeed", "training_args.deepspeed", lambda run: run.sharded_by == "deepspeed")
MULTI_PROCESS = Feature("sharding", "multiple processes", "", lambda run: run.topology.is_distributed)
PACKING = Feature("batching", "packing", "sft_args.packing", _sft("packing", True))
PADDING_FREE = Feature("batching", "padding-free", "sft_args.batching", _sft("batching", "padding-free"))
CHUNKED_LOGITS = Feature(
    "memory",
    "chunked logits",
    "sft_args.logits_at_once",
    lambda run: isinstance(getattr(getattr(run.experiment, "sft_args", None), "logits_at_once", None), int),
)
OPTIMIZER_8BIT = Feature(
    "optimizer",
    "8-bit bitsandbytes optimizer",
    _OPTIM,
    lambda run: "8bit" in run.args.optim and "torch" not in run.args.optim,
)
LOW_RANK_OPTIMIZER = Feature(
    "optimizer", "GaLore, APOLLO", _OPTIM, lambda run: run.args.optim.startswith(("galore", "apollo"))
)
LAYERWISE_OPTIMIZER = Feature(
    "optimizer", "layer-wise optimizer", _OPTIM, lambda run: run.args.optim.endswith("layerwise")
)
NOT_LORA = Feature("adapter", "other than LoRA", _TYPE, _is_not_lora)
LORAPLUS = Feature(
    "optimizer",
    "LoRA+",
    "overrides.loraplus_lr_ratio",
    lambda run: run.experiment.overrides.loraplus_lr_ratio is not None,
)
PART_RATES = Feature(
    "optimizer",
    "learning rates of parts",
    "overrides.part_learning_rates",
    lambda run: bool(run.experiment.overrides.part_learning_rates),
)
FP16 = Feature("precision", "fp16", "training_args.fp16", lambda run: run.args.fp16)
GRADIENT_CHECKPOINTING = Feature(
    "memory",
    "gradient checkpointing",
    "training_args.gradient_checkpointing",
    lambda run: bool(run.args.gradient_checkpointing),
)
COMPILED_LAYERS = Feature(
    "memory",
    "compiled layers",
    "training_args.torch_compile",
    lambda run: run.args.torch_compile == "layers",
)
RESUMING = Feature(
    "checkpoints",
    "resuming",
    "run_conf.resume_from_checkpoint",
    lambda run: str(run.experiment.run_conf.resume_from_checkpoint).lower() != "false",
)
MOVING_REFERENCE = Feature(
    "method",
    "a moving reference of DPO",
    "training_args.sync_ref_model",
    lambda run: run.experiment.method_name == "dpo" and bool((run.args.model_extra or {}).get("sync_ref_model")),
)
ADAPTER = Feature("adapter", "an adapter", _TYPE, lambda run: not run.trains_all_weights)
SHARDED_MOVING_REFERENCE = Feature(
    "method",
    "a moving reference under FSDP or DeepSpeed",
    "training_args.sync_ref_model",
    lambda run: bool((run.args.model_extra or {}).get("sync_ref_model")) and run.sharded_by is not None,
)
UNSAVED_OPTIMIZER_STATE = Feature(
    "optimizer",
    "layer-wise optimizers and AdaLomo",
    _OPTIM,
    lambda run: run.args.optim.endswith("layerwise") or run.args.optim == "adalomo",
)
LOAD_BEST_MODEL = Feature(
    "checkpoints",
    "load_best_model_at_end",
    "training_args.load_best_model_at_end",
    lambda run: run.args.load_best_model_at_end,
)
ACCUMULATION = Feature(
    "memory", "accumulation", "batchsize_conf.total_train_batch_size", lambda run: run.accumulation > 1
)
FEATURES = (
    *map(_method, ("sft", "dpo", "kto", "grpo", "orpo", "cpo")), REWARD,
    REFERENCE_MODEL,
    FULL_FINE_TUNING, LORA, ALORA, ADALORA, PREFIX, VIRTUAL, NO_4BIT_SUPPORT, NO_8BIT_SUPPORT, NOT_TOKENWISE,
    PISSA, OLORA, RANDOM_INIT, WEIGHT_BASED_INIT, DORA,
    QUANT_8BIT, QUANT_4BIT, TORCHAO, NO_TORCHAO_SUPPORT, GPTQ, NO_GPTQ_SUPPORT, FLOAT16_TRAINABLE,
    QUANTIZED_ON_LOAD,
    FSDP, DEEPSPEED, MULTI_PROCESS,
    PACKING, PADDING_FREE,
    OPTIMIZER_8BIT, LOW_RANK_OPTIMIZER, LAYERWISE_OPTIMIZER, LORAPLUS, PART_RATES,
    FP16,
    GRADIENT_CHECKPOINTING, ACCUMULATION, CHUNKED_LOGITS,
    LOAD_BEST_MODEL, RESUMING,
)  # fmt: skip
"""All features, grouped by axis."""
