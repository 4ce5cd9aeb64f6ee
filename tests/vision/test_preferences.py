"""dpo with images: the loss is that of plain transformers, and what a row may look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from finetuning.algorithms import ALGORITHMS
from finetuning.errors import DataError
from finetuning.export.merge.merge import merge_adapters
from finetuning.trainer.oom_retry import split_batch
from vision.conftest import COLORS
from vision.test_checkpoints import LORA
from vision.test_rows import WITH_PROCESSOR, processor_of

EACH = [pytest.param(name, marks=pytest.mark.full) if name == "llava" else name for name in WITH_PROCESSOR]


ANSWERS = ("It is {}, I think.", "No idea at all, sorry.")


def preference(image: str | list[str] | None, color: str, text: str = "<image>\nWhich color is it?") -> dict[str, Any]:
    """A row that prefers the color of a picture to no answer."""
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": text}],
        "chosen": [{"role": "assistant", "content": ANSWERS[0].format(color)}],
        "rejected": [{"role": "assistant", "content": ANSWERS[1]}],
    }
    if image is not None:
        row["images"] = image if isinstance(image, list) else [image]
    return row


@pytest.fixture
def preference_rows(pictures: list[str]) -> list[dict[str, Any]]:
    """Four rows with pictures, one of them with two, and one without."""
    rows = [preference(name, color) for name, color in zip(pictures, COLORS, strict=True)]
    rows[2] = preference([pictures[2], pictures[0]], "blue", "<image> or <image>?")
    return [*rows[:3], preference(None, "red", "What is the color of blood?"), rows[3]]


@pytest.fixture
def preference_values(vision_values: Any) -> Callable[..., dict[str, Any]]:
    """A function that makes the values of a dpo run of a family over rows, all rows in one batch."""

    def make(name: str, rows: list[dict[str, Any]], changes: dict[str, Any] | None = None) -> dict[str, Any]:
        values = vision_values(name, rows, {"training_args.max_length": 512, **(changes or {})})
        del values["sft_args"]
        return values

    return make


def log_probs_of(model: Any, inputs: dict[str, Any], num_answer_tokens: int) -> float:
    """The summed log-probability of the last tokens of a row."""
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0, :-1].float().log_softmax(-1)
    each = logits.gather(1, inputs["input_ids"][0, 1:, None])[:, 0]
    return float(each[-num_answer_tokens:].sum())


def plain_log_probs(folder: Path, base: Any, row: dict[str, Any], root: Path, answer: str) -> float:
    """The log-probability of an answer as transformers' documentation has it: template, processor, model."""
    processor = processor_of(folder)
    content = row["prompt"][0]["content"]
    parts: list[dict[str, str]] = []
    for index, text in enumerate(content.split("<image>")):
        parts += [{"type": "image"}] * (index > 0)
        text = text.removeprefix("\n") if index else text
        parts += [{"type": "text", "text": text}] * bool(text)
    messages = [{"role": "user", "content": parts}]
    template = processor.tokenizer.apply_chat_template
    prompt = template(messages, tokenize=False, add_generation_prompt=True)
    said = {"role": "assistant", "content": [{"type": "text", "text": row[answer][0]["content"]}]}
    text = template([*messages, said], tokenize=False)
    text = text.removesuffix("\n")
    images = [Image.open(root / name).convert("RGB") for name in row.get("images", [])]
    inputs = processor._processor(text=[text], images=[images] if images else None, return_tensors="pt")
    answer_ids = processor.tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]
    return log_probs_of(base, dict(inputs), len(answer_ids))


@pytest.mark.parametrize("name", EACH)
def test_the_log_probabilities_are_plain_transformers_and_an_image_changes_its_own_pair_only(
    name: str, preference_values: Any, train: Any, family_dir: Any, preference_rows: Any, tmp_path: Path
) -> None:
    run = train(preference_values(name, preference_rows, {"training_args.max_steps": 1}))
    base = AutoModelForImageTextToText.from_pretrained(family_dir(name))
    rows, collate = list(run.trainer.train_dataset), run.trainer.data_collator
    batch = {key: value for key, value in collate(rows).items() if key not in ("host_counts", "image_rows")}
    # The frozen reference that TRL computes with is the base model.
    chosen, rejected = run.trainer.compute_ref_log_probs(run.trainer.ref_model, batch)
    for index, row in enumerate(preference_rows):
        expected = [plain_log_probs(family_dir(name), base, row, tmp_path, key) for key in ("chosen", "rejected")]
        assert [float(chosen[index]), float(rejected[index])] == pytest.approx(expected, rel=1e-4)
    assert run.losses[0] == pytest.approx(0.6931, abs=1e-3)

    Image.new("RGB", (30, 30), "white").save(tmp_path / "white.png")
    changed_run = train(
        preference_values(
            name,
            [preference("white.png", "red"), *preference_rows[1:]],
            {"training_args.max_steps": 1, "training_args.output_dir": str(tmp_path / "white")},
        )
    )
    changed = changed_run.trainer.data_collator(list(changed_run.trainer.train_dataset))
    changed = {key: value for key, value in changed.items() if key not in ("host_counts", "image_rows")}
    now, _ = changed_run.trainer.compute_ref_log_probs(changed_run.trainer.ref_model, changed)
    assert abs(float(now[0] - chosen[0])) > 1e-5
    torch.testing.assert_close(now[1:], chosen[1:])


