"""Resume a run on a stream of rows: each checkpoint holds the position in the stream and its row statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetuning.data.streaming.dataset import RowStream
from finetuning.errors import CheckpointError, read_json_object, reading

if TYPE_CHECKING:
    from finetuning.data.prepared import PreparedData
    from finetuning.trainer.mixin import TrainerMixin

STREAM_NAME = "stream.json"


class StreamStateCallback(TrainerCallback):
    """Write the stream's position into each checkpoint, and its row statistics into the output directory."""

    def __init__(self, trainer: TrainerMixin, stream: RowStream, total_batch_size: int):
        self._trainer = trainer
        self._stream = stream
        self._total_batch_size = total_batch_size
        # The stream's position at the step that this run started with.
        self._first_row = self._first_step = 0

    def resume(self, checkpoint: Path) -> None:
        """Set the stream to its position at the checkpoint's last step.

        Raises:
            CheckpointError: the checkpoint does not contain it.
        """
        problem = f"{checkpoint.name} does not contain the position in the stream of rows"
        hint = "Start a new run in another output_dir: data_conf.streaming cannot be enabled when resuming."
        with reading(problem, CheckpointError, hint=hint):
            state = read_json_object(checkpoint / STREAM_NAME)
            step = read_json_object(checkpoint / "trainer_state.json")["global_step"]
            # The Trainer skips as many rows as its past steps would have at the current batch size: the stream yields
            # placeholders for them.
            self._first_row = self._stream.load_state_dict(state, step * self._total_batch_size)
        self._first_step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # The Trainer saves after this event: a checkpoint of this step contains the position after it.
        num_rows = self._first_row + (state.global_step - self._first_step) * self._total_batch_size
        self._trainer.additional_files[STREAM_NAME] = (
            json.dumps(self._stream.state_dict(num_rows), ensure_ascii=False) + "\n"
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._write_statistics(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._write_statistics(args, state)

    def _write_statistics(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self._stream.statistics.write(Path(str(args.output_dir)))


def attach_stream_state(
    trainer: TrainerMixin, data: PreparedData, total_batch_size: int, checkpoint: Path | None
) -> None:
    """Set the stream to its position in `checkpoint`, and have the trainer save the position in its own checkpoints.

    Raises:
        CheckpointError: the checkpoint does not contain the position.
    """
    assert isinstance(data.train, RowStream)
    # The stream must remember a step, and the batch that the data loader prefetches.
    data.train.lookahead = 2 * total_batch_size
    callback = StreamStateCallback(trainer, data.train, total_batch_size)
    if checkpoint is not None:
        callback.resume(checkpoint)
    trainer.add_callback(callback)
