"""`Telemetry`: the telemetry of one job, by callbacks or by context managers. Each context manager is a decorator, too.

with telemetry.application():
    telemetry.set_training_config(TrainingConfig(global_batch_size=32))
    with telemetry.training_loop():
        for batch in batches:
            with telemetry.training_iteration():
                ...
telemetry.close()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from finetuning.telemetry import names
from finetuning.telemetry.callbacks import TelemetryCallbacks
from finetuning.telemetry.config import Attributes
from finetuning.telemetry.spans import OpenSpan, unrecorded_span


class Telemetry(TelemetryCallbacks):
    """Records a job by callbacks (`on_…`) or by context managers (`with telemetry.training_loop(): …`)."""

    @contextmanager
    def application(self) -> Iterator[OpenSpan]:
        """Record the whole program. Files and connections stay open until `close`."""
        span = self.on_app_start() or unrecorded_span(names.APPLICATION)
        try:
            yield span
        except BaseException as error:
            self.on_app_end(error)
            raise
        self.on_app_end()

    @contextmanager
    def training_loop(
        self,
        train_iterations_start: int = 0,
        train_samples_start: int | None = None,
        *,
        attributes: Attributes | None = None,
    ) -> Iterator[OpenSpan]:
        """Record the training loop. `attributes` are added to its span."""
        span = self.on_train_start(train_iterations_start, train_samples_start, attributes=attributes)
        span = span or unrecorded_span(names.TRAINING_LOOP)
        try:
            yield span
        except BaseException as error:
            self.on_train_end(error)
            raise
        self.on_train_end()

    @contextmanager
    def training_iteration(self, tokens: float | None = None) -> Iterator[None]:
        """Record an optimizer step, with the number of its tokens if it is known."""
        self.on_training_single_iteration_start()
        try:
            yield
        except BaseException as error:
            self.fail_iteration(error)
            raise
        self.on_training_single_iteration_end(tokens=tokens)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record a phase of an iteration: `data_loading`, `model_forward`, and so on."""
        self.begin_phase(name)
        try:
            yield
        except BaseException as error:
            self.end_phase(name, error)
            raise
        self.end_phase(name)

    def validation_loop(self) -> AbstractContextManager[OpenSpan]:
        """Record a validation loop."""
        return self._evaluation_loop(names.VALIDATION_LOOP)

    def validation_iteration(self) -> AbstractContextManager[None]:
        """Record a batch of the validation loop."""
        return self._evaluation_iteration(names.VALIDATION_LOOP)

    def testing_loop(self) -> AbstractContextManager[OpenSpan]:
        """Record the testing loop."""
        return self._evaluation_loop(names.TESTING_LOOP)

    def testing_iteration(self) -> AbstractContextManager[None]:
        """Record a batch of the testing loop."""
        return self._evaluation_iteration(names.TESTING_LOOP)

    @contextmanager
    def _evaluation_loop(self, loop: str) -> Iterator[OpenSpan]:
        span = self.on_validation_start(loop) or unrecorded_span(loop)
        try:
            yield span
        except BaseException as error:
            self.on_validation_end(loop, error)
            raise
        self.on_validation_end(loop)

    @contextmanager
    def _evaluation_iteration(self, loop: str) -> Iterator[None]:
        self.on_validation_single_iteration_start(loop)
        try:
            yield
        except BaseException as error:
            self.on_validation_single_iteration_end(loop, error=error)
            raise
        self.on_validation_single_iteration_end(loop)

    @contextmanager
    def checkpoint_save(
        self, global_step: int | None = None, directory: Path | str | None = None
    ) -> Iterator[OpenSpan]:
        """Record saving a checkpoint. With the sync strategy it succeeds when the block does not raise; with the async
        one, call `on_save_checkpoint_success` when it is complete."""
        span = self.on_save_checkpoint_start(global_step) or unrecorded_span(names.CHECKPOINT_SAVE_SYNC)
        try:
            yield span
        except BaseException as error:
            self.on_save_checkpoint_end(error)
            raise
        if self.config.save_checkpoint_strategy == "sync":
            self.on_save_checkpoint_success(global_step, directory)
        self.on_save_checkpoint_end()

    @contextmanager
    def checkpoint_save_finalization(self) -> Iterator[OpenSpan]:
        """Record the part of an asynchronous save that runs in the background, in any thread."""
        parent = self.active(names.APPLICATION)
        span = self.start_span(names.CHECKPOINT_SAVE_FINALIZATION, parent=parent)
        yield from self._until_end(span or unrecorded_span(names.CHECKPOINT_SAVE_FINALIZATION))

    @contextmanager
    def span(self, name: str, attributes: Attributes | None = None) -> Iterator[OpenSpan]:
        """Record a span of your own, in any thread."""
        span = self.start_span(name, attributes)
        yield from self._until_end(span or unrecorded_span(name))

    def _until_end(self, span: OpenSpan) -> Iterator[OpenSpan]:
        try:
            yield span
        except BaseException as error:
            self.end_span(span, error)
            raise
        self.end_span(span)
