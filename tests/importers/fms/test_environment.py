from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.yaml.reader import parse_document
from finetuning.errors import ConfigError, MissingPackageError
from finetuning.importers.fms.environment import (
    JSON_PATH,
    JSON_TEXT,
    JobLaunch,
    check_training_script,
    plan_launch,
    read_job,
)
from finetuning.launch.processes import exit_code_of


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def plan(args: dict[str, Any] | None = None, gpus: int = 0, **environ: str) -> JobLaunch:
    return plan_launch(parse_document(json.dumps({"accelerate_launch_args": args}), "job.json"), gpus, environ)


def test_the_encoded_text_wins_and_empty_variables_are_ignored(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text('{"r": 1}')
    text = encoded(b'{"r": 2}')
    assert read_job({JSON_TEXT: text, JSON_PATH: str(file)}).values == {"r": 2}
    assert read_job({JSON_TEXT: "", JSON_PATH: str(file)}).values == {"r": 1}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "Must set environment variable"),
        ({JSON_TEXT: "", JSON_PATH: ""}, "Must set environment variable"),
        ({JSON_TEXT: encoded(pickle.dumps({"r": 1}))}, "pickle"),
        ({JSON_TEXT: "{not base64}"}, "not base64"),
        ({JSON_TEXT: encoded(b"\xff\xfe\x00")}, "UTF-8"),
        ({JSON_TEXT: encoded(b"[1, 2]")}, JSON_TEXT),
        ({JSON_PATH: "/no/such.json"}, "/no/such.json"),
    ],
)
def test_invalid_jobs(environ: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_job(environ)
    assert expected in str(caught.value)


def test_one_process_per_gpu_unless_disabled() -> None:
    assert plan(gpus=4).launch.processes == 4
    planned = plan({"num_processes": 2}, gpus=4)
    assert planned.launch.processes == 4 and "num_processes is 4" in planned.notes[0]
    assert plan({"num_processes": 2}, gpus=4, SET_NUM_PROCESSES_TO_NUM_GPUS="False").launch.processes == 2
    assert plan({"num_processes": 2}).launch.processes == 2
    assert plan().launch.is_plain


def test_several_gpus_shard_the_model(tmp_path: Path) -> None:
    assert plan(gpus=2).launch.config_file.name == "fsdp2.yaml"
    assert plan(gpus=1).launch.config_file is None
    assert plan({"num_processes": 2}).launch.config_file is None
    defaults = tmp_path / "mine.yaml"
    defaults.write_text("distributed_type: FSDP")
    assert plan(gpus=2, FSDP_DEFAULTS_FILE_PATH=str(defaults)).launch.config_file == defaults
    custom = tmp_path / "custom.yaml"
    custom.write_text("distributed_type: MULTI_GPU\nnum_processes: 3")
    defaults.write_text("distributed_type: MULTI_GPU")
    planned = plan({"config_file": str(custom)}, FSDP_DEFAULTS_FILE_PATH=str(defaults))
    assert (planned.launch.config_file, planned.launch.processes) == (custom, 3)


@pytest.mark.parametrize(
    ("args", "preset", "flags"),
    [
        ({}, "fsdp2.yaml", ()),
        ({"fsdp_sharding_strategy": 1}, "fsdp2.yaml", ("--fsdp_reshard_after_forward", "true")),
        ({"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, "fsdp2.yaml", ("--fsdp_reshard_after_forward", "false")),
        ({"fsdp_sharding_strategy": "NO_SHARD", "fsdp_offload_params": True}, "ddp.yaml", ()),
        ({"use_fsdp": True, "fsdp_version": 2}, "fsdp2.yaml", ()),
        ({"fsdp_offload_params": True}, "fsdp2.yaml", ("--fsdp_offload_params", "true")),
    ],
)
def test_flags_of_fsdp1_are_translated_for_the_preset(args: Any, preset: str, flags: tuple[str, ...]) -> None:
    planned = plan(args, gpus=2)
    assert (planned.launch.config_file.name, planned.launch.flags, planned.notes) == (preset, flags, ())


@pytest.mark.parametrize(
    ("fsdp", "preset"), [("full_shard auto_wrap", "ddp"), (True, "ddp"), ("", "fsdp2"), (False, "fsdp2")]
)
def test_fsdp_of_the_job_is_not_mixed_with_the_preset(fsdp: Any, preset: str) -> None:
    job = {"fsdp": fsdp, "accelerate_launch_args": {"fsdp_sharding_strategy": 2, "quiet": True}}
    planned = plan_launch(parse_document(json.dumps(job), "job.json"), 2, {})
    assert planned.launch.config_file.stem == preset
    sharding = ("--fsdp_reshard_after_forward", "false") if preset == "fsdp2" else ()
    assert set(planned.launch.flags) == {"--quiet", *sharding}
    assert bool(planned.notes) is (preset == "ddp")


def test_flags_that_only_fsdp1_has_are_dropped_with_a_note() -> None:
    args = {"fsdp_version": 1, "fsdp_backward_prefetch": "BACKWARD_PRE", "fsdp_use_orig_params": True}
    planned = plan(args, gpus=2)
    assert planned.launch.flags == ()
    assert [note.split()[1] for note in planned.notes] == [*args]
    assert all("has no effect with FSDP2" in note for note in planned.notes)
    with pytest.raises(ConfigError, match="HYBRID_SHARD is not supported without a config_file"):
        plan({"fsdp_sharding_strategy": 4}, gpus=2)


@pytest.mark.parametrize("by_variable", [False, True])
def test_fsdp_without_gpus_is_refused(by_variable: bool, tmp_path: Path) -> None:
    file = tmp_path / "fsdp.yaml"
    file.write_text("distributed_type: FSDP\nnum_processes: 2\n")
    args = {"num_processes": 2} if by_variable else {"config_file": str(file)}
    environ = {"FSDP_DEFAULTS_FILE_PATH": str(file)} if by_variable else {}
    with pytest.raises(ConfigError) as caught:
        plan(args, **environ)
    (problem,) = caught.value.problems
    assert "shards the model with FSDP, which needs GPUs, and this machine has none" in problem.message
    assert str(problem.location) == "job.json:1:2: accelerate_launch_args"
    assert plan(args, gpus=2, **environ).launch.config_file == file


def test_another_training_script_is_refused() -> None:
    for script in ("", "tuning.sft_trainer", "/app/tuning/sft_trainer.py"):
        check_training_script({"TRAINING_SCRIPT": script})
    with pytest.raises(ConfigError, match=r"TRAINING_SCRIPT is /app/mine.py: .* no other script"):
        check_training_script({"TRAINING_SCRIPT": "/app/mine.py"})


def test_flags_and_environment() -> None:
    planned = plan({"main_process_port": 1234, "quiet": True, "cpu": False, "env": ["A=1", "B=x=y"]})
    assert planned.launch.flags == ("--main_process_port", "1234", "--quiet")
    assert planned.environment == {"A": "1", "B": "x=y"}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"q": True}, "accelerate launch has no flag --q"),
        ({"main_proces_port": 1}, 'Did you mean "main_process_port"?'),
        ({"quiet": "yes"}, "quiet must be true or false"),
        ({"num_processes": 0}, "positive integer"),
        ({"env": ["A"]}, "NAME=VALUE"),
        ([1], "must be a mapping"),
    ],
)
def test_wrong_launch_arguments(args: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(args)
    (problem,) = caught.value.problems
    assert expected in str(problem)
    assert str(problem.location) == "job.json:1:2: accelerate_launch_args"


def test_missing_deepspeed_is_reported_with_the_install_command(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    file = tmp_path / "ds.yaml"
    file.write_text("distributed_type: DEEPSPEED")
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        with pytest.raises(MissingPackageError, match=r"finetuning\[deepspeed\]"):
            plan({"config_file": str(file)})


@pytest.mark.parametrize(
    ("code", "expected"), [(0, 0), (1, 1), (3, 3), (203, 203), (-15, 143), (-2, 130), (-9, 203), (7, 203)]
)
def test_exit_codes(code: int, expected: int) -> None:
    assert exit_code_of(code) == expected
