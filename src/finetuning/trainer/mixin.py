"""What every trainer of ours does besides its algorithm."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINING_ARGS_NAME

from finetuning.atomic_io import is_disk_full, publish, staging_path, write_manifest
from finetuning.errors import GuardStopped
from finetuning.trainer.checkpoint_state import (
    optimizer_settings,
    read_encoders,
    restore_optimizer_settings,
    rotate_checkpoints,
    write_encoders,
)
from finetuning.trainer.hooks import TrainerHooksMixin
from finetuning.trainer.oom_retry import OOMRetryMixin
from finetuning.trainer.peft_methods import (
    LoraPlusMixin,
    RankAllocationCallback,
    is_adalora,
    ranks_kept_whole,
    read_importance,
    write_importance,
)

logger = logging.getLogger(__name__)


class CheckpointSafetyMixin:
    """Stands left of a transformers Trainer: counts tokens, stops at values that are not finite, publishes whole
    checkpoints.

    `tokens_seen` is the number of tokens, padding left out, that this process has trained on in this job;
    `step_loss` is its loss of the last step.
    """

    collated_columns: tuple[str, ...] = ()
    """Columns that only the collator reads; the Trainer keeps those that the model takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._token_count: torch.Tensor | int = 0
        self._step_loss: torch.Tensor | float = 0.0
        self.step_loss: float | None = None
        self._staging: Path | None = None
        self._evaluated: torch.Tensor | None = None
        self._checkpoint_bytes = 0
        self.companions: dict[str, str] = {}
        """Texts that go into each checkpoint, by file name."""
        self.applies_settings = False
        """Whether the optimizer's settings win over those of a checkpoint."""
        super().__init__(*args, **kwargs)
        if is_adalora(self.model):
            self.add_callback(RankAllocationCallback(self.model))

    @property
    def tokens_seen(self) -> int:
        return int(self._token_count)

    def all_tokens_seen(self) -> int:
        """`tokens_seen` of all processes together; every process calls this at the same step."""
        if self.args.world_size == 1:
            return self.tokens_seen
        count = torch.as_tensor(self._token_count, device=self.args.device)
        return int(self.accelerator.reduce(count, "sum"))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.collated_columns]))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self._token_count = self._token_count + self._count_tokens(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        return loss

    def _count_tokens(self, inputs: Any) -> torch.Tensor | int:
        """Tokens of a batch, padding left out, summed where it lies: reading it would make a GPU wait at every step."""
        mask = inputs.get("attention_mask")
        return inputs["input_ids"].numel() if mask is None else mask.sum()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, self._step_loss = float(self._step_loss), 0.0
        self.step_loss = loss
        # Under fp16 an infinite gradient is the loss scaler's business: it skips the step and scales less.
        gradient_is_finite = norm is None or self.args.fp16 or math.isfinite(float(norm))
        if not (math.isfinite(loss) and gradient_is_finite):
            step = self.state.global_step + 1
            what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {float(norm)}"
            raise GuardStopped(
                f"step {step}: {what} is not finite. The weights were not touched by this step, and nothing of it was"
                " saved; the last checkpoint is good.",
                hint="Lower the learning rate, use bf16 instead of fp16, or look at the rows of this step.",
            )
        return norm

    def _gradient_processes(self) -> int:
        """Over how many processes gradients are averaged whose token counts were summed."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # The one place that both training and evaluation pass before anything is computed of a batch.
        # Prompts that are still to be answered come as a list.
        if batch_samples and isinstance(batch_samples[-1], Mapping):
            self._unlabel_repeated_rows(batch_samples[-1])
        return super()._get_num_items_in_batch(batch_samples, device)

    def _unlabel_repeated_rows(self, batch: Any) -> None:
        """Takes the labels off the rows that stand twice in the last batch of a pass.

        Each process gets as many rows as every other, so that the last round of a pass is filled up with rows from
        its beginning; one process would not see them again, and so no loss of theirs counts. Rows packed out of others
        are left as they are, but for a process that has repeated ones only.
        """
        state, labels = self.accelerator.gradient_state, batch.get("shift_labels")
        repeats = self.accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0
        if labels is None or not repeats:
            return
        rows = self._train_batch_size if self.model.training else self.args.eval_batch_size
        kept = max(state.remainder - self.accelerator.process_index * rows, 0)
        borders = batch.get("cu_seq_lens_q")
        for name in ("labels", "shift_labels"):
            if borders is None:
                batch[name][kept:] = -100
            elif kept == 0:
                batch[name][:] = -100
            elif kept < rows == len(borders) - 1:
                batch[name][:, int(borders[kept]) :] = -100

    def _note_evaluation(self, total: torch.Tensor, count: torch.Tensor | int) -> None:
        """Keeps a validation batch's summed loss and its token count."""
        if self._evaluated is not None and not self.model.training and count:
            self._evaluated += torch.stack([total.detach().double(), torch.as_tensor(count).double().to(total.device)])

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the loss as a mean over all tokens, however the rows fell into batches."""
        self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        total, count = self.accelerator.reduce(self._evaluated, "sum").tolist()
        self._evaluated = None
        if count:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = total / count
        return output

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that is whole or not there: put together in a staging folder, flushed, renamed by one rank.

        Without room on the disk there is none, which is said; training goes on, and the next is tried as always.

        Raises:
            GuardStopped: a trained weight is not finite, so that the last checkpoint stays the last.
        """
        self.settle_weights()
        self._check_weights()
        name = f"checkpoint-{self.state.global_step}"
        target = Path(self.args.output_dir) / name
        staging = staging_path(target)
        if self._without_room(name, self._lacks_room()):
            return
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        if self._without_room(name, self._full_while(lambda: self._stage(model, trial, staging))):
            self._discard(staging)
            return
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if best.exists() or best == target:
                self.state.best_model_checkpoint = str(best)
        if self._without_room(name, self._full_while(lambda: self._publish(staging / name, target))):
            self._discard(staging)
            return
        self.accelerator.wait_for_everyone()

    def settle_weights(self) -> None:
        """Puts the weights to be used in the place of those that a schedule-free optimizer computes gradients at; the
        next step changes them back. Other optimizers have one kind of weights only."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # A run that is told to save and stop at a step of evaluation would forget to save, were it not the best.
        stopping = self.control.should_save and self.control.should_training_stop
        return super()._determine_best_metric(*args, **kwargs) or stopping

    def _stage(self, model: Any, trial: Any, staging: Path) -> None:
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None

    def _publish(self, staged: Path, target: Path) -> None:
        if not self.args.should_save:
            return
        self.state.save_to_json(str(staged / "trainer_state.json"))
        for companion, text in self.companions.items():
            (staged / companion).write_text(text, encoding="utf-8")
        write_manifest(staged)
        if target.is_dir():
            # One that was passed over; cut short, its removal must not leave something that looks whole.
            target.rename(staged.parent / "replaced")
        publish(staged, target)
        shutil.rmtree(staged.parent, ignore_errors=True)
        self._checkpoint_bytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        best = self.state.best_model_checkpoint
        rotate_checkpoints(target, self.args.save_total_limit, Path(best) if best else None)

    def _lacks_room(self) -> str | None:
        """Why a checkpoint as large as the last one would not fit."""
        free = shutil.disk_usage(self.args.output_dir).free
        if free >= self._checkpoint_bytes:
            return None
        return f"it needs {self._checkpoint_bytes:,} bytes, and {free:,} are left"

    def _full_while(self, write: Callable[[], None]) -> str | None:
        """How the disk was full while something was written; None when it was not."""
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_full(error, Path(self.args.output_dir)):
                raise
            return str(error).partition("\n")[0]
        return None

    def _without_room(self, name: str, reason: str | None) -> bool:
        """Whether one of the processes has no room for a checkpoint; all agree, and the one says so."""
        lacking = reason is not None
        if self.args.world_size > 1:
            flag = torch.tensor(float(lacking), device=self.args.device)
            lacking = float(self.accelerator.reduce(flag, "sum")) > 0
        if reason is not None:
            logger.warning(
                "%s is not saved: no room on the disk of %s (%s). Training goes on; the checkpoints before it stay.",
                name,
                self.args.output_dir,
                reason,
            )
        return lacking

    def _discard(self, staging: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _check_weights(self) -> None:
        """Nothing while every trained weight of every process is finite; called by all of them."""
        flags = [~torch.isfinite(_share(weight)).all() for weight in self.model.parameters() if weight.requires_grad]
        bad = torch.stack([flag.to(self.args.device) for flag in flags]).sum().float() if flags else torch.zeros(1)
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad.to(self.args.device), "sum")
        if float(bad):
            raise GuardStopped(
                f"step {self.state.global_step}: a weight is not finite after the optimizer's step. Nothing of it was"
                " saved; the last checkpoint is good.",
                hint="Lower the learning rate.",
            )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with ranks_kept_whole(self.model):
            super()._save(output_dir, state_dict)
        # A pickle that may hold a hub token; the run's config is kept as YAML.
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            write_encoders(self.model, folder)
            write_importance(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        before = {name: weight.dtype for name, weight in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        read_encoders(self.model, Path(resume_from_checkpoint))
        read_importance(self.model, Path(resume_from_checkpoint))
        # PEFT widens the adapter that it loads to float32, even where it was trained in fewer bits.
        for name, weight in self.model.named_parameters():
            if weight.dtype != before.get(name, weight.dtype):
                weight.data = weight.data.to(before[name])


def _share(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight: all of it, unless FSDP has shared it out."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class TrainerMixin(TrainerHooksMixin, CheckpointSafetyMixin, LoraPlusMixin, OOMRetryMixin):
    """All, in the order in which they belong: what is measured holds what is safeguarded, and that what is retried."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        settings = optimizer_settings(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.applies_settings:
            restore_optimizer_settings(self.optimizer, self.lr_scheduler, settings)
