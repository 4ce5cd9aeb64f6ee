"""Keys and values of what was read and written so far, kept where there is room for more."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

ROOM = 128
"""Tokens that a layer has room for when it grows."""


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values, written into place; a `DynamicLayer` copies all of them for each token.

    `keys` and `values` are views of the first tokens of tensors that are longer: [row, head, token, feature].
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._shown: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        # Beams and cropping put other tensors into `keys`, which are then no view of the buffers.
        if self._buffers is None or self.keys is not self._shown or end > self._buffers[0].shape[-2]:
            self._buffers = (_roomy(self.keys, key_states, begin, end), _roomy(self.values, value_states, begin, end))
        keys, values = self._buffers
        keys[..., begin:end, :] = key_states
        values[..., begin:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        self._shown = self.keys
        return self.keys, self.values


def _roomy(old: torch.Tensor, new: torch.Tensor, kept: int, needed: int) -> torch.Tensor:
    """A tensor with room for `needed` tokens and more, that begins with the `kept` ones of `old`."""
    *outer, _, features = new.shape
    buffer = new.new_empty((*outer, needed + ROOM, features))
    if kept:
        buffer[..., :kept, :] = old
    return buffer


def preallocated_cache(model: Any, config: GenerationConfig) -> Cache | None:
    """A cache with room for a model whose layers all attend to everything; None where transformers chooses better.

    Sliding windows, states of other kinds, virtual tokens, beams and a cache that the user asked for are left to it.
    """
    base = model
    if hasattr(model, "peft_config"):
        if model.active_peft_config.is_prompt_learning:
            return None
        base = model.get_base_model()
    if config.use_cache is False or config.cache_implementation is not None or (config.num_beams or 1) > 1:
        return None
    if "past_key_values" not in inspect.signature(base.forward).parameters:
        return None
    layers = DynamicCache(config=base.config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    return Cache(layers=[PreallocatedLayer() for _ in layers])
