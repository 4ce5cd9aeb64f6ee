"""Fixtures of the tests with images: tiny checkpoints by family, and rows with pictures that are drawn here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vision.families import save_family

COLORS = ("red", "green", "blue", "yellow")
SIZES = ((30, 30), (64, 40), (40, 90), (56, 56))


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path) -> Callable[[str], Path]:
    """A function that returns the folder of a tiny checkpoint of a family, made once."""
    from transformers import AutoTokenizer

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            tokenizer = AutoTokenizer.from_pretrained(chatml_llama_dir)
            made[name] = save_family(name, tmp_path_factory.mktemp("families") / name, tokenizer)
        return made[name]

    return make


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Names of pictures in `tmp_path`, each of one color and of another size."""
    names = [f"{color}.png" for color in COLORS]
    for name, color, size in zip(names, COLORS, SIZES, strict=True):
        Image.new("RGB", size, color).save(tmp_path / name)
    return names


def question(image: str, answer: str, text: str = "<image>\nWhich color is it?") -> dict[str, Any]:
    """A row that asks for the color of a picture."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image]}


@pytest.fixture
def picture_rows(pictures: list[str]) -> list[dict[str, Any]]:
    """Four rows with pictures, one of them with two, and two rows without."""
    rows = [question(name, f"It is {color}.") for name, color in zip(pictures, COLORS, strict=True)]
    rows[3]["messages"][0]["content"] = "<image> or <image>?"
    rows[3]["images"].append(pictures[0])
    for number in (2, 30):
        messages = [
            {"role": "user", "content": f"What is {number} plus one?"},
            {"role": "assistant", "content": f"It is {number + 1}."},
        ]
        rows.append({"messages": messages})
    return rows


@pytest.fixture
def vision_values(tmp_path: Path, sft_values: Any, family_dir: Any) -> Callable[..., dict[str, Any]]:
    """A function that makes the values of an SFT run of a family over rows, all rows in one batch."""

    def make(name: str, rows: list[dict[str, Any]], changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values = sft_values(
            {
                "run_conf.model": str(family_dir(name)),
                "data_conf.training_data.datasets": [{"path": str(path)}],
                "data_conf.chat_template_name": "keep-original",
                "batchsize_conf.total_train_batch_size": len(rows),
                "batchsize_conf.max_per_device_train_batch_size": len(rows),
                "training_args.max_steps": 2,
                "sft_args.max_seq_length": 512,
            }
        )
        for key, value in (changes or {}).items():
            section = values
            *parents, last = key.split(".")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return values

    return make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    """Write the outcome of each test of a family into the folder in VISION_RESULTS, for the table in the documents."""
    report = yield
    folder, parameters = os.environ.get("VISION_RESULTS"), getattr(item, "callspec", None)
    family = parameters and parameters.params.get("name")
    if folder and family and (report.when == "call" or not report.passed):
        Path(folder).mkdir(parents=True, exist_ok=True)
        entry = {"family": family, "test": item.originalname, "outcome": report.outcome}
        (Path(folder) / f"{family}-{item.originalname}.json").write_text(json.dumps(entry), encoding="utf-8")
    return report
