"""What this package adds to every trainer, of transformers and of TRL alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from finetuning.errors import ConfigError, GuardStopped, Location, first_line
from finetuning.trainer import TrainerBase
from finetuning.trainer.checkpointing import (
    CheckpointMixin,
    describe_last_checkpoint,
    find_not_finite,
    has_additional_state,
)
from finetuning.trainer.hooks import TrainerHooksMixin
from finetuning.trainer.loaded_state import RunStateMixin
from finetuning.trainer.oom_retry import OOMRetryMixin, locate_labels

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader, Dataset
    from transformers.trainer_utils import EvalLoopOutput

    from finetuning.config.sections.model import ModelPart
    from finetuning.trainer.late_guard import LateGuard

IGNORE_INDEX = -100
PACK_BORDERS = "pack_borders"
"""What `FlatteningCollator` adds to a batch of packs, for this module only: no model takes it."""


@contextmanager
def _reraise_as_config_error(key: str) -> Iterator[None]:
    """Turn what a library raises about the arguments of an optimizer or a schedule into a ConfigError at `key`.

    Raises:
        ConfigError: an argument is missing, unknown or invalid, or a package is not installed.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError, NotImplementedError) as error:
        raise ConfigError(
            f"is rejected: {first_line(error)}", location=Location(key=key), hint="Check its arguments."
        ) from error


