"""Rows with images: every shape, what their labels are, and what becomes of images that cannot be used."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from finetuning.config.sections.data import ImagesConfig
from finetuning.data.formats.row_format import FieldError
from finetuning.data.images.files import ImageFolder, load_image
from finetuning.data.images.processor import ImageTextProcessor, load_processor
from finetuning.data.images.rendering import read_references
from finetuning.data.images.rows import PLACE, take_images
from finetuning.data.samples import Row
from finetuning.errors import ConfigError, DataError, Location, ModelError
from vision.families import FAMILIES
from vision.test_checkpoints import EACH

LIMIT = 10_000
WITH_PROCESSOR = [name for name in EACH if "mistral3" not in str(name)]
"""Mistral 3's processor needs torchvision."""


@pytest.fixture
def folder() -> ImageFolder:
    return ImageFolder(None, LIMIT)


@pytest.fixture
def take(tmp_path: Path, pictures: list[str], folder: ImageFolder) -> Callable[..., Any]:
    """A function that takes the images out of a row of a file in `tmp_path`."""

    def call(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        row, images = take_images(Row(values, Location(file=str(tmp_path / "rows.jsonl"), line=3)), folder=folder)
        return row.values, [f"{image.width}x{image.height}" for image in images]

    return call


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def user(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "It is red."}]


def part(**fields: object) -> list[dict[str, object]]:
    return [{"type": "text", "text": "This: "}, fields, {"type": "text", "text": "is?"}]


@pytest.mark.parametrize(
    "make",
    [
        lambda root: {"messages": user("This: <image>is?"), "images": ["red.png"]},
        lambda root: {"messages": user("This: <image>is?"), "image": "red.png"},
        lambda root: {"messages": user(part(type="image")), "images": ["red.png"]},
        lambda root: {"messages": user(part(type="image", image="red.png"))},
        lambda root: {"messages": user(part(type="image", path=f"file://{root}/red.png"))},
        lambda root: {"messages": user(part(type="image_url", image_url={"url": "red.png"}))},
        lambda root: {"messages": user(part(type="image_url", image_url={"url": data_uri(root / "red.png")}))},
        lambda root: {"messages": user(part(type="input_image", image_url=data_uri(root / "red.png")))},
        lambda root: {
            "messages": user("This: <image>is?"),
            "images": [{"bytes": (root / "red.png").read_bytes(), "path": "elsewhere.png"}],
        },
        lambda root: {
            "messages": user(
                part(type="image", source={"type": "base64", "data": data_uri(root / "red.png").split(",")[1]})
            )
        },
    ],
    ids=lambda make: None,
)
def test_each_way_to_write_an_image_gives_the_same_row(take: Any, tmp_path: Path, make: Callable[[Path], Any]) -> None:
    values, images = take(make(tmp_path))
    assert images == ["30x30"]
    assert values["messages"][0]["content"] == f"This: {PLACE}is?"
    assert not {"image", "images"} & values.keys()


