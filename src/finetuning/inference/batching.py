"""Which prompts go through the model together."""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_BATCH_TOKENS = 32768
"""Tokens that one batch may hold when every row is as long as its longest, answers included."""

PADDING_WORTH_A_STEP = {"cpu": 16}
"""Padding tokens, by device, that cost about as much to read as a step of another batch costs: the arithmetic of a
token against fetching all weights once. Whatever the model's size; measured on a CPU."""
PADDING_WORTH_A_STEP_ELSEWHERE = 256
"""The same for accelerators; not measured."""
STEPS_TO_EXPECT = 128
"""Most steps that an answer is expected to take: what may be written is seldom written to its end."""


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


def padding_side(device_type: str, answer_tokens: int) -> int:
    """The padding that is cheaper than another batch on a kind of device."""
    worth = PADDING_WORTH_A_STEP.get(device_type, PADDING_WORTH_A_STEP_ELSEWHERE)
    return worth * min(answer_tokens, STEPS_TO_EXPECT)
