"""The script that TRL's documentation would have one write for the same run; tells its first step.

python benchmarks/training/trl_script.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class TellFirstStep(TrainerCallback):
    """Writes a line when the first step is done."""

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        print("FIRST STEP", flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    trainer = SFTTrainer(
        model=str(folder / "model"),
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            max_steps=20,
            per_device_train_batch_size=8,
            save_strategy="no",
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "train.jsonl"), split="train"),
        callbacks=[TellFirstStep()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
