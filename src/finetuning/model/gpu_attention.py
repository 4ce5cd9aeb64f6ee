"""Attention of training batches in one call per layer, without a loop over rows and without a mask.

- Padding-free batches: `torch.nn.attention.varlen`, torch's own FlashAttention for rows of different lengths.
- Batches padded on the right: causal attention needs no mask there. No token sees the padding after it, and padding has
  no label. Without a mask, `scaled_dot_product_attention` uses its flash kernels, and nothing is read from the device
  to find out whether there is padding.

Both are verified before they are used, on the model itself, or, where its weights will be sharded, on a small copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from finetuning.errors import first_line
from finetuning.model.peft.adapters import base_model_of
from finetuning.model.varlen_attention import (
    SDPA_VARLEN,
    evaluation_mode,
    logit_tolerance,
    probe_rows,
    reduced_windows,
    sliding_window_mask,
    varlen_inputs,
    varlen_mask,
)
from finetuning.plan.attention import TORCH_VARLEN

if TYPE_CHECKING:
    from peft import PeftModel

CAUSAL_SDPA = "sdpa_causal"
"""Name under which attention without a mask, for batches padded on the right, is registered with transformers."""
_SMALL_VOCABULARY = 1024
_HALF_PRECISION = (torch.bfloat16, torch.float16)


def register_torch_varlen() -> None:
    """Make torch's varlen attention known to transformers."""
    AttentionInterface.register(TORCH_VARLEN, torch_varlen_attention)
    AttentionMaskInterface.register(TORCH_VARLEN, varlen_mask)


def torch_varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each row of a padding-free batch, in one call for all rows.

    Without `cu_seq_lens_q`, as in generation or with padded batches, this is transformers' own sdpa.

    Args:
        query: (1, heads, tokens, head size).
        key: (1, key-value heads, tokens, head size).
        value: (1, key-value heads, tokens, head size).
        cu_seq_lens_q: int32, (rows + 1), the cumulative lengths of the rows.
        max_length_q: the length of the longest row.

    Returns:
        The output, (1, tokens, heads, head size), and None in place of the attention weights.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("torch's varlen attention supports neither soft-capping nor attention sinks")
    if dropout:
        raise ValueError("torch's varlen attention has no dropout")
    if attention_mask is not None and attention_mask.is_floating_point():
        raise ValueError("torch's varlen attention supports no bias on attention scores")
    from torch.nn.attention.varlen import varlen_attn

    # Norms and rotary embeddings may have cast queries and keys to float32, which the kernels do not take.
    query, key, value = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    output = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        # How many tokens to the left and to the right a token sees; -1 for all.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output[None], None


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention of rows that are padded on the right, without looking at a mask.

    Args:
        query: (rows, heads, tokens, head size).
        key: (rows, key-value heads, tokens, head size).
        value: (rows, key-value heads, tokens, head size).

    Raises:
        ValueError: there is a key-value cache, a bias, soft-capping or an attention sink.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or attention_mask is not None:
        raise ValueError("causal sdpa attention supports no bias, no soft-capping and no attention sinks")
    if query.shape[2] != key.shape[2]:
        raise ValueError("causal sdpa attention supports no key-value cache")
    mask = sliding_window_mask(query.shape[2], sliding_window, query.device)
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


def use_causal_sdpa(model: PreTrainedModel | PeftModel) -> None:
    """Switch a model to attention without masks, after it was verified, here or by another process."""
    # transformers builds no mask for an implementation without a mask function.
    AttentionInterface.register(CAUSAL_SDPA, causal_attention)
    base_model_of(model).set_attn_implementation(CAUSAL_SDPA)


def enable_causal_sdpa(model: PreTrainedModel | PeftModel, autocast: torch.dtype | None = None) -> str | None:
    """Switch a model to attention without masks if padding on the right leaves its logits as they are.

    Args:
        autocast: the autocast dtype of the run; None without autocast.

    Returns:
        None if it is on; otherwise the reason why it is not, and the model is unchanged.
    """
    base = base_model_of(model)
    before = str(base.config._attn_implementation)
    if before != "sdpa":
        return f"the model uses {before} attention"
    rows = probe_rows(model)
    longest = max(map(len, rows))
    padded = torch.zeros(len(rows), longest, dtype=torch.int64, device=rows[0].device)
    mask = torch.zeros_like(padded)
    for index, row in enumerate(rows):
        padded[index, : len(row)], mask[index, : len(row)] = row, 1
    try:
        with _inference(model, autocast), reduced_windows(base):
            alone = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows]
            use_causal_sdpa(model)
            together = model(input_ids=padded, attention_mask=mask, use_cache=False).logits.float()
            # Tensors: `max` of Python would drop a NaN.
            differences = [(together[i, : len(row)] - alone[i]).abs().max() for i, row in enumerate(rows)]
            difference = float(torch.stack(differences).max())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        base.set_attn_implementation(before)
        return first_line(error)
    tolerance = logit_tolerance(model, together, autocast)
    if difference <= tolerance:
        return None
    base.set_attn_implementation(before)
    return f"it changes the logits by {difference:.1e} (tolerance {tolerance:.1e})"


@contextmanager
def _inference(model: PreTrainedModel | PeftModel, autocast: torch.dtype | None) -> Iterator[None]:
    device = base_model_of(model).device.type
    with evaluation_mode(model), torch.no_grad(), torch.autocast(device, autocast, enabled=autocast is not None):
        yield


def small_copy(base: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return a model of the same class and config with random weights, and as few layers as show every kind of layer.

    Attention implementations are verified on it where the model's own weights will be sharded, or are not on the
    device.

    Args:
        dtype: that of the model by default.
    """
    config = copy.deepcopy(base.config)
    text = config.get_text_config()
    kinds: list[str] = list(getattr(text, "layer_types", None) or [])
    layers = list({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())
    layers = sorted({*layers, *range(min(2, text.num_hidden_layers))})
    text.num_hidden_layers = len(layers)
    if kinds:
        text.layer_types = [kinds[layer] for layer in layers]
    text.vocab_size = min(text.vocab_size, _SMALL_VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(text, name, None), int) and getattr(text, name) >= text.vocab_size:
            text.update({name: None})
    with device, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = type(base)(config)  # pyright: ignore[reportCallIssue]
    model = model.to(device=device, dtype=dtype or base.dtype).eval()  # pyright: ignore[reportCallIssue]
    model.set_attn_implementation(str(base.config._attn_implementation))
    return model


def accepts_constant_mask(model: PreTrainedModel | PeftModel, autocast: torch.dtype | None = None) -> bool:
    """Return whether the collator's constant mask (`data/collators.py`) leaves a padding-free model's logits unchanged.

    transformers passes a 4-dimensional mask on as it is. Without a mask it compares position ids, and a GPU waits.
    """
    if model.config._attn_implementation not in (SDPA_VARLEN, TORCH_VARLEN):
        return False
    inputs: dict[str, Any] = {**varlen_inputs(probe_rows(model)), "use_cache": False}
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs["input_ids"].device)
    try:
        with _inference(model, autocast):
            return torch.equal(model(**inputs).logits, model(**inputs, attention_mask=mask).logits)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        # Some classes compute with the mask themselves.
        return False


def small_copy_on_gpu(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return `small_copy` on this process's GPU, without the model's adapter."""
    return small_copy(base_model_of(model), torch.device("cuda", torch.cuda.current_device()))
