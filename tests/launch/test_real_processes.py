"""Launchers and jobs with real processes, on the CPU."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import SECONDS, ForkServer, wait_all

SCRIPTS = Path(sys.executable).parent
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}


@pytest.fixture
def config(sft_values: Any, write_config: Any, tmp_path: Path) -> Path:
    changes = {"training_args.output_dir": str(tmp_path / "out"), "training_args.max_steps": 2, "peft_conf": LORA}
    return write_config(sft_values(changes), "experiment.yaml")


def test_launch_runs_two_processes(run_cli: Any, config: Path, tmp_path: Path) -> None:
    result = run_cli(["launch", "--nproc", "2", "sft", config], fresh=True)
    assert result.returncode == 0, result.stderr
    assert "4 = 2 x 2 x 1" in result.stdout
    assert result.stdout.count("Completed after 2 steps") == 1
    assert (tmp_path / "out" / ".complete").read_bytes() == b""


def test_under_accelerate_launch(config: Path, tmp_path: Path) -> None:
    command = [str(SCRIPTS / "accelerate"), "launch", "--num_processes", "2", "--multi_gpu", "--no-python"]
    result = subprocess.run(
        [*command, str(SCRIPTS / "finetuning"), "sft", str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stderr
    assert "4 = 2 x 2 x 1" in result.stdout


def test_a_step_of_slurm(run_cli: Any, config: Path) -> None:
    srun = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
    result = run_cli(["sft", config, "--dry-run"], env=srun)
    assert (result.returncode, result.stdout) == (0, ""), "one process of four says nothing"
    first = run_cli(["sft", config, "--dry-run"], env=srun | {"SLURM_PROCID": "0"})
    assert "4 = 4 x 1 x 1" in first.stdout


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_signal_reaches_the_processes_and_its_code_comes_back(
    fork_server: ForkServer, sft_values: Any, write_config: Any, tmp_path: Path, processes: str
) -> None:
    changes = {"training_args.output_dir": str(tmp_path / "out"), "training_args.max_steps": 5000, "peft_conf": LORA}
    config = write_config(sft_values(changes | {"training_args.logging_steps": 1}), "long.yaml")
    process = fork_server.start(["launch", "--nproc", processes, "sft", config])
    assert process.wait_for((tmp_path / "out" / "training_logs.jsonl").exists), process.output
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, process.output
    assert list((tmp_path / "out").glob("checkpoint-*"))


def test_a_process_that_was_killed_is_spoken_for(
    fork_server: ForkServer, sft_values: Any, write_config: Any, tmp_path: Path
) -> None:
    changes = {"training_args.output_dir": str(tmp_path / "out"), "training_args.max_steps": 5000, "peft_conf": LORA}
    config = write_config(sft_values(changes | {"training_args.logging_steps": 1}), "long.yaml")
    error = tmp_path / "error.json"
    process = fork_server.start(["launch", "--nproc", "1", "sft", config], {"FINETUNING_ERROR_FILE": str(error)})
    assert process.wait_for((tmp_path / "out" / "training_logs.jsonl").exists), process.output
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert process.wait() == 203, process.output
    assert "was killed" in json.loads(error.read_text())["message"]


def test_failures_are_written_for_other_programs(run_cli: Any, tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("training_arg: {}\n")
    log, error = tmp_path / "log", tmp_path / "error.json"
    log.write_text("before\n")
    report_files = {"TERMINATION_LOG_FILE": str(log), "FINETUNING_ERROR_FILE": str(error)}
    result = run_cli(["launch", "--nproc", "2", "sft", config], env=report_files)
    assert result.returncode == 1
    assert log.read_text().startswith("before\n") and "training_arg" in log.read_text()
    document = json.loads(error.read_text())
    assert (document["class"], document["exit_code"]) == ("ConfigError", 1)
    (first,) = (problem for problem in document["problems"] if problem["key"] == "training_arg")
    assert (first["file"], first["line"], first["key"]) == (str(config), 1, "training_arg")
    assert "training_args" in first["hint"]
    unwritable = run_cli(["sft", config], env={"TERMINATION_LOG_FILE": str(tmp_path / "no" / "log")})
    assert unwritable.returncode == 1 and "warning: TERMINATION_LOG_FILE" in unwritable.stderr


@pytest.fixture
def job(tiny_llama_dir: Path, write_jsonl: Any, tmp_path: Path) -> dict[str, Any]:
    rows = [{"output": f"### Text: number {n} is here\n\n### Label: {n % 2}"} for n in range(8)]
    return {
        "model_name_or_path": str(tiny_llama_dir),
        "training_data_path": str(write_jsonl(tmp_path / "texts.jsonl", rows)),
        "output_dir": str(tmp_path / "out"),
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 2,
        "response_template": "\n### Label:",
        "dataset_text_field": "output",
        "torch_dtype": "float32",
        "use_cpu": True,
    }


def test_a_job_by_the_entry_point_of_the_image(run_cli: Any, job: dict[str, Any], tmp_path: Path) -> None:
    job |= {
        "peft_method": "lora",
        "r": 4,
        "target_modules": ["lm_head", "all-linear"],
        "save_model_dir": str(tmp_path / "cos" / "model"),
        "logging_dir": str(tmp_path / "logs"),
        "lora_post_process_for_vllm": True,
        "accelerate_launch_args": {"num_processes": 2, "env": ["FINETUNING_TEST=1"]},
    }
    text = base64.b64encode(json.dumps(job).encode()).decode()
    result = run_cli([], program="accelerate_launch", env={"SFT_TRAINER_CONFIG_JSON_ENV_VAR": text})
    assert result.returncode == 0, result.stderr
    assert "4 = 2 x 2 x 1" in result.stdout, "per-device batch x accumulation x processes"
    out, model = tmp_path / "out", tmp_path / "cos" / "model"
    assert (out / ".complete").exists()
    assert {"adapter_config.json", "adapter_model.safetensors", "serving.json"} <= {
        path.name for path in model.iterdir()
    }
    (line,) = (tmp_path / "logs" / "training_logs.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "training_loss"
    assert not (out / "training_logs.jsonl").exists()
    saved = (out / "checkpoint-final" / "adapter_model.safetensors").read_bytes()
    assert (model / "adapter_model.safetensors").read_bytes() == saved


def test_multipack_trains_on_the_same_steps(
    run_cli: Any, job: dict[str, Any], write_jsonl: Any, tmp_path: Path
) -> None:
    rows = [{"output": f"### Text:{' number' * (1 + 7 * n % 13)}\n\n### Label:{' a' * (1 + n % 5)}"} for n in range(11)]
    job |= {"training_data_path": str(write_jsonl(tmp_path / "lengths.jsonl", rows)), "padding_free": ["huggingface"]}
    job |= {"logging_strategy": "steps", "logging_steps": 1, "num_train_epochs": 2.0, "save_strategy": "no", "seed": 7}
    losses = {}
    for name, more in (("plain", {}), ("balanced", {"multipack": [16]})):
        file, out = tmp_path / f"{name}.json", tmp_path / name
        launch = {"output_dir": str(out), "accelerate_launch_args": {"num_processes": 2}}
        file.write_text(json.dumps(job | more | launch))
        result = run_cli(["job", file])
        assert result.returncode == 0, result.stderr
        lines = map(json.loads, (out / "training_logs.jsonl").read_text().splitlines())
        losses[name] = [line["data"]["value"] for line in lines if line["name"] == "training_loss"]
    assert len(losses["plain"]) == 6
    assert losses["balanced"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["balanced"] != losses["plain"], "the rows are summed up in another order"


def test_full_fine_tuning_saved_to_the_output_directory(run_cli: Any, job: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job | {"save_model_dir": job["output_dir"], "save_strategy": "no"}))
    result = run_cli(["job"], env={"SFT_TRAINER_CONFIG_JSON_PATH": str(file)})
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "training_logs.jsonl", ".complete"} <= names
    assert not [name for name in names if name.startswith("checkpoint-") and name != "checkpoint-final"]
    again = run_cli(["job"], env={"SFT_TRAINER_CONFIG_JSON_PATH": str(file)})
    assert again.returncode == 0, again.stderr
    assert "already complete" in again.stdout


def test_import_prints_the_yaml_with_its_notes(run_cli: Any, job: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job | {"use_flash_attn": True}))
    result = run_cli(["import", file])
    assert result.returncode == 0, result.stderr
    assert "warning: use_flash_attn" in result.stderr and "# - use_flash_attn" in result.stdout
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(result.stdout)
    checked = run_cli(["sft", experiment, "--dry-run"])
    assert checked.returncode == 0, checked.stderr


def test_two_machines_rendezvous(fork_server: ForkServer, sft_values: Any, write_config: Any, tmp_path: Path) -> None:
    """Two launchers on one machine: one configured by flags, one by the variables of Kubeflow."""
    changes = {"training_args.output_dir": str(tmp_path / "out"), "training_args.max_steps": 2, "peft_conf": LORA}
    config = write_config(sft_values(changes), "experiment.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--nproc", "1", "--nnodes", "2", "--node-rank", "1", "--main-address", f"127.0.0.1:{port}"]
    kubeflow = {
        **{"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "1"},
        **{"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)},
    }
    second = fork_server.start(["launch", *flags, "sft", config])
    first = fork_server.start(["launch", "sft", config], kubeflow)
    assert wait_all([first, second]) == [0, 0], first.output + second.output
    said = first.stdout + second.output
    assert said.count("4 = 2 x 2 x 1") == said.count("Completed after 2 steps") == 1, "one process of the job speaks"
