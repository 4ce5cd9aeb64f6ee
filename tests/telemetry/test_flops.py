"""FLOPs compared with torch's own count, and the table of peak FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finetuning.telemetry.flops import count_flops, peak_tflops
from finetuning.telemetry.metrics import peak_memory


def multiplied(model: Any, rows: int, length: int) -> int:
    """FLOPs of one forward and backward pass, counted at each of torch's operations."""
    ids = torch.arange(rows * length).reshape(rows, length) % 100
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


@pytest.mark.parametrize("fixture", ["tiny_llama_dir", "chatml_llama_dir"])
def test_the_count_of_full_training_matches_torch(fixture: str, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(fixture))
    rows, length = 2, 64
    counted = count_flops(model)
    # Eager attention computes both halves of its square; half of it is thrown away.
    attention = 2 * rows * length**2
    assert counted.total(rows * length, rows * length, attention) == pytest.approx(
        multiplied(model, rows, length), rel=0.02
    )


def test_the_count_of_lora_matches_torch(tiny_llama_dir: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(tiny_llama_dir), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows, length = 2, 64
    counted = count_flops(model)
    attention = 2 * rows * length**2
    real = multiplied(model, rows, length)
    assert counted.total(rows * length, rows * length, attention) == pytest.approx(real, rel=0.06)
    full = count_flops(load(tiny_llama_dir))
    assert counted.per_scored_token == pytest.approx(full.per_scored_token * 2 / 3)


def test_no_count_where_it_would_be_a_guess(tiny_llama_dir: Path) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    saved = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    experts = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    assert count_flops(get_peft_model(load(tiny_llama_dir), prompt)) is None
    assert count_flops(get_peft_model(load(tiny_llama_dir), saved)) is None
    assert count_flops(MixtralForCausalLM(experts)) is None


@pytest.mark.parametrize("layout", ["padded", "padding-free"])
def test_the_flops_of_a_run_are_counted(train: Any, sft_values: Any, layout: str) -> None:
    """Squared lengths are those of the rows, whatever the batch layout."""
    values = sft_values({"telemetry": {"peak_tflops": 1.0}, "sft_args.batching": layout, "training_args.max_steps": 6})
    trainer = train(values).trainer
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    scored_per_row = [sum(label != -100 for label in row["labels"]) for row in trainer.train_dataset]
    scored, squares = trainer.flop_counters()
    # Six steps of four rows are one epoch of 24.
    assert squares == sum(length**2 for length in lengths)
    assert scored == sum(scored_per_row)
    assert trainer.tokens_seen == sum(lengths)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A1000", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_an_unknown_device_is_none(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_host_memory_is_that_of_this_process(tmp_path: Path) -> None:
    assert 10_000_000 < peak_memory(torch.device("cpu"))["peak_host_memory_bytes"] < 1 << 40
