"""Runs on rows that no chat template frames."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.errors import DataError


@pytest.fixture
def text_values(sft_values: Any, tiny_llama_dir: Path, tmp_path: Path) -> Any:
    """A function: sources -> values of a run of a base model without a chat template."""

    def make(*sources: dict[str, Any], **changes: Any) -> Any:
        return sft_values(
            {
                "data_conf.training_data.datasets": list(sources),
                "data_conf.chat_template_name": "keep-original",
                "run_conf.model": str(tiny_llama_dir),
                "training_args.max_steps": 12,
                "sft_args.train_on_completions_only": False,
                **changes,
            }
        )

    return make


def test_a_base_model_goes_on_learning_from_plain_text(train: Any, text_values: Any, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt.gz"
    with gzip.open(path, "wt") as stream:
        stream.writelines(f"The capital of France is Paris, says line {number}.\n" for number in range(16))
    run = train(text_values({"path": str(path)}))
    assert run.losses[-1] < run.losses[0] / 2
    record = json.loads((run.output_dir / "run.json").read_text())
    (formats,) = (part["formats"] for part in record["data"]["statistics"])
    assert formats == {str(path): "text, auto-detected"}
    assert "chat_template" not in json.loads((run.final / "tokenizer_config.json").read_text())
    generation = json.loads((run.final / "generation_config.json").read_text())
    assert generation["eos_token_id"] in (1, [1])


def test_the_second_format_of_fms_trains(train: Any, text_values: Any, write_jsonl: Any, tmp_path: Path) -> None:
    rows = [
        {"input": f"### Input: {state} is a state in USA ### Output:", "output": "USA : Location"}
        for state in ("Colorado", "Arizona", "Ohio", "Texas")
    ]
    run = train(text_values({"path": str(write_jsonl(tmp_path / "Train.jsonl", rows))}))
    assert run.losses[-1] < run.losses[0] / 2


TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


@pytest.mark.parametrize("is_file", [True, False])
def test_a_chat_template_of_ones_own(
    train: Any, sft_values: Any, tiny_llama_dir: Path, tmp_path: Path, is_file: bool
) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    changes = {
        "data_conf.chat_template_name": None,
        "data_conf.chat_template": str(path) if is_file else TEMPLATE,
        "data_conf.special_tokens": ["<turn>", "</turn>"],
        "run_conf.model": str(tiny_llama_dir),
        "sft_args.train_on": "last",
    }
    run = train(sft_values(changes))
    tokenizer = json.loads((run.final / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    generation = json.loads((run.final / "generation_config.json").read_text())
    stops = generation["eos_token_id"] if isinstance(generation["eos_token_id"], list) else [generation["eos_token_id"]]
    assert ids["</turn>"] in stops
    assert (run.final / "chat_template.jinja").read_text() == TEMPLATE
    assert all(row["labels"][-1] == ids["</turn>"] for row in run.trainer.train_dataset)


def test_a_chat_template_that_is_not_there(train: Any, sft_values: Any) -> None:
    with pytest.raises(DataError, match=r"data_conf.chat_template: missing.jinja cannot be read: No such file"):
        train(sft_values({"data_conf.chat_template_name": None, "data_conf.chat_template": "missing.jinja"}))
