"""The loss as a mean over the rows of a step, however they are split over processes and micro-batches.

transformers averages the losses of micro-batches, and DistributedDataParallel those of processes. Both are means over
rows only where all micro-batches have the same number of rows. At the end of an epoch they do not: the last one is
smaller, and accelerate fills it up on every process with rows from the start of the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from finetuning.data.collators import IMAGE_ROWS, UNTRAINED
from finetuning.trainer import TrainerBase
from finetuning.trainer.oom_retry import take_images

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader
    from transformers.trainer_utils import EvalLoopOutput

Batch = dict[str, torch.Tensor]


class RowMeanMixin(TrainerBase):
    """Weigh losses that are means over rows by their number. Its place is to the left of `TrainerMixin`.

    A batch that is filled up with repeated rows is computed row by row, those that are repeated with a weight of 0: all
    processes then have the same number of passes, in which TRL gathers its metrics.
    """

    loss_is_row_mean = True
    """Whether the loss of a batch is the mean of the losses of its rows."""
    _row_counts: tuple[int, ...] = ()
    """Rows of each micro-batch of the step on this process without repeated ones, if they have to be weighed."""
    _rows_of_step = 0
    """Rows of the step on all processes."""
    _num_computed = 0
    """Micro-batches of the step that were computed."""

    def num_rows(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Return the number of rows of a batch, where a preference pair is one row."""
        return _num_pairs(batch)

    def take_row(self, batch: Mapping[str, torch.Tensor], index: int) -> Batch:
        """Return a row of a batch as a batch."""
        return _take_pair(batch, index)

    def get_batch_samples(
        self, epoch_iterator: Iterator[object], num_batches: int, device: torch.device
    ) -> tuple[list[object], torch.Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_computed, self._row_counts = 0, ()
        rows = [self.num_rows(batch) for batch in batches if isinstance(batch, Mapping)]
        if self.loss_is_row_mean and rows and len(rows) == len(batches):
            self._weigh(rows, num_batches)
        return batches, num_items

    def _weigh(self, rows: Sequence[int], num_batches: int) -> None:
        """Set the weights of the step's micro-batches, if they are not equal."""
        world_size = self.args.world_size
        if world_size == 1:
            if len(set(rows)) > 1:
                self._row_counts, self._rows_of_step = tuple(rows), sum(rows)
        elif self._num_repeated(rows[-1]) is not None and not self._is_sharded_model():
            full = rows[:-1]
            kept = rows[-1] - (self._num_repeated(rows[-1]) or 0)
            self._row_counts = (*full, kept)
            self._rows_of_step = sum(full) * world_size + self.accelerator.gradient_state.remainder

    def _is_sharded_model(self) -> bool:
        # DeepSpeed takes the optimizer step in the backward pass, and FSDP gathers weights in each of them.
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _num_repeated(self, rows: int) -> int | None:
        """Return how many of this process's last rows are repeated; None if no process has repeated rows."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        kept = min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)
        return rows - kept

    def training_step(
        self,
        model: nn.Module,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if not self._row_counts:
            return super().training_step(model, inputs, num_items_in_batch)
        index, self._num_computed = self._num_computed, self._num_computed + 1
        kept, rows = self._row_counts[index], self.num_rows(inputs)
        is_filled_up = self.args.world_size > 1 and index == len(self._row_counts) - 1
        if not is_filled_up:
            return self._weighed_step(model, inputs, num_items_in_batch, kept)
        losses: list[torch.Tensor] = []
        for row in range(rows):
            part, weight = self.take_row(inputs, row), int(row < kept)
            if row == rows - 1:
                losses.append(self._weighed_step(model, part, num_items_in_batch, weight))
            else:
                with self.accelerator.no_sync(model):
                    losses.append(self._weighed_step(model, part, num_items_in_batch, weight))
        return torch.stack(losses).sum()

    def _weighed_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None, rows: int
    ) -> torch.Tensor:
        """Compute a batch with the weight of a number of rows of the step. Gradients are averaged over processes."""
        accumulation = self.current_gradient_accumulation_steps
        # The Trainer divides the loss by this number.
        divisor = self._rows_of_step / (rows * self.args.world_size) if rows else float("inf")
        self.current_gradient_accumulation_steps = divisor
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.current_gradient_accumulation_steps = accumulation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Add the losses of the rows to those that the evaluation averages, each row once."""
        rows = self.num_rows(inputs)
        repeated = self._num_repeated(rows) if self.loss_is_row_mean and not self._is_sharded_model() else None
        if repeated is not None:
            outputs = [
                super(RowMeanMixin, self).prediction_step(model, self.take_row(inputs, row), True, ignore_keys)[0]
                for row in range(rows)
            ]
            losses = torch.stack([loss for loss in outputs if loss is not None])
            self._add_eval_loss(losses[: rows - repeated].sum(), rows - repeated)
            return losses.mean(), None, None
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # The mean that transformers computes for one process is that of the rows.
        if self.loss_is_row_mean and output[0] is not None and self.args.world_size > 1:
            self._add_eval_loss(output[0].mean() * rows, rows)
        return output

    def without_repeated(self, batches: Iterable[object]) -> Iterator[tuple[Batch, int]]:
        """Yield batches, each with the number of its first rows that are not repeated."""
        for batch in batches:
            if isinstance(batch, dict):
                rows = self.num_rows(batch)
                yield batch, rows - (self._num_repeated(rows) or 0)

    if TYPE_CHECKING:

        def concatenated_forward(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]: ...

        def _add_eval_loss(self, total: torch.Tensor, count: torch.Tensor | int) -> None: ...


class ChosenTokenMeanMixin(RowMeanMixin):
    """Take the mean of the loss on chosen answers (ORPO, CPO, DPO's `sft`) over the tokens of a step.

    TRL takes it over those of a micro-batch, so that the same step has another loss on another number of processes or
    micro-batches. Its place is to the left of `TrainerMixin`.
    """

    has_chosen_loss = True
    nll_includes_prompt = False
    """Whether this loss is on the tokens of the prompt too, as ORPO's is."""
    _tokens_per_row: torch.Tensor | None = None
    """Mean number of tokens of this loss in the rows of the step, float64."""
    _eval_tokens_per_row: torch.Tensor | None = None
    """The same of the evaluation in progress; None outside of one."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[object], num_batches: int, device: torch.device
    ) -> tuple[list[object], torch.Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        inputs = [batch for batch in batches if isinstance(batch, dict)]
        if inputs and self.has_chosen_loss:
            kept = self._row_counts or tuple(map(self.num_rows, inputs))
            self._tokens_per_row = self._mean_tokens(zip(inputs, kept, strict=True))
        return batches, num_items

    def evaluation_loop(
        self,
        dataloader: DataLoader[object],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self.has_chosen_loss:
            self._eval_tokens_per_row = self._mean_tokens(self.without_repeated(dataloader))
        try:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._eval_tokens_per_row = None

    def concatenated_forward(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Return TRL's tuple, in which the fifth is the loss on the chosen answers, weighed by the number of tokens."""
        output = super().concatenated_forward(model, batch)
        weight = self.chosen_weight(batch)
        return output if weight is None else (*output[:4], output[4] * weight.to(output[4].dtype), *output[5:])

    def chosen_weight(self, batch: Batch) -> torch.Tensor | None:
        """Return what turns a batch's mean over tokens into its part of the step's mean; None outside of steps."""
        mean = self._tokens_per_row if self.model.training else self._eval_tokens_per_row
        return None if mean is None else self._num_tokens(batch).double().mean() / mean

    def _num_tokens(self, batch: Batch) -> torch.Tensor:
        """Return the number of tokens of the loss in each row, (rows,). The first token of a row is never predicted."""
        if "completion_mask" in batch:
            return batch["completion_mask"][: self.num_rows(batch), 1:].sum(1)
        if self.nll_includes_prompt:
            return batch["chosen_attention_mask"][:, 1:].sum(1)
        return (batch["chosen_labels"][:, 1:] != UNTRAINED).sum(1)

    def _mean_tokens(self, batches: Iterable[tuple[Batch, int]]) -> torch.Tensor:
        """Return the mean number of tokens in a row, float64. Collective.

        Args:
            batches: each with the number of its first rows that count.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch, kept in batches:
            totals[0] += self._num_tokens(batch)[:kept].sum().to(totals.device)
            totals[1] += kept
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        return totals[0] / totals[1]


class ChosenTermMixin(ChosenTokenMeanMixin):
    """Do so for the term `sft` of DPO's loss, which TRL adds up from terms with weights."""

    loss_types: list[str]
    loss_weights: Sequence[float | torch.Tensor]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        weights, factor = self.loss_weights, self.chosen_weight(inputs) if self.has_chosen_loss else None
        if factor is not None:
            named = zip(self.loss_types, weights, strict=True)
            self.loss_weights = [weight * factor if name == "sft" else weight for name, weight in named]
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.loss_weights = weights


def _num_pairs(batch: Mapping[str, torch.Tensor]) -> int:
    if "chosen_input_ids" in batch:
        return len(batch["chosen_input_ids"])
    return len(batch["input_ids"]) // 2


def _take_pair(batch: Mapping[str, torch.Tensor], index: int) -> Batch:
    """Return a pair of a batch that holds all chosen rows before all rejected ones, or both under their own names."""
    rows, images = _num_pairs(batch), batch.get(IMAGE_ROWS, ())
    pair = {
        name: value[[index, rows + index]] if len(value) == 2 * rows else value[index : index + 1]
        for name, value in batch.items()
        if isinstance(value, torch.Tensor) and name not in images
    }
    return {**pair, **take_images(batch, index, index + 1, copies=2)}
