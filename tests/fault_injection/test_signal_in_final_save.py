"""SIGTERM while the final model is saved: the save finishes; a second signal leaves nothing that looks complete."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

SLOW_VERIFICATION = """
import time
import finetuning.training.final_model as module
verify = module.verify_saved
def slow(*arguments, **options):
    time.sleep(1.5)
    return verify(*arguments, **options)
module.verify_saved = slow
"""
IMPATIENT = """
import finetuning.training.signals
finetuning.training.signals.REPEAT_S = 0.1
"""
SLOW_COPY = """
import shutil, time
copy = shutil.copyfile
def slow(source, destination):
    time.sleep(0.3)
    return copy(source, destination)
shutil.copyfile = slow
"""


def is_saving(out: Path) -> bool:
    return (out / ".checkpoint-final.partial").is_dir()


def status(out: Path) -> str:
    return json.loads((out / "run.json").read_text())["status"]


@pytest.fixture
def config(sft_values: Any, write_config: Any) -> Path:
    return write_config(sft_values({"run_conf.resume_from_checkpoint": "auto"}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("before", ["", SLOW_VERIFICATION], ids=["while writing", "while verifying"])
def test_the_final_save_finishes(
    fork_server: Any, config: Path, tmp_path: Path, read_tensors: Any, before: str, number: int
) -> None:
    out = tmp_path / "out"
    process = fork_server.start(["sft", config], before=before)
    assert process.wait_for(lambda: is_saving(out), pause=0.0005)
    process.send_signal(number)
    assert process.wait() == 0, process.output
    assert f"signal {int(number)} after the last step: the final model was saved" in process.output
    assert status(out) == "completed"
    assert not list(out.glob(".*.partial"))
    tensors = read_tensors(out / "checkpoint-final")
    assert tensors
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_a_second_signal_ends_the_run_and_the_next_run_saves(
    fork_server: Any, config: Path, tmp_path: Path, read_tensors: Any
) -> None:
    out = tmp_path / "out"
    process = fork_server.start(["sft", config], before=SLOW_VERIFICATION + IMPATIENT)
    assert process.wait_for(lambda: is_saving(out))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    assert not (out / "checkpoint-final").exists()
    assert status(out) == "running"
    again = fork_server.start(["sft", config])
    assert again.wait() == 0, again.output
    assert status(out) == "completed"
    assert not list(out.glob(".*.partial"))
    assert read_tensors(out / "checkpoint-final")


def test_the_copy_into_an_existing_folder_finishes(
    fork_server: Any, sft_values: Any, write_config: Any, tmp_path: Path
) -> None:
    """Its files are written next to the old ones and then renamed: half of them would be a mixture of two models."""
    target = tmp_path / "served"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"old")
    (target / "config.json").write_bytes(b"old")
    config = write_config(sft_values({"save_model_dir": str(target)}))
    process = fork_server.start(["sft", config], before=SLOW_COPY)
    assert process.wait_for(lambda: any(target.glob("generation_config.json")) or any(target.glob("*token*")))
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0, process.output
    final = tmp_path / "out" / "checkpoint-final"
    for file in final.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes(), file.name
    assert (tmp_path / "out" / ".complete").exists()


def test_the_main_process_of_two_finishes_the_final_save(
    fork_server: Any, sft_values: Any, write_config: Any, tmp_path: Path
) -> None:
    """The other process has nothing to save, and may be about to exit."""
    out = tmp_path / "out"
    config = write_config(sft_values({}))
    main, second = fork_server.start_all(["sft", config], [SLOW_VERIFICATION, ""])
    assert main.wait_for(lambda: is_saving(out))
    for process in (main, second):
        if process.is_running:
            process.send_signal(signal.SIGTERM)
    assert main.wait() == 0, main.output
    assert second.wait() in (0, -signal.SIGTERM)
    assert status(out) == "completed"
    assert (out / "checkpoint-final" / "model.safetensors").is_file()
