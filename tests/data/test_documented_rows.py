"""The examples in docs/reference/data-formats.md are correct."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuning.config.sections.data import ChatTemplateName, DataConfig
from finetuning.config.sections.training import SFTArgs
from finetuning.data.chat.template import get_template
from finetuning.data.formats import FORMATS
from finetuning.data.pipeline import prepare_dpo, prepare_kto, prepare_prompts, prepare_sft
from finetuning.data.samples import Row
from finetuning.data.transforms import make_transforms
from finetuning.errors import Location

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "data-formats.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in BLOCK.finditer(PAGE.read_text("utf-8"))]


def examples() -> list[tuple[str, str, str]]:
    """Settings, rows and texts of each example with texts."""
    result = []
    settings, rows = "", ""
    for kind, body in blocks():
        if kind == "yaml":
            settings = body
        elif kind == "jsonl":
            rows = body
        elif kind == "text":
            result.append((settings if "data_conf" not in settings else "", rows, body))
        if kind != "yaml" and kind != "jsonl":
            settings = ""
    return result


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    template = get_template(ChatTemplateName.CHAT_ML)
    assert template is not None
    return make_tokenizer("byte-level", template.source, template.special_tokens)


def config(path: Path, **source: Any) -> DataConfig:
    training = {"type": "CONCATENATION", "datasets": [{"path": str(path), **source}]}
    values = {"training_data": training, "validation_data": {"type": "NONE"}, "chat_template_name": "chat-ml"}
    return DataConfig.model_validate(values)


def displayed(settings: str, rows: str, tokenizer: Any, folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text(rows, "utf-8")
    args = SFTArgs(train_on_completions_only=True)
    data = prepare_sft(config(path, **(yaml.safe_load(settings) or {})), args, tokenizer)
    texts = ("".join(f"⟦{text}⟧" if trained else text for text, trained in row.segments) for row in data.preview)
    return "\n".join(text.rstrip("\n") for text in texts) + "\n"


@pytest.mark.parametrize("number", range(len(examples())))
def test_documented_examples_show_what_is_trained(number: int, tokenizer: Any, tmp_path: Path) -> None:
    settings, rows, text = examples()[number]
    assert displayed(settings, rows, tokenizer, tmp_path) == text


def rows_below(heading: str) -> list[str]:
    section = PAGE.read_text("utf-8").split(heading)[1]
    match = BLOCK.search(section)
    assert match is not None
    return match[2].splitlines()


def test_documented_preferences_are_read(tokenizer: Any, tmp_path: Path) -> None:
    for row in rows_below("## Preferences"):
        (tmp_path / "a.jsonl").write_text(row)
        assert len(prepare_dpo(config(tmp_path / "a.jsonl"), 99, tokenizer).train) == 1
        assert len(prepare_kto(config(tmp_path / "a.jsonl"), 99, 0, tokenizer).train) == 2


def test_documented_unpaired_rows_are_read(tokenizer: Any, tmp_path: Path) -> None:
    for row in rows_below("## Unpaired preferences"):
        (tmp_path / "a.jsonl").write_text(row)
        assert len(prepare_kto(config(tmp_path / "a.jsonl"), 99, 0, tokenizer).train) == 1


def test_documented_prompts_are_read(tokenizer: Any, tmp_path: Path) -> None:
    for row in rows_below("## Prompts"):
        (tmp_path / "a.jsonl").write_text(row)
        assert len(prepare_prompts(config(tmp_path / "a.jsonl"), 99, {}, tokenizer).train) == 1


def test_documented_tokenized_rows_are_read(tokenizer: Any, tmp_path: Path) -> None:
    (row,) = rows_below("## `tokens`")
    (tmp_path / "a.jsonl").write_text(row)
    assert prepare_sft(config(tmp_path / "a.jsonl"), SFTArgs(), tokenizer).train[0] == json.loads(row)


def errors() -> list[tuple[str, str]]:
    lines = next(body for kind, body in blocks() if kind == "errors").splitlines()
    return list(zip(lines[::2], lines[1::2], strict=True))


@pytest.mark.parametrize(("row", "message"), errors())
def test_documented_errors_are_reported(row: str, message: str) -> None:
    problem = FORMATS["messages"].parse(Row(json.loads(row), Location("train.jsonl", 6)))
    assert str(problem) == message


def test_every_format_and_handler_is_documented() -> None:
    page = PAGE.read_text("utf-8")
    source = config(Path("a")).training_data.datasets[0]
    assert make_transforms(source, "d").steps == ()
    missing = [name for name in FORMATS if f"`{name}`" not in page]
    assert not missing
