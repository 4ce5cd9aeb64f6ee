"""Images around a run: the preview, the report, and the data doctor."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from finetuning.cli.data_commands import preview_main
from finetuning.cli.data_doctor import main as doctor_main
from finetuning.data.preview import parse_text, to_text
from finetuning.export.merge.merge import merge_adapters
from vision.test_checkpoints import LORA
from vision.test_rows import data_uri, processor_of


@pytest.fixture
def config(vision_values: Any, tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[dict[str, Any]], changes: Any = None) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(vision_values("llava", rows, changes)), encoding="utf-8")
        return str(path)

    return write


def test_the_preview_names_and_shows_the_pictures(
    config: Any, picture_rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture_rows[1]["images"] = [data_uri(tmp_path / "green.png")]
    path = config(picture_rows)
    assert preview_main(["sft", path, "--rows", "6"]) == 0
    text = capsys.readouterr().out
    assert f"image: {tmp_path.resolve()}/red.png (30 x 30 pixels)\n" in text
    assert re.search(r"image: in the row, SHA-256 [0-9a-f]{12} \(64 x 40 pixels\)\n", text)
    assert "<image>×16" in text and "<image><image>" not in text
    assert "⟦It is red.<|im_end|>⟧" in text
    page = tmp_path / "page.html"
    assert preview_main(["sft", path, "--rows", "6", "--html", str(page)]) == 0
    pictures = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page.read_text(encoding="utf-8"))
    assert len(pictures) == 5
    (tmp_path / "shown.jpg").write_bytes(base64.b64decode(pictures[0]))
    red, green, blue = Image.open(tmp_path / "shown.jpg").getpixel((15, 15))
    assert red > 200 > 50 > max(green, blue)


def test_the_report_shows_the_pictures_of_the_first_rows(
    vision_values: Any, train: Any, picture_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = train(vision_values("llava", picture_rows))
    saved = (run.output_dir / "preview.txt").read_text(encoding="utf-8")
    rows = parse_text(saved)
    assert rows[0].images == (f"{tmp_path.resolve()}/red.png (30 x 30 pixels)",)
    assert to_text(rows[:1]).strip() == to_text(parse_text(to_text(rows[:1]))).strip()
    page = (run.output_dir / "report.html").read_text(encoding="utf-8")
    num_images = sum(len(row.images) for row in rows)
    assert page.count('src="data:image/jpeg;base64,') == num_images > 1


def test_the_doctor_counts_images_and_names_broken_ones(
    config: Any, picture_rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (tmp_path / "green.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(content[: len(content) // 2])
    picture_rows[2]["images"] = ["broken.png"]
    doctor_main(["doctor", config(picture_rows), "--workers", "1"])
    said = " ".join(capsys.readouterr().out.split())
    assert "4 images in 3 rows of 5, at most 2 in one; from 30 x 30 to 56 x 56 pixels" in said
    assert "rows.jsonl:3" in said
    assert "cannot be decoded" in said


@pytest.mark.parametrize(
    ("name", "settings", "tokens"),
    [("qwen2_5_vl", {"max_pixels": 28 * 28 * 4}, 4), ("idefics3", {"do_image_splitting": False}, 4)],
)
def test_the_saved_and_merged_processor_is_that_of_training(
    name: str,
    settings: Any,
    tokens: int,
    vision_values: Any,
    train: Any,
    family_dir: Any,
    picture_rows: Any,
    tmp_path: Any,
) -> None:
    def count(folder: Path) -> int:
        processor = processor_of(folder)
        return processor._replacement((100, 100)).count(processor.image_token)

    assert count(family_dir(name)) != tokens
    changes = {"peft_conf": LORA, "data_conf.images": settings, "training_args.max_steps": 1}
    run = train(vision_values(name, picture_rows, changes))
    assert count(run.final) == tokens
    merge_adapters(str(family_dir(name)), [str(run.final)], tmp_path / "merged")
    assert count(tmp_path / "merged") == tokens
