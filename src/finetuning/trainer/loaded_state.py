"""The state of a run in a checkpoint, apart from its weights: saved, restored, and verified after loading.

`RunStateMixin` saves what transformers' Trainer leaves out. The functions below compare memory with the files: the
optimizer, the learning rate schedule, the random number generators and the state that the mixin saves.
"""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.trainer_pt_utils import safe_globals

from finetuning.errors import CheckpointError, first_line, is_out_of_memory, reading
from finetuning.model.safetensors_io import read_header
from finetuning.model.saved_weights import compare_tensors
from finetuning.trainer import TrainerBase

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


@runtime_checkable
class HasState(Protocol):
    """An optimizer or a learning rate schedule."""

    def state_dict(self) -> Mapping[str, object]: ...


@runtime_checkable
class RestoresState(HasState, Protocol):
    """A callback with state of its own: plain values and tensors, which `load_state_dict` takes back."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


RUN_STATE_NAME = "run_state"
REFERENCE_FILE = Path("reference", "weights.safetensors")
"""In a folder of its own: a server loads every safetensors file next to the model's."""
_LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, EOFError,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip
"""What torch, PEFT and safetensors raise for a file that is damaged or does not fit."""


@contextmanager
def report_load_errors(checkpoint: Path, what: str, changed: Sequence[str]) -> Iterator[None]:
    """Raise CheckpointError for an error of a library in the block, which loads a part of a checkpoint.

    Args:
        changed: the changes since the checkpoint that `run_conf.allow_changed` allows, to name them as a cause.
    """
    cause = f"; changed since it was saved: {', '.join(changed)}"
    hint = "Undo the change, or start a new run in another output_dir."
    try:
        yield
    except CheckpointError as error:
        if not changed:
            raise
        raise CheckpointError(f"{error.problems[0].message}{cause}", hint=hint) from error
    except _LOAD_ERRORS as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{checkpoint}: its {what} cannot be loaded ({first_line(error)}){cause if changed else ''}",
            hint=hint if changed else "Resume from another checkpoint or start a new run.",
        ) from error


