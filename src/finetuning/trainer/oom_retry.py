"""Out-of-memory retry: repeat a step with smaller micro-batches, from the same weights and random state."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch

from finetuning.data.collators import IMAGE_ROWS
from finetuning.errors import InternalError, is_out_of_memory
from finetuning.trainer import TrainerBase
from finetuning.trainer.ddp import average_gradients, defers_gradients

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

Batch: TypeAlias = dict[str, torch.Tensor]
Split: TypeAlias = dict[str, Any]
"""Some rows of a batch: tensors, and numbers that describe them."""
logger = logging.getLogger(__name__)

_HINT = (
    "Lower sft_args.max_seq_length or training_args.max_length, set training_args.gradient_checkpointing: true, train"
    " an adapter, or, if all weights are trained, set run_conf.model_args.dtype: bfloat16."
)


def num_rows(inputs: Mapping[str, torch.Tensor]) -> int:
    """Return the rows of a batch that can be split: single rows of a pack, and pairs where rows are preferences."""
    if "cu_seq_lens_q" in inputs:
        return len(inputs["cu_seq_lens_q"]) - 1
    return len(inputs["input_ids"]) // (2 if _holds_pairs(inputs) else 1)


def _holds_pairs(inputs: Mapping[str, torch.Tensor]) -> bool:
    # KTO's batches, whose rows have labels, are no pairs.
    return "completion_mask" in inputs and "label" not in inputs


def split_batch(inputs: Mapping[str, torch.Tensor], num_splits: int) -> Iterator[tuple[Split, float]]:
    """Yield at most `num_splits` smaller batches of about as many rows each, and their share of the rows.

    Handles the batches of `data/collators.py`, padded and padding-free, and TRL's preference batches: of pairs, which
    hold all chosen rows before all rejected ones, and of single rows (KTO).
    """
    rows = num_rows(inputs)
    if num_splits == 1 or rows < 2 or inputs.get(IMAGE_ROWS) == {}:
        yield dict(inputs), 1.0
        return
    take = _take_padding_free if "cu_seq_lens_q" in inputs else _take_pairs if _holds_pairs(inputs) else _take_padded
    borders = [rows * split // num_splits for split in range(num_splits + 1)]
    for start, end in pairwise(borders):
        if end > start:
            yield take(inputs, start, end), (end - start) / rows


def locate_labels(batch: dict[str, Any]) -> None:
    """Set `label_positions` and `num_labels` of a batch whose labels have changed, where it has them.

    Reads the labels from the device: only for batches that are split, and the last of an epoch.
    """
    if "label_positions" in batch:
        batch["label_positions"] = batch["shift_labels"].flatten().ne(-100).nonzero().flatten()
        batch["num_labels"] = len(batch["label_positions"])


def _with_labels(split: Split, inputs: Mapping[str, torch.Tensor]) -> Split:
    if "label_positions" in inputs:
        split["label_positions"] = inputs["label_positions"]
        locate_labels(split)
    return split


def _take_padded(inputs: Mapping[str, torch.Tensor], start: int, end: int) -> Split:
    split = {name: value[start:end] for name, value in _row_tensors(inputs).items()}
    return _with_labels({**split, **take_images(inputs, start, end)}, inputs)


def _row_tensors(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that have a row for each row of the batch."""
    skipped = {"label_positions", *inputs.get(IMAGE_ROWS, ())}
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and name not in skipped}


def take_images(inputs: Mapping[str, torch.Tensor], start: int, end: int, *, copies: int = 1) -> Split:
    """Return the tensors of the images of some rows of a batch; none where these rows have no images.

    Args:
        copies: how often the tensors hold the images of all rows, one after the other.
    """
    split: Split = {}
    counts = cast("Mapping[str, list[int]]", inputs.get(IMAGE_ROWS, {}))
    for name, sizes in counts.items():
        first, size = sum(sizes[:start]), sum(sizes[start:end])
        if size:
            split[name] = torch.cat([part[first : first + size] for part in inputs[name].chunk(copies)])
    return split


def _take_pairs(inputs: Mapping[str, torch.Tensor], start: int, end: int) -> Split:
    rows = num_rows(inputs)
    pairs = {
        name: torch.cat([value[start:end], value[rows + start : rows + end]])
        if len(value) == 2 * rows
        else value[start:end]
        for name, value in _row_tensors(inputs).items()
    }
    return {**pairs, **take_images(inputs, start, end, copies=2)}


