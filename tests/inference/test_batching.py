"""Which prompts go together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetuning.inference.batching import max_useful_padding, plan_batches

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


@given(LENGTHS, st.integers(1, 20), st.integers(1, 300), st.none() | st.integers(1, 7), st.none() | st.integers(0, 40))
def test_each_prompt_is_in_one_batch_that_keeps_to_the_limits(
    lengths: list[int], answer: int, budget: int, most: int | None, padding: int | None
) -> None:
    batches = plan_batches(lengths, answer, budget=budget, max_rows=most, max_padding=padding)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        width = max(lengths[index] for index in batch) + answer
        assert len(batch) == 1 or len(batch) * width <= budget
        assert most is None or len(batch) <= most
        longest = max(lengths[index] for index in batch)
        assert padding is None or sum(longest - lengths[index] for index in batch) <= padding


@given(LENGTHS)
def test_prompts_of_similar_length_share_a_batch_longest_first(lengths: list[int]) -> None:
    order = [lengths[index] for batch in plan_batches(lengths, 1, budget=60) for index in batch]
    assert order == sorted(lengths, reverse=True)


def test_short_prompts_share_a_batch_within_the_budget() -> None:
    assert plan_batches([3, 9, 4], 1, budget=100) == [[1, 2, 0]]
    assert plan_batches([3, 9, 4], 1, budget=100, max_rows=2) == [[1, 2], [0]]
    assert plan_batches([], 1) == []


def test_padding_is_weighed_by_the_steps_of_an_answer() -> None:
    assert max_useful_padding("cpu", 24) == 24 * max_useful_padding("cpu", 1)
    assert max_useful_padding("cpu", 10_000) == max_useful_padding("cpu", 128) < max_useful_padding("cuda", 128)
