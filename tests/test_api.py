"""The engine from Python: what a notebook does, twice in one process."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import finetuning
from finetuning.errors import ConfigError, StorageError

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
        # The run itself, and a text alone, which is no sequence of characters.
        names["of_the_run"] = finetuning.generate("out", "What is the color of number 3?", max_new_tokens=8)
    return names


def test_the_notebook_trains_asks_and_merges(notebook: Any) -> None:
    result = notebook["result"]
    assert (result.status, result.folder) == ("completed", "out/checkpoint-final")
    assert result.final_loss is not None and result.losses.validation is not None
    assert notebook["rows"].rows == 21 and notebook["merged"].verification is not None
    assert len(notebook["answers"]) == 1 and notebook["again"] == notebook["answers"]
    assert notebook["of_the_run"] == notebook["answers"]


def test_a_notebook_shows_one_progress_bar(
    chatml_llama_dir: Path, write_jsonl: Any, sft_rows: Any, tmp_path: Path
) -> None:
    """In a real kernel: `pip install 'finetuning[test-notebook]'`."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    for module in ("ipykernel", "ipywidgets"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    (tmp_path / "base").symlink_to(chatml_llama_dir)
    write_jsonl(tmp_path / "train.jsonl", sft_rows(24))
    notebook = pytest.importorskip("nbformat").read(NOTEBOOK, 4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    (bar,) = [widget for widget in client.widget_state.values() if widget["_view_name"] == "OutputView"]
    assert not any(widget["_view_name"] == "ProgressView" for widget in client.widget_state.values())
    assert "step 3/3" in bar["outputs"][0]["data"]["text/plain"]
    (trained,) = [cell for cell in notebook.cells if "finetuning.run(" in cell.source]
    assert "training starts: 3 steps" in "".join(
        output.get("data", {}).get("text/plain", "") for output in trained.outputs
    )


def test_two_runs_on_a_quantized_base_in_one_process(sft_values: Any, tmp_path: Path) -> None:
    for name in ("first", "second"):
        values = sft_values({"peft_conf": LORA, "quant_conf": FOUR_BIT, "training_args.max_steps": 1})
        result = finetuning.run(values, [f"training_args.output_dir={tmp_path / name}"], method="sft")
        assert result.status == "completed"


@pytest.mark.parametrize("as_dataset", [False, True])
def test_rows_from_python_train_as_those_of_a_file(
    as_dataset: bool, sft_values: Any, sft_rows: Any, tmp_path: Path
) -> None:
    expected = finetuning.run(sft_values({"training_args.output_dir": str(tmp_path / "file")}), method="sft")
    rows = Dataset.from_list(sft_rows(24)) if as_dataset else iter(sft_rows(24))
    values = sft_values({"data_conf.training_data": {"type": "CONCATENATION", "datasets": []}})
    result = finetuning.run(values, method="sft", train_rows=rows, validation_rows=sft_rows(5))
    assert result.final_loss == expected.final_loss
    assert len((tmp_path / "out" / "rows" / "validation.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    # The resolved config names the files, so that the run can be repeated from the command line.
    resolved = (tmp_path / "out" / "config.resolved.yaml").read_text(encoding="utf-8")
    assert "rows/train.jsonl" in resolved and "rows/validation.jsonl" in resolved


def test_rows_from_python_keep_the_settings_of_the_dataset(sft_values: Any, tmp_path: Path) -> None:
    source = {"path": "replaced.jsonl", "columns": {"question": "prompt", "answer": "completion"}}
    values = sft_values({"data_conf.training_data.datasets": [source]})
    rows = [{"question": "Which number?", "answer": "Three."}] * 4
    assert finetuning.prepare(values, method="sft", train_rows=rows).rows == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["text"], "row 0 of train_rows is a str, not a mapping"),
        ([{"messages": []}, {"messages": {1, 2}}], "row 1 of train_rows has a value that JSON does not have"),
        ([{"score": float("nan")}], "row 0 of train_rows has a value that JSON does not have"),
    ],
)
def test_rows_from_python_that_cannot_be_written(rows: Any, message: str, sft_values: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        finetuning.prepare(sft_values(), method="sft", train_rows=rows)
    assert not any((tmp_path / "out" / "rows").iterdir())


def test_rows_from_python_need_a_place(sft_values: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rows from Python need training_args\.output_dir"):
        finetuning.prepare(sft_values({"training_args.output_dir": None}), method="sft", train_rows=[])
    (tmp_path / "file").touch()
    values = sft_values({"training_args.output_dir": str(tmp_path / "file")})
    with pytest.raises(StorageError, match="train_rows cannot be written"):
        finetuning.prepare(values, method="sft", train_rows=[])
    two = sft_values({"data_conf.training_data.datasets": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]})
    with pytest.raises(ConfigError, match="cannot take the place of 2 datasets"):
        finetuning.prepare(two, method="sft", train_rows=[])


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
