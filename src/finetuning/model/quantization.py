"""Quantized base models: bitsandbytes in 8 and 4 bits, torchao in 8 bits, and GPTQ checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from finetuning.config.sections.model import BitsAndBytes, Quantized, TorchAO
from finetuning.errors import ConfigError, Location, MissingPackageError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, TorchAoConfig

Sharding = Literal["fsdp", "deepspeed"]
_OUTPUT_LAYERS = ("lm_head", "score")


def to_quantization_config(
    conf: Quantized, *, sharded_by: Sharding | None = None
) -> BitsAndBytesConfig | TorchAoConfig:
    """Translate `quant_conf` to the config object that `from_pretrained` takes.

    Raises:
        ConfigError: both or neither of 8 bits and 4 bits are requested.
        MissingPackageError: the quantization backend is not installed.
    """
    if isinstance(conf, TorchAO):
        return to_torchao_config(conf)
    return to_bitsandbytes_config(conf, sharded_by=sharded_by)


def to_torchao_config(conf: TorchAO) -> TorchAoConfig:
    """Translate a torchao section. Only weights are quantized: activation quantization has no backward pass.

    Raises:
        MissingPackageError: torchao is not installed.
    """
    if find_spec("torchao") is None:
        raise MissingPackageError(
            "torchao is not installed",
            location=Location(key="quant_conf.quantization_type"),
            hint="Install it with: pip install 'finetuning[torchao]'",
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config_class = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[conf.weight_dtype]
    # A list here replaces transformers' default, which skips the output layer, so that layer is listed again.
    # transformers matches the patterns from the start of the name (re.match), hence the optional prefix.
    skipped = [rf"(.*\.)?{re.escape(name)}" for name in (*_OUTPUT_LAYERS, *(conf.skip_modules or ()))]
    return TorchAoConfig(config_class(), modules_to_not_convert=skipped)


def to_bitsandbytes_config(conf: BitsAndBytes, *, sharded_by: Sharding | None = None) -> BitsAndBytesConfig:
    """Translate a bitsandbytes section.

    Under FSDP, 4-bit weights are stored in the compute dtype: FSDP flattens parameters of one dtype only, and would not
    shard uint8 storage together with the other weights.
    Source: https://huggingface.co/docs/bitsandbytes/main/en/fsdp_qlora

    Raises:
        ConfigError: both or neither of 8 bits and 4 bits are requested.
        MissingPackageError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if conf.load_in_4bit == conf.load_in_8bit:
        which = "both" if conf.load_in_4bit else "neither"
        raise ConfigError(
            f"{which} of load_in_4bit and load_in_8bit are true; bits-and-bytes quantization needs exactly one",
            location=Location(key="quant_conf"),
        )
    if find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            "bitsandbytes is not installed",
            location=Location(key="quant_conf.quantization_type"),
            hint="Install it with: pip install bitsandbytes",
        )
    fields = conf.model_dump(exclude={"quantization_type"}, exclude_none=True)
    if conf.llm_int8_skip_modules is not None:
        # As for torchao: a list replaces transformers' default, which skips the output layer.
        fields["llm_int8_skip_modules"] = list(dict.fromkeys((*_OUTPUT_LAYERS, *conf.llm_int8_skip_modules)))
    if conf.load_in_4bit and conf.bnb_4bit_quant_storage is None and sharded_by == "fsdp":
        fields["bnb_4bit_quant_storage"] = conf.bnb_4bit_compute_dtype or "float32"
    return BitsAndBytesConfig(**fields)


def select_trainable_gptq_kernel(config: PreTrainedConfig) -> None:
    """Select a GPTQ kernel that has a backward pass; configs of other models are left alone.

    By default gptqmodel picks the fastest kernel for inference, and most of those refuse to train.
    """
    settings = getattr(config, "quantization_config", None)
    if isinstance(settings, dict) and settings.get("quant_method") == "gptq":
        config.quantization_config = settings | {"backend": "auto_trainable"}


def prepare_quantized_model(
    model: PreTrainedModel,
    sharded_by: Sharding | None = None,
    gradient_checkpointing: bool = False,
    gradient_checkpointing_kwargs: Mapping[str, object] | None = None,
) -> PreTrainedModel:
    """Freeze the base weights, and prepare them for gradient checkpointing where FSDP does not do so itself.

    Norms, embeddings and the head keep their 16 bits. PEFT's own preparation casts them to float32, which doubles the
    memory of large vocabularies and makes the matrix products of the head several times slower. Norms compute in
    float32 in any case.
    """
    _keep_differentiable(model)
    model.requires_grad_(False)
    if sharded_by is None and gradient_checkpointing:
        # Checkpointed layers get a gradient only if one of their inputs needs it, and all weights are frozen.
        model.enable_input_require_grads()
        kwargs = dict(gradient_checkpointing_kwargs or {"use_reentrant": False})
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return model


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keep 4-bit layers on a CPU in the weight layout that gradients can flow through.

    At the first forward pass in evaluation mode, bitsandbytes (with AVX-512 BF16) and gptqmodel repack their weights
    permanently for a kernel that has no backward pass. The loss stays correct, but layers below get no gradient, so
    adapters there silently learn nothing.
    Source: bitsandbytes 0.50, `Linear4bit.forward` and `matmul_4bit`; gptqmodel 7.6, `TorchAtenLinear.forward`.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
        if hasattr(module, "qweight") and hasattr(module, "linear_mode"):
            module.linear_mode = "train"  # pyright: ignore[reportArgumentType]


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the base weights are quantized, so that they cannot be trained or resized."""
    return getattr(model, "hf_quantizer", None) is not None


def needs_kbit_preparation(model: PreTrainedModel) -> bool:
    """Whether `prepare_quantized_model` applies; other quantization methods, such as fp8, train as they are loaded."""
    return getattr(model, "quantization_method", None) in ("bitsandbytes", "torchao", "gptq")
