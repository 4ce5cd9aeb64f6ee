"""Compile the decoder layers of a model one by one, instead of the model as a whole.

Layers of a kind share their graphs, so compiling takes as long for many layers as for a few, and the lengths of rows
are sizes that a graph leaves open: other rows need no other graphs. Layers stay the modules that they were:
`torch.nn.Module.compile` changes how a module is called and not what it is called, so weights are saved, merged and
resumed under the names of the model that is not compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from finetuning.errors import ConfigError, Location
from finetuning.model.peft.adapters import base_model_of
from finetuning.model.varlen_attention import SDPA_VARLEN, varlen_attention

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


def compile_layers(
    model: PreTrainedModel | PeftModel,
    torch_compile_backend: str | Callable[..., object] | None = None,
    torch_compile_mode: str | None = None,
    **unused: object,
) -> int:
    """Have each decoder layer compiled when it is first called; return the number of layers.

    Args:
        torch_compile_backend: a name of `torch.compiler.list_backends()`, or a backend itself; inductor by default.
        torch_compile_mode: the mode of `torch.compile`.
        unused: further keys of `training_args`.

    Raises:
        ConfigError: the model's class has no layers that are known as such.
    """
    base = base_model_of(model)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{type(base).__name__} has no layers that transformers knows as such",
            location=Location(key="training_args.torch_compile"),
            hint="Set it to true, which compiles the whole model, or to false.",
        )
    for layer in layers:
        layer.compile(backend=torch_compile_backend or "inductor", mode=torch_compile_mode, dynamic=True)
    # PEFT calls the forward of the model with the head directly, without hooks; the decoder is always called.
    decoder = cast("nn.Module", base.base_model)
    decoder.register_forward_pre_hook(_without_row_lengths, with_kwargs=True)
    # A loop over as many rows as there are would be compiled for each number of rows: it stays out of the graphs.
    AttentionInterface.register(SDPA_VARLEN, torch.compiler.disable(varlen_attention))
    return len(layers)


def _without_row_lengths(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Leave out the list of row lengths, whose every value a graph would be compiled for. The borders say the same."""
    return args, {name: value for name, value in kwargs.items() if name != "row_lengths"}
