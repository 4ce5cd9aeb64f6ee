"""Two processes of torchrun on the CPU: one optimization, one voice, one output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}


@pytest.mark.parametrize(("kind", "batching"), [("sft", "auto"), ("dpo", None)])
def test_the_curve_is_that_of_one_process(
    train: Any,
    sft_values: Any,
    dpo_values: Any,
    write_config: Any,
    read_tensors: Any,
    torchrun: Any,
    logged_losses: Any,
    tmp_path: Path,
    kind: str,
    batching: str | None,
) -> None:
    changes = {
        # 24 rows, 17 of which train, make a last batch that two processes cannot share evenly.
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.3},
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 2,
        "training_args.max_steps": 6,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 3,
        "peft_conf": LORA,
    }
    if kind == "dpo":
        changes |= {"data_conf.validation_data": {"type": "NONE"}, "training_args.eval_strategy": "no"}
    make = sft_values if kind == "sft" else dpo_values
    shared = tmp_path / "shared"
    # Where there is no GPU, nobody has to say so.
    local = {"training_args.output_dir": str(shared), "training_args.use_cpu": torch.accelerator.is_available() or None}
    config = write_config(make({**changes, **local}), "shared.yaml")
    result = torchrun(kind, config, fresh=kind == "sft")
    assert "find_unused_parameters" not in result.stderr
    assert result.stdout.count("Completed after 6 steps") == 1
    assert result.stdout.count("rows in a batch") == 1
    assert "4 = 2 x 2 x 1" in result.stdout
    alone = train(make({**changes, "training_args.output_dir": str(tmp_path / "alone")}))
    curves = [logged_losses(folder) for folder in (shared, alone.output_dir)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert len(curves[0]) == (9 if kind == "sft" else 6)
    # The console script adds what a run inside of this process does not have, and two processes a heartbeat.
    names = {path.name for path in shared.iterdir()} - {".complete", "telemetry", "heartbeat"}
    assert names == {path.name for path in alone.output_dir.iterdir()} - {"telemetry"}
    assert not list(shared.rglob("training_args.bin"))
    first, second = read_tensors(shared / "checkpoint-final"), read_tensors(alone.final)
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in second)
    record = json.loads((shared / "run.json").read_text())
    assert [job["status"] for job in record["jobs"]] == ["completed"]
