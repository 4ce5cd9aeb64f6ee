"""DeepSpeed on the CPU, by the presets that users take: the curve of one process, and a model that loads anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from processes import ForkServer, wait_all

from finetuning.launch.processes import preset_file

pytest.importorskip("deepspeed", reason="see make test-cluster")

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
COMMON: dict[str, Any] = {
    "training_args.max_steps": 4,
    "training_args.save_strategy": "steps",
    "training_args.save_steps": 2,
    "training_args.learning_rate": 0.001,
    "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 1},
    "run_conf.resume_from_checkpoint": "auto",
}
BEST = {
    "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
    "training_args.eval_strategy": "steps",
    "training_args.eval_steps": 2,
    "training_args.load_best_model_at_end": True,
}
CASES = {
    "full": ("sft", {}),
    "lora": ("sft", {"peft_conf": LORA}),
    "dpo": ("dpo", {"peft_conf": LORA}),
    "dpo full": ("dpo", {}),
    "new tokens": ("sft", {"peft_conf": LORA, "data_conf.special_tokens": ["<note>", "</note>"]}),
    "best": ("sft", BEST),
}


@pytest.fixture
def run_deepspeed(fork_server: ForkServer) -> Callable[..., str]:
    """A function that trains on two processes with the environment that `accelerate launch` gives them."""

    def run(preset: str, kind: str, config: Path, processes: int = 2) -> str:
        ranks = fork_server.start_all([kind, config], [""] * processes, deepspeed_environment(preset))
        codes = wait_all(ranks)
        output = "".join(rank.output for rank in ranks)
        assert codes == [0] * processes, output
        return output

    return run


def deepspeed_environment(preset: str) -> dict[str, str]:
    options = ["--config_file", str(preset_file(preset)), "--num_processes", "2", "--main_process_port", "0", "x.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(arguments)
    chosen = {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}
    return chosen | {"DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero3"])
def test_the_curve_and_the_model_are_those_of_one_process(
    sft_values: Any,
    dpo_values: Any,
    train: Any,
    run_deepspeed: Any,
    write_config: Any,
    read_tensors: Any,
    losses: Any,
    run_record: Any,
    tmp_path: Path,
    preset: str,
    case: str,
    record_property: Any,
) -> None:
    if (preset, case) == ("zero3", "new tokens"):
        pytest.skip("PEFT 0.21 asks for a CUDA device where new tokens are trained under ZeRO-3")
    kind, changes = CASES[case]
    make = dpo_values if kind == "dpo" else sft_values
    out = tmp_path / "sharded"
    config = write_config(make({**COMMON, **changes, "training_args.output_dir": str(out)}), "sharded.yaml")
    run_deepspeed(preset, kind, config)
    alone = train(make({**COMMON, **changes, "training_args.output_dir": str(tmp_path / "alone")}))
    expected, logged = losses(alone.output_dir), losses(out)
    assert logged.keys() == expected.keys()
    record_property("largest difference", f"{max(abs(logged[key] - expected[key]) for key in expected):.1e}")
    assert logged == pytest.approx(expected, abs=1e-4)
    record = run_record(out)
    assert record["status"] == "completed"
    saved, whole = read_tensors(out / "checkpoint-final"), read_tensors(alone.final)
    assert {name: tensor.shape for name, tensor in saved.items()} == {name: item.shape for name, item in whole.items()}
    assert all(torch.allclose(saved[name].float(), whole[name].float(), atol=2e-4) for name in whole)
    if case in ("full", "dpo full", "best"):
        assert "loads in plain transformers" in record["artifact"]["checks"]

    # Killed between its second and last checkpoint.
    for name in ("checkpoint-4", "checkpoint-final"):
        shutil.rmtree(out / name)
    assert "resumed after step 2" in run_deepspeed(preset, kind, config)
    again = read_tensors(out / "checkpoint-final")
    assert all(torch.equal(again[name], saved[name]) for name in saved), "bit by bit"

    # Killed between its last checkpoint and the publication.
    shutil.rmtree(out / "checkpoint-final")
    before = losses(out)
    run_deepspeed(preset, kind, config)
    assert losses(out) == before
    published = read_tensors(out / "checkpoint-final")
    assert all(torch.equal(published[name], saved[name]) for name in saved)
