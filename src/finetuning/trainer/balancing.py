"""The rows of a step, shared out by their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace

from transformers.trainer_pt_utils import BatchRebalanceSampler


def shares(lengths: Sequence[int], number: int) -> list[list[int]]:
    """Positions of rows in so many shares of about as many tokens each, none of them empty while rows last.

    The longest row first, each to the share that holds least. Source: Graham, "Bounds on Multiprocessing Timing
    Anomalies", 1969: no share is larger than 4/3 of the largest that the best division has.

    >>> shares([5, 1, 4, 2], 2)
    [[0, 1], [2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(number)]
    sizes = [(0, share) for share in range(number)]
    heapify(sizes)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        size, share = sizes[0]
        found[share].append(row)
        heapreplace(sizes, (size + lengths[row], share))
    return found


class TokenSampler(BatchRebalanceSampler):
    """transformers' sampler for rows without padding: it counts what it shares out as padded, this one the tokens."""

    @classmethod
    def in_place_of(cls, other: BatchRebalanceSampler, seed: int) -> TokenSampler:
        """Steps of as many rows, drawn by this seed as accelerate draws them where nothing is shared out."""
        return cls(
            other.lengths,
            other.effective_batch_size,
            other.dp_size,
            other.grad_accum,
            shuffle=other.shuffle,
            seed=seed,
            rank=other.rank,
            drop_last=other.drop_last,
        )

    def _assign(self, indices: Sequence[int], lengths: Sequence[int]) -> list[list[list[int]]]:
        """Rows by process and by batch of the step; the largest shares are computed at one time."""
        found = shares(lengths, self.dp_size * self.grad_accum)
        found.sort(key=lambda share: -sum(lengths[row] for row in share))
        return [
            [[indices[row] for row in found[batch * self.dp_size + process]] for batch in range(self.grad_accum)]
            for process in range(self.dp_size)
        ]
