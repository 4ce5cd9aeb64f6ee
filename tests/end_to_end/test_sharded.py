"""Weights shared out over two processes by FSDP2, with the preset that users take: the same curve, checkpoints that a
run goes on from exactly, and a complete fine-tuned model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from matrix import sample
from processes import SECONDS, ForkServer, wait_all

from finetuning.launch.processes import preset_file

PROGRAM = Path(__file__).with_name("sharding_on_cpu.py")
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}

APART = "padding-free: each row attends only to itself, verified on this model's logits"
LAYOUTS = {
    "all weights": APART,
    "an adapter and new tokens": "padded: attention eager has no efficient padding-free form",
    "packed": APART,
    "preferences": "padded: dpo pads its rows",
}
"""How the rows of each case lie in a batch."""


def launch_options(preset: Path) -> list[str]:
    """Return the options of `accelerate launch`, and the program."""
    return ["--config_file", str(preset), "--num_processes", "2", "--main_process_port", "0", str(PROGRAM)]


@pytest.fixture
def run_sharded(fork_server: ForkServer) -> Callable[..., str]:
    """A function that trains on two processes and returns their standard output.

    The processes have the environment that `accelerate launch` gives them; `fresh=True` runs that program itself.
    """

    def run(kind: str, config: Path, *, fresh: bool = False) -> str:
        if fresh:
            accelerate = str(Path(sys.executable).with_name("accelerate"))
            command = [accelerate, "launch", *launch_options(preset_file("fsdp2")), kind, str(config)]
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
            assert result.returncode == 0, result.stderr
            stdout = result.stdout
        else:
            ranks = fork_server.start_all(
                [kind, config], ["", ""], environment_of(preset_file("fsdp2")), program=str(PROGRAM)
            )
            assert wait_all(ranks) == [0, 0], "".join(rank.output for rank in ranks)
            stdout = "".join(rank.stdout for rank in ranks)
        assert stdout.count("shared out by FSDP2: True") == 2, "or this was DDP"
        return stdout

    return run


def environment_of(preset: Path) -> dict[str, str]:
    """Return the variables that `accelerate launch` sets for a preset."""
    options = launch_command_parser().parse_args(launch_options(preset))
    environment = prepare_multi_gpu_env(_validate_launch_command(options)[0])
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def losses(folder: Path) -> dict[tuple[str, int], float]:
    lines = [json.loads(line) for line in (folder / "training_logs.jsonl").read_text().splitlines()]
    return {(line["name"], line["data"]["step"]): line["data"]["value"] for line in lines}


def layout(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["model"]["layout"]


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS)
def test_sharing_weights_out_does_not_show(
    sft_values: Any,
    dpo_values: Any,
    train: Any,
    run_sharded: Any,
    snug_llama_dir: Path,
    write_config: Any,
    read_tensors: Any,
    tmp_path: Path,
    case: str,
    record_property: Any,
) -> None:
    changes: dict[str, Any] = {
        "training_args.max_steps": 4,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 2,
        "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 1},
        "run_conf.resume_from_checkpoint": "auto",
    }
    kind, make = ("dpo", dpo_values) if case == "preferences" else ("sft", sft_values)
    if case == "all weights":
        changes |= {
            "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
            "training_args.eval_strategy": "steps",
            "training_args.eval_steps": 2,
            "batchsize_conf.max_per_device_train_batch_size": 2,
        }
    else:
        changes["peft_conf"] = LORA
    if case == "an adapter and new tokens":
        changes |= {"run_conf.model": str(snug_llama_dir), "run_conf.model_args.attn_implementation": "eager"}
    if case == "packed":
        changes |= {"sft_args.packing": True, "sft_args.max_seq_length": 120}
    out = tmp_path / "shared"
    config = write_config(make({**changes, "training_args.output_dir": str(out)}), "shared.yaml")
    said = run_sharded(kind, config, fresh=case == "an adapter and new tokens")
    assert ("4 = 2 x 2 x 1" if case == "all weights" else "4 = 2 x 1 x 2") in said
    alone = train(make({**changes, "training_args.output_dir": str(tmp_path / "alone")}))
    assert layout(out) == layout(alone.output_dir)
    assert layout(out).startswith(LAYOUTS[case])
    first, expected = losses(out), losses(alone.output_dir)
    record_property("largest difference", f"{max(abs(first[key] - expected[key]) for key in expected):.1e}")
    assert first == pytest.approx(expected, abs=1e-4)
    saved, whole = read_tensors(out / "checkpoint-final"), read_tensors(alone.final)
    assert {name: tensor.shape for name, tensor in saved.items()} == {name: item.shape for name, item in whole.items()}
    assert all(torch.allclose(saved[name], whole[name], atol=1e-4) for name in whole)
    if case == "all weights":
        for name in ("checkpoint-4", "checkpoint-final"):
            shutil.rmtree(out / name)
        assert "resumed after step 2" in run_sharded(kind, config)
        assert losses(out) == first, "bit by bit"


@pytest.mark.slow
@pytest.mark.parametrize("part", sample(["gathered", "sharded"], ["sharded"]))
def test_shards_that_are_not_what_is_in_memory_stop_every_process(
    fork_server: ForkServer, sft_values: Any, write_config: Any, tmp_path: Path, part: str
) -> None:
    changes = {"training_args.max_steps": 1, "training_args.save_strategy": "steps", "training_args.save_steps": 1}
    preset = preset_file("fsdp2").read_text(encoding="utf-8")
    if part == "sharded":
        preset = preset.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT")
    (tmp_path / "preset.yaml").write_text(preset, encoding="utf-8")
    program = str(PROGRAM.with_name("tampering_on_cpu.py"))
    output = {}
    for tamper_with in ("none", part):
        config = write_config(sft_values({**changes, "training_args.output_dir": str(tmp_path / tamper_with)}))
        environment = {**environment_of(tmp_path / "preset.yaml"), "TAMPER_WITH": tamper_with}
        ranks = fork_server.start_all(["sft", config], ["", ""], environment, program=program)
        codes = [rank.wait() for rank in ranks]
        output[tamper_with] = "".join(rank.output for rank in ranks)
        assert codes == [0, 0] if tamper_with == "none" else all(codes), output[tamper_with]
    assert (tmp_path / "none" / "checkpoint-1").is_dir() and not (tmp_path / part / "checkpoint-1").exists()
    assert re.search(r"checkpoint-1: the saved model failed verification: pytorch_model_fsdp", output[part])
    assert "1 of 20 tensors differ from those in memory" in output[part] or "1 of 21 tensors differ" in output[part]
