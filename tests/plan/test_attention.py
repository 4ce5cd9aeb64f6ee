"""The attention implementation that is chosen if the config does not name one, for each case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetuning.plan.attention import AttentionContext, choose_attention

BOTH = ("flash_attention_2", "flash_attention_3")
ALL = (*BOTH, "flash_attention_4")
TORCH = ("torch_varlen",)
A100 = AttentionContext("cuda", (8, 0), BOTH[:1], "bfloat16", "padding-free")
H100 = replace(A100, capability=(9, 0), installed=ALL)
ROCM = replace(A100, capability=None)
EAGER = replace(A100, fallback="eager", supported=("flash_attention", "flex_attention"))
CPU = AttentionContext()


@pytest.mark.parametrize(
    ("context", "changed", "ranked", "reason"),
    [
        (CPU, {}, "sdpa", "the default; FlashAttention is not installed"),
        (CPU, {"layout": "packed", "dtype": "bfloat16"}, "sdpa", "FlashAttention is not installed"),
        (CPU, {"layout": "packed", "dtype": "bfloat16", "installed": BOTH}, "sdpa", "needs a CUDA or ROCm device"),
        (A100, {"device": "mps", "capability": None}, "sdpa", "needs a CUDA or ROCm device"),
        (A100, {}, "flash_attention_2 sdpa", "one varlen kernel for all rows"),
        (A100, {"layout": "packed"}, "flash_attention_2 sdpa", "one varlen kernel for all rows"),
        (A100, {"dtype": "float16"}, "flash_attention_2 sdpa", "one varlen kernel for all rows"),
        (A100, {"has_dropout": True}, "flash_attention_2 sdpa", "one varlen kernel for all rows"),
        (A100, {"capability": (12, 0)}, "flash_attention_2 sdpa", "one varlen kernel for all rows"),
        (A100, {"capability": (7, 5)}, "sdpa", "not known to train on this GPU with compute capability 7.5"),
        (A100, {"installed": BOTH[1:]}, "sdpa", "flash_attention_3 is not known to train on this GPU"),
        (A100, {"installed": ALL[2:]}, "sdpa", "to use it, set run_conf.model_args.attn_implementation"),
        (A100, {"installed": ()}, "sdpa", "FlashAttention is not installed"),
        (A100, {"dtype": "float32"}, "sdpa", "supports bfloat16 and float16, but this run computes in float32"),
        (A100, {"layout": "padded", "method": "dpo"}, "sdpa", "dpo batches are padded"),
        (A100, {"layout": "padded"}, "sdpa", "sft batches are padded, which sdpa has flash kernels for"),
        (A100, {"sharded_by": "fsdp"}, "flash_attention_2 sdpa", "one varlen kernel for all rows"),
        (A100, {"sharded_by": "deepspeed"}, "sdpa", "before the weights are sharded"),
        (A100, {"is_deterministic": True}, "sdpa", "run_conf.determinism"),
        (H100, {}, "flash_attention_3 flash_attention_2 sdpa", "one varlen kernel for all rows"),
        (H100, {"has_dropout": True}, "flash_attention_2 sdpa", "one varlen kernel for all rows"),
        (H100, {"installed": ALL[1:]}, "flash_attention_3 sdpa", "one varlen kernel for all rows"),
        (H100, {"capability": (10, 0)}, "flash_attention_2 sdpa", "one varlen kernel for all rows"),
        (ROCM, {}, "flash_attention_2 sdpa", "one varlen kernel for all rows"),
        (EAGER, {}, "flash_attention_2 eager", "same logits as eager on separate rows"),
        (EAGER, {"installed": ()}, "eager", "has no sdpa; FlashAttention is not installed; run_conf.model_args"),
        (EAGER, {"dtype": "float32"}, "eager", "the model's class has no sdpa; flash_attention_2 supports bfloat16"),
        (EAGER, {"layout": "padded"}, "eager", "sft batches are padded, not verified; to use flash_attention_2, set"),
        (EAGER, {"supported": ("flex_attention",)}, "eager", "the model's class has neither sdpa nor FlashAttention"),
        (A100, {"installed": TORCH}, "torch_varlen sdpa", "one varlen kernel for all rows"),
        (A100, {"installed": (*BOTH, *TORCH)}, "torch_varlen flash_attention_2 sdpa", "one varlen kernel for all rows"),
        (A100, {"installed": TORCH, "has_dropout": True}, "sdpa", "torch_varlen is not known to train"),
        (A100, {"installed": TORCH, "capability": (7, 5)}, "sdpa", "torch_varlen is not known to train on this GPU"),
        (A100, {"installed": TORCH, "dtype": "float32"}, "sdpa", "torch_varlen supports bfloat16 and float16"),
        (H100, {"installed": (*ALL, *TORCH)}, "flash_attention_3 torch_varlen flash_attention_2 sdpa", "one varlen"),
        (ROCM, {"installed": TORCH}, "torch_varlen sdpa", "one varlen kernel for all rows"),
        (ROCM, {"installed": BOTH[1:]}, "sdpa", "not known to train on this GPU; to use it, set run_conf"),
    ],
)
def test_choice_and_its_reason(context: AttentionContext, changed: dict[str, Any], ranked: str, reason: str) -> None:
    choice = choose_attention(replace(context, **changed))
    assert choice.ranked == tuple(ranked.split())
    assert reason in choice.reason
