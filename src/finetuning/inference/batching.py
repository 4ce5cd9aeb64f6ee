"""Which prompts go through the model together."""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_BATCH_TOKENS = 32768
"""Tokens that one batch may hold when every row is as long as its longest, answers included."""

PADDING_WORTH_A_BATCH = {"cpu": 2048}
"""Padding tokens, by device, that cost about as much as another batch costs; measured on a CPU."""
PADDING_WORTH_A_BATCH_ELSEWHERE = 32768
"""The same for accelerators, where a step takes nearly as long for few rows as for many; not measured."""


def plan_batches(
    lengths: Sequence[int],
    answer_tokens: int,
    *,
    budget: int = DEFAULT_BATCH_TOKENS,
    most_rows: int | None = None,
    most_padding: int | None = None,
) -> list[list[int]]:
    """Indexes of prompts, batch by batch: neighbours in length, the longest first.

    A batch that does not fit the memory is met at the start, and the time that is left only gets shorter. A prompt
    that is over the budget alone gets a batch of its own.

    Args:
        lengths: tokens of each prompt.
        answer_tokens: most tokens of an answer.
        budget: most tokens of a batch, padding and answers included.
        most_rows: most rows of a batch.
        most_padding: most padding tokens in front of a batch's prompts.

    >>> plan_batches([3, 9, 4], answer_tokens=1, budget=10)
    [[1], [2, 0]]
    >>> plan_batches([3, 9, 4], answer_tokens=1, most_padding=6)
    [[1, 2], [0]]
    """
    batches: list[list[int]] = []
    longest = padding = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rows = len(batches[-1]) + 1 if batches else 1
        padding += longest - lengths[index]
        is_full = (
            rows * (longest + answer_tokens) > budget
            or (most_rows is not None and rows > most_rows)
            or (most_padding is not None and padding > most_padding)
        )
        if not batches or is_full:
            batches.append([])
            longest, padding = lengths[index], 0
        batches[-1].append(index)
    return batches


def most_padding_on(device_type: str) -> int:
    """The padding that is cheaper than another batch on a kind of device."""
    return PADDING_WORTH_A_BATCH.get(device_type, PADDING_WORTH_A_BATCH_ELSEWHERE)
