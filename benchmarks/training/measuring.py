"""What the variants of a training benchmark share, in whichever interpreter they run."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_STEPS = 2


class Meter:
    """Counts from the end of the warm-up on: seconds of this process's CPU, on a GPU wall seconds."""

    def __init__(self, device: str):
        self._device = device
        self.steps = 0
        self.seconds = 0.0
        self._began = 0.0

    def now(self) -> float:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def step(self) -> None:
        """One optimizer step is done."""
        self.steps += 1
        if self.steps == WARM_STEPS:
            self._began = self.now()
        self.seconds = self.now() - self._began


@dataclass(frozen=True)
class Bench:
    """What one variant is given."""

    folder: Path
    """With `model`, `train.jsonl`, `rows.json` and, for LoRA, `adapter`."""
    options: argparse.Namespace
    meter: Meter

    @property
    def rows_a_step(self) -> int:
        return self.options.batch * self.options.accumulation

    def rows(self) -> list[dict[str, list[int]]]:
        """The token ids and labels that our engine prepares, for the steps of this run, in their order."""
        rows = json.loads((self.folder / "rows.json").read_text(encoding="utf-8"))
        return rows[: self.options.steps * self.rows_a_step]

    def counted(self, rows: list[Any]) -> int:
        """Tokens of the rows after the warm-up."""
        return sum(len(row["input_ids"]) for row in rows[WARM_STEPS * self.rows_a_step :])

    def watch(self) -> Any:
        """A callback that counts steps."""
        import transformers

        meter = self.meter

        class Watch(transformers.TrainerCallback):
            """Counts steps."""

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                meter.step()

        return Watch()

    def arguments(self, name: str) -> dict[str, Any]:
        """Arguments that every Trainer is given; all else is its own default."""
        return {
            "output_dir": str(self.folder / name),
            "max_steps": self.options.steps,
            "per_device_train_batch_size": self.options.batch,
            "gradient_accumulation_steps": self.options.accumulation,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": self.options.device == "cpu",
        }


def last_loss(trainer: Any) -> float:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
