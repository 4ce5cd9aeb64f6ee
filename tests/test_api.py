"""The engine from Python: what a notebook does, twice in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import finetuning
from finetuning.errors import ConfigError

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 2, "target_modules": "all-linear"}}
FOUR_BIT = {"quantization_type": "bits-and-bytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}


def test_run_prepare_generate_and_merge(sft_values: Any, chatml_llama_dir: Path, tmp_path: Path) -> None:
    values = sft_values({"peft_conf": LORA, "training_args.max_steps": 1})
    data = finetuning.prepare(values, method="sft")
    assert data.rows == 24
    result = finetuning.run(values, {"training_args.max_steps": 2}, method="sft", logging_level="WARNING")
    assert (result.status, result.steps) == ("completed", 2)
    assert result.final_loss is not None and result.folder == str(tmp_path / "out" / "checkpoint-final")
    answers = finetuning.generate(result.folder, ["Hi", [{"role": "user", "content": "Ho"}]], max_new_tokens=3)
    assert len(answers) == 2
    merged = finetuning.merge(chatml_llama_dir, result.folder, tmp_path / "merged")
    assert merged.verification is not None and (tmp_path / "merged" / "model.safetensors").is_file()
    assert finetuning.generate(tmp_path / "merged", ["Hi"], max_new_tokens=3) == answers[:1]


def test_two_runs_on_a_quantized_base_in_one_process(sft_values: Any, tmp_path: Path) -> None:
    for name in ("first", "second"):
        values = sft_values({"peft_conf": LORA, "quant_conf": FOUR_BIT, "training_args.max_steps": 1})
        result = finetuning.run(values, [f"training_args.output_dir={tmp_path / name}"], method="sft")
        assert result.status == "completed"


def test_errors_are_raised_with_their_problems(sft_values: Any, write_config: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        finetuning.run(write_config(sft_values({"training_args.lerning_rate": 1})), method="sft")
    (problem,) = caught.value.problems
    assert problem.location.line is not None and problem.hint == 'Did you mean "learning_rate"?'
    with pytest.raises(ConfigError, match="names no method"):
        finetuning.run(sft_values())
    with pytest.raises(ConfigError, match=r'unknown method "sftt"\. Did you mean "sft"'):
        finetuning.run(sft_values(), method="sftt")


def test_the_functions_are_listed() -> None:
    assert {"run", "prepare", "generate", "merge"} <= set(dir(finetuning))
    with pytest.raises(AttributeError):
        finetuning.nothing  # noqa: B018
