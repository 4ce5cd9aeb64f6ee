"""Group prompts of similar length into batches."""

from __future__ import annotations

from collections.abc import Sequence

DEFAULT_BATCH_TOKENS = 32768
"""Maximum number of tokens in a batch: rows times the length of the longest one, answers included."""

PADDING_PER_STEP = {"cpu": 16}
"""Number of padding tokens whose prefill costs as much as one decoding step of another batch, by device type.

The ratio compares the arithmetic of one token with reading all weights once, and so hardly depends on the model's
size. Measured on a CPU."""
DEFAULT_PADDING_PER_STEP = 256
"""The same for accelerators. An estimate, not measured."""
EXPECTED_STEPS = 128
"""Upper bound of the expected number of decoding steps, since answers rarely reach `max_new_tokens`."""


def plan_batches(
    lengths: Sequence[int],
    answer_tokens: int,
    *,
    budget: int = DEFAULT_BATCH_TOKENS,
    max_rows: int | None = None,
    max_padding: int | None = None,
) -> list[list[int]]:
    """Return the prompt indexes of each batch: prompts of similar length, longest first.

    With the longest first, a batch that does not fit into memory fails at the start, and estimates of the remaining
    time only get shorter. A prompt that exceeds the budget is a batch of its own.

    Args:
        lengths: number of tokens of each prompt.
        answer_tokens: maximum number of tokens of an answer.
        budget: maximum number of tokens of a batch, padding and answers included.
        max_rows: maximum number of rows of a batch.
        max_padding: maximum number of padding tokens in front of a batch's prompts.

    >>> plan_batches([3, 9, 4], answer_tokens=1, budget=10)
    [[1], [2, 0]]
    >>> plan_batches([3, 9, 4], answer_tokens=1, max_padding=6)
    [[1, 2], [0]]
    """
    batches: list[list[int]] = []
    longest = padding = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rows = len(batches[-1]) + 1 if batches else 1
        padding += longest - lengths[index]
        is_full = (
            rows * (longest + answer_tokens) > budget
            or (max_rows is not None and rows > max_rows)
            or (max_padding is not None and padding > max_padding)
        )
        if not batches or is_full:
            batches.append([])
            longest, padding = lengths[index], 0
        batches[-1].append(index)
    return batches


def max_useful_padding(device_type: str, answer_tokens: int) -> int:
    """Return the number of padding tokens up to which a larger batch is cheaper than another batch."""
    per_step = PADDING_PER_STEP.get(device_type, DEFAULT_PADDING_PER_STEP)
    return per_step * min(answer_tokens, EXPECTED_STEPS)
