"""Rows of a step shared out by their tokens: the same steps, in parts of about one size."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from transformers.trainer_pt_utils import BatchRebalanceSampler

from finetuning.trainer.data_loading import TokenBalancedSampler, balance_by_tokens

PROCESSES = 4
LENGTHS = np.random.default_rng(0).lognormal(5.5, 0.9, 200).astype(int).clip(8, 4096).tolist()


def by_step(kind: type[BatchRebalanceSampler], accumulation: int) -> list[list[list[int]]]:
    """The batches of each step, of all processes."""
    made = [list(kind(LENGTHS, 32, PROCESSES, accumulation, rank=rank, drop_last=False)) for rank in range(PROCESSES)]
    steps = range(0, len(made[0]), accumulation)
    return [[batch for item in made for batch in item[step : step + accumulation]] for step in steps]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_steps_are_those_of_transformers_in_parts_of_more_even_sizes(accumulation: int) -> None:
    theirs, ours = by_step(BatchRebalanceSampler, accumulation), by_step(TokenBalancedSampler, accumulation)
    assert len(ours) == 7
    for step, second in zip(ours, theirs, strict=True):
        assert sorted(chain(*step)) == sorted(chain(*second))
        assert all(step)
    worst = [max(max(sum(LENGTHS[row] for row in part) for part in step) for step in steps) for steps in (ours, theirs)]
    assert worst[0] < worst[1]


def test_each_step_is_in_parts_of_nearly_one_size() -> None:
    for step in by_step(TokenBalancedSampler, 1)[:-1]:
        sizes = [sum(LENGTHS[row] for row in part) for part in step]
        assert max(sizes) <= 4 / 3 * max(np.mean(sizes), max(LENGTHS[row] for row in chain(*step)))


def test_shares_hold_each_row_once() -> None:
    assert balance_by_tokens([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    assert sorted(chain(*balance_by_tokens([3] * 7, 7))) == list(range(7))
    assert balance_by_tokens([2], 3) == [[0], [], []]
