"""A step that does not fit into memory is taken again in smaller pieces, from the same weights and random state.

A batch cut into smaller ones whose losses add up to its own."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from finetuning.errors import InternalError
from finetuning.trainer.ddp import DDPMixin, average_gradients

Part = tuple[dict[str, Any], float]
"""A smaller batch, and its share of the rows."""


def num_rows(inputs: Mapping[str, Any]) -> int:
    """Rows of a batch that can be told apart: those of a pack, too; pairs, where rows are preferences."""
    if "cu_seq_lens_q" in inputs:
        return len(inputs["cu_seq_lens_q"]) - 1
    return len(inputs["input_ids"]) // (2 if "completion_mask" in inputs else 1)


def split_batch(inputs: Mapping[str, Any], pieces: int) -> Iterator[Part]:
    """A batch in at most so many pieces of about as many rows each; the batch itself for one piece.

    Knows the batches of `data/collate.py`, padded or end to end, and those of preferences, whose chosen rows stand
    before their rejected ones.
    """
    rows = num_rows(inputs)
    if pieces == 1 or rows < 2:
        yield dict(inputs), 1.0
        return
    cut = _end_to_end if "cu_seq_lens_q" in inputs else _pairs if "completion_mask" in inputs else _padded
    borders = [rows * piece // pieces for piece in range(pieces + 1)]
    for start, end in pairwise(borders):
        if end > start:
            yield cut(inputs, start, end), (end - start) / rows


def _padded(inputs: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    return {name: value[start:end] for name, value in inputs.items()}


def _pairs(inputs: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    rows = num_rows(inputs)
    return {
        name: torch.cat([value[start:end], value[rows + start : rows + end]])
        if len(value) == 2 * rows
        else value[start:end]
        for name, value in inputs.items()
    }


def _end_to_end(inputs: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    borders = inputs["cu_seq_lens_q"][start : end + 1]
    first, last = int(borders[0]), int(borders[-1])
    longest = int(borders.diff().max())
    own = {"cu_seq_lens_q": borders - first, "cu_seq_lens_k": borders - first}
    own |= {"max_length_q": longest, "max_length_k": longest}
    return {name: own[name] if name in own else value[:, first:last] for name, value in inputs.items()}


logger = logging.getLogger(__name__)

_SAID_BY_TORCH = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
_HINT = (
    "Lower sft_args.max_seq_length or training_args.max_length, set training_args.gradient_checkpointing: true, or"
    " train an adapter."
)


class OOMRetryMixin(DDPMixin):
    """Stands left of a transformers Trainer, and right of everything that counts its steps.

    When memory runs out in a step, the batches are divided by two from there on: half the rows at a time, twice as
    often, the same rows a step, so that the curve stays the same up to the rounding of sums and to dropout. Only where
    `divides_batches` says that losses add up so. Of several processes each divides its own, where none waits for
    another before all gradients are there.
    """

    divides_batches = False
    pieces = 1
    """Into how many pieces each batch is divided."""
    divisions: tuple[str, ...] = ()
    """What was divided, when and why."""
    _held: tuple[Any, ...] = ()
    _random: Any = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._held = ()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        waits = self.args.world_size > 1 and self._gradients_wait(model)
        retries = self.divides_batches and (self.args.world_size == 1 or waits)
        if not retries and self.pieces == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        if not self._held:
            self._random = _random_state(self.args.device)
        self._held = (*self._held, inputs)
        batches = self._held[-1:]
        while True:
            try:
                with self.accelerator.no_sync(model) if waits else nullcontext():
                    for batch in batches:
                        loss = self._step_in_pieces(model, batch, num_items_in_batch)
                break
            except (RuntimeError, MemoryError) as error:
                if not retries or not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Past the except block: its traceback holds on to the activations that did not fit.
            self._halve(max(num_rows(batch) for batch in self._held), f"step {self.state.global_step + 1}", reason)
            model.zero_grad()
            _set_random_state(self._random, self.args.device)
            batches = self._held
        if waits and self.accelerator.sync_gradients:
            average_gradients([w for w in model.parameters() if w.requires_grad], self.args.world_size)
        return loss

    def _step_in_pieces(self, model: Any, batch: dict[str, Any], items: Any) -> torch.Tensor:
        """The loss of a batch, its gradients added to those that are there."""
        if self.pieces == 1:
            return super().training_step(model, batch, items)
        batches, losses = self.current_gradient_accumulation_steps, []
        parts = list(split_batch(batch, self.pieces))
        try:
            for index, (part, share) in enumerate(parts):
                # Where a loss is a mean over rows, the Trainer divides it by this number.
                self.current_gradient_accumulation_steps = batches / share
                is_last = index == len(parts) - 1
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, part, items))
        finally:
            self.current_gradient_accumulation_steps = batches
        return torch.stack(losses).sum()

    def _halve(self, rows: int, where: str, reason: str) -> None:
        """Divides batches into twice as many pieces.

        Raises:
            InternalError: a piece is one row already.
        """
        if self.pieces >= rows:
            raise InternalError(f"{where}: out of memory with one row at a time: {reason}", hint=_HINT)
        self.pieces *= 2
        _free(self.args.device)
        most = -(-rows // self.pieces)
        told = (
            f"{where}: out of memory with {-(-rows * 2 // self.pieces)} rows at a time; from here on {most}, the same"
            " rows a step"
        )
        self.divisions = (*self.divisions, told)
        logger.warning("%s (%s)", told, reason)

    def check_memory(self, train_rows: list[dict[str, Any]], eval_rows: list[dict[str, Any]]) -> None:
        """Computes a training and a validation batch and takes nothing from it but whether they fit; divides both until
        they do.

        All processes agree on the outcome. Nothing is checked where computing itself makes processes wait for each
        other: under FSDP and DeepSpeed.

        Raises:
            InternalError: one row does not fit.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        with self._unnoticed():
            while self.divides_batches and train_rows:
                reason = self._fails(lambda: self._try_training(train_rows))
                if reason is None:
                    break
                self._halve(len(train_rows), "longest training rows", reason)
            rows = len(eval_rows)
            while rows:
                reason = self._fails(lambda: self._try_evaluation(eval_rows[:rows]))  # noqa: B023 - called at once
                if reason is None:
                    break
                if rows == 1:
                    raise InternalError(f"out of memory with one validation row: {reason}", hint=_HINT)
                rows //= 2
                self.args.per_device_eval_batch_size = rows
                told = f"longest validation rows: out of memory; from here on {rows} at a time"
                self.divisions = (*self.divisions, told)
                logger.warning("%s (%s)", told, reason)

    @contextmanager
    def _unnoticed(self) -> Iterator[None]:
        """Leaves no gradient, no random number drawn, no metric."""
        state = _random_state(self.args.device)
        self.current_gradient_accumulation_steps = 1
        try:
            yield
        finally:
            self.model_wrapped.zero_grad()
            _free(self.args.device)
            _set_random_state(state, self.args.device)
            for metrics in getattr(self, "_metrics", {}).values():
                metrics.clear()

    def _try_training(self, rows: list[dict[str, Any]]) -> None:
        batch = self.data_collator(rows)
        # Optimizer states come with the first step; what they will take must be free now.
        states = [
            torch.empty((2, *weight.shape), dtype=weight.dtype, device=weight.device)
            for weight in self.model.parameters()
            if weight.requires_grad and not self.optimizer.state
        ]
        with self.accelerator.no_sync(self.model_wrapped):
            self._step_in_pieces(self.model_wrapped, batch, self._get_num_items_in_batch([batch], self.args.device))
        del states
        self.model_wrapped.zero_grad()

    def _try_evaluation(self, rows: list[dict[str, Any]]) -> None:
        self.model_wrapped.eval()
        try:
            self.prediction_step(self.model_wrapped, self.data_collator(rows), prediction_loss_only=True)
        finally:
            self.model_wrapped.train()

    def _fails(self, attempt: Callable[[], None]) -> str | None:
        """What memory said when it ran out, on this process or another; None when it did not."""
        reason = None
        try:
            attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        self.model_wrapped.zero_grad()
        _free(self.args.device)
        if self.args.world_size > 1:
            failed = self.accelerator.reduce(torch.tensor(float(reason is not None), device=self.args.device), "sum")
            reason = reason or ("on another process" if float(failed) else None)
        return reason


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch and Python raise when memory runs out, on a device or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID_BY_TORCH)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _random_state(device: torch.device) -> tuple[Any, ...]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device, random.getstate(), np.random.get_state()


def _set_random_state(state: tuple[Any, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
    random.setstate(state[2])
    np.random.set_state(state[3])
