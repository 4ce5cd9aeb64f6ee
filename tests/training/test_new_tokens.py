"""A vocabulary that grew: preferences off the grown model, and QLoRA over the base that growth has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetuning.errors import ConfigError

NAMES = [f"<|tool{number}|>" for number in range(8)]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}


def growing(model: Path) -> dict[str, Any]:
    """Ten tokens more than the model has rows for."""
    return {
        "run_conf.model": str(model),
        "data_conf.chat_template_name": None,
        "data_conf.chat_template": TEMPLATE,
        "data_conf.special_tokens": ["<|im_start|>", "<|im_end|>", *NAMES],
    }


def on_top_of(model: Path, out: Path) -> dict[str, Any]:
    return {
        "run_conf.model": str(model),
        "data_conf.chat_template_name": "keep-original",
        "training_args.output_dir": str(out),
        "training_args.max_steps": 2,
    }


def test_preferences_off_a_grown_model(
    train: Any, sft_values: Any, dpo_values: Any, tiny_llama_dir: Path, tmp_path: Path, read_tensors: Any
) -> None:
    grown = train(sft_values(growing(tiny_llama_dir)))
    assert read_tensors(grown.final)["lm_head.weight"].shape[0] == 510
    run = train(dpo_values(on_top_of(grown.final, tmp_path / "dpo")))
    assert run.losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert read_tensors(run.final)["lm_head.weight"].shape[0] == 510


def test_qlora_over_a_grown_base(
    train: Any, sft_values: Any, dpo_values: Any, tiny_llama_dir: Path, tmp_path: Path, read_tensors: Any
) -> None:
    """The base grows once, unquantized; then what it left is quantized, and the new rows are trained."""
    train(sft_values({**growing(tiny_llama_dir), "peft_conf": LORA, "training_args.max_steps": 1}))
    base = tmp_path / "out" / "checkpoint-new-basemodel"
    nf4 = {"quantization_type": "bits-and-bytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantized = {"peft_conf": LORA, "quant_conf": nf4}
    run = train(sft_values({**on_top_of(base, tmp_path / "qlora"), **quantized}))
    assert run.losses[1] < run.losses[0]
    rows = [rows for name, rows in read_tensors(run.final).items() if "token" in name]
    assert [len(each) for each in rows] == [10, 10]
    assert all((each - each[0]).abs().max() > 0 for each in rows), "they began at one mean"
    with pytest.raises(ConfigError, match=r"10 tokens, whose output embeddings.*Train them by sft first"):
        train(dpo_values({**on_top_of(base, tmp_path / "too-early"), **quantized}))
    taught = quantized | {"peft_conf": {"peft_type": "PRETRAINED_PEFT", "name_or_path": str(run.final)}}
    preferred = train(dpo_values({**on_top_of(base, tmp_path / "preferred"), **taught}))
    assert preferred.losses[0] == pytest.approx(0.6931, abs=0.01)