@pytest.mark.parametrize(
    ("values", "column", "text", "sizes"),
    [
        # LLaVA
        (
            {"image": "red.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]},
            lambda row: row["conversations"][0]["value"],
            f"{PLACE}What?",
            ["30x30"],
        ),
        # LLaMA-Factory
        (
            {"instruction": "<image>Compare", "input": "with <image>", "images": ["red.png", "green.png"]},
            lambda row: row["instruction"] + row["input"],
            f"{PLACE}Comparewith {PLACE}",
            ["30x30", "64x40"],
        ),
        # TRL: images without a place come first.
        (
            {"prompt": [{"role": "user", "content": "Which?"}], "images": ["red.png", "green.png"]},
            lambda row: row["prompt"][0]["content"],
            f"{PLACE}{PLACE}Which?",
            ["30x30", "64x40"],
        ),
        ({"text": "A caption", "image": "green.png"}, lambda row: row["text"], f"{PLACE}A caption", ["64x40"]),
        ({"text": "Below\n<image>", "image": "green.png"}, lambda row: row["text"], f"Below{PLACE}", ["64x40"]),
        # Rows without images stay as they are, marks included.
        ({"text": "The tag <image> of SVG", "image": None}, lambda row: row["text"], "The tag <image> of SVG", []),
    ],
    ids=["llava", "llama-factory", "trl", "text", "at the end", "no image"],
)
def test_the_places_of_other_engines(take: Any, values: Any, column: Any, text: str, sizes: list[str]) -> None:
    row, images = take(values)
    assert (column(row), images) == (text, sizes)


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        ({"text": "<image> <image>", "image": "red.png"}, "text", "the row has no more images"),
        ({"text": "<image>", "images": ["red.png", "green.png"]}, "images[1]", "has no place"),
        ({"text": "a", "image": "missing.png"}, "image", "cannot be read: No such file"),
        ({"text": "a", "image": "../secret.png"}, "image", "is outside of"),
        ({"text": "a", "image": "/etc/hostname"}, "image", "is outside of"),
        ({"text": "a", "image": "https://example.com/a.png"}, "image", "are not downloaded"),
        ({"text": "a", "image": "data:image/png;base64,???"}, "image", "is not valid base64"),
        ({"text": "a", "image": {"url": 3}}, "image.url", "expected an image, got a number"),
        ({"text": "a", "image": {"height": 3}}, "image", "has none of the keys"),
        ({"text": "a", "image": "."}, "image", "is not a file"),
        ({"text": "a", "image": "broken.png"}, "image", "cannot be decoded"),
        ({"text": "a", "image": "note.txt"}, "image", "is not an image of the formats"),
        ({"text": "a", "image": "large.png"}, "image", "at most 10,000 are decoded"),
        ({"text": "a", "image": "bomb.png"}, "image", "are decoded"),
        ({"text": "a", "image": "link.png"}, "image", "is outside of"),
        ({"text": f"a{PLACE}", "image": "red.png"}, "text", "U+E1A6"),
        ({"messages": [{"role": "system", "content": "a"}], "image": "red.png"}, "image", "no message of the user"),
    ],
)
def test_an_image_that_cannot_be_used_makes_its_row_invalid(
    take: Any, tmp_path: Path, values: Any, key: str, message: str
) -> None:
    content = (tmp_path / "green.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "note.txt").write_text("no image", encoding="utf-8")
    Image.new("1", (200, 200)).save(tmp_path / "large.png")
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    Image.new("RGB", (3, 3)).save(outside)
    (tmp_path / "link.png").symlink_to(outside)
    with pytest.raises(FieldError) as caught:
        take(values)
    assert caught.value.key == key
    assert message in str(caught.value)


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG file that claims to have so many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_stated_folder_is_the_root_of_all_paths(tmp_path: Path, pictures: list[str]) -> None:
    elsewhere = Location(file=str(tmp_path / "deep" / "rows.jsonl"))
    with_root = ImageFolder(tmp_path, LIMIT)
    _, images = take_images(Row({"text": "a", "image": "red.png"}, elsewhere), folder=with_root)
    assert images[0].path == str((tmp_path / "red.png").resolve())
    # A link to the folder itself is no way out of it.
    (tmp_path / "deep").symlink_to(tmp_path)
    assert take_images(Row({"text": "a", "image": "deep/red.png"}, elsewhere), folder=with_root)[1] == images


def test_an_image_that_changes_after_preparation_is_noticed(tmp_path: Path, pictures: list[str]) -> None:
    reference = ImageFolder(tmp_path, LIMIT).read("red.png", "image", None)
    assert load_image(reference).size == (30, 30)
    Image.new("RGB", (30, 30), "black").save(tmp_path / "red.png")
    with pytest.raises(DataError, match="changed after its row was prepared"):
        load_image(reference)


def test_a_photo_is_turned_as_its_metadata_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    reference = ImageFolder(tmp_path, LIMIT).read("turned.jpg", "image", None)
    assert (reference.width, reference.height) == load_image(reference).size == (10, 20)


def processor_of(folder: Path, **settings: Any) -> ImageTextProcessor:
    from transformers import AutoTokenizer

    processor = load_processor(folder, AutoTokenizer.from_pretrained(folder), ImagesConfig(**settings))
    assert not isinstance(processor, str)
    return processor


@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_the_expansion_of_several_images_is_the_processors(
    name: str, family_dir: Any, tmp_path: Path, pictures: list[str]
) -> None:
    processor = processor_of(family_dir(name))
    folder = ImageFolder(tmp_path, LIMIT)
    images = [folder.read(picture, "image", None) for picture in pictures]
    mark = processor.mark
    text = f"One {mark} two{mark}{mark}, and {mark}\nlast"
    expanded = processor.expand(text, images)
    output = processor([text], [[load_image(image) for image in images]])
    ids = processor.tokenizer(expanded.text, add_special_tokens=False)["input_ids"]
    assert output["input_ids"][0].tolist() == ids
    # What is left without the images is the text, and no image is cut.
    spans = expanded.spans(None)
    assert "".join(expanded.text[start:end] for start, end in spans) == text.replace(processor.image_token, "")
    assert [expanded.text[start:end] for start, end in expanded.spans([(0, 3)])] == ["One"]
    assert [expanded.text[start:end] for start, end in expanded.spans([(len(text) - 4, len(text))])] == ["last"]


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("preprocessor_config.json", {"crop_size": [1, {"a": []}]}, "cannot process an image with the settings"),
        ("preprocessor_config.json", {"crop_size": -1}, "writes no token for an image|cannot process an image"),
        ("processor_config.json", {"patch_size": [14]}, "cannot process an image with the settings"),
    ],
)
def test_settings_that_no_processor_can_use_are_errors_of_the_model(
    family_dir: Any, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(family_dir("llava"), tmp_path / "model"))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(ModelError, match=message):
        processor_of(folder)._replacement((40, 30))