def _take_padding_free(inputs: Mapping[str, torch.Tensor], start: int, end: int) -> Split:
    borders = inputs["cu_seq_lens_q"][start : end + 1]
    first, last = int(borders[0]), int(borders[-1])
    row_lengths: list[int] = borders.diff().tolist()
    changed: Split = {"cu_seq_lens_q": borders - first, "cu_seq_lens_k": borders - first}
    changed |= {"max_length_q": max(row_lengths), "max_length_k": max(row_lengths), "row_lengths": row_lengths}
    kept = {name: value for name, value in inputs.items() if name == "attention_mask"}
    tokens = {name: value[:, first:last] for name, value in _row_tensors(inputs).items() if name not in changed | kept}
    return _with_labels({**tokens, **kept, **{name: changed[name] for name in changed if name in inputs}}, inputs)


class OOMRetryMixin(TrainerBase):
    """Halve the micro-batch when a step runs out of memory. Its place is to the right of mixins that count steps.

    From then on each batch is computed in twice as many smaller ones, so the effective batch and the loss trajectory
    stay the same up to the rounding of sums and dropout. Only for losses that add up over rows
    (`supports_batch_splitting`). With several processes each splits its own batches, where no process waits for
    another before all gradients are there.
    """

    supports_batch_splitting = False
    """Whether the loss of a batch is the sum of the losses of its rows."""
    loss_is_local = False
    """Whether the loss of a batch is computed without communication between processes."""
    num_splits = 1
    """How many smaller batches each batch is computed in."""
    oom_retries: tuple[str, ...] = ()
    """What was split, when and why."""
    _step_batches: tuple[Batch, ...] = ()
    _random_state: RandomState

    def get_batch_samples(
        self, epoch_iterator: Iterator[object], num_batches: int, device: torch.device
    ) -> tuple[list[object], torch.Tensor | int | None]:
        self._step_batches = ()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        defers = self.args.world_size > 1 and self.loss_is_local and defers_gradients(model)
        can_retry = self.supports_batch_splitting and (self.args.world_size == 1 or defers)
        if not can_retry and self.num_splits == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        if not self._step_batches:
            self._random_state = _random_state(self.args.device)
        self._step_batches = (*self._step_batches, inputs)
        batches = self._step_batches[-1:]
        while True:
            try:
                with self.accelerator.no_sync(model) if defers else nullcontext():
                    losses = [self._split_step(model, batch, num_items_in_batch) for batch in batches]
                break
            except (RuntimeError, MemoryError) as error:
                if not can_retry or not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Outside of the except block: the traceback keeps the activations that did not fit alive.
            self._halve(max(map(num_rows, self._step_batches)), f"step {self.state.global_step + 1}", reason)
            # Gradients of the earlier micro-batches of this step are discarded, so all of them are computed again.
            model.zero_grad()
            _set_random_state(self._random_state, self.args.device)
            batches = self._step_batches
        if defers and self.accelerator.sync_gradients:
            average_gradients([w for w in model.parameters() if w.requires_grad], self.args.world_size)
        return losses[-1]

    def _split_step(
        self, model: nn.Module, batch: Batch, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Return the loss of a batch, computed in `num_splits` smaller ones; gradients accumulate."""
        if self.num_splits == 1:
            return super().training_step(model, batch, num_items_in_batch)
        accumulation, losses = self.current_gradient_accumulation_steps, []
        splits = list(split_batch(batch, self.num_splits))
        try:
            for index, (split, share) in enumerate(splits):
                # Where the loss is a mean over rows, the Trainer divides it by this number.
                self.current_gradient_accumulation_steps = accumulation / share
                is_last = index == len(splits) - 1
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, split, num_items_in_batch))
        finally:
            self.current_gradient_accumulation_steps = accumulation
        return torch.stack(losses).sum()

    def _halve(self, rows: int, where: str, reason: str) -> None:
        """Split batches into twice as many.

        Raises:
            InternalError: the micro-batch is already a single row.
        """
        if self.num_splits >= rows:
            raise InternalError(f"{where}: out of memory at micro-batch 1: {reason}", hint=_HINT)
        before = -(-rows // self.num_splits)
        self.num_splits *= 2
        _empty_cache(self.args.device)
        retry = (
            f"{where}: out of memory at micro-batch {before}; retrying with {-(-rows // self.num_splits)},"
            " same effective batch"
        )
        self.oom_retries = (*self.oom_retries, retry)
        logger.warning("%s (%s)", retry, reason)

    def check_memory(self, train_rows: list[dict[str, object]], eval_rows: list[dict[str, object]]) -> None:
        """Compute a training and a validation batch and discard them; split both until they fit into memory.

        All processes agree on the outcome. Skipped under FSDP and DeepSpeed, where a process that runs out of memory
        would leave the others waiting inside a collective.

        Raises:
            InternalError: a single row does not fit.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        with self._preserve_state():
            while self.supports_batch_splitting and train_rows:
                reason = self._out_of_memory_in(lambda: self._try_training(train_rows))
                if reason is None:
                    break
                self._halve(len(train_rows), "longest training rows", reason)
            rows = len(eval_rows)
            while rows:
                reason = self._out_of_memory_in(lambda: self._try_evaluation(eval_rows[:rows]))  # noqa: B023 - called at once
                if reason is None:
                    break
                if rows == 1:
                    raise InternalError(f"out of memory with a single validation row: {reason}", hint=_HINT)
                rows //= 2
                self.args.per_device_eval_batch_size = rows
                retry = f"longest validation rows: out of memory; retrying with batch size {rows}"
                self.oom_retries = (*self.oom_retries, retry)
                logger.warning("%s (%s)", retry, reason)

    @contextmanager
    def _preserve_state(self) -> Iterator[None]:
        """Leave gradients, random state and metrics as they were."""
        self.current_gradient_accumulation_steps = 1
        try:
            with preserve_random_state(self.args.device):
                yield
        finally:
            self.model_wrapped.zero_grad()
            _empty_cache(self.args.device)
            # TRL's trainers collect what they log in here.
            for metrics in getattr(self, "_metrics", {}).values():
                metrics.clear()

    def _try_training(self, rows: list[dict[str, object]]) -> None:
        batch = self.data_collator(rows)
        # The first step allocates two optimizer states for each weight; reserve their memory now.
        assert self.optimizer is not None
        states = [
            torch.empty((2, *weight.shape), dtype=weight.dtype, device=weight.device)
            for weight in self.model.parameters()
            if weight.requires_grad and not self.optimizer.state
        ]
        with self.accelerator.no_sync(self.model_wrapped):
            self._split_step(self.model_wrapped, batch, self._get_num_items_in_batch([batch], self.args.device))
        del states
        self.model_wrapped.zero_grad()

    def _try_evaluation(self, rows: list[dict[str, object]]) -> None:
        self.model_wrapped.eval()
        try:
            self.prediction_step(self.model_wrapped, self.data_collator(rows), prediction_loss_only=True)
        finally:
            self.model_wrapped.train()

    def _out_of_memory_in(self, attempt: Callable[[], None]) -> str | None:
        """Return the error message when memory runs out on any process, None when it does not. Collective."""
        reason = None
        try:
            attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        self.model_wrapped.zero_grad()
        _empty_cache(self.args.device)
        if self.args.world_size > 1:
            flag = torch.tensor(float(reason is not None), device=self.args.device)
            failed = self.accelerator.reduce(flag, "sum")
            reason = reason or ("on another process" if float(failed) else None)
        return reason


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


class RandomState(NamedTuple):
    """The states of all random number generators that a step may use."""

    torch: torch.Tensor
    device: torch.Tensor | None
    python: tuple[object, ...]
    numpy: dict[str, object] | tuple[str, NDArray[np.uint32], int, int, float]


def _random_state(device: torch.device) -> RandomState:
    device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), device_state, random.getstate(), np.random.get_state())


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Leave the random number generators as they were before the block."""
    state = _random_state(device)
    try:
        yield
    finally:
        _set_random_state(state, device)


def _set_random_state(state: RandomState, device: torch.device) -> None:
    torch_state, device_state, python_state, numpy_state = state
    torch.set_rng_state(torch_state)
    if device_state is not None:
        torch.cuda.set_rng_state(device_state, device)
    random.setstate(python_state)
    np.random.set_state(numpy_state)
