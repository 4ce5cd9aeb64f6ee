"""The model of a run without its weights, for a rehearsal: on the meta device, then with fake tensors.

It has the run's adapter, data type, attention, gradient checkpointing and quantization, and the layers asked for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from finetuning.config.sections.model import BitsAndBytes, NewPeft, NoPeft, NoQuantization
from finetuning.errors import ConfigError, Location
from finetuning.plan.attention import DEFAULT_ATTENTION

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from finetuning.config.sections.experiment import Experiment

Model: TypeAlias = "PreTrainedModel | PeftModel"
Checkpointing = Literal["off", "selective", "full"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("off", "selective", "full")
"""Gradient checkpointing, from the fastest to the smallest."""
_BLOCK, _NESTED_BLOCK = 64, 256
"""Weights that share a factor in bitsandbytes' 4 bit, and factors that do if they are quantized as well."""


@dataclass(frozen=True)
class StepShape:
    """What determines the cost of an optimizer step, apart from the model."""

    method: str
    row_lengths: tuple[int, ...]
    """Tokens of each row of a micro-batch; of a preference pair, of each of its answers with the prompt."""
    num_labels: int
    padded: bool
    checkpointing: Checkpointing
    autocast: torch.dtype | None
    weights: torch.dtype
    """The dtype that the base model is held in."""
    attention: str
    micro_batches: int = 1
    """Per optimizer step; gradients of earlier ones are in memory during later ones."""
    optimizer_states: int = 2
    """Values per trained weight."""
    fused_update: bool = True
    """Whether one kernel updates all weights, without temporary values."""
    max_labels_at_once: float = math.inf
    labels_per_chunk: int = 0
    fused_loss: bool = False
    has_reference: bool = False
    """Whether a second copy of the model is the reference, because all weights are trained."""
    for_gpu: bool = True


def read_config(experiment: Experiment) -> PreTrainedConfig:
    """Return the config of the run's model.

    Raises:
        ModelError: it cannot be read.
    """
    from finetuning.model.load import load_pretrained_config
    from finetuning.model.resolve import resolve_model

    run = experiment.run_conf
    source = resolve_model(
        run.model, "model", key="run_conf.model", revision=run.model_args.revision, cache_dir=run.model_args.cache_dir
    )
    config, _ = load_pretrained_config(source, run.model_args)
    return config