class RunStateMixin(TrainerBase):
    """Save and restore the state that transformers' Trainer and TRL keep in attributes, and lose in a checkpoint.

    That is the losses and metrics since the last log, the state of callbacks, the split of batches after a retry, and a
    reference model that follows the policy. Subclasses add to it. It is compared with the file after loading.
    """

    allowed_changes: tuple[str, ...] = ()
    """The keys whose change since the checkpoint `run_conf.allow_changed` allows."""
    num_splits: int
    _save_differences: Sequence[str]
    _tr_loss: torch.Tensor
    _total_loss_scalar: float
    _globalstep_last_logged: int
    _loaded_log: dict[str, Any] | None = None
    """What a checkpoint holds for the next log, until the training loop has begun, which empties it."""

    def run_state(self) -> dict[str, Any]:
        """Return this process's state: nested dictionaries and lists of numbers, texts and tensors."""
        return {
            "split": self.batch_split(),
            "num_splits": self.num_splits,
            "has_ended": self._ends_here(),
            "log": self._loaded_log or self._next_log(),
            "callbacks": {name: dict(callback.state_dict()) for name, callback in self._stateful_callbacks()},
        }

    def load_run_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `run_state` returned; what depends on the split of the batch only if that is the same."""
        for name, callback in self._stateful_callbacks():
            if name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][name])
        if state["split"] == self.batch_split():
            self._loaded_log = dict(state["log"])
            self.num_splits = max(self.num_splits, state["num_splits"])

    def batch_split(self) -> list[int]:
        """Return how a batch is split: the number of processes, rows at a time, and accumulation steps."""
        return [self.args.world_size, self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps]

    def moving_reference(self) -> nn.Module | None:
        """Return the reference model if it follows the policy (`sync_ref_model`); None if it does not move."""
        reference: nn.Module | None = getattr(self, "ref_model", None)
        if reference is None or not getattr(self.args, "sync_ref_model", False):
            return None
        return self.accelerator.unwrap_model(reference)

    # transformers would train one more step of a run that was killed between its last step and its publication.
    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: object,
    ) -> tuple[int, int]:
        epochs, steps = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return epochs, steps
        if self.state.global_step >= max_steps or self._has_ended(Path(resume_from_checkpoint)):
            return num_train_epochs, 0
        return epochs, steps

    def _has_ended(self, checkpoint: Path) -> bool:
        """Return whether the run of a checkpoint ended with it before its last step: by early stopping or a rule."""
        # All processes read the same file, which may be of another number of processes.
        files = [checkpoint / f"{RUN_STATE_NAME}{suffix}.pt" for suffix in ("", "_0")]
        file = next((file for file in files if file.is_file()), None)
        return file is not None and not self.allowed_changes and bool(_read(file).get("has_ended"))

    def _ends_here(self) -> bool:
        """Return whether training ends with this step before its last one, other than by a signal or a time limit."""
        signals = [getattr(callback, "received", 0) for callback in self.callback_handler.callbacks]
        is_early = self.state.global_step < self.state.max_steps
        return self.control.should_training_stop and is_early and not any(signals)

    def get_batch_samples(
        self, epoch_iterator: Iterator[object], num_batches: int, device: torch.device
    ) -> tuple[list[object], torch.Tensor | int | None]:
        if self._loaded_log is not None:
            log, self._loaded_log = self._loaded_log, None
            self._tr_loss = log["sum"].to(self._tr_loss.device)
            self._globalstep_last_logged = log["last_logged"]
            # `train_loss` is the mean over the steps of this job, which did not take those of the sum.
            self._total_loss_scalar = -self.accelerator.reduce(self._tr_loss.clone(), "mean").item()
            for name, values in log["metrics"].items():
                self._train_metrics()[name] = list(values)
            if log["total_train_tokens"] is not None:
                self._total_train_tokens = log["total_train_tokens"]
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _next_log(self) -> dict[str, Any]:
        """Return the losses and metrics since the last log."""
        self.read_metrics()
        return {
            "sum": self._tr_loss.detach().cpu().clone(),
            "last_logged": self._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in self._train_metrics().items()},
            "total_train_tokens": getattr(self, "_total_train_tokens", None),
        }

    def read_metrics(self) -> None:
        """Read the metrics that are still on the device; see `DeferredMetricsMixin`."""

    def _train_metrics(self) -> dict[str, list[object]]:
        """Return the metrics that TRL's trainers collect until the next log; {} for transformers' Trainer."""
        metrics: dict[str, dict[str, list[object]]] = getattr(self, "_metrics", {})
        return metrics.get("train", {})

    def _stateful_callbacks(self) -> Iterator[tuple[str, RestoresState]]:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RestoresState):
                yield type(callback).__name__, callback

    def _run_state_file(self, checkpoint: str) -> Path:
        suffix = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return Path(checkpoint, f"{RUN_STATE_NAME}{suffix}.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self.run_state(), self._run_state_file(output_dir))
        reference = self.moving_reference()
        if reference is not None and self.args.should_save and not self._is_sharded():
            file = Path(output_dir) / REFERENCE_FILE
            file.parent.mkdir(exist_ok=True)
            weights = {name: p.detach().cpu().contiguous() for name, p in reference.named_parameters()}
            save_file(weights, file)
            self._save_differences = [*self._save_differences, *compare_tensors(weights, read_header(file))]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with report_load_errors(Path(resume_from_checkpoint), "weights", self.allowed_changes):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        with report_load_errors(folder, "optimizer and schedule", self.allowed_changes):
            super()._load_optimizer_and_scheduler(checkpoint)
        with report_load_errors(folder, "reference model", self.allowed_changes):
            self._load_reference(folder)
        file = self._run_state_file(checkpoint)
        if not file.is_file():
            logger.warning(
                "%s has no %s: metrics since the last log and the state of the trainer controller start again.",
                folder,
                file.name,
            )
            return
        with report_load_errors(folder, f"state in {file.name}", self.allowed_changes):
            saved = _read(file)
            self.load_run_state(saved)
            difference = self._run_state_difference(saved)
        if difference is not None:
            raise CheckpointError(
                f"{folder} was not loaded as it was saved: {file.name}{difference}",
                hint="Resume from another checkpoint or start a new run, and report this as a bug.",
            )

    def _run_state_difference(self, saved: dict[str, Any]) -> str | None:
        """Return where the restored state differs from the file; None if nowhere."""
        if self.allowed_changes or saved["split"] != self.batch_split():
            return None
        state = self.run_state()
        for values in (saved, state):
            # An attempt to fit the longest rows into memory may have split batches further. A run that goes on has not
            # ended, and checkpoints of earlier versions do not say.
            del values["num_splits"]
            values.pop("has_ended", None)
        callbacks, restored = saved.pop("callbacks"), state.pop("callbacks")
        difference = first_difference(saved, state)
        if difference is not None:
            return difference
        difference = first_difference(callbacks, restored)
        # Callbacks may come and go, which does not affect the trajectory.
        return None if difference is None or difference.endswith(_ONE_SIDE) else f"[callbacks]{difference}"

    def _load_reference(self, folder: Path) -> None:
        """Set a moving reference to the weights that it had at the checkpoint.

        Raises:
            CheckpointError: the checkpoint does not have them.
        """
        reference = self.moving_reference()
        if reference is None:
            return
        if not (folder / REFERENCE_FILE).is_file():
            raise CheckpointError(
                f"{folder} has no {REFERENCE_FILE}: the reference model moves (training_args.sync_ref_model), and its"
                " weights at this step are unknown",
                hint="Start a new run in another output_dir.",
            )
        parameters = dict(reference.named_parameters())
        with safe_open(folder / REFERENCE_FILE, framework="pt") as tensors, torch.no_grad():
            names = set(tensors.keys())
            if names != set(parameters):
                raise ValueError(f"its parameters differ: {sorted(names ^ set(parameters))[0]}")
            for name, parameter in parameters.items():
                saved = tensors.get_tensor(name)
                if saved.dtype != parameter.dtype or saved.shape != parameter.shape:
                    raise ValueError(f"{name} was {saved.dtype} of shape {list(saved.shape)}")
                parameter.copy_(saved)
                if not _equal(saved, parameter):
                    raise ValueError(f"{name} was not loaded as it was saved")

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = self.accelerator.scaler
        if checkpoint is None or scaler is None:
            return
        folder = Path(checkpoint)
        with report_load_errors(folder, "loss scaler", self.allowed_changes):
            super()._load_scaler(checkpoint)
            file = folder / SCALER_FILE
            difference = first_difference(_read(file), scaler.state_dict()) if file.is_file() else None
        if difference is not None:
            raise CheckpointError(f"{folder} was not loaded as it was saved: {SCALER_FILE}{difference}")

    def _load_best_model(self) -> None:
        with report_load_errors(Path(self.state.best_model_checkpoint or ""), "weights", ()):
            super()._load_best_model()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with report_load_errors(Path(checkpoint or ""), "random states", self.allowed_changes):
            super()._load_rng_state(checkpoint)

    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)


OPTIMIZER_FILE, SCHEDULER_FILE, SCALER_FILE = "optimizer.pt", "scheduler.pt", "scaler.pt"
_PARAM_GROUPS = "param_groups"
_SAMPLED_VALUES = 1024
TensorsAreEqual: TypeAlias = Callable[[torch.Tensor, torch.Tensor], bool]
_ONE_SIDE = " (on one side only)"


def optimizer_differences(
    optimizer: HasState, scheduler: object, checkpoint: Path, *, settings_replaced: bool
) -> list[str]:
    """Return where the states of optimizer and scheduler differ from those in a checkpoint's files; [] if nowhere.

    Args:
        settings_replaced: whether the run's own settings replaced those of the parameter groups and of the schedule.
    """
    saved = _read(checkpoint / OPTIMIZER_FILE)
    state: Mapping[str, object] = optimizer.state_dict()
    if settings_replaced:
        saved, state = ({key: value for key, value in item.items() if key != _PARAM_GROUPS} for item in (saved, state))
    difference = first_difference(saved, state)
    differences = [] if difference is None else [f"{OPTIMIZER_FILE}{difference}"]
    if not settings_replaced:
        assert isinstance(scheduler, HasState)
        difference = first_difference(_read(checkpoint / SCHEDULER_FILE), scheduler.state_dict())
        differences += [] if difference is None else [f"{SCHEDULER_FILE}{difference}"]
    return differences


def saved_optimizer_differences(optimizer: HasState, scheduler: object, checkpoint: Path) -> list[str]:
    """Return where the states in a checkpoint that was just written differ from those in memory; [] if nowhere.

    Of each tensor 4 KiB from its middle are compared: every value costs as much as comparing all weights again.
    """
    differences: list[str] = []
    for name, owner in ((OPTIMIZER_FILE, optimizer), (SCHEDULER_FILE, scheduler)):
        assert isinstance(owner, HasState)
        difference = first_difference(_read(checkpoint / name), owner.state_dict(), equal=_equal_in_the_middle)
        differences += [] if difference is None else [f"{name}{difference} differs from the state in memory"]
    return differences


def rng_differences(file: Path) -> list[str]:
    """Return which random number generators of this process differ from the states in a file; [] if none does."""
    saved = _read(file)
    current: dict[str, object] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    cuda = saved.get("cuda")
    if isinstance(cuda, list) and len(cuda) == torch.cuda.device_count():
        current["cuda"] = torch.cuda.get_rng_state_all()
    elif isinstance(cuda, torch.Tensor) and torch.cuda.is_available():
        current["cuda"] = torch.cuda.get_rng_state()
    return [name for name, state in current.items() if first_difference(saved.get(name), state) is not None]


def first_difference(saved: object, loaded: object, *, equal: TensorsAreEqual | None = None) -> str | None:
    """Return the path to the first value that differs, such as `[state][3][exp_avg]`; None if all are equal.

    Tensors are equal if dtype, shape and values are; sequences may have another type (a tuple for a list).

    Args:
        equal: compares two tensors; by default all their values.
    """
    if isinstance(saved, torch.Tensor):
        return None if isinstance(loaded, torch.Tensor) and (equal or _equal)(saved, loaded) else ""
    if isinstance(saved, Mapping):
        if not isinstance(loaded, Mapping):
            return ""
        if saved.keys() != loaded.keys():
            key = sorted(map(str, saved.keys() ^ loaded.keys()))[0]
            return f"[{key}]{_ONE_SIDE}"
        items = ((key, saved[key], loaded[key]) for key in saved)
    elif isinstance(saved, np.ndarray):
        return None if np.array_equal(saved, np.asarray(loaded)) else ""
    elif isinstance(saved, Sequence) and not isinstance(saved, str | bytes):
        if not isinstance(loaded, Sequence) or len(saved) != len(loaded):
            return ""
        items = ((index, left, right) for index, (left, right) in enumerate(zip(saved, loaded, strict=True)))
    else:
        return None if saved == loaded or (saved != saved and loaded != loaded) else ""
    for key, left, right in items:
        difference = first_difference(left, right, equal=equal)
        if difference is not None:
            return f"[{key}]{difference}"
    return None


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if type(first) is not torch.Tensor and hasattr(first, "dequantize"):
        # Optimizer states of torchao are tensor subclasses that implement few operations.
        first, second = first.dequantize(), second.dequantize()
    return torch.equal(first, second.to(first.device))


def _equal_in_the_middle(saved: torch.Tensor, current: torch.Tensor) -> bool:
    if saved.dtype != current.dtype or saved.shape != current.shape:
        return False
    if type(saved) is not torch.Tensor or type(current) is not torch.Tensor or saved.numel() <= _SAMPLED_VALUES:
        # Tensor subclasses, as of optimizers in 8 bits, cannot be cut into pieces.
        return type(saved) is not torch.Tensor or _equal(saved, current)
    start = (saved.numel() - _SAMPLED_VALUES) // 2
    first, second = (tensor.reshape(-1)[start : start + _SAMPLED_VALUES] for tensor in (saved, current))
    return torch.equal(first, second.to(first.device))


def _read(file: Path) -> dict[str, object]:
    with reading(f"{file} cannot be read", CheckpointError), safe_globals():
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
