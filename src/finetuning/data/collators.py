"""Collators: rows of token ids to one batch, padded or padding-free."""

# torch.from_numpy is not annotated.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

UNTRAINED = -100
"""The label of a token without loss; the default `ignore_index` of PyTorch's cross entropy."""
IMAGE_ROWS = "image_rows"
"""The key of a batch with images for how many entries of each of their tensors belong to each row, by the tensor's
name. A preference pair is one row: its tensors hold the images of all pairs twice, one after the other. Empty where it
is not known. For the trainer only: no model takes it."""

Row = dict[str, Any]
Rows = Sequence[Row]


@dataclass(frozen=True)
class PaddingCollator:
    """Pads rows to the longest row of the batch.

    Returns `input_ids`, `attention_mask`, `labels` and `shift_labels`: int64 tensors of shape (rows, longest row).
    `shift_labels[t]` is the target of the logits at t, which is `labels[t + 1]`. Padding is masked by position, not by
    token id: a padding token that is also a real token, such as the end-of-sequence token, is trained where it is real.
    `label_positions` and `num_labels` are those of `find_labels`.
    """

    pad_token_id: int
    side: str = "right"

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, pad_token_id: int | None = None) -> PaddingCollator:
        """The collator for a tokenizer; `pad_token_id` replaces the tokenizer's own."""
        own_id = cast("int", tokenizer.pad_token_id)
        return cls(own_id if pad_token_id is None else pad_token_id, tokenizer.padding_side)

    def __call__(self, rows: Rows) -> dict[str, Any]:
        import torch

        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, UNTRAINED, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            span = slice(shape[1] - size, shape[1]) if self.side == "left" else slice(0, size)
            input_ids[index, span] = row["input_ids"]
            labels[index, span] = row["labels"]
            attention_mask[index, span] = 1
            # The first token of a row is not a target: nothing, or only padding, precedes it.
            labels[index, span.start] = UNTRAINED
        shift_labels = np.full(shape, UNTRAINED, dtype=np.int64)
        shift_labels[:, :-1] = labels[:, 1:]
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
            "shift_labels": torch.from_numpy(shift_labels),
            **find_labels(shift_labels),
        }


def find_labels(shift_labels: np.ndarray) -> dict[str, torch.Tensor | int]:
    """Return where a batch has labels, known before it is copied to a GPU: finding them there would make it wait.

    Args:
        shift_labels: int64, (rows, tokens).

    Returns:
        `label_positions`, int64, (labels,): indices into the flattened batch; and their number, `num_labels`.
    """
    import torch

    positions = np.flatnonzero(shift_labels != UNTRAINED)
    return {"label_positions": torch.from_numpy(positions), "num_labels": len(positions)}


@dataclass(frozen=True)
class FlatteningCollator:
    """Concatenates rows without padding.

    Returns `input_ids`, `position_ids`, `labels` and `shift_labels`: int64 tensors of shape (1, tokens); and the
    row boundaries in the form that varlen attention kernels take: `cu_seq_lens_q`, `cu_seq_lens_k` (int32, rows + 1)
    and `max_length_q`, `max_length_k`; `row_lengths` are the same lengths as a list of integers. `label_positions` and
    `num_labels` are those of `find_labels`. The first token of a row is not a target. A packed row brings the `lengths`
    of the rows that it consists of; then `pack_borders`, int64 (packs + 1), are the boundaries of the packs.
    """

    with_constant_mask: bool = False
    """Add a 4-dimensional attention mask of a single True, which transformers passes on as it is. Without a mask, each
    forward pass looks at the position ids for borders of rows, for which a GPU has to wait."""

    def __call__(self, rows: Rows) -> dict[str, Any]:
        import torch

        lengths = np.concatenate([np.asarray(row.get("lengths") or [len(row["input_ids"])]) for row in rows])
        borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        labels = np.concatenate([np.asarray(row["labels"], dtype=np.int64) for row in rows])
        labels[borders[:-1]] = UNTRAINED
        shift_labels = np.append(labels[1:], UNTRAINED)
        positions = np.arange(len(labels)) - np.repeat(borders[:-1], lengths)
        longest = int(lengths.max())
        sizes = [len(row["input_ids"]) for row in rows if row.get("lengths")]
        packs = {"pack_borders": torch.from_numpy(np.cumsum([0, *sizes]))} if sizes else {}
        mask = {"attention_mask": constant_mask()} if self.with_constant_mask else {}
        batch = {
            **mask,
            "input_ids": torch.from_numpy(
                np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows])
            )[None],
            "position_ids": torch.from_numpy(positions.astype(np.int64))[None],
            "labels": torch.from_numpy(labels)[None],
            "shift_labels": torch.from_numpy(shift_labels)[None],
            "cu_seq_lens_q": torch.from_numpy(borders),
            "cu_seq_lens_k": torch.from_numpy(borders),
            "max_length_q": longest,
            "max_length_k": longest,
            "row_lengths": cast("list[int]", lengths.tolist()),
            **find_labels(shift_labels),
        }
        return batch | packs


def constant_mask() -> torch.Tensor:
    """Return an attention mask for padding-free batches: bool, (1, 1, 1, 1), True."""
    import torch

    return torch.ones(1, 1, 1, 1, dtype=torch.bool)
