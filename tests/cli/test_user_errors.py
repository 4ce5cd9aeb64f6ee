"""Errors that a user can fix have exit code 1 and a key, by `--dry-run` where possible; 203 is left for our defects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from matrix import sample
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from finetuning.cli.main import main

Say = Callable[..., tuple[int, str, str]]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "cosine": {"num_cycles": 0.5},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": 0.0},
    "inverse_sqrt": {"timescale": 10},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 1},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5, "warmup_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 1},
    "greedy": {"patience": 2},
}
EVALUATED = {
    "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
    "training_args.eval_strategy": "steps",
    "training_args.eval_steps": 1,
}


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], write_config: Any) -> Say:
    """A function that runs values in this process, dry or not: exit code, stdout, stderr."""

    def run(method: str, values: dict[str, Any], *options: str) -> tuple[int, str, str]:
        shutil.rmtree(values["training_args"]["output_dir"], ignore_errors=True)
        code = main([method, str(write_config(values)), *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def check(say: Say) -> Callable[..., int]:
    """A function that compares the verdict of `--dry-run` with that of a run of two steps and returns it."""

    def compare(method: str, values: dict[str, Any]) -> int:
        planned, _, dry_errors = say(method, values, "--dry-run")
        if planned == 0:
            code, _, errors = say(method, values)
            assert code == 0, errors
        else:
            assert planned == 1 and "config.yaml:" in dry_errors, dry_errors
        return planned

    return compare


@pytest.mark.parametrize("name", [item.value for item in SchedulerType])
def test_each_schedule_trains_or_is_refused_by_dry_run(check: Any, say: Say, sft_values: Any, name: str) -> None:
    evaluated = EVALUATED if name in ("reduce_lr_on_plateau", "greedy") else {}
    values = {"training_args.max_steps": 2, "training_args.lr_scheduler_type": name, **evaluated}
    needs_arguments = name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
    assert check("sft", sft_values(values)) == int(needs_arguments)
    if name in ARGUMENTS:
        assert check("sft", sft_values({**values, "training_args.lr_scheduler_kwargs": ARGUMENTS[name]})) == 0
    unknown = sft_values({**values, "training_args.lr_scheduler_kwargs": {**ARGUMENTS.get(name, {}), "zzz": 1}})
    code, _, err = say("sft", unknown, "--dry-run")
    if name in ("constant", "constant_with_warmup"):
        assert code == 0 and "lr_scheduler_kwargs.zzz: is ignored" in err
    else:
        assert code == 1 and "zzz: is no argument of the schedule" in err


def test_an_invalid_argument_of_a_schedule_is_a_config_error(say: Say, sft_values: Any) -> None:
    values = {"training_args.lr_scheduler_type": "polynomial", "training_args.lr_scheduler_kwargs": {"lr_end": 1.0}}
    code, _, err = say("sft", sft_values(values))
    assert code == 1 and "training_args.lr_scheduler_kwargs: is rejected: lr_end" in err


@pytest.mark.parametrize(
    "changes",
    [
        {"training_args.learning_rate": 0.0, "peft_conf": {"peft_type": "NO_PEFT"}},
        {
            "training_args.max_steps": 1,
            "training_args.warmup_steps": 0.03,
            "peft_conf": {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj"]}},
        },
    ],
    ids=["as configured", "in the warm-up"],
)
def test_a_learning_rate_of_0_in_every_step_is_a_warning(
    check: Any, say: Say, sft_values: Any, changes: dict[str, Any]
) -> None:
    values = sft_values({"training_args.max_steps": 2, **changes})
    assert check("sft", values) == 0
    assert "training will not change the weights" in say("sft", values, "--dry-run")[2]


# With 4 bits the step is compiled for a minute; those with 8 bits and in float8 take the same way.
OPTIMIZERS = [item.value for item in OptimizerNames]


@pytest.mark.parametrize("name", sample(OPTIMIZERS, {*OPTIMIZERS} - {"adamw_torch_4bit"}))
def test_each_optimizer_trains_or_is_refused_by_dry_run(check: Any, sft_values: Any, name: str) -> None:
    # RAdam takes no step before the variance of its second moment is known: weights that never moved fail verification.
    steps = 8 if "radam" in name else 2
    check("sft", sft_values({"training_args.max_steps": steps, "training_args.optim": name}))


def test_malformed_arguments_of_an_optimizer_are_a_config_error(say: Say, sft_values: Any) -> None:
    code, _, err = say("sft", sft_values({"training_args.optim_args": "beta1"}))
    assert code == 1 and "training_args.optim_args: is rejected" in err


def test_a_metric_that_is_not_reported_is_refused(check: Any, say: Say, sft_values: Any, dpo_values: Any) -> None:
    best = {**EVALUATED, "training_args.max_steps": 2, "training_args.metric_for_best_model": "eval_loss"}
    assert check("sft", sft_values(best)) == 0
    code, _, err = say("sft", sft_values({**best, "training_args.metric_for_best_model": "accuracy"}), "--dry-run")
    assert code == 1 and '"accuracy" is not among the metrics of an evaluation: loss, runtime' in err

    preference = {**best, "training_args.metric_for_best_model": "rewards/accuracies"}
    assert check("dpo", dpo_values(preference)) == 0
    accuracy = dpo_values({**best, "training_args.metric_for_best_model": "eval_rewards/accuracy"})
    code, _, err = say("dpo", accuracy, "--dry-run")
    assert code == 1 and '"eval_rewards/accuracy" is not among the metrics of an evaluation: loss' in err
    assert 'Did you mean "rewards/accuracies"?' in err and "config.yaml:" in err
    # A metric that only another option reports is refused at the first evaluation.
    code, _, err = say("dpo", dpo_values({**best, "training_args.metric_for_best_model": "aux_loss"}))
    assert code == 1 and "'aux_loss' is not among the metrics of the evaluation: " in err and "config.yaml:" in err


def test_the_dry_run_refuses_what_a_run_would_refuse_in_the_first_rows(
    say: Say, sft_values: Any, write_jsonl: Any, sft_rows: Any, tmp_path: Path
) -> None:
    rows = sft_rows(4)
    wrong_role = write_jsonl(tmp_path / "role.jsonl", [*rows, {"messages": [{"role": "asistant", "content": "a"}]}])
    path = "data_conf.training_data.datasets"
    missing = {"type": "CONCATENATION", "datasets": [{"path": "/no/validation.jsonl"}]}
    for changes, expected in (
        ({"data_conf.validation_data": missing, "training_args.eval_strategy": "epoch"}, "/no/validation.jsonl"),
        ({path: [{"path": str(wrong_role), "handlers": [{"name": "shuffle"}]}]}, 'unknown handler "shuffle"'),
        ({path: [{"path": str(wrong_role)}]}, 'role.jsonl:5: messages[0].role: unknown role "asistant"'),
        ({path: [{"path": str(wrong_role), "format": "preference"}]}, '"preference" is not supported by this method'),
    ):
        code, _, err = say("sft", sft_values(changes), "--dry-run")
        assert code == 1 and expected in err, err
    skipped = {path: [{"path": str(wrong_role)}], "data_conf.on_bad_row": "skip", "data_conf.max_lost_fraction": 1.0}
    assert say("sft", sft_values(skipped), "--dry-run")[0] == 0


def test_what_the_trainer_rejects_is_a_config_error_with_a_warning_by_dry_run(say: Say, sft_values: Any) -> None:
    values = sft_values({"training_args.fsdp": True})
    code, _, err = say("sft", values, "--dry-run")
    assert code == 0 and "training_args.fsdp: shards the model over several processes, and this is one" in err
    # transformers sets variables of accelerate.
    with patch.dict(os.environ):
        code, _, err = say("sft", values)
    assert code == 1 and "the sft trainer rejects this config: Using fsdp only works in distributed training" in err


def test_a_device_that_is_not_there_is_refused_by_dry_run(say: Say, sft_values: Any) -> None:
    values = sft_values({"run_conf.model_args": {"device_map": {"": "cuda:7"}}})
    code, _, err = say("sft", values, "--dry-run")
    assert code == 1 and "run_conf.model_args.device_map: cannot use 'cuda:7'" in err


def test_the_configs_within_a_config_of_lora(say: Say, sft_values: Any) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"], "use_dora": True}

    def dry_run(**more: Any) -> tuple[int, str]:
        peft = {"peft_type": "LORA", "peft_kwargs": lora | more}
        code, _, err = say("sft", sft_values({"peft_conf": peft}), "--dry-run")
        return code, err

    code, err = dry_run(runtime_config={"ephemeral_gpu_offload": True})
    assert code == 0 and "runtime_config: is not used" in err
    code, err = dry_run(runtime_config={"gpu_offload": True})
    assert code == 1 and "LORA" in err and "gpu_offload" in err
    code, err = dry_run(arrow_config={"top_k": 2})
    assert code == 1 and "arrow_config: Arrow combines adapters that are trained already" in err


def test_a_limit_on_the_size_of_files_is_no_defect(chatml_llama_dir: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("replace_tokens")), str(chatml_llama_dir), str(tmp_path / "out")]
    command += ["--from", "<|im_start|>", "--to", "<|call|>"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 2; exec "$@"', "sh", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "larger than this process may write" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_launcher_with_fsdp_1_needs_a_gpu(say: Say, sft_values: Any) -> None:
    """accelerate's own message is a RuntimeError that no available devices were found."""
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "true"}
    for version, expected in (("1", 1), ("2", 0)):
        with patch.dict(os.environ, launched | {"FSDP_VERSION": version}):
            code, _, err = say("sft", sft_values(), "--dry-run")
        assert code == expected, err
        assert ("loads it to GPUs (fsdp_sync_module_states), and this machine has none" in err) is bool(expected)


