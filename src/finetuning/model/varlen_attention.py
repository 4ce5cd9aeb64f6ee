"""Padding-free (varlen) attention: rows concatenated without padding, each attending only to itself.

A batch of rows is one sequence of shape (1, tokens). FlashAttention's varlen kernels take it with the cumulative
lengths of the rows (`cu_seq_lens`). For the same on torch's scaled dot product attention, this module registers an
implementation with transformers, which computes row by row.

Whether a model keeps rows apart depends on all of its layers, not only on attention: positions from a buffer, a
convolution or a recurrent state would leak. So support is not taken from a list of architectures. It is verified on
the model itself, by comparing the logits of rows alone with those of the same rows concatenated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetuning.config.pretrained_config import FLASH_ATTENTION_PACKAGES
from finetuning.errors import first_line
from finetuning.model.peft.adapters import base_model_of, peft_type_of
from finetuning.plan.features import TOKENWISE_ADAPTERS

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

SDPA_VARLEN = "sdpa_varlen"
"""Name under which the implementation of this module is registered with transformers."""

# Other layer types, such as linear attention and Mamba, carry a state from one row into the next.
_ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention"}


class VarlenInputs(TypedDict):
    """Model inputs of concatenated rows; names and dtypes are those of transformers' FlashAttention arguments."""

    input_ids: torch.Tensor
    """int64, (1, tokens)."""
    position_ids: torch.Tensor
    """int64, (1, tokens); starts at 0 in each row."""
    cu_seq_lens_q: torch.Tensor
    """int32, (rows + 1): the cumulative lengths, starting with 0."""
    cu_seq_lens_k: torch.Tensor
    max_length_q: int
    max_length_k: int


def enable_varlen(model: PreTrainedModel | PeftModel, adapter: PeftConfig | None = None) -> str | None:
    """Switch a model to padding-free attention if its own logits show that it keeps rows apart.

    The logits of rows alone and of the same rows concatenated must agree. The comparison runs on the device of the
    weights, before training; the weights must not be sharded yet. A model that fails it is left unchanged.

    Args:
        adapter: config of the PEFT adapter on the model, if there is one.

    Returns:
        None if padding-free attention is on; otherwise the reason why it is not.
    """
    base = base_model_of(model)
    before = str(base.config._attn_implementation)
    reason = _unsupported_reason(base, before, adapter)
    if reason:
        return reason
    use_varlen(model)
    try:
        difference, tolerance = _isolation_error(model)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        # Some kernels run on GPUs only, and under FSDP the model is still on the CPU here.
        reason = f"isolation cannot be verified on {base.device}: {first_line(error)}"
    else:
        if difference <= tolerance:
            return None
        reason = f"concatenating rows changes the logits by {difference:.1e} (tolerance {tolerance:.1e})"
    base.set_attn_implementation(before)
    return reason


def enable_varlen_kernel(
    model: PreTrainedModel | PeftModel,
    name: str,
    adapter: PeftConfig | None = None,
    autocast: torch.dtype | None = None,
) -> str | None:
    """Switch a model from `sdpa` to another implementation with varlen support, such as FlashAttention, if it agrees.

    The logits of concatenated rows under `name` must agree with those of rows alone under `sdpa`, and the gradient must
    be finite. A model that fails this is left unchanged.

    Args:
        name: the implementation, by transformers' name.
        adapter: config of the PEFT adapter on the model, if there is one.
        autocast: the autocast dtype of the run; None without autocast.

    Returns:
        None if the implementation is on; otherwise the reason why it is not.
    """
    base = base_model_of(model)
    before = str(base.config._attn_implementation)
    if before != "sdpa":
        return f"the model uses {before} attention"
    reason = _unsupported_reason(base, before, adapter)
    if reason:
        return reason
    try:
        with _autocast(autocast, base.device):
            difference, tolerance = _isolation_error(model, lambda: base.set_attn_implementation(name), autocast)
            has_finite_gradient = _has_finite_gradient(model)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        # An installed package may be built for another version of torch, and a kernel for another GPU.
        reason = first_line(error)
    else:
        # transformers may fall back to another implementation with only a warning.
        if base.config._attn_implementation != name:
            reason = f"transformers uses {base.config._attn_implementation} instead"
        elif not difference <= tolerance:
            reason = f"it changes the logits by {difference:.1e} (tolerance {tolerance:.1e})"
        elif not has_finite_gradient:
            reason = "its gradient is not finite"
        else:
            return None
    base.set_attn_implementation(before)
    return reason


def use_varlen(model: PreTrainedModel | PeftModel, name: str = SDPA_VARLEN) -> None:
    """Switch a model to a padding-free implementation that was verified, here or by another process."""
    base = base_model_of(model)
    if base.config._attn_implementation == "sdpa":
        if name == SDPA_VARLEN:
            AttentionInterface.register(SDPA_VARLEN, varlen_attention)
            AttentionMaskInterface.register(SDPA_VARLEN, varlen_mask)
        base.set_attn_implementation(name)


