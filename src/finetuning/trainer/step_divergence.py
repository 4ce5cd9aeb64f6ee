"""KTO's estimate of the divergence from the reference over the rows of a step, however they are split.

TRL estimates it over the rows that all processes compute at the same time. Its place in the loss is not linear, so that
the same step has another loss on another number of processes or micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from finetuning.model.peft.adapter_files import is_peft_model
from finetuning.trainer.oom_retry import split_batch
from finetuning.trainer.row_mean import Batch, RowMeanMixin

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader
    from transformers.trainer_utils import EvalLoopOutput

    class _KTOBase(RowMeanMixin):
        def _compute_kl_logps(self, model: nn.Module, batch: Batch) -> torch.Tensor: ...

else:
    _KTOBase = RowMeanMixin


class StepDivergenceMixin(_KTOBase):
    """Estimate the divergence once for each optimizer step, and once for each evaluation. Left of `TrainerMixin`.

    The mean of KTO's mismatched pairs over all rows takes as many passes as TRL's means over parts of them. The rows of
    a step, or of an evaluation, must be paired with each other (`with_kl_completions`).
    """

    calculate_KL: bool
    precompute_ref_logps: bool
    num_splits: int
    ref_model: nn.Module | None
    _batches: tuple[Batch, ...] = ()
    """The micro-batches of the step whose divergence is not estimated yet."""
    _divergence: torch.Tensor | None = None
    """Of the step, float64, in nats; None before the first one."""
    _eval_divergence: torch.Tensor | None = None
    """Of the evaluation in progress; None outside of one."""
    _is_reference_call = False

    def num_rows(self, batch: Mapping[str, torch.Tensor]) -> int:
        return len(batch["label"])

    def take_row(self, batch: Mapping[str, torch.Tensor], index: int) -> Batch:
        return {name: value[index : index + 1] for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def get_batch_samples(
        self, epoch_iterator: Iterator[object], num_batches: int, device: torch.device
    ) -> tuple[list[object], torch.Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches = tuple(batch for batch in batches if isinstance(batch, dict))
        return batches, num_items

    def training_step(
        self,
        model: nn.Module,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if self.calculate_KL and self._batches:
            model.train()
            kept = self._row_counts or tuple(map(self.num_rows, self._batches))
            self._divergence = self._estimate(model, zip(self._batches, kept, strict=True))
        self._batches = ()
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Batch],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self.calculate_KL and not self._is_sharded_model():
            self.model.eval()
            self._eval_divergence = self._estimate(self.model, self.without_repeated(dataloader))
        try:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._eval_divergence = None

    def _estimate(self, model: nn.Module, batches: Iterable[tuple[Batch, int]]) -> torch.Tensor:
        """Return the mean difference of log-probabilities of mismatched pairs, float64. Collective.

        Args:
            batches: each with the number of its first rows that count.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch, kept in batches:
                # As large as those that training fits into memory.
                for inputs, _ in split_batch(self._move_to_device(batch), self.num_splits):
                    policy = super()._compute_kl_logps(model, inputs)
                    difference = (policy - self._reference_logps(model, inputs))[: max(kept, 0)]
                    totals[0] += difference.double().sum()
                    totals[1] += len(difference)
                    kept -= self.num_rows(inputs)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        self._is_reference_call = False
        return totals[0] / totals[1]

    def _move_to_device(self, batch: Batch) -> Batch:
        device = self.args.device
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    def _reference_logps(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the log-probabilities of mismatched pairs under the reference, (rows,): as TRL's loss does."""
        from trl.models.utils import disable_gradient_checkpointing
        from trl.trainer.utils import use_adapter

        if self.precompute_ref_logps:
            return batch["ref_KL_logps"]
        trained: Any = self.model
        kwargs = self.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(trained, kwargs if isinstance(kwargs, dict) else None):
            if self.ref_model is not None:
                return super()._compute_kl_logps(self.ref_model, batch)
            unwrapped = self.accelerator.unwrap_model(trained)
            assert is_peft_model(unwrapped)
            with use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None):
                return super()._compute_kl_logps(self.model, batch)

    def _compute_kl_logps(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return, for the policy, the divergence of the step for each row, and zeros for the reference.

        The loss computes the mean of their difference. Outside of steps and evaluations it estimates it itself.
        """
        value = self._divergence if self.model.training else self._eval_divergence
        if value is None or not self.calculate_KL:
            return super()._compute_kl_logps(model, batch)
        zeros = torch.zeros(self.num_rows(batch), device=value.device)
        if self.precompute_ref_logps:
            batch["ref_KL_logps"] = zeros
        elif self._is_reference_call:
            self._is_reference_call = False
            return zeros
        else:
            self._is_reference_call = True
        return zeros + value.float()
