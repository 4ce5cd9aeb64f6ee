"""What an experiment asks for, by the axes that can get in each other's way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetuning.config.pretrained_config import quantization_method
from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import BitsAndBytes, NewPeft, NoPeft, PretrainedPeft, TorchAO
from finetuning.distributed import ProcessTopology

VIRTUAL_TOKEN_ADAPTERS = ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
"""Adapters that put vectors before a row's tokens."""
TOKENWISE_ADAPTERS = (
    "ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
    "LORA", "MISS", "OFT", "OSF", "PVERA", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
"""Adapters that treat each token independently: the only ones that padding-free batches are compatible with."""
INCOMPATIBLE_WITH_8BIT = (
    "ADAMSS", "DEFT", "DELORA", "FROD", "GLORA", "HRA", "OSF", "PSOFT", "SHIRA", "SUPERTUNING", "TINYLORA",
)  # fmt: skip
INCOMPATIBLE_WITH_4BIT = (*INCOMPATIBLE_WITH_8BIT, "LOHA", "LOKR", "PEANUT")
"""Adapters that read the numbers of the weights under them, which quantised weights do not hold as such."""
TORCHAO_ADAPTERS = ("LORA",)
"""Adapters that are known to train over torchao's weights."""
GPTQ_ADAPTERS = ("ADALORA", "BOFT", "LN_TUNING", "LORA", "MISS", "OFT", "SHADOW", "TRAINABLE_TOKENS", "VERA")
"""Adapters that PEFT has layers for over a GPTQ checkpoint's, or that leave those alone."""


@dataclass(frozen=True)
class RunContext:
    """An experiment and where it runs."""

    experiment: Experiment
    topology: ProcessTopology
    accumulation: int

    @property
    def args(self) -> Any:
        return self.experiment.training_args

    @property
    def adapter(self) -> str:
        """The type of a new adapter in PEFT's spelling; empty without one."""
        conf = self.experiment.peft_conf
        return conf.peft_type.upper() if isinstance(conf, NewPeft) else ""

    @property
    def sharded_by(self) -> str | None:
        """`fsdp` or `deepspeed`, as the launcher or the config says."""
        if self.topology.sharded_by:
            return self.topology.sharded_by
        passed_on = self.args.model_extra or {}
        return "deepspeed" if self.args.deepspeed else "fsdp" if passed_on.get("fsdp") else None

    @property
    def quantised_by(self) -> str | None:
        """How the checkpoint itself is quantised, such as `gptq`; None where it is not, or lies elsewhere."""
        return quantization_method(self.experiment.run_conf.model)


@dataclass(frozen=True)
class Feature:
    """One choice on one axis: its name in the tables, the key that makes it, and whether a setting has it."""

    axis: str
    name: str
    key: str
    has: Callable[[RunContext], bool]


def _quantised(bits: str) -> Callable[[RunContext], bool]:
    return lambda run: isinstance(run.experiment.quant_conf, BitsAndBytes) and getattr(run.experiment.quant_conf, bits)


def _sft(name: str, value: Any) -> Callable[[RunContext], bool]:
    return lambda run: getattr(getattr(run.experiment, "sft_args", None), name, None) == value


def _method(name: str) -> Feature:
    return Feature("method", name, "method", lambda run: run.experiment.method_name == name)


def _is_alora(run: RunContext) -> bool:
    conf = run.experiment.peft_conf
    return run.adapter == "LORA" and bool(
        conf.alora_invocation_string or conf.peft_kwargs.get("alora_invocation_tokens")
    )


def _begins_with(*beginnings: Any) -> Callable[[RunContext], bool]:
    return lambda run: (
        run.adapter == "LORA" and run.experiment.peft_conf.peft_kwargs.get("init_lora_weights", True) in beginnings
    )


def _has_reference(run: RunContext) -> bool:
    method = run.experiment.method_name
    return method in ("dpo", "kto") or (method == "grpo" and bool(getattr(run.args, "beta", 0)))


def _is_other_than_lora(run: RunContext) -> bool:
    """Whether no LoRA is trained, as far as the config tells: what an adapter on disk is, it does not."""
    return run.adapter != "LORA" and not isinstance(run.experiment.peft_conf, PretrainedPeft)


def _is_not_over_torchao(run: RunContext) -> bool:
    return run.adapter not in (*TORCHAO_ADAPTERS, *VIRTUAL_TOKEN_ADAPTERS, "")


def _is_not_over_gptq(run: RunContext) -> bool:
    return run.adapter not in (*GPTQ_ADAPTERS, *VIRTUAL_TOKEN_ADAPTERS, "")


def _is_dora(run: RunContext) -> bool:
    return run.adapter == "LORA" and bool(run.experiment.peft_conf.peft_kwargs.get("use_dora"))


def _trains_fp16(run: RunContext) -> bool:
    """Whether float16 weights are trained as they are; adapters that nothing shards are made in float32."""
    in_half = run.experiment.run_conf.model_args.dtype == "float16"
    return in_half and (isinstance(run.experiment.peft_conf, NoPeft) or run.sharded_by is not None)


_INIT = "peft_conf.peft_kwargs.init_lora_weights"
_TYPE, _QUANT, _OPTIM = "peft_conf.peft_type", "quant_conf.quantization_type", "training_args.optim"
ALL_WEIGHTS = Feature("adapter", "all weights", _TYPE, lambda run: isinstance(run.experiment.peft_conf, NoPeft))
LORA = Feature("adapter", "LoRA", _TYPE, lambda run: run.adapter == "LORA" and not _is_alora(run))
ALORA = Feature("adapter", "aLoRA", "peft_conf.peft_kwargs.alora_invocation_tokens", _is_alora)
ADALORA = Feature("adapter", "AdaLoRA", _TYPE, lambda run: run.adapter == "ADALORA")
PREFIX = Feature("adapter", "prefix tuning", _TYPE, lambda run: run.adapter == "PREFIX_TUNING")
VIRTUAL = Feature("adapter", "virtual tokens", _TYPE, lambda run: run.adapter in VIRTUAL_TOKEN_ADAPTERS)
NO_FOUR_BIT = Feature("adapter", "reads 4 bit weights", _TYPE, lambda run: run.adapter in INCOMPATIBLE_WITH_4BIT)
NO_EIGHT_BIT = Feature("adapter", "reads 8 bit weights", _TYPE, lambda run: run.adapter in INCOMPATIBLE_WITH_8BIT)
UNPROVEN = Feature(
    "adapter",
    "not token by token",
    _TYPE,
    lambda run: run.adapter not in (*TOKENWISE_ADAPTERS, *VIRTUAL_TOKEN_ADAPTERS, ""),
)
PISSA = Feature("adapter", "PiSSA", _INIT, _begins_with("pissa"))
OLORA = Feature("adapter", "OLoRA", _INIT, _begins_with("olora"))
FROM_WEIGHTS = Feature("adapter", "a beginning from the weights", _INIT, _begins_with("pissa", "olora", "orthogonal"))
DORA = Feature("adapter", "DoRA", "peft_conf.peft_kwargs.use_dora", _is_dora)
RANDOM_START = Feature("adapter", "a random beginning", _INIT, _begins_with(False))
SCORES = Feature("method", "reward", "method", lambda run: run.experiment.method_name == "reward")
REFERENCE = Feature("method", "a reference (dpo, kto, grpo with beta)", "method", _has_reference)
EIGHT_BIT = Feature("weights", "8 bit", _QUANT, _quantised("load_in_8bit"))
FOUR_BIT = Feature("weights", "4 bit", _QUANT, _quantised("load_in_4bit"))
TORCHAO = Feature("weights", "torchao", _QUANT, lambda run: isinstance(run.experiment.quant_conf, TorchAO))
NOT_OVER_TORCHAO = Feature("adapter", "not over torchao", _TYPE, _is_not_over_torchao)
GPTQ = Feature("weights", "GPTQ", "run_conf.model", lambda run: run.quantised_by == "gptq")
NOT_OVER_GPTQ = Feature("adapter", "not over GPTQ", _TYPE, _is_not_over_gptq)
QUANTISED_ANEW = Feature(
    "quantisation", "quantised anew", _QUANT, lambda run: isinstance(run.experiment.quant_conf, (BitsAndBytes, TorchAO))
)
FLOAT16_MASTERS = Feature("weights", "trained weights in float16", "run_conf.model_args.dtype", _trains_fp16)
FSDP = Feature("sharding", "FSDP", "training_args.fsdp", lambda run: run.sharded_by == "fsdp")
DEEPSPEED = Feature("sharding", "DeepSpeed", "training_args.deepspeed", lambda run: run.sharded_by == "deepspeed")
SEVERAL = Feature("sharding", "several processes", "", lambda run: run.topology.is_distributed)
PACKING = Feature("rows", "packing", "sft_args.packing", _sft("packing", True))
PADDING_FREE = Feature("rows", "padding-free", "sft_args.batching", _sft("batching", "padding-free"))
SLICED = Feature(
    "memory",
    "logits slice by slice",
    "sft_args.logits_at_once",
    lambda run: isinstance(getattr(getattr(run.experiment, "sft_args", None), "logits_at_once", None), int),
)
EIGHT_BIT_OPTIMIZER = Feature(
    "optimizer", "bitsandbytes, 8 bit", _OPTIM, lambda run: "8bit" in run.args.optim and "torch" not in run.args.optim
)
LOW_RANK = Feature("optimizer", "GaLore, APOLLO", _OPTIM, lambda run: run.args.optim.startswith(("galore", "apollo")))
LAYERWISE = Feature("optimizer", "layer by layer", _OPTIM, lambda run: run.args.optim.endswith("layerwise"))
NOT_LORA = Feature("adapter", "anything but LoRA", _TYPE, _is_other_than_lora)
LORAPLUS = Feature(
    "optimizer",
    "LoRA+",
    "overrides.loraplus_lr_ratio",
    lambda run: run.experiment.overrides.loraplus_lr_ratio is not None,
)
FP16 = Feature("numbers", "fp16", "training_args.fp16", lambda run: run.args.fp16)
CHECKPOINTING = Feature(
    "memory",
    "gradient checkpointing",
    "training_args.gradient_checkpointing",
    lambda run: run.args.gradient_checkpointing,
)
BEST_AT_END = Feature(
    "checkpoints",
    "the best checkpoint at the end",
    "training_args.load_best_model_at_end",
    lambda run: run.args.load_best_model_at_end,
)
ACCUMULATION = Feature(
    "memory", "accumulation", "batchsize_conf.total_train_batch_size", lambda run: run.accumulation > 1
)
FEATURES = (
    *map(_method, ("sft", "dpo", "kto", "grpo", "orpo", "cpo")), SCORES,
    REFERENCE,
    ALL_WEIGHTS, LORA, ALORA, ADALORA, PREFIX, VIRTUAL, NO_FOUR_BIT, NO_EIGHT_BIT, UNPROVEN,
    PISSA, OLORA, RANDOM_START, FROM_WEIGHTS, DORA,
    EIGHT_BIT, FOUR_BIT, TORCHAO, NOT_OVER_TORCHAO, GPTQ, NOT_OVER_GPTQ, FLOAT16_MASTERS, QUANTISED_ANEW,
    FSDP, DEEPSPEED, SEVERAL,
    PACKING, PADDING_FREE,
    EIGHT_BIT_OPTIMIZER, LOW_RANK, LAYERWISE, LORAPLUS,
    FP16,
    CHECKPOINTING, ACCUMULATION, SLICED,
    BEST_AT_END,
)  # fmt: skip
"""Every trait, axis by axis."""
