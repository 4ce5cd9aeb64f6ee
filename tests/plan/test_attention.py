"""The attention that a run is given where its config names none: every row of the choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetuning.plan.attention import AttentionContext, choose_attention

BOTH = ("flash_attention_2", "flash_attention_3")
ALL = (*BOTH, "flash_attention_4")
A100 = AttentionContext("cuda", (8, 0), BOTH[:1], "bfloat16", "end to end")
H100 = replace(A100, capability=(9, 0), installed=ALL)
ROCM = replace(A100, capability=None)
CPU = AttentionContext()


@pytest.mark.parametrize(
    ("here", "changed", "ranked", "reason"),
    [
        (CPU, {}, "sdpa", "the default; no package of another is installed"),
        (CPU, {"layout": "packed", "dtype": "bfloat16"}, "sdpa", "no package of another"),
        (CPU, {"layout": "packed", "dtype": "bfloat16", "installed": BOTH}, "sdpa", "needs a CUDA or ROCm device"),
        (A100, {"device": "mps", "capability": None}, "sdpa", "needs a CUDA or ROCm device"),
        (A100, {}, "flash_attention_2 sdpa", "all rows in one kernel"),
        (A100, {"layout": "packed"}, "flash_attention_2 sdpa", "all rows in one kernel"),
        (A100, {"dtype": "float16"}, "flash_attention_2 sdpa", "all rows in one kernel"),
        (A100, {"has_dropout": True}, "flash_attention_2 sdpa", "all rows in one kernel"),
        (A100, {"capability": (12, 0)}, "flash_attention_2 sdpa", "all rows in one kernel"),
        (A100, {"capability": (7, 5)}, "sdpa", "not known to train on this GPU of compute capability 7.5"),
        (A100, {"installed": BOTH[1:]}, "sdpa", "flash_attention_3 is not known to train on this GPU"),
        (A100, {"installed": ALL[2:]}, "sdpa", "run_conf.model_args.attn_implementation takes it"),
        (A100, {"installed": ()}, "sdpa", "no package of another is installed"),
        (A100, {"dtype": "float32"}, "sdpa", "computes in bfloat16 or float16, and this run in float32"),
        (A100, {"layout": "padded", "method": "dpo"}, "sdpa", "the rows of dpo are padded"),
        (A100, {"layout": "padded"}, "sdpa", "the rows of sft are padded, for which it has flash kernels of its own"),
        (A100, {"sharded_by": "fsdp"}, "sdpa", "before the weights are shared out"),
        (A100, {"sharded_by": "deepspeed"}, "sdpa", "before the weights are shared out"),
        (A100, {"is_deterministic": True}, "sdpa", "run_conf.determinism"),
        (H100, {}, "flash_attention_3 flash_attention_2 sdpa", "all rows in one kernel"),
        (H100, {"has_dropout": True}, "flash_attention_2 sdpa", "all rows in one kernel"),
        (H100, {"installed": ALL[1:]}, "flash_attention_3 sdpa", "all rows in one kernel"),
        (H100, {"capability": (10, 0)}, "flash_attention_2 sdpa", "all rows in one kernel"),
        (ROCM, {}, "flash_attention_2 sdpa", "all rows in one kernel"),
        (ROCM, {"installed": BOTH[1:]}, "sdpa", "not known to train on this GPU; run_conf"),
    ],
)
def test_what_is_chosen_and_why(here: AttentionContext, changed: dict[str, Any], ranked: str, reason: str) -> None:
    choice = choose_attention(replace(here, **changed))
    assert choice.ranked == tuple(ranked.split())
    assert reason in choice.reason
