"""The collator of rows with images: decodes the images of a batch, and has the model's processor make its inputs.

It runs where the data loader runs it, in worker processes with `dataloader_num_workers`. No pixels are kept.
"""

# torch.from_numpy is not annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetuning.config.sections.data import ImagesConfig
from finetuning.config.sections.model import RunConfig
from finetuning.data.collators import PaddingCollator, Rows
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
class ImageCollator:
    """Pads rows as `PaddingCollator` does, and adds what the processor returns for their images.

    The processor is called with the text and the images of each row. Its tokens must be those of the prepared row. What
    it returns for each token, such as `token_type_ids`, is padded with 0; all other tensors, such as `pixel_values` and
    `image_grid_thw`, are passed on as they are. A batch without images has none of them.
    """

    padding: PaddingCollator
    processor: ImageTextProcessor

    def __call__(self, rows: Rows) -> dict[str, object]:
        batch = self.padding([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
        references = [read_references(row["images"]) for row in rows]
        with_images = [index for index, images in enumerate(references) if images]
        if not with_images:
            return batch
        images = [[load_image(image) for image in references[index]] for index in with_images]
        processed = self.processor([rows[index]["text"] for index in with_images], images)
        mask = processed["attention_mask"].numpy().astype(bool)
        ids = processed["input_ids"].numpy()
        for number, index in enumerate(with_images):
            check_processed(rows[index]["input_ids"], ids[number][mask[number]].tolist(), _location(references[index]))
        longest = int(batch["input_ids"].shape[1])
        for name, value in processed.items():
            if name in _TEXT_KEYS:
                continue
            is_per_token = value.ndim == 2 and tuple(value.shape) == ids.shape
            batch[name] = self._per_token(value.numpy(), mask, rows, with_images, longest) if is_per_token else value
        return batch

    def _per_token(
        self,
        values: np.ndarray,
        mask: np.ndarray,
        rows: Rows,
        with_images: Sequence[int],
        longest: int,
    ) -> torch.Tensor:
        """Return a value for each token of the padded batch; 0 for padding and for rows without images."""
        import torch

        padded = np.zeros((len(rows), longest), dtype=values.dtype)
        for number, index in enumerate(with_images):
            size = len(rows[index]["input_ids"])
            start = longest - size if self.padding.side == "left" else 0
            padded[index, start : start + size] = values[number][mask[number]][:size]
        return torch.from_numpy(padded)


def image_collator(
    run_conf: RunConfig, config: ImagesConfig, tokenizer: PreTrainedTokenizerBase, padding: PaddingCollator
) -> ImageCollator:
    """Return the collator for rows with images of the model of a run."""
    processor = processor_for(run_conf, config, tokenizer)
    assert not isinstance(processor, str)
    return ImageCollator(padding, processor)


def _location(images: Sequence[ImageReference]) -> Location | None:
    return next((Location(file=image.path) for image in images if image.path), None)
