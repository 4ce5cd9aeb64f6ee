"""Floating point operations of training, counted from the model where the count is known to be right.

A matrix of n weights costs 2n a token forward, 2n for the gradient of its inputs, and 2n for its own gradient, which
a frozen one does not need. Attention's two products cost 2·2·width·keys a token forward, and twice that backward; a
token sees the half of its row, so a row of s tokens costs 6·width·s² a layer. Recomputation of activations is not
counted: it is no progress. Embeddings are looked up, not multiplied.

Source: arXiv 2204.02311 (PaLM), appendix B, with the causal half of attention and frozen weights taken into account.

What a device can do at most, and how much of its memory was used."""

from __future__ import annotations

import math
import re
import resource
import sys
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


# Dense TFLOP/s in bfloat16 or float16 with float32 accumulation, from the vendors' data sheets. The first pattern that
# is found in the device's name counts. No sparsity, no boost beyond the sheet.
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
    """Peak dense TFLOP/s of a device in 16 bit; None for one that is not known.

    >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("NVIDIA GeForce RTX 9999")
    (989.4, None)
    """
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, name)), None)


def device_name(device: Any) -> str:
    """The name of a torch device's hardware; `cpu` for a processor."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: Any) -> dict[str, int]:
    """The most bytes that were in use at once since the job began, by attribute name: of the device, if it is a GPU,
    and of this process on the host."""
    import torch

    # Kilobytes, but bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    told = {"peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        told["peak_memory_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        told["peak_memory_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        told["memory_total_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return told
