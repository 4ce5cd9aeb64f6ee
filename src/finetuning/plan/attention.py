"""Choose the attention implementation of a run whose config does not name one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetuning.config.pretrained_config import FLASH_ATTENTION_PACKAGES, missing_attention_package
from finetuning.config.sections.experiment import Experiment

RowLayout = Literal["padded", "padding-free", "packed"]

DEFAULT_ATTENTION = "sdpa"
"""The implementation that needs no package, and that every other one is verified against."""
TORCH_VARLEN = "torch_varlen"
"""`torch.nn.attention.varlen`, torch's own FlashAttention for rows of different lengths, as registered by
`model/gpu_attention.py`."""
_KEY = "run_conf.model_args.attn_implementation"
_HALF_PRECISION = ("bfloat16", "float16")
_AMPERE, _HOPPER = (8, 0), 9
_BEST_FIRST = ("flash_attention_3", TORCH_VARLEN, "flash_attention_2")


@dataclass(frozen=True)
class AttentionContext:
    """What the choice depends on: the device, the installed packages, and how rows are batched."""

    device: str = "cpu"
    """torch device type; `cuda` includes ROCm."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None for other devices, including ROCm."""
    installed: tuple[str, ...] = ()
    """Names of the installed FlashAttention implementations, with `torch_varlen` where torch has it."""
    dtype: str = "float32"
    """Data type of the computation: the dtype of the weights, or that of autocast."""
    layout: RowLayout = "padded"
    method: str = "sft"
    sharded_by: str | None = None
    is_deterministic: bool = False
    has_dropout: bool = False
    """Whether the model applies dropout to attention weights in training."""
    fallback: str = DEFAULT_ATTENTION
    """What transformers chooses without FlashAttention: `eager` for a class without `sdpa`."""
    supported: tuple[str, ...] = ()
    """What else such a class supports: `flash_attention`, `flex_attention`."""


@dataclass(frozen=True)
class AttentionChoice:
    """Implementations to try, best first and `sdpa` or `eager` last, and the reason for the first."""

    ranked: tuple[str, ...]
    reason: str


def choose_attention(context: AttentionContext) -> AttentionChoice:
    """Choose FlashAttention for padding-free and packed batches on GPUs that support it, otherwise `sdpa`.

    The order is: the package of FlashAttention 3, which is the fastest on Hopper; torch's own, which needs no package;
    the package of FlashAttention 2; and rows one by one.

    Padded batches use `sdpa`, which has flash kernels of its own. Only padding-free batches gain from a single varlen
    kernel, and only for those is an implementation verified on the logits of the model before training.

    A class without `sdpa` falls back to `eager`, whose memory grows with the square of the length.
    """
    usable = tuple(name for name in _BEST_FIRST if _is_usable(name, context))
    fallback, obstacle = context.fallback, _obstacle(context, usable)
    if fallback != DEFAULT_ATTENTION and "flash_attention" not in context.supported:
        return AttentionChoice((fallback,), "the model's class has neither sdpa nor FlashAttention")
    if not obstacle:
        reason = f"one varlen kernel for all rows; same logits as {fallback} on separate rows"
        return AttentionChoice((*usable, fallback), reason)
    if fallback == DEFAULT_ATTENTION:
        return AttentionChoice((fallback,), f"the default; {obstacle}")
    reason = f"the model's class has no sdpa; {obstacle}"
    if "flex_attention" in context.supported and context.device == "cuda":
        reason += f"; {_KEY}: flex_attention needs less memory, and is not verified before training"
    return AttentionChoice((fallback,), reason)


def replace_unavailable_attention(experiment: Experiment) -> tuple[Experiment, str | None]:
    """Remove an attention implementation that cannot run here, so that the run chooses one itself.

    Returns:
        The experiment, and the warning that says what runs instead; None if nothing was removed.
    """
    name = experiment.run_conf.model_args.attn_implementation
    missing = missing_attention_package(name)
    if missing is not None:
        why = f"needs the package {missing}, which is not installed"
    elif name in FLASH_ATTENTION_PACKAGES and not _has_gpu():
        why = "needs a CUDA or ROCm device, and there is none"
    else:
        return experiment, None
    installed = [key for key in FLASH_ATTENTION_PACKAGES if key != name and missing_attention_package(key) is None]
    instead = DEFAULT_ATTENTION
    if installed and _has_gpu():
        instead = f"the fastest of {', '.join(installed)} and {DEFAULT_ATTENTION} that is verified for this model"
    args = experiment.run_conf.model_args.model_copy(update={"attn_implementation": None})
    run_conf = experiment.run_conf.model_copy(update={"model_args": args})
    replaced = experiment.model_copy(update={"run_conf": run_conf})
    return replaced, f"{name} {why}; {instead} is used instead"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _obstacle(context: AttentionContext, usable: tuple[str, ...]) -> str | None:
    """Return why FlashAttention is not chosen; None if it is."""
    if not context.installed:
        return "FlashAttention is not installed"
    names = " or ".join(context.installed)
    if context.device != "cuda":
        return f"{names} needs a CUDA or ROCm device"
    if context.layout == "padded":
        why_not = "which sdpa has flash kernels for" if context.fallback == DEFAULT_ATTENTION else "not verified"
        return f"{context.method} batches are padded, {why_not}; to use {names}, set {_KEY}"
    if context.sharded_by == "deepspeed":
        return f"{names} cannot be verified before the weights are sharded; to use it, set {_KEY}"
    if context.is_deterministic:
        return f"the backward pass of {names} is not deterministic, which run_conf.determinism requires"
    if context.dtype not in _HALF_PRECISION:
        return f"{names} supports bfloat16 and float16, but this run computes in {context.dtype}"
    if not usable:
        return f"{names} is not known to train on this GPU{_capability_text(context)}; to use it, set {_KEY}"
    return None


def _is_usable(name: str, context: AttentionContext) -> bool:
    """Return whether an implementation is installed and known to train this model on this device."""
    if name not in context.installed:
        return False
    if name == TORCH_VARLEN and context.has_dropout:
        return False
    if name == "flash_attention_3":
        # FlashAttention 3 is written for Hopper and has no dropout.
        return context.capability is not None and context.capability[0] == _HOPPER and not context.has_dropout
    return context.capability is None or context.capability >= _AMPERE


def _capability_text(context: AttentionContext) -> str:
    if context.capability is None:
        return ""
    return f" with compute capability {context.capability[0]}.{context.capability[1]}"
