"""The collators of rows with images: decode the images of a batch, and have the model's processor make its inputs.

They run where the data loader runs them, in worker processes with `dataloader_num_workers`. No pixels are kept.
"""

# torch.from_numpy is not annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetuning.config.sections.data import ImagesConfig
from finetuning.config.sections.model import RunConfig
from finetuning.data.collators import IMAGE_ROWS, PaddingCollator, Rows
from finetuning.data.collators import Row as Batch
from finetuning.data.images.files import load_image
from finetuning.data.images.processor import ImageTextProcessor, check_processed, processor_for
from finetuning.data.images.rendering import read_references
from finetuning.data.samples import ImageReference
from finetuning.errors import Location

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_TEXT_KEYS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class ImageInputs:
    """What the processor makes of rows with images."""

    per_token: dict[str, dict[int, np.ndarray]]
    """By name and by index of the row: values of its tokens, such as those of `token_type_ids`."""
    tensors: dict[str, torch.Tensor]
    """All others, such as `pixel_values` and `image_grid_thw`, the rows one after another."""
    rows: dict[str, list[int]]
    """By name of these tensors: how many of its entries belong to each row; empty if that is not known of all."""


@dataclass(frozen=True)
class ImageReader:
    """Makes the inputs of the images of a batch. The tokens of the processor must be those of the prepared rows."""

    processor: ImageTextProcessor

    def __call__(self, ids: Sequence[Sequence[int]], texts: Sequence[str], images: Sequence[str]) -> ImageInputs | None:
        """Return the inputs for rows; None if none of them has an image.

        Args:
            ids: the prepared tokens of each row.
            texts: the text of each row, with one token for an image.
            images: the references of each row, as `rendering.with_references` writes them.

        Raises:
            DataError: an image cannot be read or was changed, or the processor makes other tokens of a row.
        """
        references = [read_references(text) for text in images]
        with_images = [index for index, row in enumerate(references) if row]
        if not with_images:
            return None
        decoded = [[load_image(image) for image in references[index]] for index in with_images]
        processed = self.processor([texts[index] for index in with_images], decoded)
        mask = processed["attention_mask"].numpy().astype(bool)
        made = processed["input_ids"].numpy()
        for number, index in enumerate(with_images):
            check_processed(ids[index], made[number][mask[number]].tolist(), _location(references[index]))
        per_token: dict[str, dict[int, np.ndarray]] = {}
        tensors: dict[str, torch.Tensor] = {}
        rows: dict[str, list[int]] = {}
        num_images = [len(row) for row in references]
        num_tokens = [int(np.isin(row, list(self.processor.feature_token_ids)).sum()) for row in ids]
        for name, value in processed.items():
            if name in _TEXT_KEYS:
                continue
            if value.ndim > 1 and tuple(value.shape[:2]) == made.shape:
                values = value.numpy()
                per_token[name] = {row: values[number][mask[number]] for number, row in enumerate(with_images)}
                continue
            tensors[name] = value
            if (sizes := _entries_of_rows(len(value), num_images, num_tokens)) is not None:
                rows[name] = sizes
        return ImageInputs(per_token, tensors, rows if len(rows) == len(tensors) else {})


