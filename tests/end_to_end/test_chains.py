"""Whole chains of console scripts, each a process of its own; the first ones of a kind in a fresh interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def succeed(run_cli: Any, tmp_path: Path) -> Any:
    def run(program: str, *arguments: str | Path, fresh: bool = False) -> str:
        result = run_cli([str(argument) for argument in arguments], cwd=tmp_path, program=program, fresh=fresh)
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
        return result.stdout

    return run


def answer(succeed: Any, write_config: Any, tmp_path: Path, model_conf: dict[str, str], *, fresh: bool = False) -> str:
    values = {
        "prompt_conf": {
            "type": "open-input",
            "input": "What is number 3? Answer with one word.",
            "num_samples": 1,
        },
        "model_conf": model_conf,
        "hf_gen_params": {"max_length": 200, "max_new_tokens": 8},
    }
    out = tmp_path / f"answers-{len(list(tmp_path.glob('answers-*')))}.yaml"
    succeed("generate", write_config(values, "generate.yaml"), out, fresh=fresh)
    return yaml.safe_load(out.read_text())[0]["answer"]


def test_an_adapter_with_new_tokens(
    succeed: Any, sft_values: Any, write_config: Any, snug_llama_dir: Path, tmp_path: Path
) -> None:
    changes = {
        "run_conf.model": str(snug_llama_dir),
        "peft_conf": {"peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_kwargs": {"target_modules": "all-linear"}},
        "training_args.max_steps": 6,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 0.5,
    }
    output = succeed("finetuning", "sft", write_config(sft_values(changes)), fresh=True)
    out = tmp_path / "out"
    assert f"adapter     {out / 'checkpoint-final'}" in output
    assert "merge_adapter" in output
    rows = json.loads((out / "checkpoint-new-basemodel" / "config.json").read_text())["vocab_size"]
    new = rows - json.loads((snug_llama_dir / "config.json").read_text())["vocab_size"]
    for folder in (out, out / "checkpoint-final"):
        info = json.loads((folder / "added_tokens_info.json").read_text())
        assert info == {"num_new_tokens": new, "new_embedding_size": rows}
    merged = tmp_path / "merged"
    succeed("merge_adapter", out / "checkpoint-new-basemodel", out / "checkpoint-final", merged, fresh=True)
    base = {"model": str(out / "checkpoint-new-basemodel"), "adapter": str(out / "checkpoint-final")}
    assert answer(succeed, write_config, tmp_path, base, fresh=True) == answer(
        succeed, write_config, tmp_path, {"model": str(merged)}
    )


def test_all_weights(succeed: Any, sft_values: Any, write_config: Any, tmp_path: Path) -> None:
    changes = {"training_args.max_steps": 4, "training_args.save_strategy": "epoch", "method": "sft"}
    output = succeed("finetuning", "--logging-level", "WARNING", "sft", write_config(sft_values(changes)))
    final = tmp_path / "out" / "checkpoint-final"
    assert f"model       {final}" in output
    assert "loads in plain transformers" in output
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "completed"
    assert record["artifact"]["folder"] == str(final)
    assert isinstance(answer(succeed, write_config, tmp_path, {"model": str(final)}), str)
