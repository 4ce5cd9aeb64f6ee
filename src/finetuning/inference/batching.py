"""Which prompts go through the model together."""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_BATCH_TOKENS = 32768
"""Tokens that one batch may hold when every row is as long as its longest, answers included."""


def plan_batches(
    lengths: Sequence[int], answer_tokens: int, *, budget: int = DEFAULT_BATCH_TOKENS, most_rows: int | None = None
) -> list[list[int]]:
    """Indexes of prompts, batch by batch: neighbours in length, the longest first.

    A batch that does not fit the memory is met at the start, and the time that is left only gets shorter. A prompt
    that is over the budget alone gets a batch of its own.

    Args:
        lengths: tokens of each prompt.
        answer_tokens: most tokens of an answer.
        budget: most tokens of a batch, padding and answers included.
        most_rows: most rows of a batch.

    >>> plan_batches([3, 9, 4], answer_tokens=1, budget=10)
    [[1], [2, 0]]
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rows = len(batches[-1]) + 1 if batches else 1
        if not batches or rows * width > budget or (most_rows is not None and rows > most_rows):
            batches.append([])
            width = lengths[index] + answer_tokens
        batches[-1].append(index)
    return batches