@pytest.mark.parametrize("name", EACH)
def test_an_adapter_of_dpo_merges_and_splits_of_a_batch_have_the_loss_of_the_whole(
    name: str, preference_values: Any, train: Any, family_dir: Any, preference_rows: Any, tmp_path: Path
) -> None:
    run = train(preference_values(name, preference_rows, {"peft_conf": LORA}))
    assert run.losses[1] < run.losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert "equals the policy before the first update" in run.trainer.reference_summary
    batch = run.trainer.data_collator(list(run.trainer.train_dataset))
    model = run.trainer.model.eval()
    with torch.no_grad():
        whole = float(run.trainer.compute_loss(model, dict(batch)))
        assert run.trainer.supports_batch_splitting
        parts = list(split_batch(batch, 5))
        assert len(parts) == 5
        losses = [float(run.trainer.compute_loss(model, part)) * share for part, share in parts]
    assert sum(losses) == pytest.approx(whole, rel=1e-4)
    merge_adapters(str(family_dir(name)), [str(run.final)], tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        inputs = {
            key: value for key, value in batch.items() if key not in ("host_counts", "image_rows", "completion_mask")
        }
        torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-3)


def test_images_are_decoded_in_workers_and_reference_log_probabilities_can_be_computed_first(
    preference_values: Any, train: Any, preference_rows: Any, tmp_path: Path
) -> None:
    whole = train(preference_values("qwen2_5_vl", preference_rows))
    changes = {
        "training_args.dataloader_num_workers": 1,
        "training_args.precompute_ref_log_probs": True,
        "training_args.output_dir": str(tmp_path / "precomputed"),
        "batchsize_conf.max_per_device_train_batch_size": 1,
    }
    assert train(preference_values("qwen2_5_vl", preference_rows, changes)).losses == pytest.approx(
        whole.losses, rel=1e-4
    )


def test_both_answers_can_be_conversations_that_begin_with_the_prompt(
    preference_values: Any, train: Any, preference_rows: Any, tmp_path: Path
) -> None:
    run = train(preference_values("llava", preference_rows, {"training_args.max_steps": 1}))
    expected = [row["chosen_ids"] for row in run.trainer.train_dataset], run.losses
    implicit = [
        {
            "images": row.get("images", []),
            "chosen": [*row["prompt"], *row["chosen"]],
            "rejected": [*row["prompt"], *row["rejected"]],
        }
        for row in preference_rows
    ]
    changes = {"training_args.max_steps": 1, "training_args.output_dir": str(tmp_path / "implicit")}
    again = train(preference_values("llava", implicit, changes))
    assert ([row["chosen_ids"] for row in again.trainer.train_dataset], again.losses) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": [{"role": "assistant", "content": "<image> is red."}]}, "images belong to the prompt"),
        ({"images": ["red.png", "blue.png"]}, "2 images, and fewer <image>"),
        ({"images": ["gone.png"]}, "gone.png cannot be read"),
        ({"images": ["../red.png"]}, "is outside of"),
    ],
)
def test_rows_that_no_image_can_be_given_to(
    change: dict[str, Any], message: str, preference_values: Any, train: Any, preference_rows: Any
) -> None:
    if "chosen" in change:
        change = {**change, "prompt": [{"role": "user", "content": "Which color?"}]}
    rows = [{**preference_rows[0], **change}, *preference_rows[1:]]
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: [^\n]*{message}"):
        train(preference_values("llava", rows))


def test_a_prompt_with_images_is_not_cut(preference_values: Any, train: Any, preference_rows: Any) -> None:
    values = preference_values(
        "llava", preference_rows, {"training_args.max_prompt_length": 40, "data_conf.max_lost_fraction": 1}
    )
    values["batchsize_conf"] = {"total_train_batch_size": 1, "max_per_device_train_batch_size": 1}
    run = train(values)
    # The picture with two images is the longest; the text row is cut to its last tokens.
    assert all(not row["image_references"] or len(row["prompt_ids"]) <= 40 for row in run.trainer.train_dataset)
    assert len(run.trainer.train_dataset) < len(preference_rows)


def test_other_methods_refuse_images(preference_values: Any, train: Any, preference_rows: Any) -> None:
    values = preference_values("llava", preference_rows)
    with pytest.raises(DataError, match="holds images, on which only sft, dpo and grpo train"):
        train(values, ALGORITHMS["orpo"])