def _entries_of_rows(total: int, images: Sequence[int], tokens: Sequence[int]) -> list[int] | None:
    """Return how many of a tensor's entries belong to each row: one a row, one an image, or so many a token of images.

    None if it is none of these. Whether the answer is right for a family is checked before the first step.
    """
    if total == sum(map(bool, images)):
        return [int(bool(count)) for count in images]
    if total == sum(images):
        return list(images)
    if any(total * count % sum(tokens) for count in tokens):
        return None
    return [total * count // sum(tokens) for count in tokens]


@dataclass(frozen=True)
class ImageCollator:
    """Pads rows as `PaddingCollator` does, and adds what the processor returns for their images.

    What it returns for each token, such as `token_type_ids`, is padded with 0; all other tensors, such as
    `pixel_values` and `image_grid_thw`, are passed on as they are. A batch without images has none of them.
    """

    padding: PaddingCollator
    processor: ImageTextProcessor

    def __call__(self, rows: Rows) -> Batch:
        batch = self.padding([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
        ids = [row["input_ids"] for row in rows]
        inputs = ImageReader(self.processor)(ids, [row["text"] for row in rows], [row["images"] for row in rows])
        if inputs is None:
            return batch
        longest = int(batch["input_ids"].shape[1])
        for name, values in inputs.per_token.items():
            batch[name] = _padded(values, list(map(len, ids)), longest, from_left=self.padding.side == "left")
        return {**batch, **inputs.tensors, IMAGE_ROWS: inputs.rows}


@dataclass(frozen=True)
class ImagePreferenceCollator:
    """Adds what the processor returns for the images of prompts to the batches of TRL's preference collator.

    Both answers to a prompt see the same images, which are decoded and processed once.
    """

    padding: Callable[[list[Batch]], Batch]
    """Returns `input_ids`, (2 * rows, tokens): all chosen rows, padded on the right, before all rejected ones."""
    processor: ImageTextProcessor
    references: str
    """The column of the images."""

    def __call__(self, rows: Rows) -> Batch:
        image_columns = (self.references, "text")
        batch = self.padding([{name: row[name] for name in row if name not in image_columns} for row in rows])
        chosen = [[*row["prompt_ids"], *row["chosen_ids"]] for row in rows]
        texts, references = [row["text"] for row in rows], [row[self.references] for row in rows]
        inputs = ImageReader(self.processor)(chosen, texts, references)
        if inputs is None:
            return batch
        rejected = [len(row["prompt_ids"]) + len(row["rejected_ids"]) for row in rows]
        lengths = [*map(len, chosen), *rejected]
        for name, values in inputs.per_token.items():
            # The tokens of answers have the values of text, which are 0.
            prompts = {len(rows) + index: value[: len(rows[index]["prompt_ids"])] for index, value in values.items()}
            batch[name] = _padded({**values, **prompts}, lengths, int(batch["input_ids"].shape[1]), from_left=False)
        import torch

        twice = {name: torch.cat([value, value]) for name, value in inputs.tensors.items()}
        return {**batch, **twice, IMAGE_ROWS: inputs.rows}


@dataclass(frozen=True)
class ImagePromptCollator:
    """Adds `image_inputs` to prompts for generation: what the processor makes of their images; None without images.

    The rows of a batch stay apart, as each prompt is completed several times. Its images are processed once for all.
    """

    processor: ImageTextProcessor
    key: str

    def __call__(self, rows: Rows) -> list[Batch]:
        made = {(row["text"], row["images"]): row["prompt_ids"] for row in rows}
        inputs = {key: self._inputs(*key, ids) for key, ids in made.items()}
        return [{**row, self.key: inputs[row["text"], row["images"]]} for row in rows]

    def _inputs(self, text: str, references: str, ids: Sequence[int]) -> Batch | None:
        inputs = ImageReader(self.processor)([ids], [text], [references])
        if inputs is None:
            return None
        import torch

        per_token = {name: torch.from_numpy(values[0]) for name, values in inputs.per_token.items()}
        return {
            "tensors": inputs.tensors,
            "per_token": per_token,
            "num_images": len(read_references(references)),
        }

    def as_batch(self, rows: Rows) -> Batch:
        """Return one prompt as a batch for the model."""
        import torch

        (row,) = self(rows)
        inputs = row[self.key]
        per_token = {name: value[None] for name, value in inputs["per_token"].items()}
        return {"input_ids": torch.tensor([row["prompt_ids"]]), **inputs["tensors"], **per_token}


def _padded(values: dict[int, np.ndarray], lengths: Sequence[int], longest: int, *, from_left: bool) -> torch.Tensor:
    """Return a value for each token of a padded batch; 0 for padding and for rows without values.

    Args:
        values: by row, of at least its first tokens.
    """
    import torch

    any_row = next(iter(values.values()))
    padded = np.zeros((len(lengths), longest, *any_row.shape[1:]), dtype=any_row.dtype)
    for index, row in values.items():
        start = longest - lengths[index] if from_left else 0
        size = min(len(row), lengths[index])
        padded[index, start : start + size] = row[:size]
    return torch.from_numpy(padded)


def image_collator(
    run_conf: RunConfig, config: ImagesConfig, tokenizer: PreTrainedTokenizerBase, padding: PaddingCollator
) -> ImageCollator:
    """Return the collator for rows with images of the model of a run."""
    return ImageCollator(padding, _processor(run_conf, config, tokenizer))


def preference_collator(
    run_conf: RunConfig,
    config: ImagesConfig,
    tokenizer: PreTrainedTokenizerBase,
    padding: Callable[[list[Batch]], Batch],
    references: str,
) -> ImagePreferenceCollator:
    """Return the collator for preferences with images of the model of a run."""
    return ImagePreferenceCollator(padding, _processor(run_conf, config, tokenizer), references)


def prompt_collator(
    run_conf: RunConfig, config: ImagesConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> ImagePromptCollator:
    """Return the collator for prompts with images of the model of a run."""
    return ImagePromptCollator(_processor(run_conf, config, tokenizer), key)


def _processor(run_conf: RunConfig, config: ImagesConfig, tokenizer: PreTrainedTokenizerBase) -> ImageTextProcessor:
    processor = processor_for(run_conf, config, tokenizer)
    assert not isinstance(processor, str)
    return processor


def _location(images: Sequence[ImageReference]) -> Location | None:
    return next((Location(file=image.path) for image in images if image.path), None)
