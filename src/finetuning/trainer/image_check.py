"""Before the first step: each image of the first rows gives the model as many features as it has tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import datasets
import torch

from finetuning.data.collators import IMAGE_ROWS
from finetuning.errors import GuardStopped, Location

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetuning.data.collators import Rows

_NUM_ROWS = 8
"""Rows that are checked."""
_SEARCHED_ROWS = 256


def check_image_tokens(model: PreTrainedModel, collate: Callable[[Rows], Mapping[str, object]], rows: object) -> str:
    """Compare the features that the vision tower gives for each of the first rows with the tokens of its images.

    Each row is a batch of its own: in a batch, too many of one row could make up for too few of another.

    Args:
        collate: the collator of the run.
        rows: the training rows, with the column `images`.

    Returns:
        What was checked, for the start summary.

    Raises:
        GuardStopped: the numbers differ for a row.
    """
    first = _first_with_images(rows)
    token_id = image_token_id(model)
    num_tokens = 0
    for number, row in enumerate(first, start=1):
        batch = collate([row])
        ids = batch["input_ids"]
        assert isinstance(ids, torch.Tensor)
        tokens = int((ids == token_id).sum())
        features = count_features(model, batch)
        if tokens != features:
            raise GuardStopped(
                f"training row {number} with images has {tokens} image tokens, and the vision tower gives {features}"
                " features for its images",
                location=Location(key="data_conf.images"),
                hint="The files of the processor and config.json do not belong together.",
            )
        num_tokens += tokens
    return f"{len(first)} rows: each image token gets one feature of the vision tower ({num_tokens:,} in all)"


def _first_with_images(rows: object) -> list[dict[str, object]]:
    assert isinstance(rows, datasets.Dataset)
    column = next(name for name in ("images", "image_references") if name in rows.column_names)
    searched = rows.select(range(min(len(rows), _SEARCHED_ROWS))).to_list()
    return [row for row in searched if row[column]][:_NUM_ROWS]


def why_not_split(collate: Callable[[Rows], Mapping[str, object]], rows: object) -> str | None:
    """Return why batches with images cannot be split by their rows; None if they can.

    The first rows are collated together and alone: each must have as many entries in each tensor of images as the
    batch says.
    """
    first = _first_with_images(rows)
    together = cast("Mapping[str, list[int]]", collate(first)[IMAGE_ROWS])
    if not together:
        return "it is not known which entries of their tensors belong to which row"
    for index, row in enumerate(first):
        alone = cast("Mapping[str, list[int]]", collate([row])[IMAGE_ROWS])
        if any(alone.get(name) != [sizes[index]] for name, sizes in together.items()):
            return f"the processor makes other tensors of training row {index + 1} alone than among others"
    return None


def image_token_id(model: PreTrainedModel) -> int:
    """Return the id of the token in whose place a feature of an image is put."""
    config = model.config
    token_id = getattr(config, "image_token_id", None)
    return int(token_id if token_id is not None else config.image_token_index)


def count_features(model: PreTrainedModel, batch: Mapping[str, object]) -> int:
    """Return how many vectors the vision tower and the projector give for the images of a batch."""
    compute = cast("Callable[..., torch.Tensor]", model.get_image_features)
    names = inspect.signature(compute).parameters.keys() & batch.keys() - {"input_ids", "attention_mask"}
    inputs = {name: value.to(model.device) for name in names if isinstance(value := batch[name], torch.Tensor)}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = compute(**inputs)
    finally:
        model.train(was_training)
    features: torch.Tensor | Sequence[torch.Tensor] = getattr(output, "pooler_output", output)
    return sum(_num_vectors(part) for part in ([features] if isinstance(features, torch.Tensor) else features))


def _num_vectors(features: torch.Tensor) -> int:
    return features.numel() // features.shape[-1]
