"""Small files in the shapes of other engines and APIs: each is read as it is, and exactly its answers are trained.

Next to each file is a text with what is trained between ⟦ and ⟧, decoded from the token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetuning.config.sections.training import SFTArgs
from finetuning.data.pipeline import prepare_dpo, prepare_kto, prepare_sft
from finetuning.data.prepared import PreparedData
from finetuning.data.samples import Row
from finetuning.data.sources import read_rows

from .test_loss_mask_matrix import source_of
from .test_pipeline import config

FOLDER = Path(__file__).with_name("shapes")
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.suffix not in ("", ".txt"))
NOT_USED = {
    "sft/dolly.jsonl": ("context",),
    "sft/openhermes.jsonl": ("id", "model_name", "skip_prompt_formatting", "source"),
    "sft/openai_parallel_calls.jsonl": ("parallel_tool_calls",),
    "sft/multilingual_thinking.jsonl": ("analysis", "developer", "final", "reasoning_language", "user"),
    "dpo/openai.jsonl": ("input.parallel_tool_calls",),
    "dpo/ultrafeedback.jsonl": ("messages", "prompt_id", "score_chosen", "score_rejected"),
}
"""The columns of a file that are reported as unused."""
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "data-formats.md"


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """Qwen3's template, which prints tools and tool calls."""
    return make_tokenizer("byte-level", source_of("qwen3"))


def prepared(path: Path, method: str, tokenizer: Any) -> PreparedData:
    conf = config(str(path), chat_template_name="keep-original", cache="off")
    if method == "sft":
        return prepare_sft(conf, SFTArgs(train_on_completions_only=True), tokenizer)
    return prepare_dpo(conf, None, tokenizer) if method == "dpo" else prepare_kto(conf, None, 0, tokenizer)


def displayed(data: PreparedData) -> str:
    rows = (
        f"{row.title}: " + "".join(f"⟦{text}⟧" if trained else text for text, trained in row.segments)
        for row in data.preview
    )
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_it_is(name: str, tokenizer: Any) -> None:
    path = FOLDER / name
    data = prepared(path, name.split("/")[0], tokenizer)
    assert displayed(data) == path.with_suffix(".txt").read_text("utf-8")
    notes = data.statistics.report()[0]["warnings"]
    relevant = {note: count for note, count in notes.items() if not note.startswith(("the turn", "the text was split"))}
    assert relevant == {f"column {column} is not used": 1 for column in NOT_USED.get(name, ())}


@pytest.mark.parametrize("name", ["sft/openai_tools.jsonl", "dpo/trl_texts.jsonl", "kto/ms_swift.jsonl"])
def test_the_same_rows_in_parquet_are_trained_alike(name: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [row.values for row in read_rows(str(FOLDER / name)) if isinstance(row, Row)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = prepared(tmp_path / "a.parquet", name.split("/")[0], tokenizer)
    assert displayed(data) == (FOLDER / name).with_suffix(".txt").read_text("utf-8")


def test_every_file_is_in_the_table_of_the_documentation() -> None:
    page = PAGE.read_text("utf-8").split("## Bring your files")[1].split("\n## ")[0]
    missing = [name for name in FILES if f"`{Path(name).name}`" not in page]
    assert not missing, json.dumps(missing)
