"""Every run logs its first and its last step, and says of each loss what it is of."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from finetuning.report.html import key_results
from finetuning.report.run_folder import FinalLosses, final_losses, read_run
from finetuning.report.run_list import list_runs

EVALUATED = {
    "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.25},
    "training_args.eval_strategy": "steps",
    "training_args.eval_steps": 4,
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 4,
}


def logged_steps(run: Any) -> list[int]:
    return [entry["step"] for entry in run.trainer.state.log_history if "loss" in entry]


def test_a_short_run_logs_every_step_and_names_its_losses(
    train: Any, sft_values: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(sft_values({**EVALUATED, "training_args.max_steps": 9, "training_args.logging_steps": None}))
    assert logged_steps(run) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    losses = run.result.losses
    assert losses.training_steps == (9, 9) and losses.training == run.losses[-1] == run.result.final_loss
    assert (losses.validation_step, losses.best_checkpoint) == (9, f"checkpoint-{losses.best_step}")

    assert json.loads((tmp_path / "out" / "run.json").read_text())["losses"] == json.loads(json.dumps(asdict(losses)))
    (listed,) = list_runs(tmp_path)
    report = dict(key_results(read_run(tmp_path / "out")))
    for label, text in losses.lines():
        assert listed.losses[label] == report[label] == text
    assert listed.losses["final loss"].endswith(", step 9")
    assert " at step 9" in listed.losses["validation loss"]


def test_the_first_and_the_last_step_are_logged(train: Any, sft_values: Any) -> None:
    run = train(sft_values({"training_args.max_steps": 25, "training_args.logging_steps": None}))
    assert logged_steps(run) == [1, 10, 20, 25]
    assert run.result.losses.lines() == [("final loss", f"{run.losses[-1]:.4f}, mean over steps 21 to 25")]


def test_logging_can_be_configured_and_switched_off(train: Any, sft_values: Any, tmp_path: Path) -> None:
    values = {"training_args.max_steps": 5, "training_args.logging_steps": 2, "training_args.logging_first_step": False}
    assert logged_steps(train(sft_values(values))) == [2, 4, 5]
    values |= {"training_args.logging_strategy": "no", "training_args.output_dir": str(tmp_path / "silent")}
    unlogged = train(sft_values(values))
    assert logged_steps(unlogged) == [] and unlogged.result.final_loss is None


@pytest.mark.parametrize(
    ("series", "lines"),
    [
        ({}, []),
        ({"loss": [(1, 2.0), (10, 1.5)]}, [("final loss", "1.5000, mean over steps 2 to 10")]),
        ({"loss": [(7, 2.0)]}, [("final loss", "2.0000, mean over steps 1 to 7")]),
        (
            {"eval_loss": [(5, 0.5), (10, 0.7)]},
            [("validation loss", "0.7000 at step 10; 0.5000 at step 5, the best")],
        ),
        ({"eval_loss": [(5, 0.5), (10, 0.5)]}, [("validation loss", "0.5000 at step 10, the best, checkpoint-10")]),
    ],
)
def test_a_loss_is_named_for_what_it_is(tmp_path: Path, series: Any, lines: Any) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    assert final_losses(series, tmp_path).lines() == lines


def test_a_record_of_another_version_is_listed(tmp_path: Path) -> None:
    record = {"status": "completed", "losses": {"training": 1.0, "unknown": 2}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert list_runs(tmp_path)[0].losses == {}
    assert FinalLosses().lines() == []


def test_fewer_rows_than_a_batch_are_a_warning(train: Any, sft_values: Any, capsys: pytest.CaptureFixture[str]) -> None:
    batch = {"total_train_batch_size": 32, "max_per_device_train_batch_size": 2}
    train(sft_values({"batchsize_conf": batch, "training_args.max_steps": 1}))
    assert "warning: 24 training rows in all, fewer than the 32 of a batch" in capsys.readouterr().out
