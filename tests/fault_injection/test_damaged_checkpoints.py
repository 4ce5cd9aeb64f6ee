"""Checkpoints that are damaged, and runs that are stopped or fail where it hurts; each in a real process."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.errors import CheckpointError
from finetuning.training.resume.find import find_resume_point

SAVED = {
    "run_conf.resume_from_checkpoint": "auto",
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 2,
    "training_args.max_steps": 4,
}
LONG = {**SAVED, "training_args.max_steps": 100_000}


@pytest.fixture
def start(fork_server: Any, sft_values: Any, write_config: Any) -> Callable[..., Any]:
    """A function that starts a run."""

    def begin(changes: Any, before: str = "") -> Any:
        return fork_server.start(["sft", write_config(sft_values(changes))], before=before)

    return begin


@pytest.fixture(scope="module")
def finished() -> dict[str, Path]:
    """The directory of a run that is done, by `whole` once there is one."""
    return {}


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000:-500] = bytes(500)
    file.write_bytes(content)


def cut(folder: Path) -> None:
    file = folder / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "half of the weights is zero": (flip, "model.safetensors is not what was written"),
    "the optimizer is cut off": (cut, "optimizer.pt has"),
    "the optimizer is gone": (lambda folder: (folder / "optimizer.pt").unlink(), "it has no optimizer state"),
    "the state is cut off": (
        lambda folder: (folder / "trainer_state.json").write_text('{"global_'),
        "trainer_state.json is truncated",
    ),
    "the random state is gone": (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    start: Any,
    finished: dict[str, Path],
    losses_by_step: Any,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    damage: str,
) -> None:
    out = tmp_path / "out"
    if "whole" not in finished:
        assert (run := start(SAVED)).wait() == 0, run.output
        shutil.rmtree(out / "checkpoint-final")
        finished["whole"] = tmp_path_factory.mktemp("finished") / "out"
        out.rename(finished["whole"])
    shutil.copytree(finished["whole"], out)
    harm, reason = DAMAGES[damage]
    harm(out / "checkpoint-4")
    assert (run := start(SAVED)).wait() == 0, run.output
    assert f"checkpoint-4 skipped: {reason}" in run.output
    assert "checkpoint-2" in run.output
    assert losses_by_step(out) == losses_by_step(finished["whole"]), (
        "the steps that were taken again are what they were"
    )


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


BYTE_DAMAGES = [remove, truncate, empty, flip_a_bit]


def test_every_file_of_a_checkpoint_is_compared(train: Any, sft_values: Any) -> None:
    out = train(sft_values(SAVED)).output_dir
    checkpoint = out / "checkpoint-4"
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    assert {"manifest.json", "optimizer.pt", "rng_state.pth", "run_config.json"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        for damage in BYTE_DAMAGES:
            damage(file)
            skipped = find_resume_point(out, "auto")
            assert skipped.checkpoint == out / "checkpoint-2", (file.name, damage.__name__)
            assert len(skipped.notes) == 1 and skipped.notes[0].startswith("checkpoint-4 skipped: ")
            with pytest.raises(CheckpointError, match=r"cannot resume from .*checkpoint-4: "):
                find_resume_point(out, str(checkpoint))
            file.write_bytes(content)
    assert find_resume_point(out, "auto").checkpoint == checkpoint


STOCK_FILES = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
# A checkpoint of transformers' Trainer has no checksum of safetensors weights and logs, and the bit of a small archive
# may be one of its padding. A missing random state is a warning.
NOT_NOTICED = [*((name, flip_a_bit) for name in STOCK_FILES if name != "optimizer.pt"), ("rng_state.pth", remove)]


@pytest.mark.parametrize("name", STOCK_FILES)
def test_a_damaged_checkpoint_of_the_stock_trainer_never_ends_in_an_internal_error(
    train: Any, sft_values: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    whole = train(sft_values({**SAVED, "training_args.max_steps": 3}))
    checkpoint = whole.output_dir / "checkpoint-2"
    shutil.rmtree(whole.final)
    shutil.rmtree(whole.output_dir / "checkpoint-3", ignore_errors=True)
    for extra in ("manifest.json", "run_config.json"):
        (checkpoint / extra).unlink()
    (checkpoint / "training_args.bin").write_bytes(b"")
    file = checkpoint / name
    content = file.read_bytes()
    values = sft_values({**SAVED, "training_args.max_steps": 3, "run_conf.resume_from_checkpoint": str(checkpoint)})
    for number, damage in enumerate([None, *BYTE_DAMAGES]):
        file.write_bytes(content)
        if damage is not None:
            damage(file)
        values["training_args"]["output_dir"] = f"{whole.output_dir}-{number}"
        if damage is None or (name, damage) in NOT_NOTICED:
            try:
                train(values)
            except CheckpointError:
                assert damage is flip_a_bit
                continue
            assert "checkpoint-2 has no manifest.json: transformers' Trainer saved it" in capsys.readouterr().out
            continue
        with pytest.raises(CheckpointError) as raised:
            train(values)
        assert raised.value.exit_code == 1
        # What the file is called, or what was found missing.
        assert name.partition(".")[0] in str(raised.value) or "it has no" in str(raised.value)


def test_a_signal_while_everything_is_set_up_ends_it_at_once(start: Any, tmp_path: Path) -> None:
    run = start(SAVED)
    assert run.wait_for((tmp_path / "out" / "config.resolved.yaml").exists, pause=0.001)
    run.send_signal(signal.SIGTERM)
    assert run.wait() in (-signal.SIGTERM, 143)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert (again := start(SAVED)).wait() == 0, again.output


def test_a_signal_in_the_middle_of_a_save_lets_it_end(start: Any, tmp_path: Path) -> None:
    run, out = start(LONG), tmp_path / "out"
    assert run.wait_for((out / ".checkpoint-2.partial").exists, pause=0.001)
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 143, run.output
    saved = sorted(path.name for path in out.glob("checkpoint-*"))
    assert saved[0] == "checkpoint-2" and not list(out.glob(".*.partial"))
    assert "signal 15 at step" in run.output and "is saved" in run.output


SLOW = """
import time
from transformers import TrainerCallback
from dataclasses import replace
from finetuning.algorithms import ALGORITHMS

class Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **more):
        if state.global_step == 3:
            time.sleep(300)

def build(parts):
    trainer = method.build_trainer(parts)
    trainer.add_callback(Slow())
    return trainer

method = ALGORITHMS["sft"]
ALGORITHMS["sft"] = replace(method, build_trainer=build)
"""


def test_a_second_signal_does_not_wait_for_the_step(start: Any, tmp_path: Path) -> None:
    impatient = "import finetuning.training.signals\nfinetuning.training.signals.REPEAT_S = 0.1\n"
    run, out = start(LONG, SLOW + impatient), tmp_path / "out"
    assert run.wait_for((out / "checkpoint-2").exists)
    assert run.wait_for(lambda: '"step": 3' in (out / "training_logs.jsonl").read_text())
    run.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    run.send_signal(signal.SIGTERM)
    assert run.wait() == -signal.SIGTERM
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


FAILING = SLOW.replace("time.sleep(300)", "raise RuntimeError('a defect of somebody')")


def test_a_defect_in_a_step_is_recorded(start: Any, tmp_path: Path) -> None:
    run, out = start(LONG, FAILING), tmp_path / "out"
    assert run.wait() == 203
    assert "error: internal error: RuntimeError: a defect of somebody" in run.output and "Traceback" not in run.output
    record = json.loads((out / "run.json").read_text())
    assert (record["status"], record["jobs"][0]["status"]) == ("failed", "failed")
    assert "a defect of somebody" in record["error"]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
