"""The batch solver: exact totals, or an error that names the nearest ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuning.config.sections.training import BatchSizeConfig, TrainingArgs
from finetuning.errors import ConfigError
from finetuning.plan.plan import plan_batches, plan_steps


def _config(total: int, maximum: int, evaluation: int | None = None) -> BatchSizeConfig:
    return BatchSizeConfig(
        total_train_batch_size=total, max_per_device_train_batch_size=maximum, per_device_eval_batch_size=evaluation
    )


@given(st.integers(1, 4096), st.integers(1, 256), st.integers(1, 64))
def test_every_plan_reaches_its_total_with_the_largest_batch(total: int, maximum: int, world_size: int) -> None:
    try:
        plan = plan_batches(_config(total, maximum), world_size)
    except ConfigError as error:
        assert total % world_size
        lower = total - total % world_size
        assert str(lower + world_size) in str(error) and (not lower or str(lower) in str(error))
        return
    assert plan.world_size * plan.per_device * plan.accumulation == total
    assert 1 <= plan.per_device <= maximum
    rows = total // world_size
    assert not any(rows % size == 0 for size in range(plan.per_device + 1, min(rows, maximum) + 1))


def test_inefficient_total_gets_better_suggestions() -> None:
    plan = plan_batches(_config(514, 8), 1)
    assert (plan.per_device, plan.accumulation) == (2, 257)
    assert plan.warning and "512 (8 x 64)" in plan.warning and "520 (8 x 65)" in plan.warning
    assert plan_batches(_config(512, 8), 1).warning is None


def test_indivisible_total_suggests_the_nearest_totals() -> None:
    with pytest.raises(ConfigError, match=r"512 rows cannot be divided among 6 processes.*510 and 516"):
        plan_batches(_config(512, 8), 6)


def test_evaluation_batch_defaults_to_the_training_batch() -> None:
    assert plan_batches(_config(8, 4), 1).per_device_eval == 4
    assert plan_batches(_config(8, 4, 32), 1).per_device_eval == 32


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("epochs", [0.5, 1, 3])
def test_steps_count_a_short_last_accumulation(rows: int, epochs: float) -> None:
    batch = plan_batches(_config(8, 2), 2)
    steps = plan_steps(rows, batch, TrainingArgs(num_train_epochs=epochs))
    batches = math.ceil(math.ceil(rows / 2) / 2)
    assert steps.per_epoch == max(math.ceil(batches / 2), 1)
    assert plan_steps(rows, batch, TrainingArgs(max_steps=5)).total == 5