def test_pushing_to_the_hub_offline_is_refused_by_dry_run(say: Say, sft_values: Any) -> None:
    code, _, err = say("sft", sft_values({"training_args.push_to_hub": True}), "--dry-run")
    assert code == 1 and "training_args.push_to_hub: needs the Hub, but HF_HUB_OFFLINE" in err


def test_an_unreachable_hub_is_a_config_error(run_cli: Any, sft_values: Any, write_config: Any) -> None:
    config = write_config(sft_values({"training_args.push_to_hub": True, "training_args.hub_token": "hf_none"}))
    result = run_cli(["sft", config], env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert result.returncode == 1, result.stderr
    assert "push_to_hub: the Hub cannot be reached, or rejects the token" in result.stderr


@pytest.mark.parametrize("kind", ["directory", "loop of links"])
def test_a_model_file_that_cannot_be_read_is_named(
    say: Say, sft_values: Any, tmp_path: Path, chatml_llama_dir: Path, kind: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chatml_llama_dir, folder)
    weights = folder / "model.safetensors"
    weights.unlink()
    if kind == "directory":
        weights.mkdir()
    else:
        weights.symlink_to(weights)
    code, _, err = say("sft", sft_values({"run_conf.model": str(folder)}), "--dry-run")
    assert code == 1 and str(weights) in err and "permissions" in err


def test_a_run_goes_on_without_a_home_for_its_cache(
    run_cli: Any, sft_values: Any, write_config: Any, tmp_path: Path
) -> None:
    environment = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": None, "FINETUNING_CACHE": None}
    result = run_cli(["sft", write_config(sft_values())], env=environment)
    assert result.returncode == 0, result.stderr
    assert "the default cache of prepared rows cannot be used" in result.stderr
    assert (tmp_path / "out" / "checkpoint-final").is_dir()


def test_an_evaluation_batch_of_incomplete_grpo_groups_is_refused_by_dry_run(
    say: Say, dpo_values: Any, write_jsonl: Any, tmp_path: Path
) -> None:
    rows = [{"prompt_messages": [{"role": "user", "content": f"What is number {number}?"}]} for number in range(12)]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    values = dpo_values(
        {
            "data_conf.training_data.datasets": [{"path": str(path)}],
            **EVALUATED,
            "training_args.max_length": None,
            "training_args.num_generations": 4,
            "training_args.max_completion_length": 8,
            "batchsize_conf": {"total_train_batch_size": 8, "max_per_device_train_batch_size": 2},
            "grpo_args": {"rewards": [{"type": "length", "target": 5}]},
        }
    )
    code, _, err = say("grpo", values, "--dry-run")
    assert code == 1, err
    assert "an evaluation batch has 2 completions (2 per device), not a multiple of the 4 completions" in err
    assert "Set it to 4 or a multiple" in err


@pytest.mark.parametrize(
    ("saved", "code"), [(None, 1), (["embed_tokens"], 0)], ids=["rows of new tokens", "whole embeddings"]
)
def test_new_tokens_that_a_dpo_adapter_does_not_train_are_refused_by_dry_run(
    check: Any, say: Say, dpo_values: Any, saved: list[str] | None, code: int
) -> None:
    kwargs = {"r": 4, "target_modules": ["q_proj"], **({"modules_to_save": saved} if saved else {})}
    values = dpo_values(
        {
            "peft_conf": {"peft_type": "LORA", "peft_kwargs": kwargs},
            "data_conf.special_tokens": ["<|tool|>", "<|call|>"],
        }
    )
    assert check("dpo", values) == code
    if code:
        _, _, err = say("dpo", values, "--dry-run")
        assert "data_conf.chat_template_name: the chat template adds 2 tokens" in err
        assert "modules_to_save: [embed_tokens]" in err
