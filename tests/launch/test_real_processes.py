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


# An ordinary run starts `accelerate launch` in test_sharded.py.
@pytest.mark.full
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


def without_spare_rows(model_dir: Path, folder: Path) -> Path:
    """Save a model whose embeddings have as many rows as the tokenizer has tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


def test_a_job_by_the_entry_point_of_the_image(
    run_cli: Any, job: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    base = without_spare_rows(tiny_llama_dir, tmp_path / "base")
    job |= {
        "model_name_or_path": str(base),
        "peft_method": "lora",
        "r": 4,
        "target_modules": ["lm_head", "all-linear"],
        "save_model_dir": str(tmp_path / "cos" / "model"),
        "logging_dir": str(tmp_path / "logs"),
        "lora_post_process_for_vllm": True,
        "add_special_tokens": ["<new>"],
        "accelerate_launch_args": {"num_processes": 2, "env": ["FINETUNING_TEST=1"]},
    }
    spare = base64.b64encode(json.dumps(job | {"model_name_or_path": str(tiny_llama_dir)}).encode()).decode()
    refused = run_cli([], program="accelerate_launch", env={"SFT_TRAINER_CONFIG_JSON_ENV_VAR": spare})
    assert refused.returncode == 1 and not (tmp_path / "out").exists()
    assert "lora_post_process_for_vllm: cannot be combined with add_special_tokens here" in refused.stderr
    text = base64.b64encode(json.dumps(job).encode()).decode()
    result = run_cli([], program="accelerate_launch", env={"SFT_TRAINER_CONFIG_JSON_ENV_VAR": text})
    assert result.returncode == 0, result.stderr
    assert "4 = 2 x 2 x 1" in result.stdout, "per-device batch x accumulation x processes"
    out, model = tmp_path / "out", tmp_path / "cos" / "model"
    assert (out / ".complete").exists()
    converted = {path.name for path in model.iterdir()}
    assert {"adapter_model.safetensors", "new_embeddings.safetensors", "serving.json"} <= converted
    assert (
        json.loads((model / "adapter_config.json").read_text())["base_model_name_or_path"] == job["model_name_or_path"]
    )
    (line,) = (tmp_path / "logs" / "training_logs.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "training_loss"
    assert not (out / "training_logs.jsonl").exists()
    trained = (out / "checkpoint-final" / "adapter_model.safetensors").read_bytes()
    assert (model / "old_with_extra_layers_adapter_model.safetensors").read_bytes() == trained


def as_flags(job: dict[str, Any]) -> list[str]:
    return [text for key, value in job.items() for text in (f"--{key}", *([] if value is True else [str(value)]))]


def test_sft_trainer_trains_like_the_job_alone_and_in_several_processes(
    run_cli: Any, fork_server: ForkServer, job: dict[str, Any], tmp_path: Path
) -> None:
    job |= {"save_strategy": "no", "gradient_accumulation_steps": 2}
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job))
    printed = run_cli([*as_flags(job), "--print-config"], program="sft_trainer")
    assert printed.returncode == 0, printed.stderr
    imported = run_cli(["import", file])
    assert printed.stdout == imported.stdout
    alone = run_cli(as_flags(job), program="sft_trainer")
    assert alone.returncode == 0, alone.stderr
    assert "4 = 1 x 2 x 2" in alone.stdout
    # Under `accelerate launch`, which sets the variables of torchrun: the same rows in a step.
    flags = as_flags(job | {"gradient_accumulation_steps": 1, "output_dir": str(tmp_path / "two")})
    both = fork_server.start_all(flags, ["", ""], program="sft_trainer")
    assert wait_all(both) == [0, 0], both[0].output + both[1].output
    assert "4 = 2 x 2 x 1" in both[0].stdout and "warning" not in both[1].stderr
    losses = [
        json.loads((folder / "training_logs.jsonl").read_text())["data"]["value"]
        for folder in (tmp_path / "out", tmp_path / "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_data_is_only_processed_and_can_be_trained_on(run_cli: Any, job: dict[str, Any], tmp_path: Path) -> None:
    more = {"do_dataprocessing_only": True, "num_train_dataset_shards": 3, "num_eval_dataset_shards": 1}
    more |= {"validation_data_path": job["training_data_path"]}
    done = run_cli(as_flags(job | more), program="sft_trainer")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    names = [f"train_dataset/ds_0000{index}.parquet" for index in range(3)] + ["validation_dataset/ds_00000.parquet"]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == names
    unset = {"response_template", "dataset_text_field", "output_dir", "training_data_path"}
    processed = {key: value for key, value in job.items() if key not in unset}
    losses = []
    for folder, changes in (("rows", job), ("shards", processed | {"training_data_path": str(out / "train_dataset")})):
        flags = as_flags(changes | {"output_dir": str(tmp_path / folder), "save_strategy": "no"})
        trained = run_cli(flags, program="sft_trainer")
        assert trained.returncode == 0, trained.stderr
        losses.append(json.loads((tmp_path / folder / "training_logs.jsonl").read_text())["data"]["value"])
    assert losses[0] == losses[1]
    again = run_cli(as_flags(job | more), program="sft_trainer")
    assert again.returncode == 1 and "train_dataset exists and is not empty" in again.stderr


def test_errors_name_the_line_of_the_job(run_cli: Any, job: dict[str, Any], tmp_path: Path) -> None:
    """At every depth of the translation: its own checks, those of the experiment, and those before training."""
    log, file = tmp_path / "log", tmp_path / "job.json"
    for key, value, message in (
        ("lora_alfa", 3, 'unknown key. Did you mean "lora_alpha"?'),
        ("learning_rate", -1.0, "learning_rate: "),
        ("lr_scheduler_type", "cosin", "cosine"),
        ("training_data_path", "/no/such.jsonl", "no such file"),
        ("model_name_or_path", "/no/model", "/no/model"),
    ):
        log.unlink(missing_ok=True)
        changed = job | {key: value}
        file.write_text(json.dumps(changed, indent=1))
        result = run_cli(["job", file, "--worker"], env={"TERMINATION_LOG_FILE": str(log)})
        line = [*changed].index(key) + 2
        assert result.returncode == 1, result.stderr
        assert f"error: {file}:{line}:2: {key}: " in result.stderr and message in result.stderr
        assert f"{file}:{line}:2: {key}: " in log.read_text()
        assert "experiment.yaml" not in result.stderr + log.read_text()
        flags = run_cli(as_flags(changed), program="sft_trainer")
        assert flags.returncode == 1 and f"error: --{key}: " in flags.stderr


def test_multipack_trains_on_the_same_steps(
    fork_server: ForkServer, job: dict[str, Any], write_jsonl: Any, tmp_path: Path
) -> None:
    rows = [{"output": f"### Text:{' number' * (1 + 7 * n % 13)}\n\n### Label:{' a' * (1 + n % 5)}"} for n in range(11)]
    job |= {"training_data_path": str(write_jsonl(tmp_path / "lengths.jsonl", rows)), "padding_free": ["huggingface"]}
    job |= {"logging_strategy": "steps", "logging_steps": 1, "num_train_epochs": 2.0, "save_strategy": "no", "seed": 7}
    losses = {}
    for name, more in (("plain", {}), ("balanced", {"multipack": [16]})):
        file, out = tmp_path / f"{name}.json", tmp_path / name
        launch = {"output_dir": str(out), "accelerate_launch_args": {"num_processes": 2}}
        file.write_text(json.dumps(job | more | launch))
        both = fork_server.start_all(["job", file, "--worker"], ["", ""])
        assert wait_all(both) == [0, 0], both[0].output + both[1].output
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
    again = run_cli(["job", "--worker"], env={"SFT_TRAINER_CONFIG_JSON_PATH": str(file)})
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
