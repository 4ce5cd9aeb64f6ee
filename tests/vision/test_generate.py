"""`generate` with images: the answers are those of plain transformers, and no image is left out without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText

from finetuning.cli.generate import main
from vision.test_rows import WITH_PROCESSOR, processor_of


@pytest.fixture
def generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that answers rows with a model: from rows to the exit code, the records and what was said."""

    def run(
        model: Path, rows: list[dict[str, Any]], params: Any = None, images: Any = None
    ) -> tuple[int, list[dict[str, Any]], str]:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        prompts = {"type": "eval-data", "data": {"path": str(tmp_path / "prompts.jsonl")}, "images": images or {}}
        config = {
            "prompt_conf": prompts,
            "model_conf": {"model": str(model)},
            "hf_gen_params": {"max_new_tokens": 5, "do_sample": False, **(params or {})},
        }
        (tmp_path / "generate.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        out = tmp_path / "answers.jsonl"
        code = main([str(tmp_path / "generate.yaml"), str(out)])
        records = [json.loads(line) for line in out.read_text().splitlines()] if code == 0 else []
        return code, records, capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_answers_are_those_of_plain_transformers(
    name: str, generate: Any, family_dir: Any, picture_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    code, records, said = generate(family_dir(name), picture_rows)
    assert code == 0, said
    assert [record["correct_answers"] for record in records] == [
        [row["messages"][1]["content"]] for row in picture_rows
    ]
    processor = processor_of(family_dir(name))
    model = AutoModelForImageTextToText.from_pretrained(family_dir(name)).eval()
    for row, record in list(zip(picture_rows, records, strict=True))[2:5]:
        images = [Image.open(tmp_path / file).convert("RGB") for file in row.get("images", [])]
        inputs = processor._processor(text=[record["prompt"]], images=images or None, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert record["all_text_raw"] == processor.tokenizer.decode(ids[0]), row


def test_several_answers_of_a_prompt_with_several_images(
    generate: Any, family_dir: Any, picture_rows: list[dict[str, Any]]
) -> None:
    row = [picture_rows[3]]
    _, single, _ = generate(family_dir("llava"), row, {"max_new_tokens": 8})
    # With a temperature near 0, each answer is the greedy one, if each has its images in their order.
    sampled = {"max_new_tokens": 8, "do_sample": True, "temperature": 1e-4, "num_return_sequences": 3}
    _, three, _ = generate(family_dir("llava"), row, sampled)
    assert [record["all_text_raw"] for record in three] == [single[0]["all_text_raw"]] * 3
    code, _, said = generate(family_dir("llava"), row, {"num_beams": 2})
    assert (code, "num_beams: does not work for prompts with images" in said) == (1, True)


def test_settings_of_the_images_change_the_prompt(
    generate: Any, family_dir: Any, picture_rows: list[dict[str, Any]]
) -> None:
    rows = picture_rows[2:3]
    _, plain, _ = generate(family_dir("qwen2_5_vl"), rows)
    _, small, _ = generate(family_dir("qwen2_5_vl"), rows, images={"max_pixels": 28 * 28 * 2})
    counts = [records[0]["all_text_raw"].count("<|image_pad|>") for records in (plain, small)]
    assert counts[0] > counts[1] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["missing.png"]}, "prompts.jsonl:1"),
        ({"images": ["../a.png"]}, "is outside of"),
        ({"images": []}, None),
        ({"audio": "a.wav", "images": []}, "holds sound, which prompts cannot have"),
    ],
)
def test_an_image_that_cannot_be_read_ends_the_command(
    generate: Any, family_dir: Any, picture_rows: list[dict[str, Any]], change: Any, message: str | None
) -> None:
    row = {"messages": [{"role": "user", "content": "Which color?"}], **change}
    code, records, said = generate(family_dir("llava"), [row])
    if message is None:
        assert (code, "<image>" in records[0]["all_text_raw"]) == (0, False)
    else:
        assert (code, message in said) == (1, True)


def test_a_model_of_text_refuses_prompts_with_images(
    generate: Any, chatml_llama_dir: Path, picture_rows: list[dict[str, Any]]
) -> None:
    code, _, said = generate(chatml_llama_dir, picture_rows)
    assert code == 1
    assert "the prompts hold images, and" in said
