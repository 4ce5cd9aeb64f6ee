"""Quantised base models: bitsandbytes 8 and 4 bit, torchao 8 bit, and checkpoints that GPTQ has quantised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from finetuning.config.sections.model import BitsAndBytes, Quantized, TorchAO
from finetuning.errors import ConfigError, Location, MissingPackageError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig

Sharding = Literal["fsdp", "deepspeed"]
_OUTPUT_LAYERS = ("lm_head", "score")


def to_quantization_config(
    conf: Quantized, *, sharded_by: Sharding | None = None
) -> BitsAndBytesConfig | TorchAoConfig:
    """What transformers quantises by.

    Raises:
        ConfigError: not exactly one of 8 bit and 4 bit is asked for.
        MissingPackageError: the package that quantises is not installed.
    """
    if isinstance(conf, TorchAO):
        return to_torchao_config(conf)
    return to_bitsandbytes_config(conf, sharded_by=sharded_by)


def to_torchao_config(conf: TorchAO) -> TorchAoConfig:
    """What transformers quantises by: weights only, so that gradients pass through the layers.

    Raises:
        MissingPackageError: torchao is not installed.
    """
    from importlib.util import find_spec

    if find_spec("torchao") is None:
        raise MissingPackageError(
            "torchao is not installed",
            place=Location(key="quant_conf.quantization_type"),
            hint="Install it with: pip install 'finetuning[torchao]'",
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kind = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[conf.weight_dtype]
    # The list replaces the one that transformers makes, in which the output layer stands; names match from the start.
    skipped = [rf"(.*\.)?{re.escape(name)}" for name in (*_OUTPUT_LAYERS, *(conf.skip_modules or ()))]
    return TorchAoConfig(kind(), modules_to_not_convert=skipped)


def to_bitsandbytes_config(conf: BitsAndBytes, *, sharded_by: Sharding | None = None) -> BitsAndBytesConfig:
    """What transformers quantises by.

    Under FSDP 4 bit weights are stored in the type that they are computed in: it flattens weights of one type only.

    Raises:
        ConfigError: not exactly one of 8 bit and 4 bit is asked for.
        MissingPackageError: bitsandbytes is not installed.
    """
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if conf.load_in_4bit == conf.load_in_8bit:
        which = "both" if conf.load_in_4bit else "neither"
        raise ConfigError(
            f"{which} of load_in_4bit and load_in_8bit is true; quantisation by bits-and-bytes needs one",
            place=Location(key="quant_conf"),
        )
    if find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            "bitsandbytes is not installed",
            place=Location(key="quant_conf.quantization_type"),
            hint="Install it with: pip install bitsandbytes",
        )
    fields = conf.model_dump(exclude={"quantization_type"}, exclude_none=True)
    if conf.llm_int8_skip_modules is not None:
        # The list replaces the one that transformers makes, in which the output layer stands.
        fields["llm_int8_skip_modules"] = list(dict.fromkeys((*_OUTPUT_LAYERS, *conf.llm_int8_skip_modules)))
    if conf.load_in_4bit and conf.bnb_4bit_quant_storage is None and sharded_by == "fsdp":
        fields["bnb_4bit_quant_storage"] = conf.bnb_4bit_compute_dtype or "float32"
    return BitsAndBytesConfig(**fields)


def choose_trainable_kernel(config: PreTrainedConfig) -> None:
    """Has the layers of a GPTQ checkpoint computed by a kernel that has a backward pass; leaves other configs alone.

    gptqmodel's own choice is the fastest for inference, and most of those refuse to train.
    """
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method") == "gptq":
        config.quantization_config = settings | {"backend": "auto_trainable"}


def prepare_quantized_model(
    model: PreTrainedModel,
    *,
    sharded_by: Sharding | None = None,
    gradient_checkpointing: bool = False,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The model with its own weights frozen and, where nothing shards it, its 16 bit ones in float32.

    Sharding needs one type of number throughout, so the casts are left out there.
    """
    _keep_differentiable(model)
    if sharded_by is not None:
        model.requires_grad_(False)
        return model
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs=dict(gradient_checkpointing_kwargs or {"use_reentrant": False}),
    )


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Holds 4 bit layers on a CPU to the layout that gradients flow through.

    bitsandbytes (with AVX-512 BF16) and gptqmodel rearrange their weights for good at a first pass in evaluation mode,
    for a product that has no backward: the loss still comes out right, and adapters below learn nothing.
    Source: bitsandbytes 0.50, `Linear4bit.forward` and `matmul_4bit`; gptqmodel 7.6, `TorchAtenLinear.forward`.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "qweight") and hasattr(module, "linear_mode"):
            module.linear_mode = "train"


def is_quantized(model: PreTrainedModel) -> bool:
    """True when the base weights are not plain numbers that can be trained or grown."""
    return getattr(model, "hf_quantizer", None) is not None


def is_known(model: PreTrainedModel) -> bool:
    """True where `prepare_quantized_model` is right; other ways to quantise, fp8 say, train as they were loaded."""
    return getattr(model, "quantization_method", None) in ("bitsandbytes", "torchao", "gptq")


def is_packed(model: PreTrainedModel) -> bool:
    """True for a GPTQ checkpoint, whose layers are none of torch's own."""
    return getattr(model, "quantization_method", None) == "gptq"


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers, packed by GPTQ or not, but those that end a model."""
    from torch.nn import Linear

    names = [name for name, layer in model.named_modules() if hasattr(layer, "qweight") or isinstance(layer, Linear)]
    return [name for name in names if name.rpartition(".")[2] not in _OUTPUT_LAYERS]
