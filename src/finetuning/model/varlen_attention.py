"""Rows laid end to end without padding, each attending to itself alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetuning.config.pretrained_config import FLASH_ATTENTION_PACKAGES

NAME = "sdpa_segments"
"""The attention implementation that this file registers with transformers."""

_LAYERS = {"full_attention", "sliding_attention"}
# Adapters that treat each token alone, so that it does not matter what lies beside it.
_TOKENWISE = {
    "ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
    "LORA", "MISS", "OFT", "OSF", "PVERA", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment of a batch of one long row.

    query: (1, heads, tokens, head size); key and value: (1, key heads, tokens, head size); cu_seq_lens_q: int32 of
    shape (segments + 1), where each segment begins, and the end. Without it, transformers' own sdpa.

    Returns the output, (1, tokens, heads, head size), and None in place of the weights, as transformers wants it.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("attention by segments has neither soft-capping nor sinks")
    borders = cu_seq_lens_q.tolist()
    lengths = [end - start for start, end in pairwise(borders)]
    groups = query.shape[1] // key.shape[1]
    outputs = [
        scaled_dot_product_attention(
            part_query,
            part_key,
            part_value,
            attn_mask=_window(part_query.shape[2], sliding_window, query.device),
            dropout_p=dropout,
            is_causal=sliding_window is None or part_query.shape[2] <= sliding_window,
            scale=scaling,
            enable_gqa=groups > 1,
        )
        for part_query, part_key, part_value in zip(
            query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask of a sliding window, (length, length), where the segment is longer than the window; else None."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _segment_mask(
    *args: Any, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> torch.Tensor | None:
    """No mask for rows laid end to end, which transformers announces by not allowing the causal shortcut."""
    if attention_mask is None and not allow_is_causal_skip:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


def enable_varlen(model: PreTrainedModel, adapter: Any = None) -> str | None:
    """Makes a model compute rows end to end, proven by its own logits; says why not where that cannot be shown.

    The proof: rows, alone and end to end, give the same logits. It is made on the model itself, whatever its
    architecture, before training, and where its weights lie, which must be whole. A model that fails it is left as it
    was.

    Args:
        adapter: the PEFT config of the adapter that the model wears.

    Returns:
        None when rows may be laid end to end; otherwise the reason why not.
    """
    base = model.get_base_model() if adapter is not None else model
    before = base.config._attn_implementation
    reason = _refusal(base, before, adapter)
    if reason:
        return reason
    use_varlen(model, adapter)
    try:
        difference, tolerance = _isolation_error(model)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        # Some kernels are for GPUs alone, and a model that is to be shared out lies on the CPU till then.
        reason = f"the model could not be asked on {base.device}: {(str(error).strip() or repr(error)).splitlines()[0]}"
    else:
        if difference <= tolerance:
            return None
        reason = f"rows end to end change the logits by {difference:.1e} (tolerance {tolerance:.1e})"
    base.set_attn_implementation(before)
    return reason


def enable_kernel(
    model: PreTrainedModel, name: str, adapter: Any = None, autocast: torch.dtype | None = None
) -> str | None:
    """Makes a model that computes by `sdpa` compute rows end to end by another implementation; says why not where that
    cannot be shown.

    The proof: rows end to end give by it the logits that rows alone give by `sdpa`, and a gradient that is finite. A
    model that fails it is left as it was.

    Args:
        name: the implementation, as transformers names it.
        adapter: the PEFT config of the adapter that the model wears.
        autocast: the type that the run computes in by autocast; None without.
    """
    base = model.get_base_model() if adapter is not None else model
    before = base.config._attn_implementation
    if before != "sdpa":
        return f"the model computes by {before}"
    reason = _refusal(base, before, adapter)
    if reason:
        return reason
    try:
        with _computing_in(autocast, base.device):
            difference, tolerance = _isolation_error(model, lambda: base.set_attn_implementation(name), autocast)
            has_gradient = _has_gradient(model)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        # A package may be installed and built for another torch, and a kernel for another GPU.
        reason = (str(error).strip() or repr(error)).splitlines()[0]
    else:
        if base.config._attn_implementation != name:
            reason = f"transformers has put {base.config._attn_implementation} in its place"
        elif not difference <= tolerance:
            reason = f"it changes the logits by {difference:.1e} (tolerance {tolerance:.1e})"
        elif not has_gradient:
            reason = "its gradient is not finite"
        else:
            return None
    base.set_attn_implementation(before)
    return reason


def use_varlen(model: PreTrainedModel, adapter: Any = None, name: str = NAME) -> None:
    """Makes a model compute rows end to end, as another process has proven it to be able to (`enable_varlen`, or
    `enable_kernel` by the implementation of this name)."""
    base = model.get_base_model() if adapter is not None else model
    if base.config._attn_implementation == "sdpa":
        if name == NAME:
            AttentionInterface.register(NAME, varlen_attention)
            AttentionMaskInterface.register(NAME, _segment_mask)
        base.set_attn_implementation(name)


def attention_of(model: Any, reason: str) -> str:
    """Which attention computes, and why that one."""
    computes = model.config._attn_implementation
    return f"attention: {'sdpa, each row by itself' if computes == NAME else computes}  ({reason})"


def _refusal(base: PreTrainedModel, implementation: str, adapter: Any) -> str | None:
    if implementation != "sdpa" and implementation not in FLASH_ATTENTION_PACKAGES:
        return f"attention {implementation} is not known to keep rows apart at a gain; sdpa and FlashAttention are"
    if implementation in FLASH_ATTENTION_PACKAGES and base.device.type == "cpu":
        return f"{implementation} computes on GPUs alone, and the weights lie on the CPU until they are shared out"
    config = base.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not layers <= _LAYERS:
        return f"layers of type {', '.join(sorted(layers - _LAYERS))} carry a state from row to row"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model caps its attention scores, which sdpa cannot"
    if adapter is not None:
        kind = adapter.peft_type.value
        if kind not in _TOKENWISE or getattr(adapter, "alora_invocation_tokens", None):
            return f"the adapter ({kind}) does not treat each token alone"
    return None


def _computing_in(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _rows_to_ask(model: PreTrainedModel) -> list[torch.Tensor]:
    vocabulary = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    return [
        (torch.arange(length, device=device) * 7919 + offset) % vocabulary
        for length, offset in ((5, 11), (9, 3), (1, 5))
    ]


@torch.no_grad()
def _isolation_error(
    model: PreTrainedModel, between: Callable[[], None] = lambda: None, dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """Largest difference between the logits of rows alone and end to end, and how much rounding may make of it.

    `between` is called after the rows alone; `dtype` is what is computed in, where not in that of the weights.
    """
    rows = _rows_to_ask(model)
    was_training = model.training
    model.eval()
    try:
        alone = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows]
        between()
        together = model(use_cache=False, **flat_inputs(rows)).logits[0].float()
    finally:
        model.train(was_training)
    reference = torch.cat(alone)
    weight = next(model.parameters())
    unit = torch.finfo(dtype or weight.dtype).eps if dtype or weight.is_floating_point() else 1e-2
    spread = float(reference.abs().max().clamp(min=1.0))
    return float((reference - together).abs().max()), max(unit * 8, 1e-5) * spread


def _has_gradient(model: PreTrainedModel) -> bool:
    """Whether the gradient of rows end to end can be computed, asked of the smallest weight that is trained."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained:
        return True
    with torch.enable_grad():
        loss = model(use_cache=False, **flat_inputs(_rows_to_ask(model))).logits.float().square().mean()
        (gradient,) = torch.autograd.grad(loss, min(trained, key=torch.Tensor.numel), allow_unused=True)
    return gradient is None or bool(gradient.isfinite().all())


def flat_inputs(rows: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Rows of token ids laid end to end: int64 `input_ids` and `position_ids` of shape (1, tokens), and the borders."""
    lengths = torch.tensor([len(row) for row in rows])
    borders = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(rows[0].device, torch.int32)
    longest = int(lengths.max())
    return {
        "input_ids": torch.cat(list(rows))[None],
        "position_ids": torch.cat([torch.arange(len(row), device=row.device) for row in rows])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }
