"""How rows reach the training loop: token-balanced batches, and rows from a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import heapify, heapreplace
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers.trainer_pt_utils import BatchRebalanceSampler

from finetuning.data.streaming.dataset import RowStream


def balance_by_tokens(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Return row indices in `num_shares` shares of about as many tokens each; none is empty while rows remain.

    Longest row first, each to the share with the fewest tokens. Source: Graham, "Bounds on Multiprocessing Timing
    Anomalies", 1969: the largest share has at most 4/3 of the tokens of the best possible one.

    >>> balance_by_tokens([5, 1, 4, 2], 2)
    [[0, 1], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    sizes = [(0, share) for share in range(num_shares)]
    heapify(sizes)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        size, share = sizes[0]
        shares[share].append(row)
        heapreplace(sizes, (size + lengths[row], share))
    return shares


class TokenBalancedSampler(BatchRebalanceSampler):
    """transformers' rebalancing sampler for padding-free batches: it balances tokens instead of padded sizes."""

    @classmethod
    def from_sampler(cls, sampler: BatchRebalanceSampler, seed: int) -> TokenBalancedSampler:
        """Return a sampler with the same step size, which shuffles as accelerate does without rebalancing."""
        return cls(
            sampler.lengths,
            sampler.effective_batch_size,
            sampler.dp_size,
            sampler.grad_accum,
            shuffle=sampler.shuffle,
            seed=seed,
            rank=sampler.rank,
            drop_last=sampler.drop_last,
        )

    def _assign(self, indices: Sequence[int], lengths: Sequence[int]) -> list[list[list[int]]]:
        """Return row indices by process and by micro-batch; the largest shares are computed at the same time."""
        shares = balance_by_tokens(lengths, self.dp_size * self.grad_accum)
        shares.sort(key=lambda share: -sum(lengths[row] for row in share))
        return [
            [[indices[row] for row in shares[batch * self.dp_size + process]] for batch in range(self.grad_accum)]
            for process in range(self.dp_size)
        ]


class StreamedRows(IterableDataset[Mapping[str, object]]):
    """The rows of a stream as the Trainer takes them.

    Every process iterates over all rows, and accelerate keeps this process's slice of each global batch. That is the
    slice it would get of a map-style dataset, so a step trains on the same rows at any world size. Read in accelerate
    1.15, `IterableDatasetShard`.
    """

    def __init__(self, stream: RowStream, max_length: int):
        self.stream = stream
        self._max_length = max_length

    def __iter__(self) -> Iterator[Mapping[str, object]]:
        return iter(self.stream)

    def longest_rows(self, count: int) -> list[dict[str, Any]]:
        """Return rows of the maximum length, because the lengths in a stream are not known in advance."""
        ids = np.zeros(self._max_length, dtype=np.int32)
        return [{"input_ids": ids, "labels": ids}] * count
