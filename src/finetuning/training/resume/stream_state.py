"""A run on a stream of rows: where it stood in each checkpoint, and what became of its rows so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetuning.data.streaming.dataset import RowStream
from finetuning.errors import CheckpointError

if TYPE_CHECKING:
    from finetuning.data.prepared import PreparedData

STREAM_NAME = "stream.json"


class StreamStateCallback(TrainerCallback):
    """Has each checkpoint say where the stream stood, and the report what became of its rows by then."""

    def __init__(self, trainer: Any, stream: RowStream, rows_a_step: int, output_dir: Path):
        self._trainer = trainer
        self._stream = stream
        self._rows_a_step = rows_a_step
        self._output_dir = output_dir
        self._num_yielded = self._step = 0

    def go_on(self, checkpoint: Path) -> None:
        """Sets the stream to where it stood at the checkpoint's last step.

        Raises:
            CheckpointError: the checkpoint does not say where that is.
        """
        try:
            state = json.loads((checkpoint / STREAM_NAME).read_text(encoding="utf-8"))
            step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint.name} does not say where its stream of rows stood: {error}",
                hint="Start afresh in another output_dir; only a run with data_conf.streaming can be resumed with it.",
            ) from None
        # The Trainer passes over as many rows as its steps have had, counted by the batch of now.
        self._num_yielded, self._step = self._stream.load_state_dict(state, step * self._rows_a_step), step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """What a checkpoint of this step would need."""
        num_yielded = self._num_yielded + (state.global_step - self._step) * self._rows_a_step
        self._trainer.companions[STREAM_NAME] = (
            json.dumps(self._stream.state_dict(num_yielded), ensure_ascii=False) + "\n"
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._write(state)

    def _write(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self._stream.statistics.write(self._output_dir)


def attach_stream_state(
    trainer: Any, data: PreparedData, rows_a_step: int, output_dir: Path, checkpoint: Path | None
) -> None:
    """Puts the stream where a checkpoint left it, and has the trainer's own say where it stands; nothing for rows that
    are all at hand."""
    if not isinstance(data.train, RowStream):
        return
    # One step, and one batch that the loader fetches ahead of it.
    data.train.lookahead = 2 * rows_a_step
    follow = StreamStateCallback(trainer, data.train, rows_a_step, output_dir)
    if checkpoint is not None:
        follow.go_on(checkpoint)
    trainer.add_callback(follow)
