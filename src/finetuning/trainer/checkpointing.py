"""Checkpoints of a trainer: written atomically, checked, rotated, and loaded with the state that PEFT leaves out."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINING_ARGS_NAME

from finetuning.atomic_io import is_disk_full, publish, staging_path, write_manifest
from finetuning.distributed import GRACE_VARIABLE, announce_wait, read_grace
from finetuning.errors import CheckpointError, GuardStopped, reading
from finetuning.model.fingerprint import ADAPTER_FINGERPRINT_FILE
from finetuning.model.peft.adapter_files import is_peft_model
from finetuning.model.save import (
    check_saved,
    compare_with_saved,
    find_stop_tokens,
    write_companion_files,
)
from finetuning.model.saved_weights import compare_with_files, has_safetensors, load_saved_weights
from finetuning.trainer import TrainerBase
from finetuning.trainer.loaded_state import (
    OPTIMIZER_FILE,
    optimizer_differences,
    rng_differences,
    saved_optimizer_differences,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler

    from finetuning.model.embeddings import EmbeddingInfo
    from finetuning.model.fingerprint import Fingerprint
    from finetuning.model.stop_tokens import EndOfTurn, StopTokens

logger = logging.getLogger(__name__)

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
OptimizerSettings = list[dict[str, Any]]
"""The settings of each parameter group."""


class CheckpointMixin(TrainerBase):
    """Save checkpoints that are complete or absent, and never hold weights that are not finite."""

    additional_files: dict[str, str]
    """Texts that are written into each checkpoint, by file name."""
    end_of_turn: EndOfTurn = None
    """What ends an assistant's turn in the chat template; None for the tokenizer's end-of-sequence token."""
    base_fingerprint: Fingerprint | None = None
    """The base model of an adapter."""
    embeddings: EmbeddingInfo | None = None
    """What `resize_embeddings` returned, to record new tokens."""
    override_optimizer_settings = False
    """Whether the run's optimizer settings replace those of the checkpoint that it resumes from."""
    _staging: Path | None = None
    _checkpoint_bytes = 0
    _save_differences: Sequence[str] = ()
    """How what this process has saved last differs from what it has in memory."""
    _step_began: float | None = None
    """When the step in progress began."""
    _is_grace_compared = False
    _verified_tokenizer: dict[str, bytes] | None = None
    """Names and contents of the tokenizer's files that were last loaded and compared."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.additional_files = {}
        super().__init__(*args, **kwargs)

    def _get_output_dir(self, trial: object) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        # With save_strategy "best" the Trainer resets should_save, which would lose the checkpoint of a run that was
        # asked to save and stop at a step with an evaluation.
        is_stopping = self.control.should_save and self.control.should_training_stop
        return super()._determine_best_metric(metrics, trial) or is_stopping

    def use_eval_weights(self) -> None:
        """Switch a schedule-free optimizer to the weights to save or evaluate; the next step switches back.

        Other optimizers have a single set of weights, and this does nothing.
        """
        if (switch := getattr(self.optimizer, "eval", None)) is not None:
            switch()

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Write a checkpoint into a staging folder, flush it, and have one rank rename it.

        When the disk is full, log a warning, skip this checkpoint and go on training.

        Raises:
            GuardStopped: a trained weight is not finite, or what was written is not what is in memory. The last
            checkpoint stays the last one.
        """
        self.use_eval_weights()
        self._check_weights()
        name = f"checkpoint-{self.state.global_step}"
        target = Path(self.args.output_dir) / name
        staging = staging_path(target)
        if self._skip_checkpoint(name, self._check_free_space()):
            return
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self._wait_for_everyone()
        if self._skip_checkpoint(name, self._disk_full_in(lambda: self._write_staged(model, trial, staging))):
            self._discard(staging)
            return
        self._check_written(staging / name, target)
        # The Trainer has recorded the best checkpoint's path inside the staging folder.
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if best.exists() or best == target:
                self.state.best_model_checkpoint = str(best)
        if self._skip_checkpoint(name, self._disk_full_in(lambda: self._publish(staging / name, target))):
            self._discard(staging)
            return
        self._wait_for_everyone()
        self._compare_with_grace_period()

    def _compare_with_grace_period(self) -> None:
        """Warn, once, if a signal would lose the checkpoint: a step and its save take longer than what it leaves."""
        if self._is_grace_compared or self._step_began is None:
            return
        self._is_grace_compared = True
        needed_s, grace_s = time.monotonic() - self._step_began, read_grace()
        if needed_s > grace_s:
            logger.warning(
                "a step with its save takes %.0f s here; the grace period is %d s: a signal would lose the checkpoint."
                " Raise the scheduler's grace period, and set %s or finetuning launch --grace to it",
                needed_s,
                grace_s,
                GRACE_VARIABLE,
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator[object], num_batches: int, device: torch.device
    ) -> tuple[list[object], torch.Tensor | int | None]:
        self._step_began = time.monotonic()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _wait_for_everyone(self) -> None:
        with announce_wait(f"the other processes, to save checkpoint-{self.state.global_step}"):
            self.accelerator.wait_for_everyone()

    def _write_staged(self, model: nn.Module, trial: object, staging: Path) -> None:
        self._staging = staging
        self._save_differences = []
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        folder = staging / f"checkpoint-{self.state.global_step}"
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.should_save and not is_sharded and (folder / OPTIMIZER_FILE).is_file():
            differences = saved_optimizer_differences(self.optimizer, self.lr_scheduler, folder)
            self._save_differences = [*self._save_differences, *differences]

    def _check_written(self, staged: Path, target: Path) -> None:
        """Raise GuardStopped in all processes if any has saved something else than it has in memory. Collective."""
        differences = self._save_differences
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2 and not self.args.save_only_model:
            from finetuning.trainer.fsdp import compare_sharded_weights

            self._wait_for_everyone()
            differences = [*differences, *compare_sharded_weights(self.model, staged)]
        if self._any_process(bool(differences)):
            self._discard(staged.parent)
            check_saved(target, differences or ["another process reports what differs"])

    def _publish(self, staged: Path, target: Path) -> None:
        if not self.args.should_save:
            return
        self.state.save_to_json(str(staged / "trainer_state.json"))
        for name, text in self.additional_files.items():
            (staged / name).write_text(text, encoding="utf-8")
        write_manifest(staged)
        if target.is_dir():
            # An invalid checkpoint that this run did not resume from. Rename it first: if its removal is interrupted,
            # what is left must not look like a complete checkpoint.
            target.rename(staged.parent / "replaced")
        publish(staged, target)
        shutil.rmtree(staged.parent, ignore_errors=True)
        self._checkpoint_bytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        best = self.state.best_model_checkpoint
        rotate_checkpoints(target, self.args.save_total_limit, Path(best) if best else None)

    def _check_free_space(self) -> str | None:
        """Return why a checkpoint of the size of the last one does not fit; None when it does."""
        free = shutil.disk_usage(self.args.output_dir).free
        if free >= self._checkpoint_bytes:
            return None
        return f"needs {self._checkpoint_bytes:,} bytes, {free:,} free"

    def _disk_full_in(self, write: Callable[[], None]) -> str | None:
        """Return the error message when the disk fills up in `write`; None when it does not."""
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_disk_full(error, Path(self.args.output_dir)):
                raise
            return str(error).partition("\n")[0]
        return None

    def _skip_checkpoint(self, name: str, reason: str | None) -> bool:
        """Return whether any process has a reason to skip the checkpoint, and log this process's one. Collective."""
        skips = self._any_process(reason is not None)
        if reason is not None:
            logger.warning(
                "%s is not saved: no space left in %s (%s). Training continues; earlier checkpoints are kept.",
                name,
                self.args.output_dir,
                reason,
            )
        return skips

    def _any_process(self, flag: bool) -> bool:
        """Return whether the flag is set in any process. Collective."""
        if self.args.world_size == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), "sum")
        return float(total) > 0

    def _discard(self, staging: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._wait_for_everyone()

    def _check_weights(self) -> None:
        """Raise GuardStopped unless every trained weight of every process is finite. Collective."""
        flags = [
            ~torch.isfinite(_local_tensor(weight)).all() for weight in self.model.parameters() if weight.requires_grad
        ]
        bad = torch.stack([flag.to(self.args.device) for flag in flags]).sum().float() if flags else torch.zeros(1)
        if self.args.world_size > 1:
            bad = self.accelerator.reduce(bad.to(self.args.device), "sum")
        if float(bad):
            raise GuardStopped(
                f"step {self.state.global_step}: a weight is not finite after the optimizer step. This step was not"
                f" saved. {describe_last_checkpoint(Path(self.args.output_dir))}",
                hint="Lower the learning rate.",
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        # The Trainer's may rename the weights and drop tied ones in the dictionary that it is given.
        gathered = None if state_dict is None else dict(state_dict)
        with self._all_ranks():
            super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if self._has_adapter_state():
            from finetuning.trainer.peft_methods import write_adapter_state

            write_adapter_state(self.model, folder)
        # A pickle that may contain a Hub token; the config is kept as YAML.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        tokenizer = self.processing_class if isinstance(self.processing_class, PreTrainedTokenizerBase) else None
        # The Trainer has saved the tokenizer and the generation config with the base model's stop tokens.
        stop_tokens = find_stop_tokens(model, tokenizer, self.end_of_turn) if tokenizer is not None else None
        if tokenizer is not None:
            write_companion_files(
                tokenizer,
                folder,
                model=model,
                stop_tokens=stop_tokens,
                base_fingerprint=self.base_fingerprint,
                embeddings=self.embeddings,
            )
        differences = self._compare_with_saved(model, tokenizer, folder, stop_tokens, gathered)
        if self._staging is None:
            check_saved(folder, differences)
        # `_save_checkpoint` raises in all processes: raising here would leave the others waiting for this one.
        self._save_differences = differences

    def _compare_with_saved(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        folder: Path,
        stop_tokens: StopTokens | None,
        gathered: dict[str, torch.Tensor] | None,
    ) -> list[str]:
        """Return how the files that `_save` wrote differ from what is in memory; [] if they do not."""
        if gathered == {}:
            # DeepSpeed saves shards of its own when weights are not gathered (`stage3_gather_16bit_weights_on_...`).
            return []
        # Loading a tokenizer of 150,000 tokens takes a second. It is done once; later files have to be the same.
        tokenizer_files = _read_tokenizer_files(folder)
        is_known = tokenizer_files == self._verified_tokenizer
        with self._all_ranks(model):
            differences = compare_with_saved(
                model,
                None if is_known else tokenizer,
                folder,
                stop_tokens=stop_tokens,
                base_fingerprint=self.base_fingerprint if tokenizer is not None else None,
                state_dict=gathered,
            )
        if self._has_adapter_state():
            from finetuning.trainer.peft_methods import compare_adapter_state

            differences += compare_adapter_state(self.model, folder)
        if not differences:
            self._verified_tokenizer = tokenizer_files
        return differences

    def _all_ranks(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
        """Return a context in which an AdaLoRA adapter has all its ranks; it does nothing for other models.

        Args:
            model: the unwrapped model, if it is at hand: to unwrap it visits every module.
        """
        model = self.accelerator.unwrap_model(self.model) if model is None else model
        if not has_additional_state(model):
            return nullcontext()
        from finetuning.trainer.peft_methods import keep_all_ranks

        return keep_all_ranks(model)

    def _has_adapter_state(self) -> bool:
        return has_additional_state(self.model) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a checkpoint, and verify that those in memory are those in its files.

        Raises:
            CheckpointError: they are not, or the checkpoint is another model's.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Sharded checkpoints have the names that the weights have in memory. They are not compared.
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        weights = self.accelerator.unwrap_model(self.model)
        with reading(f"the weights of {folder} cannot be loaded", CheckpointError):
            if is_peft_model(weights):
                self._load_adapter(folder, model)
            else:
                load_saved_weights(weights, folder)
        if has_safetensors(folder):
            _check_loaded(folder, self._differences_from_files(folder))
        else:
            logger.warning("the weights of %s are not in safetensors files: not compared after loading", folder)

    def _load_adapter(self, folder: Path, model: nn.Module | None) -> None:
        dtypes = {name: weight.dtype for name, weight in self.model.named_parameters()}
        super()._load_from_checkpoint(str(folder), model)
        if has_additional_state(self.model):
            from finetuning.trainer.peft_methods import read_adapter_state

            read_adapter_state(self.model, folder)
        # PEFT loads adapters in float32, even those that were trained in a smaller dtype.
        for name, weight in self.model.named_parameters():
            if weight.dtype != dtypes.get(name, weight.dtype):
                weight.data = weight.data.to(dtypes[name])
        unwrapped = self.accelerator.unwrap_model(self.model)
        if is_peft_model(unwrapped) and not has_additional_state(unwrapped):
            from finetuning.model.peft.adapter_files import restore_lora_tensors

            restore_lora_tensors(unwrapped, folder)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        assert self.state.best_model_checkpoint is not None
        logger.info("loading the best model from %s", self.state.best_model_checkpoint)
        CheckpointMixin._load_from_checkpoint(self, self.state.best_model_checkpoint)

    def _differences_from_files(self, folder: Path) -> list[str]:
        """Return how the weights in memory differ from those of a checkpoint; [] if they are equal."""
        with self._all_ranks():
            return compare_with_files(self.accelerator.unwrap_model(self.model), folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        settings = optimizer_settings(self.optimizer) if self.override_optimizer_settings else []
        with reading(f"the optimizer and scheduler states of {checkpoint} cannot be loaded", CheckpointError):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.override_optimizer_settings:
            restore_optimizer_settings(self.optimizer, self.lr_scheduler, settings)
        folder = Path(checkpoint)
        # Sharded optimizer states have a format of their own, which is not compared.
        if (folder / OPTIMIZER_FILE).is_file() and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            differences = optimizer_differences(
                self.optimizer, self.lr_scheduler, folder, settings_replaced=self.override_optimizer_settings
            )
            _check_loaded(folder, differences)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"the random states of {checkpoint} cannot be loaded", CheckpointError):
            super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        suffix = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        file = Path(checkpoint) / f"rng_state{suffix}.pth"
        if file.is_file():
            _check_loaded(file.parent, [f"{file.name}: {name}" for name in rng_differences(file)])
        else:
            logger.warning(
                "%s has no %s: dropout and other random values are not those of an uninterrupted run.",
                file.parent,
                file.name,
            )


def _check_loaded(checkpoint: Path, differences: list[str]) -> None:
    """Raise CheckpointError if there are differences between the state in memory and a checkpoint's files."""
    if differences:
        raise CheckpointError(
            f"{checkpoint} was not loaded as it was saved: {'; '.join(differences)}",
            hint="Resume from another checkpoint or start a new run, and report this as a bug.",
        )


def _read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files in a folder that may be the tokenizer's: all but weights and their fingerprint.

    They are compared as they are: a digest of a large tokenizer would be a tenth of an adapter's verification.
    """
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and file.name != ADAPTER_FINGERPRINT_FILE
    }


def has_additional_state(model: nn.Module) -> bool:
    """Return whether the model has an adapter with state that PEFT does not save: AdaLoRA, or a prompt encoder."""
    configs = getattr(model, "peft_config", {}).values()
    return any(config.is_prompt_learning or config.peft_type.value in ("ADALORA", "CPT") for config in configs)


def _local_tensor(weight: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a weight; the whole weight unless FSDP has sharded it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def rotate_checkpoints(newest: Path, limit: int | None, best: Path | None) -> None:
    """Remove checkpoints other than `newest` and `best` until at most `limit` are left.

    Checkpoints of a later step are removed first: this run did not resume from them. Each is renamed before its files
    are removed, so what is called a checkpoint is complete even if the removal is interrupted. Nothing is removed when
    `limit` is None or 0.
    """
    if not limit or limit < 0:
        return
    step = _step(newest)
    candidates = [
        path
        for path in newest.parent.glob(f"{newest.name.rpartition('-')[0]}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit() and path not in (newest, best)
    ]
    candidates.sort(key=lambda path: (_step(path) < step, _step(path)))
    num_kept = len({newest, best} - {None})
    for path in candidates[: max(len(candidates) + num_kept - limit, 0)]:
        retired = staging_path(path)
        shutil.rmtree(retired, ignore_errors=True)
        os.rename(path, retired)
        shutil.rmtree(retired, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def optimizer_settings(optimizer: torch.optim.Optimizer) -> OptimizerSettings:
    """Return the settings of each parameter group: learning rate, weight decay, betas and so on."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def restore_optimizer_settings(
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler, settings: OptimizerSettings
) -> None:
    """Replace the settings that a checkpoint loaded, and set the learning rate that the schedule has at this step."""
    factors = [
        group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0 for group in optimizer.param_groups
    ]
    lr_lambdas = getattr(scheduler, "lr_lambdas", None)
    if lr_lambdas is not None:
        factors = [lr_lambda(scheduler.last_epoch) for lr_lambda in lr_lambdas]
    for group, new, factor in zip(optimizer.param_groups, settings, factors, strict=True):
        group.update(new)
        group["lr"] = new.get("initial_lr", new["lr"]) * factor
    rates = {
        "base_lrs": [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups],
        "_last_lr": [group["lr"] for group in optimizer.param_groups],
    }
    state = scheduler.state_dict()
    scheduler.load_state_dict(state | {name: rate for name, rate in rates.items() if name in state})


def find_not_finite(model: nn.Module) -> str | None:
    """Return the name of a trained weight of this process that holds NaN or infinity; None if all are finite."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(_local_tensor(weight)).all()):
            return name
    return None


def describe_last_checkpoint(output_dir: Path) -> str:
    """Return a sentence on what a run that was stopped can continue from. A checkpoint has finite weights only."""
    suffixes = [path.name.rpartition("-")[2] for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    steps = [int(suffix) for suffix in suffixes if suffix.isdecimal()]
    if not steps:
        return "No checkpoint was saved before"
    return f"checkpoint-{max(steps)} was saved before, with finite weights"