def test_settings_change_the_number_of_tokens_and_unknown_ones_are_refused(family_dir: Any) -> None:
    def tokens(processor: ImageTextProcessor) -> int:
        return processor._replacement((100, 100)).count(processor.image_token)

    plain, small = (
        processor_of(family_dir("qwen2_5_vl")),
        processor_of(family_dir("qwen2_5_vl"), max_pixels=28 * 28 * 4),
    )
    assert tokens(plain) == 16
    assert tokens(small) == 4
    assert plain.digest != small.digest
    with pytest.raises(ConfigError, match=r"data_conf.images.do_pan_and_scan: .*has no such setting"):
        processor_of(family_dir("qwen2_5_vl"), do_pan_and_scan=True)


def prepared(values: dict[str, Any]) -> Any:
    """The rows of a config as a run prepares them."""
    import yaml

    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.reader import read_document
    from finetuning.training.setup import load_tokenizer, prepare

    path = Path(values["training_args"]["output_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    experiment = validate(read_document(path), ALGORITHMS["sft"].experiment).experiment
    tokenizer = load_tokenizer(experiment)
    return prepare(experiment, ALGORITHMS["sft"], tokenizer, 1), tokenizer.tokenizer


@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_labels_decode_to_the_answers_and_never_to_an_image(
    name: str, vision_values: Any, picture_rows: list[dict[str, Any]]
) -> None:
    data, tokenizer = prepared(vision_values(name, picture_rows))
    assert data.has_images
    for row, source in zip(data.train, picture_rows, strict=True):
        trained = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(trained) == source["messages"][1]["content"] + "<|im_end|>"
        assert len(json.loads(row["images"] or "[]")) == len(source.get("images", ()))


def test_training_on_everything_leaves_the_images_out(vision_values: Any, picture_rows: list[dict[str, Any]]) -> None:
    values = vision_values("idefics3", picture_rows, {"sft_args.train_on_completions_only": False})
    data, tokenizer = prepared(values)
    row = data.train[0]
    assert tokenizer.decode([token for token in row["labels"] if token != -100]) == (
        "<|im_start|>user\nWhich color is it?<|im_end|>\n<|im_start|>assistant\nIt is red.<|im_end|>\n"
    )
    untrained = np.array(row["input_ids"])[np.array(row["labels"]) == -100]
    assert "<row_1_col_1>" in tokenizer.decode(untrained)


def test_the_length_limit_counts_image_tokens_and_cuts_no_image(
    vision_values: Any, picture_rows: list[dict[str, Any]]
) -> None:
    whole, tokenizer = prepared(vision_values("llava", picture_rows))
    lengths = [len(row["input_ids"]) for row in whole.train]
    image = tokenizer.convert_tokens_to_ids("<image>")
    last_image = max(index for index, token in enumerate(whole.train[3]["input_ids"]) if token == image)
    cut = {"sft_args.length_handling": "truncate", "data_conf.max_lost_fraction": 1.0}
    # The row with two images is dropped where the limit is in its last image, and shortened where it is behind it.
    inside, _ = prepared(vision_values("llava", picture_rows, {**cut, "sft_args.max_seq_length": last_image}))
    assert "an image would be cut off" in str(inside.statistics.lines())
    assert len(inside.train) == sum(length <= last_image for length in lengths)
    behind, _ = prepared(vision_values("llava", picture_rows, {**cut, "sft_args.max_seq_length": lengths[3] - 1}))
    assert max(len(row["input_ids"]) for row in behind.train) == lengths[3] - 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sft_args.packing": True}, "images do not work together with sft_args.packing: true"),
        ({"sft_args.batching": "padding-free"}, "images do not work together with sft_args.batching: padding-free"),
    ],
)
def test_what_excludes_images_is_named(
    vision_values: Any, picture_rows: list[dict[str, Any]], changes: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        prepared(vision_values("llava", picture_rows, changes))


def test_a_model_of_text_refuses_images(
    vision_values: Any, picture_rows: list[dict[str, Any]], chatml_llama_dir: Path
) -> None:
    values = vision_values("llava", picture_rows, {"run_conf.model": str(chatml_llama_dir)})
    with pytest.raises(DataError, match=r"rows\.jsonl.*holds images, and .* is a model that takes text only"):
        prepared(values)


def test_the_token_of_an_image_as_text_is_refused(vision_values: Any, picture_rows: list[dict[str, Any]]) -> None:
    picture_rows[5]["messages"][0]["content"] = "What does <image> mean?"
    with pytest.raises(DataError, match=r"rows\.jsonl:6.*a token of images"):
        prepared(vision_values("llava", picture_rows))


def test_a_changed_image_gives_no_old_entry_of_the_cache(
    vision_values: Any, picture_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    values = vision_values("llava", picture_rows, {"data_conf.cache": str(tmp_path / "cache")})
    first, _ = prepared(values)
    again, _ = prepared(values)
    assert "read from the cache" in again.origin
    Image.new("RGB", (50, 20), "white").save(tmp_path / "green.png")
    changed, _ = prepared(values)
    assert "green.png was changed after its row was prepared" in changed.origin
    assert load_image(read_references(changed.train[1]["images"])[0]).size == (50, 20)
    assert first.train[0] == changed.train[0]
    # A row that was invalid is looked at again, too.
    (tmp_path / "red.png").rename(tmp_path / "away.png")
    values["data_conf"] |= {"on_bad_row": "skip", "max_lost_fraction": 1.0}
    assert len(prepared(values)[0].train) == len(picture_rows) - 2
    (tmp_path / "away.png").rename(tmp_path / "red.png")
    assert len(prepared(values)[0].train) == len(picture_rows)


def test_parquet_with_images_of_datasets(
    tmp_path: Path, vision_values: Any, picture_rows: list[dict[str, Any]]
) -> None:
    import datasets

    rows = [{**row, "images": [str(tmp_path / name) for name in row.get("images", ())]} for row in picture_rows]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    dataset.to_parquet(tmp_path / "rows.parquet")
    data, _ = prepared(
        vision_values(
            "llava", picture_rows, {"data_conf.training_data.datasets": [{"path": str(tmp_path / "rows.parquet")}]}
        )
    )
    expected, _ = prepared(vision_values("llava", picture_rows))
    assert data.train["input_ids"] == expected.train["input_ids"]
    assert FAMILIES


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("PaliGemmaProcessor", "reads prompts in both directions"),
        ("MllamaProcessor", "reads images by cross-attention"),
    ],
)
def test_processors_of_models_that_are_not_trained_on_images_have_a_reason(
    name: str, reason: str, tmp_path: Path, chatml_llama_dir: Path
) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": name}), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(chatml_llama_dir)
    assert reason in str(load_processor(tmp_path, tokenizer, ImagesConfig()))
