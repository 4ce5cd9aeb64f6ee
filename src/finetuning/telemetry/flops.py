"""FLOPs of training, counted from the model where the count is exact, and peak FLOPs of devices.

A matrix of n weights costs 2n FLOPs per token in the forward pass, 2n for the gradient of its input, and 2n for its own
gradient, which a frozen weight does not need. The two matrix products of attention cost 2·2·width·keys per token
forward and twice that backward. With a causal mask a token attends to half of its row on average, so that a row of
s tokens costs 6·width·s² per layer. Recomputed activations are not counted, because MFU measures progress. Embeddings
are looked up, not multiplied.

Source: PaLM (arXiv 2204.02311), appendix B, changed for the causal mask and for frozen weights.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_UNSUPPORTED_LAYERS = (
    *("expert", "moe", "mamba", "ssm", "conv", "vision", "audio"),
    *("modules_to_save", "trainable_tokens"),
)
_BITSANDBYTES = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


@dataclass(frozen=True)
class FlopsCount:
    """FLOPs of forward and backward pass: per token in the body, per position that the LM head scores, and per unit of
    the sum of squared row lengths in attention."""

    per_token: float
    per_scored_token: float
    per_squared_length: float

    def total(self, tokens: float, scored_tokens: float, squared_lengths: float) -> float:
        """Return the FLOPs of this many tokens, scored positions, and sum of squared row lengths."""
        return (
            tokens * self.per_token + scored_tokens * self.per_scored_token + squared_lengths * self.per_squared_length
        )


def count_flops(model: PreTrainedModel) -> FlopsCount | None:
    """Return the cost of training a dense decoder: fully, or by LoRA, unquantized or quantized by bitsandbytes.

    Return None where the count would be a guess: for other layers, adapters and quantizations.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(heads or 1, 1)
    if not (layers and heads and width) or not _is_full_or_lora(model) or not _has_known_shapes(model):
        return None
    lm_head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if lm_head is None:
        return None
    body = scored = 0.0
    lm_head_weights = set(map(id, lm_head.parameters()))
    embeddings = {id(weight) for weight in model.get_input_embeddings().parameters()}
    for name, weight in model.named_parameters():
        if any(kind in name.lower() for kind in _UNSUPPORTED_LAYERS):
            return None
        if weight.dim() < 2:
            continue
        # bitsandbytes packs 4-bit weights; their quantization state has the original shape.
        shape: torch.Size = getattr(getattr(weight, "quant_state", None), "shape", None) or weight.shape
        cost = math.prod(shape) * (6 if weight.requires_grad else 4)
        if id(weight) in lm_head_weights:
            scored += cost
        elif id(weight) not in embeddings:
            body += cost
    return FlopsCount(body, scored, 6.0 * layers * heads * width)


def _is_full_or_lora(model: PreTrainedModel) -> bool:
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return True
    from finetuning.model.peft.adapters import peft_type_of

    return all(
        peft_type_of(adapter) == "LORA" and not getattr(adapter, "use_dora", False) for adapter in adapters.values()
    )


def _has_known_shapes(model: PreTrainedModel) -> bool:
    """Return whether the weights are unquantized, or quantized in a way that keeps their original shapes."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return True
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method)).lower() in _BITSANDBYTES


# Dense TFLOP/s in bfloat16 or float16 with float32 accumulation and without sparsity, from the vendors' data sheets.
# The first pattern that matches the device's name counts, so that the special models come first.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"\bB200\b", 2250.0),
    (r"\bGH200\b", 989.4),
    (r"\bH200\b(?!.*NVL)", 989.4),
    (r"\bH100\b.*NVL", 835.0),
    (r"\bH100\b.*PCIe", 756.0),
    (r"\bH100\b", 989.4),
    (r"\bA100\b", 312.0),
    (r"\bA30\b", 165.0),
    (r"\bA40\b", 149.7),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.05),
    (r"\bL40\b", 181.05),
    (r"\bL4\b", 121.0),
    (r"\bMI325X\b", 1307.4),
    (r"\bMI300X\b", 1307.4),
    # A device is one of the two dies of a card.
    (r"\bMI250X\b", 191.5),
    (r"\bMI250\b", 181.05),
    (r"\bMI210\b", 181.0),
)


def peak_tflops(name: str) -> float | None:
    """Return the peak dense 16-bit TFLOP/s of a device by its hardware name; None for an unknown device.

    >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("NVIDIA GeForce RTX 9999")
    (989.4, None)
    """
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, name)), None)
