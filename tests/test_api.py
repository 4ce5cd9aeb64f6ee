"""The engine from Python: what a notebook does, twice in one process."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

import finetuning
from finetuning.errors import ConfigError

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 2, "target_modules": "all-linear"}}
FOUR_BIT = {"quantization_type": "bits-and-bytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}


NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "notebook" / "first_run.ipynb"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path, write_jsonl: Any, sft_rows: Any) -> Any:
    """The variables of the example notebook after its cells were run, in a folder with a model and rows."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "base").symlink_to(chatml_llama_dir)
    write_jsonl(folder / "train.jsonl", sft_rows(24))
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
        names["again"] = finetuning.generate("merged", ["What is the color of number 3?"], max_new_tokens=8)
    return names


def test_the_notebook_trains_asks_and_merges(notebook: Any) -> None:
    result = notebook["result"]
    assert (result.status, result.folder) == ("completed", "out/checkpoint-final")
    assert result.final_loss is not None and result.losses.validation is not None
    assert notebook["rows"].rows == 21 and notebook["merged"].verification is not None
    assert len(notebook["answers"]) == 1 and notebook["again"] == notebook["answers"]


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
