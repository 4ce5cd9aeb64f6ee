"""A key-value cache with preallocated memory."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from finetuning.model.peft.adapter_files import is_peft_model
from finetuning.model.peft.adapters import base_model_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

GROWTH = 128
"""Number of tokens by which a layer's buffers grow."""


class PreallocatedLayer(DynamicLayer):
    """The keys and values of a layer, written in place. `DynamicLayer` instead copies all of them for each token.

    `keys` and `values` have the shape [row, head, token, feature]; they are views of the first tokens of buffers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._view: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        # Beam search and cropping assign new tensors to `keys`, which are then not views of the buffers.
        if self._buffers is None or self.keys is not self._view or end > self._buffers[0].shape[-2]:
            self._buffers = (_grow(self.keys, key_states, begin, end), _grow(self.values, value_states, begin, end))
        keys, values = self._buffers
        keys[..., begin:end, :] = key_states
        values[..., begin:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        self._view = self.keys
        return self.keys, self.values


def _grow(old: torch.Tensor | None, new: torch.Tensor, kept: int, needed: int) -> torch.Tensor:
    """Return a buffer for more than `needed` tokens that starts with the first `kept` tokens of `old`."""
    *outer, _, features = new.shape
    buffer = new.new_empty((*outer, needed + GROWTH, features))
    if old is not None and kept:
        buffer[..., :kept, :] = old
    return buffer


def preallocated_cache(model: PreTrainedModel | PeftModel, config: GenerationConfig) -> Cache | None:
    """Return a preallocated cache for a model with full attention in all layers; None to let transformers choose.

    transformers chooses the cache for sliding-window attention, other kinds of state, virtual tokens, beam search, and
    if the user configures a cache.
    """
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        return None
    base = base_model_of(model)
    if config.use_cache is False or config.cache_implementation is not None or (config.num_beams or 1) > 1:
        return None
    if "past_key_values" not in inspect.signature(base.forward).parameters:
        return None
    layers = DynamicCache(config=base.config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    return Cache(layers=[PreallocatedLayer() for _ in layers])
