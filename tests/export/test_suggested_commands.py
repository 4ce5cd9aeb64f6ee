"""Every command that a run suggests after training an adapter succeeds, and none that would is left out."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_types import EXPERTS, GROWN, LORA_BY_PEFT, LORA_KINDS, LORA_OF_GPT2, MINIMAL, QV
from matrix import sample

from finetuning.cli import create_vllm_compatible_adapter, generate, merge_adapter
from finetuning.training.final_model import FinalModel, next_commands

from .conftest import load_for

PROGRAMS = {
    "create_vllm_compatible_adapter": create_vllm_compatible_adapter.main,
    "generate": generate.main,
    "merge_adapter": merge_adapter.main,
}
MERGE, SERVE = ["generate", "merge_adapter", "vllm"], ["generate", "merge_adapter", "create_vllm_compatible_adapter"]
CASES: dict[str, tuple[str, str, dict[str, Any], int, list[str]]] = {
    # PEFT type, base, arguments, new tokens, suggested programs.
    "plain": ("LORA", "llama", LORA_KINDS["plain"], 0, SERVE),
    "rslora": ("LORA", "llama", LORA_KINDS["rslora"], 0, SERVE),
    "patterns": ("LORA", "llama", LORA_KINDS["patterns"], 0, SERVE),
    "head and embeddings": ("LORA", "llama", LORA_KINDS["head and embeddings"], 0, SERVE),
    "dora": ("LORA", "llama", LORA_KINDS["dora"], 0, MERGE),
    "modules to save": ("LORA", "llama", LORA_KINDS["modules to save"], 0, MERGE),
    "tokens": ("LORA", "llama", LORA_KINDS["tokens"], 0, MERGE),
    "lora_bias": ("LORA", "gpt2", LORA_OF_GPT2["lora bias"], 0, MERGE),
    "lora_bias without a bias in the base": ("LORA", "llama", {**QV, "lora_bias": True}, 0, MERGE),
    "trained biases": ("LORA", "gpt2", LORA_OF_GPT2["own biases"], 0, MERGE),
    "pissa": ("LORA", "llama", LORA_BY_PEFT["pissa"], 0, SERVE),
    "experts": ("LORA", "mixtral", EXPERTS, 0, MERGE),
    "attention of a mixture of experts": ("LORA", "mixtral", QV, 0, SERVE),
    "new tokens, rows": ("LORA", "llama", GROWN["new rows trained"], 8, MERGE),
    "new tokens, embeddings": ("LORA", "llama", GROWN["embeddings trained"], 8, MERGE),
    "IA3": ("IA3", "llama", MINIMAL["IA3"], 0, MERGE),
    "BEFT": ("BEFT", "biased", MINIMAL["BEFT"], 0, MERGE),
    "BEFT without a bias in the base": ("BEFT", "llama", MINIMAL["BEFT"], 0, ["generate"]),
    "prompt tuning": ("PROMPT_TUNING", "llama", MINIMAL["PROMPT_TUNING"], 0, ["generate"]),
}
SAMPLE = (
    *("plain", "dora", "tokens", "lora_bias", "lora_bias without a bias in the base", "pissa", "experts"),
    *("new tokens, rows", "BEFT without a bias in the base", "prompt tuning"),
)


@pytest.mark.parametrize("name", sample(CASES, SAMPLE))
def test_suggested_commands_succeed(
    name: str,
    base_of: Callable[[str], Path],
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from transformers import AutoTokenizer

    # `generate` writes its answers to the working directory.
    monkeypatch.chdir(tmp_path)
    peft_type, base_name, arguments, new_tokens, expected = CASES[name]
    base = base_of(base_name)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](task_type="CAUSAL_LM", **arguments)
    rows = load_for("CAUSAL_LM", base).get_input_embeddings().weight.shape[0] + new_tokens
    adapter = make_adapter(base, config, tmp_path / "adapter", rows=rows if new_tokens else None)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    # As a run does: a tokenizer that knows the new rows.
    tokenizer.add_tokens([f"<new{number}>" for number in range(rows - len(tokenizer))] if new_tokens else [])
    tokenizer.save_pretrained(adapter)
    model = FinalModel("adapter", str(adapter), str(base), 1, (), "stops")
    commands = [shlex.split(item.command) for item in next_commands(model)]
    assert [program for program, *_ in commands] == expected
    for program, *words in commands:
        if program in PROGRAMS:
            assert PROGRAMS[program](words) == 0, program
        else:
            assert words == ["serve", f"{adapter}-merged"]
            assert Path(words[1], "config.json").is_file()


@pytest.mark.parametrize("name", ["dora", "tokens", "lora_bias", "experts", "new tokens, rows"])
def test_what_is_not_suggested_is_refused(
    name: str, base_of: Callable[[str], Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    peft_type, base_name, arguments, new_tokens, _ = CASES[name]
    base = base_of(base_name)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](task_type="CAUSAL_LM", **arguments)
    rows = load_for("CAUSAL_LM", base).get_input_embeddings().weight.shape[0] + new_tokens
    adapter = make_adapter(base, config, tmp_path / "adapter", rows=rows if new_tokens else None)
    assert create_vllm_compatible_adapter.main([str(adapter)]) == 1
