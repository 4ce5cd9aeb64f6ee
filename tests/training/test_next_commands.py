"""What a run suggests at its end works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetuning.training.final_model import FinalModel, next_commands


def made(folder: Path, config: dict[str, Any]) -> str:
    """An adapter of this config."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"base_model.model.lm_head.lora_A.weight": np.ones((1, 2), dtype=np.float32)},
        folder / "adapter_model.safetensors",
    )
    return str(folder)


@pytest.mark.parametrize(
    ("quantization", "suggested"),
    [
        (None, "merge_adapter {base} {a} {a}-merged"),
        ({"quant_method": "bitsandbytes"}, "merge_adapter {base} {a} {a}-merged"),
        ({"quant_method": "gptq"}, "merge_adapter --force UNQUANTIZED_BASE {a} {a}-merged"),
    ],
)
def test_an_adapter_is_merged_into_a_base_that_takes_it(
    tmp_path: Path, quantization: dict[str, Any] | None, suggested: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization} if quantization else {}))
    adapter = made(tmp_path / "a", {"peft_type": "LORA"})
    commands = [item.command for item in next_commands(FinalModel("adapter", adapter, str(tmp_path), 1, (), "stops"))]
    assert suggested.format(base=tmp_path, a=adapter) in commands


@pytest.mark.parametrize(
    ("config", "suggested"),
    [
        ({"peft_type": "LORA"}, ["generate", "merge_adapter", "create_vllm_compatible_adapter"]),
        ({"peft_type": "IA3"}, ["generate", "merge_adapter", "vllm"]),
        ({"peft_type": "LORA", "use_dora": True}, ["generate", "merge_adapter", "vllm"]),
        ({"peft_type": "PROMPT_TUNING"}, ["generate"]),
        ({"peft_type": "LORA", "alora_invocation_tokens": [5]}, ["generate"]),
    ],
)
def test_nothing_is_suggested_that_would_be_refused(
    tmp_path: Path, config: dict[str, Any], suggested: list[str]
) -> None:
    commands = next_commands(FinalModel("adapter", made(tmp_path / "a", config), "base", 1, (), "stops"))
    assert [item.command.split()[0] for item in commands] == suggested