class TrainingLoopMixin(TrainerBase):
    """Count tokens, stop at values that are not finite, and average the validation loss over tokens.

    `tokens_seen` is the number of tokens without padding that this process has trained on in this job. `step_loss` is
    this process's loss of the last step.
    """

    collator_columns: tuple[str, ...] = ()
    """Columns that only the collator reads. The Trainer drops columns that the model's `forward` does not take."""
    loraplus_lr_ratio: float | None = None
    """Learning rate of the LoRA B matrices divided by that of all other weights; None without LoRA+."""
    part_learning_rates: Mapping[ModelPart, float] = MappingProxyType({})
    """Peak learning rates of parts of the model that differ from that of the others."""
    step_loss: float | None = None
    mixin_summary: str | None = None
    """What the user's class overrides, if the run has one."""
    guards_late: bool | None = None
    """Whether a step is checked one step late: by default on GPUs, where reading its values makes the device wait."""
    _late_guard: LateGuard | None = None
    _token_count: torch.Tensor | int = 0
    _running_loss: torch.Tensor | float = 0.0
    _eval_totals: torch.Tensor | None = None
    """float64, shape (2,): the summed loss and the number of tokens of the evaluation in progress."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if has_additional_state(self.model):
            from finetuning.trainer.peft_methods import RankAllocationCallback, is_adalora

            if is_adalora(self.model):
                self.add_callback(RankAllocationCallback(self.model))
        is_quantized = getattr(self.model, "is_loaded_in_4bit", False) or getattr(
            self.model, "is_loaded_in_8bit", False
        )
        if is_quantized and hasattr(self.model, "peft_config") and not self._shards_weights:
            from finetuning.trainer.peft_methods import restore_adapter_dtype

            restore_adapter_dtype(self.model)

    @property
    def _shards_weights(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def tokens_seen(self) -> int:
        return int(self._token_count)

    def all_tokens_seen(self) -> int:
        """Return `tokens_seen` summed over all processes. Collective."""
        if self.args.world_size == 1:
            return self.tokens_seen
        count = torch.as_tensor(self._token_count, device=self.args.device)
        return int(self.accelerator.reduce(count, "sum"))

    def _build_accelerator_args(self, **kwargs: object) -> dict[str, object]:
        if self.args.world_size > 1:
            from finetuning.trainer.ddp import set_ddp_defaults, use_bucket_views

            set_ddp_defaults(self.args, self.model)
            return use_bucket_views(super()._build_accelerator_args(**kwargs))
        return super()._build_accelerator_args(**kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.collator_columns]))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        with _reraise_as_config_error("training_args.optim_args" if self.args.optim_args else "training_args.optim"):
            optimizer = super().create_optimizer(model)
        if is_new and self.part_learning_rates:
            from finetuning.model.vision import set_part_rates

            set_part_rates(optimizer, self.model if model is None else model, self.part_learning_rates)
        if is_new and self.loraplus_lr_ratio is not None:
            from finetuning.trainer.peft_methods import set_loraplus_lr

            set_loraplus_lr(optimizer, self.model if model is None else model, self.loraplus_lr_ratio)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        key = "lr_scheduler_kwargs" if self.args.lr_scheduler_kwargs else "lr_scheduler_type"
        with _reraise_as_config_error(f"training_args.{key}"):
            return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate, and check that `metric_for_best_model` is among the metrics.

        Raises:
            ConfigError: it is not.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        name = self.args.metric_for_best_model
        if name is not None and metric_key_prefix == "eval" and f"eval_{name.removeprefix('eval_')}" not in metrics:
            names = ", ".join(sorted(key.removeprefix("eval_") for key in metrics if key.startswith("eval_")))
            raise ConfigError(
                f"{name!r} is not among the metrics of the evaluation: {names}",
                location=Location(key="training_args.metric_for_best_model"),
            )
        return metrics

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self._token_count = self._token_count + self._count_tokens(inputs)
        with self._adapter_inputs():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._running_loss = self._running_loss + loss
        return loss

    def _adapter_inputs(self) -> AbstractContextManager[None]:
        """Return a context for a training step that leaves the input of adapters as it is, if autocast casts it."""
        if not (self.args.bf16 or self.args.fp16) or not hasattr(self.model, "peft_config") or self._shards_weights:
            return nullcontext()
        from finetuning.trainer.peft_methods import without_input_casts

        return without_input_casts(self.model)

    def _count_tokens(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | int:
        """Return the tokens of a batch without padding, on its device: copying the sum would synchronize a GPU."""
        mask = None if "cu_seq_lens_q" in inputs else inputs.get("attention_mask")
        return inputs["input_ids"].numel() if mask is None else mask.sum()

    # Called once per optimizer step, before the weights change, whether or not gradients are clipped.
    def _get_grad_norm(
        self, model: nn.Module, grad_norm: torch.Tensor | float | None = None
    ) -> torch.Tensor | float | None:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._can_guard_late(norm):
            self._guard_late(norm)
            return norm
        loss, self._running_loss = float(self._running_loss), 0.0
        self.step_loss = loss
        # Under fp16 infinite gradients are expected: the loss scaler skips the step and lowers its scale.
        gradient_norm = 0.0 if norm is None or self.args.fp16 else float(norm)
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise self._not_finite_error(loss, gradient_norm, self.state.global_step + 1)
        return norm

    def _can_guard_late(self, norm: object) -> bool:
        """Return whether the optimizer can be made to skip this step on the device, if a value is not finite."""
        late = self.args.device.type == "cuda" if self.guards_late is None else self.guards_late
        return late and type(norm) is torch.Tensor and not self.args.fp16 and not self._updates_early()

    def _updates_early(self) -> bool:
        """Return whether weights change before the gradient norm is known: DeepSpeed, updates in the backward pass."""
        return bool(self.is_deepspeed_enabled) or self.args.optim.endswith(("layerwise", "lomo"))

    def _guard_late(self, norm: Any) -> None:
        """Check the step before this one, and leave the values of this one to be read."""
        from finetuning.trainer.late_guard import LateGuard

        self.read_guard()
        if self._late_guard is None:
            self._late_guard = LateGuard()
        loss, self._running_loss = self._running_loss, 0.0
        self._late_guard.submit(self.state.global_step + 1, torch.as_tensor(loss), norm, self.optimizer)

    def read_guard(self) -> None:
        """Check the last step if it has not been checked, as before anything is saved or logged.

        Raises:
            GuardStopped: its loss or gradient norm was not finite.
        """
        values = None if self._late_guard is None else self._late_guard.read()
        if values is None:
            return
        self.step_loss = values.loss
        if not (math.isfinite(values.loss) and math.isfinite(values.gradient_norm)):
            raise self._not_finite_error(values.loss, values.gradient_norm, values.step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.read_guard()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self.read_guard()
        super()._save_checkpoint(model, trial)

    def _not_finite_error(self, loss: float, gradient_norm: float, step: int) -> GuardStopped:
        """Return the error for a loss or gradient norm of a step that is not finite; the step was not taken."""
        value = f"gradient norm {gradient_norm}" if math.isfinite(loss) else f"loss {loss}"
        message = f"step {step}: {value} is not finite"
        broken = find_not_finite(self.model)
        if broken is not None:
            since = "since an earlier step" if step > 1 else "from the start"
            message += f", and {broken} holds values that are not finite {since}"
            hint = f"{self._describe_dtype_risk()}Lower the learning rate."
        elif step > 1:
            hint = f"{self._describe_dtype_risk()}Lower the learning rate, or check the rows of this step."
        else:
            hint = (
                f"{self._describe_dtype_risk()}No step was taken before, so the learning rate is not the reason: check"
                " the rows of this step and the base model."
            )
        is_skipped = self._late_guard.leaves_weights if self._late_guard is not None else not self._updates_early()
        if broken is None and is_skipped:
            message += ". This step did not change the weights"
        return GuardStopped(f"{message}. {describe_last_checkpoint(Path(self.args.output_dir))}", hint=hint)

    def _describe_dtype_risk(self) -> str:
        """Return a remedy for the dtype that the run trains in; empty if the dtype is no likely reason."""
        if self.args.fp16:
            return "Use training_args.bf16 instead of fp16. "
        if any(weight.requires_grad and weight.dtype == torch.float16 for weight in self.model.parameters()):
            return "Set run_conf.model_args.dtype: float32, as float16 weights become NaN in training. "
        return ""

    def _num_averaging_processes(self) -> int:
        """Return how many processes gradients are averaged over after their token counts were summed."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _get_num_items_in_batch(self, batch_samples: list[object], device: torch.device) -> torch.Tensor | int | None:
        # The only method that both training and evaluation call before they compute anything of a batch. Prompts that
        # are still to be completed (GRPO) come as a list.
        packs = [batch.pop(PACK_BORDERS, None) for batch in batch_samples if isinstance(batch, dict)]
        if batch_samples and isinstance(batch_samples[-1], dict):
            self._mask_repeated_rows(batch_samples[-1], packs[-1])
        return super()._get_num_items_in_batch(batch_samples, device)

    def _mask_repeated_rows(self, batch: dict[str, Any], packs: torch.Tensor | None) -> None:
        """Set the labels of rows that occur twice in the last batch of an epoch to -100.

        All processes get the same number of rows, so accelerate fills up the last batch with rows from the start of the
        epoch. Their loss must not count twice.

        Args:
            packs: the borders of the packs, where a row is a pack of original rows.
        """
        state, labels = self.accelerator.gradient_state, batch.get("shift_labels")
        has_repeats = self.accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0
        if labels is None or not has_repeats:
            return
        rows = self._train_batch_size if self.model.training else self.args.eval_batch_size
        kept = max(state.remainder - self.accelerator.process_index * rows, 0)
        borders = batch.get("cu_seq_lens_q") if packs is None else packs
        for name in ("labels", "shift_labels"):
            if borders is None:
                batch[name][kept:] = IGNORE_INDEX
            elif kept < len(borders) - 1:
                batch[name][:, int(borders[kept]) :] = IGNORE_INDEX
        locate_labels(batch)

    def _add_eval_loss(self, total: torch.Tensor, count: torch.Tensor | int) -> None:
        """Add the summed loss and the number of tokens of a validation batch."""
        if self._eval_totals is not None and not self.model.training and count:
            counts = torch.as_tensor(count).double().to(total.device)
            self._eval_totals += torch.stack([total.detach().double(), counts])

    def evaluation_loop(
        self,
        dataloader: DataLoader[object],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, with the loss averaged over tokens: it does not depend on how rows are batched."""
        self._eval_totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total, count = self.accelerator.reduce(self._eval_totals, "sum").tolist()
        self._eval_totals = None
        if count:
            assert output.metrics is not None
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output


class TrainerMixin(TrainerHooksMixin, TrainingLoopMixin, RunStateMixin, CheckpointMixin, OOMRetryMixin):
    """All mixins in the order that they must have: hooks measure everything, and a retried step counts once."""