def varlen_inputs(rows: Sequence[torch.Tensor]) -> VarlenInputs:
    """Concatenate rows of token ids, each an int64 tensor (tokens), to the inputs of one padding-free batch."""
    lengths = torch.tensor([len(row) for row in rows])
    cu_seq_lens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(rows[0].device, torch.int32)
    longest = int(lengths.max())
    return {
        "input_ids": torch.cat(list(rows))[None],
        "position_ids": torch.cat([torch.arange(len(row), device=row.device) for row in rows])[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def describe_attention(model: PreTrainedModel | PeftModel, reason: str) -> str:
    """Describe the model's attention implementation, and why it was chosen."""
    name = model.config._attn_implementation
    return f"attention: {'sdpa, row by row' if name == SDPA_VARLEN else name}  ({reason})"


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
    """Compute causal attention within each row of a padding-free batch.

    Rows are computed one after the other: a block-diagonal mask over the whole batch would cost memory and time
    quadratic in the number of all tokens, and keeps torch from its fused causal kernels. Without `cu_seq_lens_q`, as in
    generation or with padded batches, this is transformers' own sdpa.

    Args:
        query: (1, heads, tokens, head size).
        key: (1, key-value heads, tokens, head size).
        value: (1, key-value heads, tokens, head size).
        cu_seq_lens_q: int32, (rows + 1), the cumulative lengths of the rows.

    Returns:
        The output, (1, tokens, heads, head size), and None in place of the attention weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("varlen sdpa attention supports neither soft-capping nor attention sinks")
    boundaries = cu_seq_lens_q.tolist()
    lengths = [end - start for start, end in pairwise(boundaries)]
    groups = query.shape[1] // key.shape[1]
    outputs = [
        scaled_dot_product_attention(
            row_query,
            row_key,
            row_value,
            attn_mask=_sliding_window_mask(row_query.shape[2], sliding_window, query.device),
            dropout_p=dropout,
            is_causal=sliding_window is None or row_query.shape[2] <= sliding_window,
            scale=scaling,
            enable_gqa=groups > 1,
        )
        for row_query, row_key, row_value in zip(
            query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _sliding_window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return a bool mask (length, length), True where attention is allowed; None if the window covers the row."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def varlen_mask(
    *args: Any, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> torch.Tensor | None:
    """Build no mask for padding-free batches, and transformers' sdpa mask for all others.

    transformers detects concatenated rows by their position ids, and then forbids the shortcut by `is_causal`
    (`allow_is_causal_skip=False`). Without an attention mask, that is the sign of a padding-free batch.
    """
    if attention_mask is None and not allow_is_causal_skip:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


def _unsupported_reason(base: PreTrainedModel, implementation: str, adapter: PeftConfig | None) -> str | None:
    """Return why padding-free attention is ruled out without trying; None if it is worth a try."""
    if implementation != "sdpa" and implementation not in FLASH_ATTENTION_PACKAGES:
        return f"attention {implementation} has no efficient padding-free form; sdpa and FlashAttention have"
    if implementation in FLASH_ATTENTION_PACKAGES and base.device.type == "cpu":
        return f"{implementation} runs on GPUs only, and the weights are on the CPU until they are sharded"
    config = base.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not layers <= _ATTENTION_LAYER_TYPES:
        return f"layers of type {', '.join(sorted(layers - _ATTENTION_LAYER_TYPES))} carry a state from row to row"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model soft-caps its attention scores, which sdpa does not support"
    if adapter is not None:
        peft_type = peft_type_of(adapter)
        # Adapters such as prompt tuning add virtual tokens to each row, and aLoRA depends on the tokens before.
        if peft_type not in TOKENWISE_ADAPTERS or getattr(adapter, "alora_invocation_tokens", None):
            return f"the adapter ({peft_type}) does not treat tokens independently"
    return None


def _autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _probe_rows(model: PreTrainedModel | PeftModel) -> list[torch.Tensor]:
    """Return three rows of different lengths, one of a single token, with ids spread over the vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    return [
        (torch.arange(length, device=device) * 7919 + offset) % vocabulary
        for length, offset in ((5, 11), (9, 3), (1, 5))
    ]


@torch.no_grad()
def _isolation_error(
    model: PreTrainedModel | PeftModel,
    switch_implementation: Callable[[], None] = lambda: None,
    dtype: torch.dtype | None = None,
) -> tuple[float, float]:
    """Return the largest difference between the logits of rows alone and concatenated, and the tolerance for it.

    The tolerance is 8 units of the compute dtype's machine epsilon (at least 1e-5), relative to the largest logit:
    kernels for other shapes sum in another order, and so round differently. A leak between rows is larger by orders of
    magnitude.

    Args:
        switch_implementation: called between the two passes.
        dtype: the compute dtype, if it is not that of the weights.
    """
    rows = _probe_rows(model)
    was_training = model.training
    # Dropout would make the two passes differ.
    model.eval()
    try:
        alone = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows]
        switch_implementation()
        together = model(use_cache=False, **varlen_inputs(rows)).logits[0].float()
    finally:
        model.train(was_training)
    reference = torch.cat(alone)
    weight = next(model.parameters())
    # Quantized weights are stored as integers, which have no epsilon.
    epsilon = torch.finfo(dtype or weight.dtype).eps if dtype or weight.is_floating_point() else 1e-2
    scale = float(reference.abs().max().clamp(min=1.0))
    return float((reference - together).abs().max()), max(epsilon * 8, 1e-5) * scale


def _has_finite_gradient(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the backward pass works; computed for the smallest trainable weight, to save memory."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained:
        return True
    with torch.enable_grad():
        loss = model(use_cache=False, **varlen_inputs(_probe_rows(model))).logits.float().square().mean()
        (gradient,) = torch.autograd.grad(loss, min(trained, key=torch.Tensor.numel), allow_unused=True)
    return gradient is None or bool(gradient.isfinite().all())
