"""A run on a stream of rows: its curve, its checkpoints, its report; and the same on two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.errors import CheckpointError, DataError

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "lora_dropout": 0.2, "target_modules": "all-linear"}}
# 64 rows per step: the second block of rows begins within step 17, and the second pass in step 24.
STREAM = {
    "data_conf.streaming": True,
    "data_conf.shuffle_buffer": 200,
    "batchsize_conf": {"total_train_batch_size": 64, "max_per_device_train_batch_size": 16},
    "training_args.max_steps": 26,
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 13,
    "peft_conf": LORA,
}


@pytest.fixture
def rows(tmp_path: Path, write_jsonl: Any, sft_rows: Any) -> str:
    """A file of 1500 short rows; every hundredth is too long."""
    rows = [{"messages": row["messages"][-2:]} for row in sft_rows(1500)]
    for row in rows[::100]:
        row["messages"][0]["content"] = "word " * 400
    return str(write_jsonl(tmp_path / "many.jsonl", rows))


def values_of(sft_values: Any, rows: str, changes: dict[str, Any], out: str = "") -> dict[str, Any]:
    values = sft_values({**STREAM, "data_conf.training_data.datasets": [{"path": rows}], **changes})
    values["training_args"]["output_dir"] += out
    return values


@pytest.mark.parametrize(("packing", "saved"), [(False, 24), (True, 13)], ids=str)
def test_a_resumed_stream_is_bit_identical(
    train: Any, sft_values: Any, read_tensors: Any, rows: str, packing: bool, saved: int
) -> None:
    changes = {"sft_args.packing": packing, "training_args.save_steps": saved}
    if packing:
        # A pack holds four rows: as many steps go through all of them once.
        changes["batchsize_conf"] = {"total_train_batch_size": 16, "max_per_device_train_batch_size": 4}
    whole = train(values_of(sft_values, rows, changes))
    cut = values_of(sft_values, rows, {**changes, "run_conf.resume_from_checkpoint": "auto"}, "-cut")
    folder = Path(cut["training_args"]["output_dir"])
    folder.mkdir()
    (whole.output_dir / f"checkpoint-{saved}").rename(folder / f"checkpoint-{saved}")
    (folder / "rejects.jsonl").write_bytes((whole.output_dir / "rejects.jsonl").read_bytes())
    resumed = train(cut)
    assert resumed.result.steps == 26
    assert resumed.losses == whole.losses
    first, second = read_tensors(whole.final), read_tensors(resumed.final)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("data_report.json", "rejects.jsonl"):
        assert (resumed.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes()
    history = [{**entry, "train_runtime": 0} for entry in whole.trainer.state.log_history if "loss" in entry]
    assert [entry["epoch"] for entry in history] == [
        entry["epoch"] for entry in resumed.trainer.state.log_history if "loss" in entry
    ]


def test_the_report_the_plan_and_the_record_say_what_is_known(
    train: Any, sft_values: Any, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = train(values_of(sft_values, rows, {}))
    (report,) = json.loads((done.output_dir / "data_report.json").read_text())
    assert (report["rows"], report["kept"], report["filtered_by_length"], report["epochs"]) == (1500, 1485, 15, 1)
    rejected = [json.loads(line)["line"] for line in (done.output_dir / "rejects.jsonl").read_text().splitlines()]
    assert sorted(rejected) == list(range(1, 1500, 100))
    record = json.loads((done.output_dir / "run.json").read_text())
    assert record["data"]["rows"] is None
    assert record["data"]["statistics"] == [report]
    assert record["plan"]["steps"]["total"] == 26
    assert (done.output_dir / "preview.txt").read_text().count("--- ") == 10
    displayed = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps 26 (max_steps; the rows of a streaming dataset are not counted)" in displayed
    assert "prepared rows streamed during training, with a shuffle buffer of 200 rows" in displayed
    assert "padding-free" in displayed


def test_padding_free_changes_no_loss(train: Any, sft_values: Any, rows: str) -> None:
    changes = {"training_args.max_steps": 4, "training_args.save_strategy": "no", "peft_conf": {"peft_type": "NO_PEFT"}}
    flattened = train(values_of(sft_values, rows, changes))
    padded = train(values_of(sft_values, rows, {**changes, "sft_args.batching": "padded"}, "-padded"))
    assert flattened.losses == pytest.approx(padded.losses, abs=1e-4)


def test_a_bad_row_stops_the_run_with_its_line_and_leaves_the_last_checkpoint(
    train: Any, sft_values: Any, rows: str
) -> None:
    path = Path(rows)
    lines = path.read_text().splitlines()
    lines[1400] = '{"messages": [{"role": "nobody", "content": "x"}]}'
    path.write_text("\n".join(lines) + "\n")
    values = values_of(sft_values, rows, {"data_conf.shuffle_buffer": 1, "training_args.save_steps": 10})
    with pytest.raises(DataError, match=r"many.jsonl:1401: messages\[0\].role: unknown role"):
        train(values)
    out = Path(values["training_args"]["output_dir"])
    assert (out / "checkpoint-10").is_dir()
    assert json.loads((out / "run.json").read_text())["status"] == "failed"


def test_a_checkpoint_of_prepared_rows_is_no_place_in_a_stream(train: Any, sft_values: Any, rows: str) -> None:
    changes = {"training_args.max_steps": 2, "training_args.save_steps": 1, "data_conf.shuffle_buffer": None}
    train(values_of(sft_values, rows, {**changes, "data_conf.streaming": None}))
    allowed = ["data_conf.streaming", "data", "training_args"]
    goes_on = {
        "training_args.max_steps": 3,
        "run_conf.resume_from_checkpoint": "auto",
        "run_conf.allow_changed": allowed,
        "run_conf.final_checkpoint_name": "longer",
        "data_conf.shuffle_buffer": None,
    }
    with pytest.raises(CheckpointError, match=r"checkpoint-2 does not contain the position in the stream of rows"):
        train(values_of(sft_values, rows, goes_on))


def test_two_processes_train_on_the_same_rows(
    train: Any,
    sft_values: Any,
    write_config: Any,
    read_tensors: Any,
    torchrun: Any,
    logged_losses: Any,
    rows: str,
    tmp_path: Path,
) -> None:
    another = Path(rows).with_name("other.jsonl")
    another.write_text("".join(Path(rows).read_text().splitlines(keepends=True)[700:1000]))
    changes = {
        "data_conf.training_data": {
            "type": "PRECOMPUTE_WEIGHTED_MIX",
            "datasets": [{"path": rows, "sampling_weight": 0.7}, {"path": str(another), "sampling_weight": 0.3}],
        },
        "training_args.max_steps": 20,
        "training_args.save_steps": 10,
        "peft_conf": {"peft_type": "NO_PEFT"},
    }
    values = values_of(sft_values, rows, changes)
    values["data_conf"]["training_data"] = changes["data_conf.training_data"]
    shared = tmp_path / "shared"
    config = write_config({**values, "training_args": {**values["training_args"], "output_dir": str(shared)}}, "s.yaml")
    torchrun("sft", config)
    alone = train(values)
    curves = [logged_losses(folder) for folder in (shared, alone.output_dir)]
    assert len(curves[0]) == 20
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    first, second = read_tensors(shared / "checkpoint-final"), read_tensors(alone.final)
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in second)
    for name in ("data_report.json", "rejects.jsonl", "checkpoint-10/stream.json"):
        assert (shared / name).read_bytes() == (alone.output_dir / name).read_bytes()
