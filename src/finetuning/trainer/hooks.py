"""Hooks that are called when a phase of training begins and ends, for telemetry and heartbeats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from finetuning.trainer import TrainerBase

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader
    from transformers.trainer_utils import EvalLoopOutput


class TrainerHooks:
    """Callbacks around each phase. This base class does nothing; assign a subclass to `trainer.hooks`."""

    def begin(self, name: str) -> None:
        """Called when a phase begins."""

    def end(self, name: str) -> None:
        """Called when a phase has completed."""

    def fail(self, name: str, error: BaseException) -> None:
        """Called when a phase raised; the exception propagates."""


class TrainerHooksMixin(TrainerBase):
    """Call `hooks` around the phases of a transformers Trainer. Must be the leftmost base class.

    The phases are `data_loader_initialization`, `optimizer_initialization`, `checkpoint_load`, `data_loading` (which
    starts a step), `model_forward`, `model_backward`, `checkpoint_save`, `validation_loop`, `testing_loop`, and their
    steps `validation_single_iteration` and `testing_single_iteration`. `end("no_rows")` is called when a step that
    started has no data because the epoch is over.

    Forward and backward are measured on the host. On a GPU that is the time to launch the kernels.
    """

    hooks: TrainerHooks = TrainerHooks()
    _is_stepping = False
    _is_backward = False
    _loop_name = "validation"
    _flop_counters: torch.Tensor | None = None
    """float64, shape (2,): positions with a loss, and the sum of squared row lengths."""

    def enable_flop_counters(self) -> None:
        """Start to count what `flop_counters` returns."""
        self._flop_counters = torch.zeros(2, dtype=torch.float64, device=self.args.device)

    def flop_counters(self) -> tuple[float, float]:
        """Return the positions this process computed a loss on, and the sum of the squared lengths of its rows."""
        if self._flop_counters is None:
            return 0.0, 0.0
        loss_positions, squared_lengths = self._flop_counters.tolist()
        return loss_positions, squared_lengths

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.hooks.begin(name)
        try:
            yield
        except BaseException as error:
            self.hooks.fail(name, error)
            raise
        self.hooks.end(name)

    def get_train_dataloader(self) -> DataLoader[object]:
        with self._phase("data_loader_initialization"):
            return super().get_train_dataloader()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        with self._phase("optimizer_initialization"):
            return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        with self._phase("optimizer_initialization"):
            return super().create_scheduler(num_training_steps, optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._phase("checkpoint_load"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._phase("checkpoint_load"):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with self._phase("checkpoint_load"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def get_batch_samples(
        self, epoch_iterator: Iterator[object], num_batches: int, device: torch.device
    ) -> tuple[list[object], torch.Tensor | int | None]:
        with self._phase("data_loading"):
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            self.hooks.end("no_rows")
        elif self._flop_counters is not None and num_items is not None:
            # The item count is that of all processes.
            self._flop_counters[0] += num_items / self.args.world_size
        return batches, num_items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self._is_stepping, self._is_backward = True, False
        if self._flop_counters is not None:
            self._flop_counters[1] += _sum_squared_lengths(inputs)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except BaseException as error:
            self.hooks.fail("model_backward" if self._is_backward else "model_forward", error)
            raise
        finally:
            self._is_stepping = False
        if self._is_backward:
            self.hooks.end("model_backward")
        return loss

    # The Trainer enters this context for the forward pass alone, so the backward pass begins where it ends.
    def compute_loss_context_manager(self) -> ExitStack:
        stack = super().compute_loss_context_manager()
        if self._is_stepping and not self._is_backward:
            self.hooks.begin("model_forward")
            stack.push(self._end_forward)
        return stack

    def _end_forward(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.hooks.end("model_forward")
            self._is_backward = True
            self.hooks.begin("model_backward")

    def evaluation_loop(
        self,
        dataloader: DataLoader[object],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        outer = self._loop_name
        self._loop_name = "testing" if metric_key_prefix.startswith("test") else "validation"
        try:
            with self._phase(f"{self._loop_name}_loop"):
                return super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self._loop_name = outer

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        name = f"{self._loop_name}_single_iteration"
        self.hooks.begin(name)
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self.hooks.end(name)
        return output

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        with self._phase("checkpoint_save"):
            super()._save_checkpoint(model, trial)


def _sum_squared_lengths(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | float:
    """Return the sum of the squared row lengths of a batch, on its device: copying it would synchronize a GPU."""
    cu_seq_lens, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
    if cu_seq_lens is not None:
        return cu_seq_lens.diff().double().square().sum()
    if mask is not None:
        return mask.sum(-1).double().square().sum()
    num_rows, length = inputs["input_ids"].shape
    return float(num_rows * length * length)


@contextmanager
def select_head_input(head: nn.Module, positions: torch.Tensor) -> Iterator[list[int]]:
    """Compute the head of a model in the block at some positions only.

    The hidden states are selected by indices that are known beforehand. A bool mask (`logits_to_keep`) would make a GPU
    wait until their number is known.

    Args:
        positions: int64, (positions,): indices into the flattened batch.

    Yields:
        A list that gets the number of positions that the head was called with; empty if the model does not call it.
    """
    calls: list[int] = []

    def select(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden = arguments[0]
        calls.append(hidden.shape[:-1].numel())
        return (hidden.flatten(0, -2).index_select(0, positions.to(hidden.device)),)

    hook = head.register_forward_pre_hook(select)
    try:
        yield calls
    finally:
        hook.remove()
