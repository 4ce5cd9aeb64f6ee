"""A stream of rows as the Trainer takes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from finetuning.data.streaming.dataset import RowStream


class StreamedRows(IterableDataset):
    """The rows of a stream; of several processes each goes through all, and accelerate gives it its share.

    That share is its slice of each batch of all processes, the one that it gets of rows which are all at hand, so that
    a step trains on the same rows on any number of processes. Source: accelerate 1.15, `IterableDatasetShard`.
    """

    def __init__(self, stream: RowStream, longest: int):
        self.stream = stream
        self._longest = longest

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.stream)

    def longest_rows(self, count: int) -> list[dict[str, Any]]:
        """Rows as long as they can be: how long those of the stream are, nobody knows."""
        ids = np.zeros(self._longest, dtype=np.int32)
        return [{"input_ids": ids, "labels": ids}] * count


def as_dataset(rows: Any, longest: int) -> Any:
    """The rows as the Trainer takes them: as they are, where they are all at hand."""
    return StreamedRows(rows, longest) if isinstance(rows, RowStream) else rows
