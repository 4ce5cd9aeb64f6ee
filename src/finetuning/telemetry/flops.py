"""Floating point operations of training, counted from the model where the count is known to be right.

A matrix of n weights costs 2n a token forward, 2n for the gradient of its inputs, and 2n for its own gradient, which
a frozen one does not need. Attention's two products cost 2·2·width·keys a token forward, and twice that backward; a
token sees the half of its row, so a row of s tokens costs 6·width·s² a layer. Recomputation of activations is not
counted: it is no progress. Embeddings are looked up, not multiplied.

Source: arXiv 2204.02311 (PaLM), appendix B, with the causal half of attention and frozen weights taken into account.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_UNKNOWN_KINDS = ("expert", "moe", "mamba", "ssm", "conv", "vision", "audio", "modules_to_save", "trainable_tokens")


@dataclass(frozen=True)
class FlopsCount:
    """What one token costs in the body, one scored position in the head, and one unit of the sum of squared row
    lengths in attention; forward and backward."""

    a_token: float
    a_scored_token: float
    a_squared_length: float

    def of(self, tokens: float, scored: float, squares: float) -> float:
        """FLOPs of so much work."""
        return tokens * self.a_token + scored * self.a_scored_token + squares * self.a_squared_length


def count_flops(model: Any) -> FlopsCount | None:
    """The cost of training a dense decoder, all of it or a LoRA on it, quantised by bitsandbytes or not.

    None where the count would be a guess: other kinds of layers, other adapters, other quantisations.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(heads or 1, 1)
    if not (layers and heads and width) or not _is_lora_or_full(model):
        return None
    head = _head_of(model)
    if head is None:
        return None
    body = scored = 0.0
    inner = set(map(id, head.parameters()))
    embeddings = {id(weight) for weight in model.get_input_embeddings().parameters()}
    for name, weight in model.named_parameters():
        if any(kind in name.lower() for kind in _UNKNOWN_KINDS):
            return None
        if weight.dim() < 2:
            continue
        shape = getattr(getattr(weight, "quant_state", None), "shape", None) or weight.shape
        cost = math.prod(shape) * (6 if weight.requires_grad else 4)
        if id(weight) in inner:
            scored += cost
        elif id(weight) not in embeddings:
            body += cost
    if _is_packed_unknown(model):
        return None
    return FlopsCount(body, scored, 6.0 * layers * heads * width)


def _is_lora_or_full(model: Any) -> bool:
    active = getattr(model, "peft_config", None)
    return not active or all(
        item.peft_type.value == "LORA" and not getattr(item, "use_dora", False) for item in active.values()
    )


def _head_of(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _is_packed_unknown(model: Any) -> bool:
    """Whether weights are quantised in a way whose shapes this does not know."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return False
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method)).lower() not in (
        "bitsandbytes",
        "bitsandbytes_4bit",
        "bitsandbytes_8bit",
    )
