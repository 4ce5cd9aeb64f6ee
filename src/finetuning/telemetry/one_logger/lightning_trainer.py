"""One Logger's callback and trainer for Lightning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetuning.telemetry import names
from finetuning.telemetry.one_logger import job_callbacks
from finetuning.telemetry.one_logger.provider import TrainingTelemetryProvider

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer  # pyright: ignore[reportMissingImports]
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:
        from pytorch_lightning import Callback, LightningModule, Trainer

_Arguments = dict[str, Any]
_TrainerClass = TypeVar("_TrainerClass", bound=type)


class TimeEventCallback(Callback):
    """Records training, validation, testing and prediction of a Lightning trainer.

    Lightning has no hook for when a checkpoint has been saved: use `OneLoggerPTLTrainer` or `hook_trainer_cls`.

    Args:
        call_on_app_start: whether the application starts now. Otherwise call `on_app_start`, or use `application()`.
    """

    def __init__(self, training_telemetry_provider: TrainingTelemetryProvider, call_on_app_start: bool = True) -> None:
        super().__init__()
        self._provider = training_telemetry_provider
        self._steps_before_batch = 0
        self._is_iterating = False
        self._began_testing = False
        if call_on_app_start:
            job_callbacks.on_app_start()

    # Training: an iteration is an optimizer step, which takes several batches with gradient accumulation.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        job_callbacks.on_train_start(
            trainer.global_step,
            train_iterations_target_or_fn=trainer.max_steps if trainer.max_steps > 0 else None,
        )
        self._is_iterating = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._provider.telemetry.discard_iteration()
        job_callbacks.on_train_end()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._steps_before_batch = trainer.global_step
        if not self._is_iterating:
            job_callbacks.on_training_single_iteration_start()
            self._is_iterating = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        # With manual optimization a batch may have any number of steps; it counts as one iteration.
        accumulates = pl_module.automatic_optimization and trainer.global_step == self._steps_before_batch
        if not accumulates:
            job_callbacks.on_training_single_iteration_end()
            self._is_iterating = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        telemetry = self._provider.telemetry
        for loop in (names.VALIDATION_LOOP, names.TESTING_LOOP):
            telemetry.on_validation_end(loop, exception)
        telemetry.on_train_end(exception)

    # Validation and testing

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        job_callbacks.on_validation_start()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        job_callbacks.on_validation_end()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        job_callbacks.on_validation_single_iteration_start()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        job_callbacks.on_validation_single_iteration_end()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # One Logger's callback leaves testing to the user, who may have begun it.
        self._began_testing = self._provider.telemetry.active(names.TESTING_LOOP) is None
        if self._began_testing:
            job_callbacks.on_testing_start()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._began_testing:
            job_callbacks.on_testing_end()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        job_callbacks.on_testing_single_iteration_start()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        job_callbacks.on_testing_single_iteration_end()

    # Lightning does not call these. The trainer below calls the ones for saving, the application the others.

    def on_save_checkpoint_start(self, global_step: int) -> None:
        job_callbacks.on_save_checkpoint_start(global_step)

    def on_save_checkpoint_success(self, global_step: int, directory: Path | str | None = None) -> None:
        job_callbacks.on_save_checkpoint_success(global_step, directory=directory)

    def on_save_checkpoint_end(self, global_step: int | None = None, error: BaseException | None = None) -> None:
        job_callbacks.on_save_checkpoint_end(error=error)

    def on_app_end(self) -> None:
        job_callbacks.on_app_end()

    def on_model_init_start(self) -> None:
        job_callbacks.on_model_init_start()

    def on_model_init_end(self) -> None:
        job_callbacks.on_model_init_end()

    def on_dataloader_init_start(self) -> None:
        job_callbacks.on_dataloader_init_start()

    def on_dataloader_init_end(self) -> None:
        job_callbacks.on_dataloader_init_end()

    def on_optimizer_init_start(self) -> None:
        job_callbacks.on_optimizer_init_start()

    def on_optimizer_init_end(self) -> None:
        job_callbacks.on_optimizer_init_end()

    def on_load_checkpoint_start(self) -> None:
        job_callbacks.on_load_checkpoint_start()

    def on_load_checkpoint_end(self) -> None:
        job_callbacks.on_load_checkpoint_end()

    def on_testing_start(self) -> None:
        job_callbacks.on_testing_start()

    def on_testing_end(self) -> None:
        job_callbacks.on_testing_end()


def _recorded_save(
    callback: TimeEventCallback, save: Callable[[], None], global_step: int, filepath: Path | str
) -> None:
    """Save a checkpoint, and record it."""
    callback.on_save_checkpoint_start(global_step)
    try:
        save()
    except BaseException as error:
        callback.on_save_checkpoint_end(error=error)
        raise
    telemetry = callback._provider.telemetry
    if telemetry.config.save_checkpoint_strategy == "sync":
        callback.on_save_checkpoint_success(global_step, filepath)
    callback.on_save_checkpoint_end()


class OneLoggerPTLTrainer(Trainer):
    """Lightning's trainer with telemetry.

    Args:
        trainer_config: the arguments of Lightning's trainer.
    """

    def __init__(
        self, trainer_config: _Arguments, training_telemetry_provider: TrainingTelemetryProvider, **kwargs: Any
    ) -> None:
        self._nv_one_logger_callback = TimeEventCallback(training_telemetry_provider, **kwargs)
        super().__init__(**_with_callback(trainer_config, self._nv_one_logger_callback))

    @property
    def nv_one_logger_callback(self) -> TimeEventCallback:
        """The callback, for what Lightning does not call."""
        return self._nv_one_logger_callback

    def save_checkpoint(
        self, filepath: Path | str, weights_only: bool | None = None, storage_options: object = None
    ) -> None:
        def save() -> None:
            arguments = {} if weights_only is None else {"weights_only": weights_only}
            super(OneLoggerPTLTrainer, self).save_checkpoint(filepath, storage_options=storage_options, **arguments)

        _recorded_save(self._nv_one_logger_callback, save, self.global_step, filepath)


def _with_callback(trainer_config: _Arguments, callback: TimeEventCallback) -> _Arguments:
    """Return a trainer's arguments with one more callback, which is called first."""
    callbacks = trainer_config.get("callbacks") or []
    callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    return {**trainer_config, "callbacks": [callback, *callbacks]}


def hook_trainer_cls(
    cls: _TrainerClass,
    training_telemetry_provider: TrainingTelemetryProvider,
    telemetry_callback: TimeEventCallback | None = None,
) -> tuple[_TrainerClass, TimeEventCallback]:
    """Return a subclass of a trainer class that records, and its callback. The class itself stays as it is."""
    callback = telemetry_callback or TimeEventCallback(training_telemetry_provider)

    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **_with_callback(kwargs, callback))

    def save_checkpoint(self: Any, filepath: Path | str, *args: object, **kwargs: object) -> None:
        def save() -> None:
            cls.save_checkpoint(self, filepath, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

        _recorded_save(callback, save, self.global_step, filepath)

    members = {
        "__init__": initialize,
        "save_checkpoint": save_checkpoint,
        "nv_one_logger_callback": property(lambda self: callback),
        "__doc__": f"{cls.__name__} with telemetry.",
        "__module__": cls.__module__,
    }
    hooked: Any = type(cls)(cls.__name__, (cls,), members)
    return hooked, callback
