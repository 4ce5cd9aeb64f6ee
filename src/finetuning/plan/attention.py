"""Which attention a run computes with, where its config names none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetuning.config.pretrained_config import FLASH_ATTENTION_PACKAGES

RowLayout = Literal["padded", "end to end", "packed"]

DEFAULT_ATTENTION = "sdpa"
"""The implementation that is there without a package, and that every other is held against."""
_KEY = "run_conf.model_args.attn_implementation"
_HALF = ("bfloat16", "float16")
_AMPERE, _HOPPER = (8, 0), 9


@dataclass(frozen=True)
class AttentionContext:
    """What the choice hangs on: what the machine can do, what is installed, and how the rows lie."""

    device: str = "cpu"
    """The kind of device, as torch names it; `cuda` stands for ROCm, too."""
    capability: tuple[int, int] | None = None
    """Compute capability of NVIDIA's GPUs; None where there is none, as under ROCm."""
    installed: tuple[str, ...] = ()
    """Names of the FlashAttentions that can be imported."""
    dtype: str = "float32"
    """What is computed in: the weights' type, or that of autocast."""
    layout: RowLayout = "padded"
    method: str = "sft"
    sharded_by: str | None = None
    is_deterministic: bool = False
    has_dropout: bool = False
    """Whether the model drops attention weights in training."""


@dataclass(frozen=True)
class AttentionChoice:
    """Implementations to try, the best first and the one that always remains last; and why the first is it."""

    ranked: tuple[str, ...]
    reason: str


def choose_attention(here: AttentionContext) -> AttentionChoice:
    """FlashAttention for rows that lie end to end, on what can compute it; else `sdpa`.

    Padded rows are left to `sdpa`, which has flash kernels of its own: only rows end to end gain by one kernel over
    all of them, and only there is an implementation proven on the model's own logits before it trains.
    """
    able = tuple(name for name in ("flash_attention_3", "flash_attention_2") if _computes(name, here))
    obstacle = _obstacle(here, able)
    if obstacle:
        return AttentionChoice((DEFAULT_ATTENTION,), f"the default; {obstacle}")
    return AttentionChoice(
        (*able, DEFAULT_ATTENTION), "installed, all rows in one kernel; the logits are those of sdpa on each row alone"
    )


def _obstacle(here: AttentionContext, able: tuple[str, ...]) -> str | None:
    """Why no FlashAttention is chosen."""
    if not here.installed:
        return "no package of another is installed"
    names = " or ".join(here.installed)
    if here.device != "cuda":
        return f"{names} needs a CUDA or ROCm device"
    if here.layout == "padded":
        return f"the rows of {here.method} are padded, for which it has flash kernels of its own; {_KEY} takes {names}"
    if here.sharded_by:
        return f"before the weights are shared out {names} cannot be tried; {_KEY} takes it"
    if here.is_deterministic:
        return f"{names} adds gradients up in no fixed order, and run_conf.determinism asks for one"
    if here.dtype not in _HALF:
        return f"{names} computes in bfloat16 or float16, and this run in {here.dtype}"
    if not able:
        return f"{names} is not known to train on this GPU{_told(here)}; {_KEY} takes it"
    return None


def _computes(name: str, here: AttentionContext) -> bool:
    """Whether an implementation is installed and known to train this on such a device."""
    if name not in here.installed or name not in FLASH_ATTENTION_PACKAGES:
        return False
    if name == "flash_attention_3":
        return here.capability is not None and here.capability[0] == _HOPPER and not here.has_dropout
    return here.capability is None or here.capability >= _AMPERE


def _told(here: AttentionContext) -> str:
    return f" of compute capability {here.capability[0]}.{here.capability[1]}" if here.capability else ""
