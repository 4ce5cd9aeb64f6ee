"""Training on images: the features of the vision tower, whose loss an image changes, and plain transformers' loss."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from finetuning.data.collators import IMAGE_ROWS
from finetuning.data.images.files import ImageFolder, load_image
from finetuning.data.images.rendering import read_references
from finetuning.errors import DataError, GuardStopped
from finetuning.export.inputs import read_adapter, read_base
from finetuning.export.merge.merge import merge_adapters
from finetuning.export.merge.verification import VERIFICATION_FILE, verify_merge
from finetuning.model.vision import module_parts
from finetuning.trainer.image_check import count_features, image_token_id, why_not_split
from finetuning.trainer.oom_retry import split_batch
from vision.test_checkpoints import LORA
from vision.test_rows import WITH_PROCESSOR, prepared, processor_of

_TEXT_KEYS = {"shift_labels", "label_positions", "num_labels", "labels"}


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{key: value for key, value in batch.items() if key not in _TEXT_KEYS}).logits


def losses_of(model: Any, batch: Any) -> torch.Tensor:
    """The mean loss of each row."""
    logits, targets = logits_of(model, batch).float(), batch["shift_labels"]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return losses.sum(1) / targets.ne(-100).sum(1)


@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_the_loss_is_plain_transformers_and_an_image_changes_its_own_row_only(
    name: str, vision_values: Any, train: Any, family_dir: Any, picture_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = train(vision_values(name, picture_rows, {"training_args.max_steps": 1}))
    base = AutoModelForImageTextToText.from_pretrained(family_dir(name))
    rows, collate = list(run.trainer.train_dataset), run.trainer.data_collator
    batch = collate(rows)
    total = trained = 0.0
    processor = processor_of(family_dir(name))
    for row, source in zip(rows, picture_rows, strict=True):
        # As transformers' documentation has it: the processor's template, its input, and the model's own loss.
        content, names = source["messages"][0]["content"], source.get("images", [])
        parts: list[dict[str, str]] = []
        for index, text in enumerate(content.split("<image>")):
            parts += [{"type": "image"}] * (index > 0)
            text = text.removeprefix("\n") if index else text
            parts += [{"type": "text", "text": text}] * bool(text)
        answer = [{"type": "text", "text": source["messages"][1]["content"]}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
        images = [Image.open(tmp_path / file).convert("RGB") for file in names]
        inputs = processor._processor(text=[text], images=[images] if images else None, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == row["input_ids"]
        with torch.no_grad():
            loss = base(**inputs, labels=torch.tensor([row["labels"]])).loss
        count = sum(label != -100 for label in row["labels"])
        total, trained = total + loss.item() * count, trained + count
        if images:
            tokens = int((inputs["input_ids"] == image_token_id(base)).sum())
            assert count_features(base, inputs) == tokens > 0
    assert run.losses[0] == pytest.approx(total / trained, rel=1e-5)

    before = losses_of(base, batch)
    Image.new("RGB", (30, 30), "white").save(tmp_path / "white.png")
    white = ImageFolder(tmp_path, 10_000).read("white.png", "image", None)
    changed = [dict(row) for row in rows]
    assert [image.width for image in read_references(changed[0]["images"])] == [30]
    changed[0]["images"] = json.dumps([dataclasses.asdict(white)])
    after = losses_of(base, collate(changed))
    assert before[0] != after[0]
    assert torch.equal(before[1:], after[1:])


@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_saved_merged_and_reloaded_models_give_the_same_logits(
    name: str, vision_values: Any, train: Any, family_dir: Any, picture_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    parts = {"run_conf.train_parts": ["language_model", "projector", "vision_tower"]}
    run = train(vision_values(name, picture_rows, parts))
    batch = run.trainer.data_collator(list(run.trainer.train_dataset))
    again = AutoModelForImageTextToText.from_pretrained(run.final)
    assert torch.equal(logits_of(run.trainer.model, batch), logits_of(again, batch))
    base = AutoModelForImageTextToText.from_pretrained(family_dir(name))
    assert not torch.equal(base.get_output_embeddings().weight, again.get_output_embeddings().weight)
    # The folder of the final model serves as a checkpoint with images again.
    reloaded = processor_of(run.final)
    row = run.trainer.train_dataset[0]
    images = [load_image(image) for image in read_references(row["images"])]
    assert reloaded([row["text"]], [images])["input_ids"][0].tolist() == row["input_ids"]

    changes = {"peft_conf": LORA, "training_args.output_dir": str(tmp_path / "adapter"), **parts}
    adapter = train(vision_values(name, picture_rows, changes))
    merge_adapters(str(family_dir(name)), [str(adapter.final)], tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, batch), logits_of(adapter.trainer.model, batch), atol=1e-4, rtol=1e-3)
    verification = json.loads((tmp_path / "merged" / VERIFICATION_FILE).read_text(encoding="utf-8"))
    assert verification["image"].startswith("an image of 96 x 64 pixels, ")
    assert verification["passed"]


def test_a_merge_with_another_vision_tower_is_refused(
    vision_values: Any, train: Any, family_dir: Any, picture_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = train(vision_values("qwen2_5_vl", picture_rows, {"peft_conf": LORA}))
    base, merged = family_dir("qwen2_5_vl"), tmp_path / "merged"
    merge_adapters(str(base), [str(run.final)], merged)
    tensors = load_file(merged / "model.safetensors")
    name = next(name for name in tensors if "visual" in name and name.endswith("mlp.down_proj.weight"))
    save_file({**tensors, name: tensors[name] * 1.5}, merged / "model.safetensors", {"format": "pt"})
    adapter = read_adapter(str(run.final))
    # A text alone would not show it.
    with pytest.raises(GuardStopped, match="max_logit_difference"):
        verify_merge(read_base(str(base)), [adapter], merged)


def test_accumulation_keeps_the_loss(
    vision_values: Any, train: Any, picture_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    whole = train(vision_values("qwen2_5_vl", picture_rows))
    split = {
        "batchsize_conf.max_per_device_train_batch_size": 2,
        "training_args.output_dir": str(tmp_path / "split"),
        "training_args.dataloader_num_workers": 1,
    }
    assert train(vision_values("qwen2_5_vl", picture_rows, split)).losses == pytest.approx(whole.losses, rel=1e-4)


@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_a_batch_that_is_split_when_memory_runs_out_has_the_same_loss(
    name: str, vision_values: Any, train: Any, picture_rows: list[dict[str, Any]]
) -> None:
    run = train(vision_values(name, picture_rows, {"training_args.max_steps": 1}))
    assert run.trainer.supports_batch_splitting
    model, batch = run.trainer.model.eval(), run.trainer.data_collator(list(run.trainer.train_dataset))
    count = torch.tensor(batch["num_labels"])
    with torch.no_grad():
        whole = float(run.trainer.compute_loss(model, dict(batch), num_items_in_batch=count))
        for parts in (2, 6):
            losses = [
                float(run.trainer.compute_loss(model, part, num_items_in_batch=count))
                for part, _ in split_batch(batch, parts)
            ]
            assert len(losses) == parts
            assert sum(losses) == pytest.approx(whole, rel=1e-4)


def test_a_batch_whose_tensors_depend_on_its_rows_is_not_split() -> None:
    rows = Dataset.from_list([{"images": ["a"]}, {"images": []}, {"images": ["b", "c"]}])

    def collate(batch: Any, unused: int = 0) -> dict[str, Any]:
        return {IMAGE_ROWS: {"pixel_values": [len(row["images"]) + unused for row in batch]}}

    def in_batches_padded(batch: Any) -> dict[str, Any]:
        return collate(batch, unused=int(len(batch) > 1))

    assert why_not_split(collate, rows) is None
    reason = "the processor makes other tensors of training row 1 alone than among others"
    assert why_not_split(in_batches_padded, rows) == reason
    assert why_not_split(lambda batch: {IMAGE_ROWS: {}}, rows) == (
        "it is not known which entries of their tensors belong to which row"
    )


def test_a_run_resumes_where_it_was(
    vision_values: Any, train: Any, picture_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    steps = {
        "training_args.max_steps": 4,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 2,
        "batchsize_conf.total_train_batch_size": 2,
        "batchsize_conf.max_per_device_train_batch_size": 2,
    }
    whole = train(vision_values("llava", picture_rows, steps))
    folder = tmp_path / "resumed"
    folder.mkdir()
    shutil.copytree(whole.output_dir / "checkpoint-2", folder / "checkpoint-2")
    assert (folder / "checkpoint-2" / "preprocessor_config.json").is_file()
    changes = {"training_args.output_dir": str(folder), "run_conf.resume_from_checkpoint": "auto"}
    resumed = train(vision_values("llava", picture_rows, {**steps, **changes}))
    assert resumed.losses == whole.losses


def test_too_few_features_stop_the_run_before_its_first_step(
    vision_values: Any, train: Any, family_dir: Any, picture_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = shutil.copytree(family_dir("gemma3"), tmp_path / "model")
    fields = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    (folder / "processor_config.json").write_text(json.dumps({**fields, "image_seq_length": 5}), encoding="utf-8")
    values = vision_values("gemma3", picture_rows, {"run_conf.model": str(folder)})
    with pytest.raises(GuardStopped, match="has 5 image tokens, and the vision tower gives 4 features"):
        train(values)


def test_an_image_that_is_gone_ends_the_run_by_its_name(
    vision_values: Any, picture_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    from finetuning.data.collators import PaddingCollator
    from finetuning.data.images.collator import ImageCollator

    values = vision_values("llava", picture_rows)
    data, tokenizer = prepared(values)
    collate = ImageCollator(PaddingCollator.for_tokenizer(tokenizer), processor_of(Path(values["run_conf"]["model"])))
    (tmp_path / "green.png").unlink()
    with pytest.raises(DataError, match=r"green\.png.* cannot be read"):
        collate(list(data.train))


def test_parts_have_learning_rates_of_their_own_and_resume_with_them(
    vision_values: Any, train: Any, picture_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    changes = {
        "run_conf.train_parts": ["language_model", "projector", "vision_tower"],
        "overrides.part_learning_rates": {"vision_tower": 0.002, "projector": 0.005},
        "training_args.lr_scheduler_type": "constant",
        "training_args.max_steps": 3,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 2,
    }
    whole = train(vision_values("qwen2_5_vl", picture_rows, changes))
    trainer = whole.trainer
    rates = {id(weight): group["lr"] for group in trainer.optimizer.param_groups for weight in group["params"]}
    parts = module_parts(trainer.model)
    expected = {"language_model": 0.01, "projector": 0.005, "vision_tower": 0.002}
    assert all(rates[id(weight)] == expected[parts[name]] for name, weight in trainer.model.named_parameters())
    folder = tmp_path / "resumed"
    folder.mkdir()
    shutil.copytree(whole.output_dir / "checkpoint-2", folder / "checkpoint-2")
    again = {"training_args.output_dir": str(folder), "run_conf.resume_from_checkpoint": "auto"}
    assert train(vision_values("qwen2_5_vl", picture_rows, {**changes, **again})).losses == whole.losses