def with_layers(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """Return the config with these layers, by their index; an index may occur twice."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = [kinds[layer] for layer in layers]
    text.num_hidden_layers = len(layers)
    return config


def build_model(experiment: Experiment, config: PreTrainedConfig, shape: StepShape) -> Model:
    """Return the model on the meta device, with its adapter, in training mode.

    Raises:
        ConfigError: it is quantized otherwise than in 4 bit, or continues an adapter.
    """
    from peft import get_peft_model

    from finetuning.model.peft.adapters import make_peft_config

    model: Any = _build_base(experiment, config, shape)
    _quantize(model, experiment)
    conf = experiment.peft_conf
    if isinstance(conf, NewPeft):
        with torch.device("meta"):
            parts = experiment.run_conf.train_parts
            model = get_peft_model(model, make_peft_config(model, conf, total_steps=1, parts=parts))
    elif not isinstance(conf, NoPeft):
        raise ConfigError(
            "rehearsing a run that continues an adapter is not supported",
            location=Location(key="peft_conf.peft_type"),
            hint="Rehearse with a new adapter of the same type and rank.",
        )
    model.train()
    if shape.autocast is not None and isinstance(conf, NewPeft):
        from finetuning.trainer.peft_methods import without_input_casts

        # For good: no other pass is made with this model.
        without_input_casts(model).__enter__()
    if shape.checkpointing != "off":
        kwargs: dict[str, object] = {"use_reentrant": False}
        if shape.checkpointing == "selective":
            from finetuning.trainer.selective_checkpointing import selective_kwargs

            kwargs = selective_kwargs(None)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        if isinstance(conf, NewPeft):
            model.enable_input_require_grads()
    return model


def build_reference(experiment: Experiment, config: PreTrainedConfig, shape: StepShape) -> Model:
    """Return the reference of a preference loss on the meta device: the model again, in evaluation mode."""
    return _build_base(experiment, config, shape).eval()


def _build_base(experiment: Experiment, config: PreTrainedConfig, shape: StepShape) -> PreTrainedModel:
    from finetuning.model.load import CAUSAL_LM
    from finetuning.model.peft.adapters import freeze_other_parts

    with torch.device("meta"):
        model = (
            CAUSAL_LM.for_config(config)
            .auto_class.from_config(
                copy.deepcopy(config), trust_remote_code=experiment.run_conf.model_args.trust_remote_code
            )
            .to(shape.weights)
        )
    freeze_other_parts(model, experiment.run_conf.train_parts)
    _set_attention(model, shape.attention)
    if shape.method == "dpo":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def _set_attention(model: Model, name: str) -> None:
    if name == DEFAULT_ATTENTION:
        return
    from finetuning.model.gpu_attention import CAUSAL_SDPA, register_torch_varlen, use_causal_sdpa
    from finetuning.model.varlen_attention import use_varlen

    if name == CAUSAL_SDPA:
        use_causal_sdpa(model)
    else:
        register_torch_varlen()
        use_varlen(model, name)


def _quantize(model: PreTrainedModel, experiment: Experiment) -> None:
    """Replace the layers that are quantized when the model is loaded, as transformers does before it loads weights."""
    conf = experiment.quant_conf
    if isinstance(conf, NoQuantization):
        return
    if not isinstance(conf, BitsAndBytes) or not conf.load_in_4bit:
        raise ConfigError(
            "of quantized models, only those in 4 bit of bitsandbytes can be rehearsed",
            location=Location(key="quant_conf.quantization_type"),
            hint="Rehearse with quantization_type: no-quantization: activations are the same.",
        )
    from transformers.quantizers.auto import AutoHfQuantizer

    from finetuning.model.quantization import prepare_quantized_model, to_quantization_config

    quantizer = AutoHfQuantizer.from_config(to_quantization_config(conf))
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)
    prepare_quantized_model(model)


def make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace parameters and buffers on the meta device by fake ones; tied weights stay tied.

    Args:
        dtype: that of weights before they were quantized.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(weight) not in made:
                is_packed = name == "weight" and hasattr(weight, "compress_statistics")
                made[id(weight)] = _packed(module, dtype) if is_packed else _empty_parameter(weight)
            module.register_parameter(name, made[id(weight)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _empty_parameter(weight: nn.Parameter) -> nn.Parameter:
    return torch.nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad)


def _packed(layer: Any, dtype: torch.dtype) -> nn.Parameter:
    """Return the weight of a layer with two values per byte, and their factors, in the layout of bitsandbytes."""
    from bitsandbytes.functional import QuantState

    weight, shape = layer.weight, torch.Size((layer.out_features, layer.in_features))
    count = shape.numel()
    storage = torch.empty(-(-count // (2 * weight.quant_storage.itemsize)), 1, dtype=weight.quant_storage)
    packed = torch.nn.Parameter(storage, requires_grad=False)
    factors = -(-count // _BLOCK)
    code, nested = torch.empty(16), None
    if weight.compress_statistics:
        nested = QuantState(
            torch.empty(-(-factors // _NESTED_BLOCK)),
            code=torch.empty(256),
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
    packed.quant_state = QuantState(  # pyright: ignore[reportAttributeAccessIssue]
        torch.empty(factors, dtype=torch.uint8 if nested else torch.float32),
        shape=shape,
        code=code,
        blocksize=_BLOCK,
        quant_type=weight.quant_type,
        dtype=dtype,
        offset=torch.empty(()) if nested else None,
        state2=nested,
    )
    return packed
