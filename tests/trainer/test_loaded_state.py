"""The states of optimizer, schedule and random number generators are compared with the checkpoint's files."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetuning.errors import CheckpointError
from finetuning.trainer.loaded_state import first_difference, rng_differences

SAVED = {"training_args.max_steps": 4, "training_args.save_strategy": "steps", "training_args.save_steps": 2}
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}}


def interrupted_values(train: Any, sft_values: Any, changes: dict[str, Any]) -> tuple[Any, Any]:
    """Train to the end, and return that run and the values of one that resumes from its first checkpoint."""
    whole = train(sft_values({**SAVED, **changes}))
    values = sft_values({**SAVED, **changes, "run_conf.resume_from_checkpoint": "auto"})
    values["training_args"]["output_dir"] += "-resumed"
    folder = Path(values["training_args"]["output_dir"])
    folder.mkdir()
    shutil.move(whole.output_dir / "checkpoint-2", folder / "checkpoint-2")
    return whole, values


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "lion_32bit", "schedule_free_adamw"]
)
def test_each_optimizer_resumes_with_the_state_it_had(train: Any, sft_values: Any, optim: str) -> None:
    if optim.startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    changes: dict[str, Any] = {"training_args.optim": optim, "peft_conf": LORA}
    if optim.startswith("schedule_free"):
        changes["training_args.lr_scheduler_type"] = "constant"
    whole, values = interrupted_values(train, sft_values, changes)
    assert train(values).losses == whole.losses


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_an_optimizer_that_loads_other_values_stops_the_run(
    train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _, values = interrupted_values(train, sft_values, {"peft_conf": LORA})
    load = torch.optim.AdamW.load_state_dict

    def load_and_change(self: torch.optim.AdamW, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for state in self.state.values():
            state[name].add_(1)

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", load_and_change)
    with pytest.raises(CheckpointError, match=rf"optimizer\.pt\[state\]\[0\]\[{name}\]"):
        train(values)


def test_a_schedule_that_loads_another_step_stops_the_run(
    train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, values = interrupted_values(train, sft_values, {"peft_conf": LORA})
    schedule = torch.optim.lr_scheduler.LambdaLR
    load = schedule.load_state_dict

    def load_and_forget(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict | {"last_epoch": 0})

    monkeypatch.setattr(schedule, "load_state_dict", load_and_forget)
    with pytest.raises(CheckpointError, match=r"scheduler\.pt\[last_epoch\]"):
        train(values)


def test_a_missing_rng_state_is_a_warning(
    train: Any, sft_values: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    _, values = interrupted_values(train, sft_values, {"peft_conf": LORA})
    checkpoint = Path(values["training_args"]["output_dir"]) / "checkpoint-2"
    (checkpoint / "rng_state.pth").unlink()
    # A checkpoint of a stock Trainer has no manifest.
    (checkpoint / "manifest.json").unlink(missing_ok=True)
    (checkpoint / "training_args.bin").write_bytes(b"")
    train(values)
    assert "has no rng_state.pth" in caplog.text + capsys.readouterr().err


def test_each_generator_is_compared(tmp_path: Path) -> None:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    file = tmp_path / "rng_state.pth"
    torch.save(state, file)
    assert rng_differences(file) == []
    random.random()
    np.random.random()
    torch.rand(1)
    assert rng_differences(file) == ["python", "numpy", "cpu"]


@pytest.mark.parametrize(
    ("saved", "loaded", "difference"),
    [
        ({"a": [1, torch.ones(2)]}, {"a": (1, torch.ones(2))}, None),
        ({"a": [1, torch.ones(2)]}, {"a": [1, torch.tensor([1.0, 2.0])]}, "[a][1]"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.bfloat16)}, "[a]"),
        ({"a": 1, "b": 2}, {"a": 1}, "[b] (on one side only)"),
        ({"a": {"b": None}}, {"a": {"b": 0}}, "[a][b]"),
        (float("nan"), float("nan"), None),
        ([1, 2], [1], ""),
    ],
)
def test_the_first_difference_is_named_by_its_path(saved: object, loaded: object, difference: str | None) -> None:
    assert first_difference(saved, loaded) == difference
