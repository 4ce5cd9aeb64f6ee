"""A batch cut into smaller ones whose losses add up to its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch

Part = tuple[dict[str, Any], float]
"""A smaller batch, and its share of the rows."""


def num_rows(inputs: Mapping[str, Any]) -> int:
    """Rows of a batch that can be told apart: those of a pack, too; pairs, where rows are preferences."""
    if "cu_seq_lens_q" in inputs:
        return len(inputs["cu_seq_lens_q"]) - 1
    return len(inputs["input_ids"]) // (2 if "completion_mask" in inputs else 1)


def divided(inputs: Mapping[str, Any], pieces: int) -> Iterator[Part]:
    """A batch in at most so many pieces of about as many rows each; the batch itself for one piece.

    Knows the batches of `data/collate.py`, padded or end to end, and those of preferences, whose chosen rows stand
    before their rejected ones.
    """
    rows = num_rows(inputs)
    if pieces == 1 or rows < 2:
        yield dict(inputs), 1.0
        return
    cut = _end_to_end if "cu_seq_lens_q" in inputs else _pairs if "completion_mask" in inputs else _padded
    borders = [rows * piece // pieces for piece in range(pieces + 1)]
    for start, end in pairwise(borders):
        if end > start:
            yield cut(inputs, start, end), (end - start) / rows


def _padded(inputs: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    return {name: value[start:end] for name, value in inputs.items()}


def _pairs(inputs: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    rows = num_rows(inputs)
    return {
        name: torch.cat([value[start:end], value[rows + start : rows + end]])
        if len(value) == 2 * rows
        else value[start:end]
        for name, value in inputs.items()
    }


def _end_to_end(inputs: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    borders = inputs["cu_seq_lens_q"][start : end + 1]
    first, last = int(borders[0]), int(borders[-1])
    longest = int(borders.diff().max())
    own = {"cu_seq_lens_q": borders - first, "cu_seq_lens_k": borders - first}
    own |= {"max_length_q": longest, "max_length_k": longest}
    return {name: own[name] if name in own else value[:, first:last] for name, value in inputs.items()}
