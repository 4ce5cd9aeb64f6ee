"""The loss of a step is the mean over its rows, however many processes and micro-batches they are split over."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetuning.trainer.mixin import PACK_BORDERS, TrainingLoopMixin
from finetuning.trainer.row_mean import RowMeanMixin

VALUES = torch.arange(1.0, 100.0) ** 2


class MeanLoss:
    """What transformers does with a loss that is a mean over rows."""

    def __init__(self, batches: list[Any], rank: int, world_size: int, remainder: int):
        self.batches = batches
        self.args = SimpleNamespace(world_size=world_size)
        state = SimpleNamespace(end_of_dataloader=True, remainder=remainder)
        self.accelerator = SimpleNamespace(
            gradient_state=state, process_index=rank, no_sync=lambda model: nullcontext()
        )
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False
        self.eval_rows: list[tuple[float, int]] = []
        self.passes = 0

    def get_batch_samples(self, *_: object) -> tuple[list[Any], None]:
        return self.batches, None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.passes += 1
        return inputs["value"][: len(inputs["value"])].mean() / self.current_gradient_accumulation_steps

    def prediction_step(self, model: Any, inputs: Any, *_: object) -> tuple[Any, None, None]:
        return inputs["value"].mean(), None, None

    def _add_eval_loss(self, total: torch.Tensor, count: int) -> None:
        self.eval_rows.append((float(total), count))


class Trainer(RowMeanMixin, MeanLoss):  # pyright: ignore[reportIncompatibleMethodOverride]
    pass


def pairs(rows: list[int]) -> dict[str, torch.Tensor]:
    """A batch of preference pairs: `value` has one number per pair, `input_ids` all chosen before all rejected rows."""
    return {"value": VALUES[rows], "input_ids": torch.zeros(2 * len(rows), 3)}


def split(num_rows: int, world_size: int, per_device: int) -> list[list[dict[str, torch.Tensor]]]:
    """The last step of an epoch as accelerate splits it: filled up with rows from the start of the epoch."""
    rows = list(range(num_rows))
    if world_size > 1:
        rows += [row % num_rows for row in range(-num_rows % (world_size * per_device))]
    batches = [pairs(rows[start : start + per_device]) for start in range(0, len(rows), per_device)]
    return [batches[rank::world_size] for rank in range(world_size)]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 7, 8, 9])
@pytest.mark.parametrize(("world_size", "per_device"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 2)])
def test_the_loss_of_the_last_step_is_the_mean_over_its_rows(num_rows: int, world_size: int, per_device: int) -> None:
    losses, passes, evaluated = [], set(), []
    for rank, batches in enumerate(split(num_rows, world_size, per_device)):
        trainer = Trainer(batches, rank, world_size, num_rows % (world_size * per_device))
        trainer.get_batch_samples(iter(()), len(batches), torch.device("cpu"))
        trainer.current_gradient_accumulation_steps = len(batches)
        losses.append(sum(float(trainer.training_step(None, batch)) for batch in batches))
        passes.add(trainer.passes)
        trainer.accelerator.gradient_state.end_of_dataloader = False
        for batch in batches[:-1]:
            trainer.prediction_step(None, batch, True)
        trainer.accelerator.gradient_state.end_of_dataloader = True
        trainer.prediction_step(None, batches[-1], True)
        evaluated += trainer.eval_rows
        assert trainer.current_gradient_accumulation_steps == len(batches)
    mean = float(VALUES[:num_rows].mean())
    assert sum(losses) / world_size == pytest.approx(mean), "gradients are averaged over processes"
    assert len(passes) == 1, "metrics are gathered in each pass, so that all processes have the same number"
    if world_size == 1:
        assert evaluated == [], "transformers averages over the rows of one process"
    else:
        assert sum(count for _, count in evaluated) == num_rows
        assert sum(total for total, _ in evaluated) / num_rows == pytest.approx(mean)


def test_a_loss_that_is_no_mean_over_rows_is_left_alone() -> None:
    [batches, _] = split(3, 2, 2)
    trainer = Trainer(batches, 0, 2, 3)
    trainer.loss_is_row_mean = False
    trainer.get_batch_samples(iter(()), 1, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 1
    assert float(trainer.training_step(None, batches[0])) == float(batches[0]["value"].mean())
    assert trainer.passes == 1


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_packs_that_are_repeated_have_no_labels(rank: int) -> None:
    """Two packs a process, of 5 and 3 tokens; the last step has three packs."""
    state = SimpleNamespace(end_of_dataloader=True, remainder=3)
    trainer: Any = object.__new__(TrainingLoopMixin)
    trainer.accelerator = SimpleNamespace(gradient_state=state, num_processes=3, process_index=rank)
    trainer._train_batch_size, trainer.model = 2, SimpleNamespace(training=True)
    borders = torch.tensor([0, 2, 5, 8])
    batch = {"labels": torch.ones(1, 8), "shift_labels": torch.ones(1, 8), "cu_seq_lens_q": borders}
    trainer._mask_repeated_rows(batch, torch.tensor([0, 5, 8]))
    expected = {0: 8, 1: 5, 2: 0}[rank]
    assert batch["labels"].eq(1).sum() == batch["shift_labels"].eq(1).sum() == expected
    assert batch["labels"][0, :expected].eq(1).all()


def test_the_borders_of_packs_do_not_reach_the_model() -> None:
    from finetuning.data.collators import FlatteningCollator

    first = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "lengths": [2, 1]}
    rows = [first, {"input_ids": [4], "labels": [4], "lengths": [1]}]
    batch = FlatteningCollator()(rows)
    assert batch[PACK_BORDERS].tolist() == [0, 3, 4] and batch["cu_seq_lens_q"].tolist() == [0, 2, 3, 4]
    assert PACK_BORDERS not in FlatteningCollator()([{"input_ids": [1], "labels": [1]}])
