"""Padding-free (varlen) attention: rows concatenated without padding, each attending only to itself.

A batch of rows is one sequence of shape (1, tokens). FlashAttention's varlen kernels take it with the cumulative
lengths of the rows (`cu_seq_lens`). For the same on torch's scaled dot product attention, this module registers an
implementation with transformers, which computes row by row.

Whether a model keeps rows apart depends on all of its layers, not only on attention: positions from a buffer, a
convolution or a recurrent state would leak. So support is not taken from a list of architectures. It is verified on
the model itself, on the device and in the dtype that it trains in:

- The logits of rows alone and of the same rows concatenated must agree. This finds wrong positions and wrong values,
  down to the rounding errors of the dtype.
- The gradient of a row's logits with respect to the embeddings of all other rows must be 0. It has no rounding error,
  so it finds a leak of any size. The same gradient shows that a model is causal, which every run verifies.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetuning.config.pretrained_config import FLASH_ATTENTION_PACKAGES
from finetuning.errors import Location, ModelError, first_line
from finetuning.model.peft.adapters import base_model_of, peft_type_of
from finetuning.plan.features import TOKENWISE_ADAPTERS

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

SDPA_VARLEN = "sdpa_varlen"
"""Name under which the implementation of this module is registered with transformers."""

# Other layer types, such as linear attention and Mamba, carry a state from one row into the next.
_ATTENTION_LAYER_TYPES = {"full_attention", "sliding_attention"}

_REDUCIBLE_WINDOWS = ("sliding_window", "attention_chunk_size")
_OTHER_WINDOWS = (
    *("window_size", "local_attention", "attention_window", "keep_window_size", "chunk_size", "mamba_chunk_size"),
    *("conv_kernel", "conv_L_cache", "d_conv", "mamba_d_conv", "linear_conv_kernel_dim", "conv1d_width"),
)
"""Fields of configs: how many tokens a layer looks at."""
_MIN_REACH = 64
"""Rows for the checks are longer than this, and than every window, chunk and convolution of the model."""
_MAX_REACH = 1024
"""Rows are longer than windows that cannot be reduced up to this size, and not beyond."""
_REDUCED_WINDOW = 32
"""What larger windows are set to during a check, so that short rows are longer than them."""
_MAX_LEAK = 1e-5
"""Relative to the largest gradient that is allowed. 0 up to the rounding of convolutions by Fourier transform."""


_FAILED_PASS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, NotImplementedError)
"""What models raise that cannot compute the rows of a check here, such as those with kernels for GPUs only."""


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
    row_lengths: list[int]


def enable_varlen(
    model: PreTrainedModel | PeftModel, adapter: PeftConfig | None = None, autocast: torch.dtype | None = None
) -> str | None:
    """Switch a model to padding-free attention if its own logits and gradients show that it keeps rows apart.

    The check runs on the device of the weights, before training; the weights must not be sharded yet. A model that
    fails it is left unchanged.

    Args:
        adapter: config of the PEFT adapter on the model, if there is one.
        autocast: the autocast dtype of the run; None without autocast.

    Returns:
        None if padding-free attention is on; otherwise the reason why it is not.
    """
    base = base_model_of(model)
    before = str(base.config._attn_implementation)
    reason = _without_varlen_form(before, base.device) or _unsupported_reason(base, before, adapter)
    if reason:
        return reason
    try:
        with _autocast(autocast, base.device):
            reason = _leak_between_rows(model, lambda: use_varlen(model), autocast)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        # Some kernels run on GPUs only, and under FSDP the model is still on the CPU here.
        reason = f"isolation cannot be verified on {base.device}: {first_line(error)}"
    if reason:
        base.set_attn_implementation(before)
        return f"concatenating rows {reason}" if not reason.startswith("isolation") else reason
    return None


def enable_varlen_kernel(
    model: PreTrainedModel | PeftModel,
    name: str,
    adapter: PeftConfig | None = None,
    autocast: torch.dtype | None = None,
) -> str | None:
    """Switch a model to another implementation with varlen support, such as FlashAttention, if it agrees.

    The logits of concatenated rows under `name` must agree with those of rows alone under `sdpa`, or under `eager` for
    a class without `sdpa`, and the gradient must be finite, and 0 between rows. A model that fails this is left
    unchanged.

    Args:
        name: the implementation, by transformers' name.
        adapter: config of the PEFT adapter on the model, if there is one.
        autocast: the autocast dtype of the run; None without autocast.

    Returns:
        None if the implementation is on; otherwise the reason why it is not.
    """
    base = base_model_of(model)
    before = str(base.config._attn_implementation)
    if not _has_default_attention(base):
        return f"the model uses {before} attention"
    reason = _unsupported_reason(base, before, adapter)
    if reason:
        return reason
    try:
        with _autocast(autocast, base.device):
            leak = _leak_between_rows(model, lambda: use_varlen(model, name), autocast)
            has_finite_gradient = bool(leak) or _has_finite_gradient(model)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        # An installed package may be built for another version of torch, and a kernel for another GPU.
        reason = first_line(error)
    else:
        # transformers may fall back to another implementation with only a warning.
        if base.config._attn_implementation != name:
            reason = f"transformers uses {base.config._attn_implementation} instead"
        elif leak:
            reason = f"it {leak}"
        elif not has_finite_gradient:
            reason = "its gradient is not finite"
        else:
            return None
    base.set_attn_implementation(before)
    return reason


def use_varlen(model: PreTrainedModel | PeftModel, name: str = SDPA_VARLEN) -> None:
    """Switch a model to a padding-free implementation that was verified, here or by another process."""
    base = base_model_of(model)
    if _has_default_attention(base):
        if name == SDPA_VARLEN:
            AttentionInterface.register(SDPA_VARLEN, varlen_attention)
            AttentionMaskInterface.register(SDPA_VARLEN, varlen_mask)
        base.set_attn_implementation(name)


def _has_default_attention(base: PreTrainedModel) -> bool:
    """Whether attention is what transformers chooses for the class: `sdpa`, or `eager` where the class has no sdpa."""
    name = base.config._attn_implementation
    return name == "sdpa" or (name == "eager" and not base._supports_sdpa)


def varlen_inputs(rows: Sequence[torch.Tensor]) -> VarlenInputs:
    """Concatenate rows of token ids, each an int64 tensor (tokens), to the inputs of one padding-free batch."""
    row_lengths = [len(row) for row in rows]
    cu_seq_lens = torch.tensor([0, *accumulate(row_lengths)], dtype=torch.int32, device=rows[0].device)
    longest = max(row_lengths)
    return {
        "input_ids": torch.cat(list(rows))[None],
        "position_ids": torch.cat([torch.arange(len(row), device=row.device) for row in rows])[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
        "row_lengths": row_lengths,
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
    row_lengths: Sequence[int] | None = None,
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
        row_lengths: the lengths of the rows; read from `cu_seq_lens_q` if they are not known on the host.

    Returns:
        The output, (1, tokens, heads, head size), and None in place of the attention weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("varlen sdpa attention supports neither soft-capping nor attention sinks")
    if attention_mask is not None and attention_mask.is_floating_point():
        # A bias that the model computes, such as Doge's from its hidden states, which training may move away from 0.
        raise ValueError("varlen sdpa attention supports no bias on attention scores")
    lengths = list(row_lengths or cu_seq_lens_q.diff().tolist())
    groups = query.shape[1] // key.shape[1]
    outputs = [
        scaled_dot_product_attention(
            row_query,
            row_key,
            row_value,
            attn_mask=sliding_window_mask(row_query.shape[2], sliding_window, query.device),
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


def sliding_window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
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


def _without_varlen_form(implementation: str, device: torch.device) -> str | None:
    """Return why an attention implementation cannot compute concatenated rows on this device; None if it can."""
    if implementation != "sdpa" and implementation not in FLASH_ATTENTION_PACKAGES:
        return f"attention {implementation} has no efficient padding-free form; sdpa and FlashAttention have"
    if implementation in FLASH_ATTENTION_PACKAGES and device.type == "cpu":
        return f"{implementation} runs on GPUs only, and the weights are on the CPU until they are sharded"
    return None


def _unsupported_reason(base: PreTrainedModel, implementation: str, adapter: PeftConfig | None) -> str | None:
    """Return why padding-free attention is ruled out without trying; None if it is worth a try.

    Args:
        implementation: the one that computes the rows alone.
    """
    config = base.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not layers <= _ATTENTION_LAYER_TYPES:
        return f"layers of type {', '.join(sorted(layers - _ATTENTION_LAYER_TYPES))} carry a state from row to row"
    if implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model soft-caps its attention scores, which sdpa does not support"
    if adapter is not None:
        peft_type = peft_type_of(adapter)
        # Adapters such as prompt tuning add virtual tokens to each row, and aLoRA depends on the tokens before.
        if peft_type not in TOKENWISE_ADAPTERS or getattr(adapter, "alora_invocation_tokens", None):
            return f"the adapter ({peft_type}) does not treat tokens independently"
    return None


def _autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def check_causality(
    model: PreTrainedModel, autocast: torch.dtype | None = None, key: str = "run_conf.model"
) -> str | None:
    """Check that no token changes the logits of earlier ones: the loss would reward copying the next token.

    The gradient with respect to later tokens must be 0, and other later tokens must leave the logits as they were, up
    to rounding. The weights must not be sharded yet.

    Returns:
        None if the model is causal; the reason if it cannot be verified, because the model computes no logits here.

    Raises:
        ModelError: the model is not causal.
    """
    (row,) = probe_rows(model, (_MIN_REACH + 33,))
    cut = max(len(row) * 5 // 8, 1)
    changed = torch.cat([row[:cut], (row[cut:] + 1) % model.config.get_text_config().vocab_size])
    with evaluation_mode(model), _autocast(autocast, model.device):
        try:
            with torch.no_grad():
                before, after = (logits_of(model, ids[None])[0, :cut] for ids in (row, changed))
        except torch.OutOfMemoryError:
            raise
        except _FAILED_PASS as error:
            return first_line(error)
        if not bool(before.isfinite().all()):
            return "its logits are not finite"
        try:
            leak = _gradient_leak(model, {"input_ids": row[None]}, [(range(cut), range(cut))])
        except torch.OutOfMemoryError:
            raise
        except _FAILED_PASS:
            leak = 0.0  # Kernels of quantized weights may have no backward pass.
    difference, tolerance = float((before - after).abs().max()), logit_tolerance(model, before, autocast)
    if leak <= _MAX_LEAK and difference <= tolerance:
        return None
    raise ModelError(
        f"{type(model).__name__} is not a causal language model: later tokens change the logits of earlier ones by"
        f" {difference:.1e} (tolerance {tolerance:.1e}; gradient {leak:.1e} of the largest). It would learn to copy the"
        " tokens that it has to predict",
        location=Location(key=key),
        hint="Choose a decoder-only model, or set run_conf.model_args.is_decoder: true (BERT and others).",
    )


def describe_isolation_check(model: PreTrainedModel | PeftModel) -> str:
    """Return what `enable_varlen` has verified the model on."""
    base = base_model_of(model)
    reduced = [f"with {name} {window} reduced to {_REDUCED_WINDOW}" for name, window in _large_windows(base)]
    config = base.config.get_text_config()
    fields: list[tuple[str, object]] = [(name, getattr(config, name, None)) for name in _OTHER_WINDOWS]
    larger = [f"shorter than {name} {size}" for name, size in fields if isinstance(size, int) and size > _MAX_REACH]
    longest = max(map(len, probe_rows(base)))
    return ", ".join([f"rows of up to {longest} tokens", *reduced, *larger])


def probe_rows(model: PreTrainedModel | PeftModel, lengths: Sequence[int] = ()) -> list[torch.Tensor]:
    """Return rows with ids spread over the vocabulary: by default three, longer than what any layer looks at.

    The last one has a single token.
    """
    base = base_model_of(model)
    config = base.config.get_text_config()
    reach = _reach(base)
    lengths = lengths or (reach + 7, reach + 35, 1)
    positions = getattr(config, "max_position_embeddings", None)
    # XLNet has -1 for no limit.
    max_length = positions if isinstance(positions, int) and positions > 0 else max(lengths)
    device = next(model.parameters()).device
    return [
        (torch.arange(min(length, max_length), device=device) * 7919 + offset) % config.vocab_size
        for length, offset in zip(lengths, (11, 3, 5), strict=False)
    ]


def _reach(base: PreTrainedModel) -> int:
    """Return how many tokens back a single layer looks, other than full attention, and at least 64."""
    config = base.config.get_text_config()
    fields: list[object] = [getattr(config, name, None) for name in (*_REDUCIBLE_WINDOWS, *_OTHER_WINDOWS)]
    windows = [field for field in fields if isinstance(field, int)]
    kernels = [
        (module.kernel_size[0] - 1) * module.dilation[0] + 1
        for module in base.modules()
        if isinstance(module, torch.nn.Conv1d)
    ]
    large = {window for _, window in _large_windows(base)}
    return max([_MIN_REACH, *(size for size in (*windows, *kernels) if size not in large and size <= _MAX_REACH)])


def _large_windows(base: PreTrainedModel) -> list[tuple[str, int]]:
    """Return the attention windows and chunks, by field of the config, that are reduced during a check."""
    config = base.config.get_text_config()
    windows: list[tuple[str, object]] = [(name, getattr(config, name, None)) for name in _REDUCIBLE_WINDOWS]
    return [(name, window) for name, window in windows if isinstance(window, int) and window > _MIN_REACH]


@contextmanager
def reduced_windows(base: PreTrainedModel) -> Iterator[None]:
    """Reduce large attention windows of a model in the block, in its config and in its modules.

    So a row of 100 tokens is longer than the window of any model: the kernels take the same way as with a row that is
    longer than the real window, at a fraction of its cost.
    """
    owners: list[Any] = [base.config.get_text_config(), *base.modules()]
    large = dict(_large_windows(base))
    sliding = [owner for owner in owners if getattr(owner, "sliding_window", None) == large.get("sliding_window", ())]
    chunked = [
        owner
        for owner in owners
        if getattr(owner, "attention_chunk_size", None) == large.get("attention_chunk_size", ())
    ]
    try:
        for owner in sliding:
            owner.sliding_window = _REDUCED_WINDOW
        for owner in chunked:
            owner.attention_chunk_size = _REDUCED_WINDOW
        yield
    finally:
        for owner in sliding:
            owner.sliding_window = large["sliding_window"]
        for owner in chunked:
            owner.attention_chunk_size = large["attention_chunk_size"]


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode in the block: dropout would make passes differ."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _leak_between_rows(
    model: PreTrainedModel | PeftModel,
    switch_implementation: Callable[[], None],
    dtype: torch.dtype | None,
) -> str | None:
    """Return how concatenating rows changes them; None if it does not.

    Args:
        switch_implementation: called before the rows are concatenated.
        dtype: the compute dtype, if it is not that of the weights.
    """
    base = base_model_of(model)
    rows = probe_rows(model)
    with evaluation_mode(model):
        with torch.no_grad(), reduced_windows(base):
            alone = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows]
        longest = max((window for _, window in _large_windows(base)), default=0)
        reducing = reduced_windows
        if 0 < longest <= _MAX_REACH and not _window_changes(model, rows[1], alone[1]):
            # The window is stored elsewhere, or not used: only rows that are longer than it show what happens.
            reducing, rows = nullcontext, probe_rows(model, (longest + 7, longest + 35, 1))
            with torch.no_grad():
                alone = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows]
        switch_implementation()
        inputs = varlen_inputs(rows)
        with reducing(base):
            with torch.no_grad():
                together = model(use_cache=False, **inputs).logits[0].float()
            difference = float((torch.cat(alone) - together).abs().max())
            tolerance = logit_tolerance(model, together, dtype)
            if not difference <= tolerance:
                return f"changes the logits by {difference:.1e} (tolerance {tolerance:.1e})"
            leak = _gradient_leak(model, inputs, _own_tokens(inputs["cu_seq_lens_q"].tolist()))
    if not leak <= _MAX_LEAK:
        return f"lets a row depend on other rows or on later tokens (gradient {leak:.1e} of the largest)"
    return None


def _window_changes(model: PreTrainedModel | PeftModel, row: torch.Tensor, reduced: torch.Tensor) -> bool:
    """Return whether the logits of a row differ from those with reduced windows."""
    with torch.no_grad():
        return not torch.equal(model(input_ids=row[None], use_cache=False).logits[0].float(), reduced)


def _own_tokens(borders: list[int]) -> list[tuple[range, range]]:
    """Return spans of tokens, each with the span of all tokens that their logits may depend on."""
    rows = [range(start, end) for start, end in pairwise(borders)]
    longest = max(rows, key=len)
    first_half = range(longest.start, longest.start + max(len(longest) // 2, 1))
    return [*((row, row) for row in rows), (first_half, first_half)]


def _gradient_leak(
    model: PreTrainedModel | PeftModel, inputs: VarlenInputs | dict[str, torch.Tensor], spans: list[tuple[range, range]]
) -> float:
    """Return the largest gradient with respect to a token that must not matter, divided by the largest one that may.

    Args:
        spans: tokens whose logits are summed with changing signs, and the tokens that these may depend on.

    Raises:
        RuntimeError: the gradient cannot be computed.
    """
    embeddings: list[torch.Tensor] = []

    def detach(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        # A copy, which the model may change in place.
        return embeddings[-1].clone()

    handle = base_model_of(model).get_input_embeddings().register_forward_hook(detach)
    try:
        with torch.enable_grad():
            logits = logits_of(model, **cast("dict[str, Any]", inputs))[0]
    finally:
        handle.remove()
    if not embeddings:
        raise RuntimeError("the model does not use its input embeddings")
    signs = 1.0 - 2.0 * (torch.arange(logits.shape[-1], device=logits.device) * 7919 % 97 % 2)
    leaks: list[float] = []
    for tokens, allowed in spans:
        with torch.enable_grad():
            target = (logits[tokens.start : tokens.stop] * signs).sum()
        gradients = torch.autograd.grad(target, embeddings, retain_graph=True)
        size = torch.stack([gradient[0].float().abs().amax(-1) for gradient in gradients]).amax(0)
        largest = float(size[allowed.start : allowed.stop].max())
        if not math.isfinite(largest) or largest == 0:
            raise RuntimeError(f"its gradient is {'0' if largest == 0 else 'not finite'}")
        size[allowed.start : allowed.stop] = 0
        leaks.append(float(size.max()) / largest)
    # A tensor: `max` of Python would drop a NaN.
    return float(torch.tensor(leaks).max())


def logit_tolerance(model: PreTrainedModel | PeftModel, logits: torch.Tensor, dtype: torch.dtype | None) -> float:
    """Return the difference between logits that rounding explains.

    8 units of the compute dtype's machine epsilon (at least 1e-5), relative to the largest logit: kernels for other
    shapes sum in another order, and so round differently.

    Args:
        dtype: the compute dtype, if it is not that of the weights.
    """
    weight = next(model.parameters())
    # Quantized weights are stored as integers, which have no epsilon.
    epsilon = torch.finfo(dtype or weight.dtype).eps if dtype or weight.is_floating_point() else 1e-2
    return max(epsilon * 8, 1e-5) * float(logits.abs().max().clamp(min=1.0))


def logits_of(model: PreTrainedModel | PeftModel, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Return the logits in float32, computed without a cache: some classes cannot make one from their config."""
    takes_option = "use_cache" in inspect.signature(base_model_of(model).forward).parameters
    options = {"use_cache": False} if takes_option else {}
    return model(input_ids=input_ids, **inputs, **options).logits.float()


def check_row_lengths(model: PreTrainedModel) -> None:
    """Check that a class takes rows of any length in training: Reformer's wants multiples of a fixed length.

    Raises:
        ModelError: it does not.
    """
    (row,) = probe_rows(model, (9,))
    was_training = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng():
            logits_of(model.train(), row[None])
    except ValueError as error:
        raise ModelError(
            f"{type(model).__name__} cannot be trained on rows of any length: {first_line(error)}",
            location=Location(key="run_conf.model"),
        ) from error
    finally:
        model.train(was_training)


def _has_finite_gradient(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the backward pass works; computed for the smallest trainable weight, to save memory."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained:
        return True
    with torch.enable_grad():
        loss = model(use_cache=False, **varlen_inputs(probe_rows(model))).logits.float().square().mean()
        (gradient,) = torch.autograd.grad(loss, min(trained, key=torch.Tensor.numel), allow_unused=True)
    return gradient is None or bool(gradient.isfinite().all())
