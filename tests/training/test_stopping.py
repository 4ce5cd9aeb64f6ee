"""What ends a run other than its last step: a file, the clock, a scheduler's signal."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from finetuning.distributed import read_job_end_time
from finetuning.errors import Interrupted
from finetuning.training.process_sync import HEARTBEAT_FOLDER, find_hung_rank
from finetuning.training.signals import SCHEDULER_MARGIN_S, parse_duration


def test_a_time_limit_saves_and_goes_on_the_next_time(train: Any, sft_values: Any) -> None:
    changes = {"run_conf.resume_from_checkpoint": "auto", "training_args.max_steps": 400}
    with pytest.raises(Interrupted, match=r"max_time 1s at step \d+: checkpoint-\d+ is saved") as end:
        train(sft_values({**changes, "run_conf.max_time": "1s"}))
    assert end.value.exit_code == 143
    out = Path(sft_values()["training_args"]["output_dir"])
    assert len(list(out.glob("checkpoint-*"))) == 1


def test_the_end_of_the_schedulers_time_and_a_file_stop_a_run(
    train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(sft_values()["training_args"]["output_dir"])
    out.mkdir()
    (out / "STOP").touch()
    with pytest.raises(Interrupted, match="file STOP at step 1: checkpoint-1 is saved") as end:
        train(sft_values())
    assert end.value.exit_code == 143
    assert not (out / "STOP").exists(), "the next run goes on"
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + SCHEDULER_MARGIN_S))
    with pytest.raises(Interrupted, match="the scheduler's time limit at step 2"):
        train(sft_values({"run_conf.resume_from_checkpoint": "auto"}))


def test_times_are_read() -> None:
    assert parse_duration("1h30m") == 5400
    assert parse_duration("2d") == 172800
    assert read_job_end_time({}) is None
    assert read_job_end_time({"SLURM_JOB_END_TIME": "soon"}) is None


def beat(folder: Path, rank: int, phase: str, step: int, age: float, *, frozen: bool = False) -> None:
    (folder / HEARTBEAT_FOLDER).mkdir(exist_ok=True)
    values = {"phase": phase, "step": step, "time": time.time() - age}
    file = folder / HEARTBEAT_FOLDER / f"rank-{rank}.json"
    file.write_text(json.dumps(values))
    if frozen:
        os.utime(file, (values["time"], values["time"]))


def test_who_hangs_is_the_one_that_is_furthest_behind(tmp_path: Path) -> None:
    assert find_hung_rank(tmp_path, 2, 5) is None
    beat(tmp_path, 0, "model_backward", 7, age=40)
    beat(tmp_path, 1, "model_forward", 7, age=41)
    assert find_hung_rank(tmp_path, 2, 60) is None
    assert find_hung_rank(tmp_path, 2, 5).startswith("rank 1 hangs: model_forward of step 7 for 41 s")
    beat(tmp_path, 2, "after model_backward", 6, age=40)
    assert find_hung_rank(tmp_path, 3, 5).startswith("rank 2 hangs: after model_backward of step 6")
    beat(tmp_path, 0, "model_backward", 7, age=40, frozen=True)
    assert find_hung_rank(tmp_path, 3, 5).startswith(
        "rank 0 hangs: model_backward of step 7 for 40 s, and its process does not"
    )
    beat(tmp_path, 0, "data_loading", 8, age=1)
    assert find_hung_rank(tmp_path, 3, 5) is None
