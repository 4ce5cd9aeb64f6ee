"""Each algorithm's and each technique's recipe trains, on a tiny model and a handful of rows; those of large models
differ from them in sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from finetuning.algorithms import ALGORITHMS
from finetuning.config.yaml.reader import read_document

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted([*(ROOT / "configs").glob("*/quickstart.yaml"), *(ROOT / "configs" / "techniques").glob("*.yaml")])
SMALL = {
    "max_steps": 2,
    "save_strategy": "no",
    "use_cpu": True,
    "logging_steps": 1,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_length": 128,
}
"""What is made small of `training_args`, where a recipe has it or any run does."""
ALWAYS = ("max_steps", "save_strategy", "use_cpu", "logging_steps")


@pytest.fixture
def rows_of(tmp_path: Path, write_jsonl: Any, sft_rows: Any, dpo_rows: Any) -> Any:
    """A function that writes rows for a method and gives their path."""

    def write(method: str) -> str:
        pairs = dpo_rows(16)
        if method == "sft":
            rows = sft_rows(16)
        elif method == "grpo":
            rows = [{"prompt_messages": pair["prompt_messages"], "correct_answers": ["red"]} for pair in pairs]
        else:
            rows = pairs
        return str(write_jsonl(tmp_path / f"{method}.jsonl", rows))

    return write


@pytest.fixture
def sft_adapter(train: Any, sft_values: Any, tmp_path: Path) -> Any:
    """A function that trains the adapter that a recipe goes on from."""
    lora = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
    return lambda: str(
        train(sft_values({"peft_conf": lora, "training_args.output_dir": str(tmp_path / "first")})).final
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_trains(
    train: Any, rows_of: Any, sft_adapter: Any, chatml_llama_dir: Path, tmp_path: Path, path: Path
) -> None:
    values = read_document(path).values
    method = values["method"]
    data, args, peft = values["data_conf"], values["training_args"], values["peft_conf"]
    data["training_data"] = {"type": "CONCATENATION", "datasets": [{"path": rows_of(method)}]}
    if data["validation_data"]["type"] != "NONE":
        data["validation_data"] = {"type": "AUTO_SPLIT", "ratio": 0.2}
    args |= {key: value for key, value in SMALL.items() if key in args or key in ALWAYS}
    args["output_dir"] = str(tmp_path / "out")
    values["batchsize_conf"] = {"total_train_batch_size": 8, "max_per_device_train_batch_size": 4}
    values["run_conf"] |= {"model": str(chatml_llama_dir)}
    if peft["peft_type"] == "PRETRAINED_PEFT":
        peft["name_or_path"] = sft_adapter()
    if "tokenizer_name_or_path" in peft.get("peft_kwargs", {}):
        peft["peft_kwargs"]["tokenizer_name_or_path"] = str(chatml_llama_dir)
    if "grpo_args" in values:
        # Nothing that a model of random weights writes is right; some of it holds two vowels.
        values["grpo_args"]["rewards"].append({"type": "regex", "pattern": "[aeiou].*[aeiou]"})
    run = train(values, ALGORITHMS[method])
    assert run.result.steps == 2
    assert all(math.isfinite(loss) for loss in run.losses)
    assert run.result.model.kind == ("model" if peft["peft_type"] == "NO_PEFT" else "adapter")
