"""The parts of a training, told as they begin and end, for those who measure them.

A stream of rows as the Trainer takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from finetuning.data.streaming.dataset import RowStream


class TrainerHooks:
    """Told of each part by its name. This one listens to nothing; whoever measures puts another into a trainer."""

    def begin(self, name: str) -> None:
        """The part begins."""

    def end(self, name: str) -> None:
        """The part is done."""

    def fail(self, name: str, error: BaseException) -> None:
        """The part ended with an exception, which goes on."""


class TrainerHooksMixin:
    """Stands left of everything else of a transformers Trainer, and tells `phases` what the Trainer does:

    `data_loader_initialization`, `optimizer_initialization`, `checkpoint_load`, `data_loading` (which begins a step),
    `model_forward`, `model_backward`, `checkpoint_save`, `validation_loop` and `testing_loop`, and the steps of these,
    `validation_single_iteration` and `testing_single_iteration`. `no_rows` says that a step that began is none.

    Forward and backward are those of the host: on a GPU, the time that launching takes.
    """

    phases: TrainerHooks = TrainerHooks()
    _is_stepping = False
    _is_backward = False
    _loop = "validation"
    _work: torch.Tensor | None = None
    """Scored positions and the sum of squared row lengths, once they are asked for."""

    def count_work(self) -> None:
        """Counts, from here on, what `work_done` gives."""
        self._work = torch.zeros(2, dtype=torch.float64, device=self.args.device)

    def work_done(self) -> tuple[float, float]:
        """Positions that this process computed a loss on, and the sum of the squared lengths of its rows."""
        scored, squares = (0.0, 0.0) if self._work is None else self._work.tolist()
        return scored, squares

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.phases.begin(name)
        try:
            yield
        except BaseException as error:
            self.phases.fail(name, error)
            raise
        self.phases.end(name)

    def get_train_dataloader(self) -> Any:
        with self._phase("data_loader_initialization"):
            return super().get_train_dataloader()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with self._phase("optimizer_initialization"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with self._phase("optimizer_initialization"):
            return super().create_scheduler(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        with self._phase("checkpoint_load"):
            return super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> Any:
        with self._phase("checkpoint_load"):
            return super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> Any:
        if checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        with self._phase("checkpoint_load"):
            return super()._load_optimizer_and_scheduler(checkpoint)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self._phase("data_loading"):
            batches, items = super().get_batch_samples(*args, **kwargs)
        if not batches:
            self.phases.end("no_rows")
        elif self._work is not None and items is not None:
            self._work[0] += items / self.args.world_size
        return batches, items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self._is_stepping, self._is_backward = True, False
        if self._work is not None:
            self._work[1] += _squared_lengths(inputs)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except BaseException as error:
            self.phases.fail("model_backward" if self._is_backward else "model_forward", error)
            raise
        finally:
            self._is_stepping = False
        if self._is_backward:
            self.phases.end("model_backward")
        return loss

    @contextmanager
    def compute_loss_context_manager(self) -> Iterator[None]:
        if not self._is_stepping or self._is_backward:
            with super().compute_loss_context_manager():
                yield
            return
        self.phases.begin("model_forward")
        with super().compute_loss_context_manager():
            yield
        self.phases.end("model_forward")
        self._is_backward = True
        self.phases.begin("model_backward")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        before = self._loop
        self._loop = "testing" if kwargs.get("metric_key_prefix", "eval").startswith("test") else "validation"
        try:
            with self._phase(f"{self._loop}_loop"):
                return super().evaluation_loop(*args, **kwargs)
        finally:
            self._loop = before

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        name = f"{self._loop}_single_iteration"
        self.phases.begin(name)
        outcome = super().prediction_step(*args, **kwargs)
        self.phases.end(name)
        return outcome

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        with self._phase("checkpoint_save"):
            return super()._save_checkpoint(*args, **kwargs)


def _squared_lengths(inputs: Any) -> torch.Tensor | float:
    """The sum of the squared lengths of the rows of a batch, computed where it lies."""
    borders, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
    if borders is not None:
        return borders.diff().double().square().sum()
    if mask is not None:
        return mask.sum(-1).double().square().sum()
    rows, length = inputs["input_ids"].shape
    return float(rows * length * length)


class IterableRows(IterableDataset):
    """The rows of a stream; of several processes each goes through all, and accelerate gives it its share.

    That share is its slice of each batch of all processes, the one that it gets of rows which are all at hand, so that
    a step trains on the same rows on any number of processes. Source: accelerate 1.15, `IterableDatasetShard`.
    """

    def __init__(self, stream: RowStream, longest: int):
        self.stream = stream
        self._longest = longest

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.stream)

    def longest_rows(self, count: int) -> list[dict[str, Any]]:
        """Rows as long as they can be: how long those of the stream are, nobody knows."""
        ids = np.zeros(self._longest, dtype=np.int32)
        return [{"input_ids": ids, "labels": ids}] * count


def as_dataset(rows: Any, longest: int) -> Any:
    """The rows as the Trainer takes them: as they are, where they are all at hand."""
    return IterableRows(rows, longest) if isinstance(rows, RowStream) else rows
