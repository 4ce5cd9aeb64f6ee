"""A dry run reads what a run reads before its first step, names what it did not read, and approves of nothing else."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dry_run_refusals
import pytest

from finetuning.cli.main import main
from finetuning.errors import ConfigError, ModelError

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
KEEPS = "warning: the configured chat template replaces the one of"
Dry = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dry(capsys: pytest.CaptureFixture[str], write_config: Any) -> Dry:
    """A function that runs values with `--dry-run` in this process: exit code, stdout, stderr."""

    def run(values: dict[str, Any], method: str = "sft") -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([method, str(write_config(values)), "--dry-run"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_what_was_checked_and_what_was_not_is_listed(dry: Dry, sft_values: Any, tmp_path: Path) -> None:
    code, out, err = dry(sft_values({"peft_conf": LORA}))
    assert code == 0 and err.count("\n") == 1 and KEEPS in err, err
    (checked,) = [line for line in out.splitlines() if line.startswith("checked ")]
    for name in (
        "output directory",
        "free disk space",
        "device",
        "training arguments",
        "optimizer and schedule",
        "model files",
        "tokenizer and chat template",
        "all rows",
        "longest row",
        "adapter",
        "controllers and guard",
    ):
        assert name in checked
    assert "rows read          training: 24 rows of 24 kept" in out
    assert out.count("\nnot checked ") == 2
    assert out.endswith("No problem was found in what was checked. Nothing was trained: --dry-run.\n")
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"


@pytest.fixture
def long_rows(tmp_path: Path, write_jsonl: Any, sft_rows: Any) -> list[dict[str, str]]:
    """A dataset of which a dry run reads the head."""
    return [{"path": str(write_jsonl(tmp_path / "long.jsonl", sft_rows(205)))}]


def test_of_many_rows_the_first_are_read(dry: Dry, sft_values: Any, long_rows: Any, tmp_path: Path) -> None:
    code, out, err = dry(sft_values({"data_conf.training_data.datasets": long_rows}))
    assert code == 0 and err.count("\n") == 1 and KEEPS in err, err
    assert "; the first 200 rows of each dataset;" in out and "training: 200 rows of 200 kept" in out
    assert "not checked        the rows after the first 200 of a dataset" in out
    assert "training rows      205" in out
    rows = (tmp_path / "long.jsonl").read_text().splitlines()
    (tmp_path / "long.jsonl").write_text("\n".join([*rows[:150], '{"messages": 1}', *rows[151:]]))
    code, out, err = dry(sft_values({"data_conf.training_data.datasets": long_rows}))
    assert code == 1 and "long.jsonl:151: messages: " in err


def no_tokenizer(folder: Path) -> dict[str, Any]:
    (folder / "tokenizer.json").unlink()
    return {}


def no_weights(folder: Path) -> dict[str, Any]:
    (folder / "model.safetensors").unlink()
    return {}


def truncated_weights(folder: Path) -> dict[str, Any]:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {}


def unknown_class(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    return {}


def wrong_template(folder: Path) -> dict[str, Any]:
    return {"data_conf.chat_template_name": None, "data_conf.chat_template": "{% for m in messages %}"}


def wrong_target(folder: Path) -> dict[str, Any]:
    return {"peft_conf": {"peft_type": "LORA", "peft_kwargs": {"target_modules": ["qproj"]}}}


def wrong_optimizer(folder: Path) -> dict[str, Any]:
    return {"training_args.optim_args": "beta1"}


def wrong_schedule(folder: Path) -> dict[str, Any]:
    return {"training_args.lr_scheduler_type": "polynomial", "training_args.lr_scheduler_kwargs": {"lr_end": 1.0}}


def wrong_upload(folder: Path) -> dict[str, Any]:
    return {"run_conf.copy_checkpoints_to": "nowhere://bucket"}


def wrong_controller(folder: Path) -> dict[str, Any]:
    metric = {"name": "loss", "class": "Loss", "arguments": {"window": 1}}
    rule = {"name": "stop", "triggers": ["on_log"], "rule": "loss > 9", "operations": ["hfcontrols.nothing"]}
    return {"trainer_controller": {"controller_metrics": [metric], "controllers": [rule]}}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (no_tokenizer, "tokenizer"),
        (no_weights, "has no weights"),
        (truncated_weights, "model.safetensors"),
        (unknown_class, "`lama`"),
        (wrong_template, "the chat template is not valid Jinja"),
        (wrong_target, "no module 'qproj'. Did you mean q_proj"),
        (wrong_optimizer, "training_args.optim_args: is rejected"),
        (wrong_schedule, "training_args.lr_scheduler_kwargs: is rejected: lr_end"),
        (wrong_upload, "nowhere"),
        (wrong_controller, "hfcontrols.nothing"),
    ],
)
def test_each_fault_is_found_by_the_dry_run(
    dry: Dry, sft_values: Any, chatml_llama_dir: Path, tmp_path: Path, fault: Any, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chatml_llama_dir, folder)
    code, out, err = dry(sft_values({"run_conf.model": str(folder), **fault(folder)}))
    assert code == 1 and message in err, err
    assert "No problem was found" not in out


def test_several_faults_are_reported_at_once(dry: Dry, sft_values: Any) -> None:
    changes = wrong_upload(Path()) | wrong_target(Path()) | wrong_optimizer(Path())
    code, _, err = dry(sft_values(changes))
    assert code == 1
    assert [line.startswith("error: ") and "config.yaml:" in line for line in err.splitlines()] == [True] * 3


@pytest.fixture
def held(tmp_path: Path) -> Iterator[None]:
    """Another run uses the output directory."""
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".finetuning.lock", "w") as lock:
        lock.write("process 1 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_a_directory_in_use_is_refused(dry: Dry, sft_values: Any, held: None, tmp_path: Path) -> None:
    code, _, err = dry(sft_values())
    assert code == 1 and "another run (process 1 on elsewhere) is using" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".finetuning.lock"]


def test_an_earlier_run_and_a_full_disk_are_refused(
    dry: Dry, sft_values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "out" / "checkpoint-final"
    final.mkdir(parents=True)
    (final / "model.safetensors").touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    code, _, err = dry(sft_values())
    assert code == 1 and "holds an earlier run (checkpoint-final)" in err and "1 B free" in err


def test_a_model_on_an_unreachable_hub_is_not_checked(dry: Dry, sft_values: Any) -> None:
    code, out, err = dry(sft_values({"run_conf.model": "nobody/nothing"}))
    assert code == 0, err
    for what in ("model files: nobody/nothing is not", "tokenizer and chat template: nobody/nothing is not"):
        assert f"not checked        {what}" in out
    assert "No problem was found in what was checked." in out
    code, _, err = dry(sft_values({"run_conf.model": "./nothing"}))
    assert code == 1 and "there is no folder" in err


def test_a_tracker_that_does_not_answer_is_a_warning(dry: Dry, sft_values: Any, tmp_path: Path) -> None:
    code, out, err = dry(sft_values({"tracking": {"mlflow_server_uri": "http://127.0.0.1:9"}}))
    assert code == 0 and "warning: MLflow: 127.0.0.1:9 does not answer" in err
    code, out, err = dry(sft_values({"tracking": {"mlflow_server_uri": f"sqlite:///{tmp_path}/m.db"}}))
    assert code == 0 and err.count("\n") == 1 and KEEPS in err, err and "tracker address" in out


def test_fewer_prompts_than_a_batch_needs_are_refused(dry: Dry, grpo_values: Any) -> None:
    batch = {"total_train_batch_size": 200, "max_per_device_train_batch_size": 4}
    code, _, err = dry(grpo_values({"batchsize_conf": batch}), "grpo")
    assert code == 1 and "a batch needs 50 prompts, but there are 24" in err


def test_a_complete_run_would_train_nothing(dry: Dry, sft_values: Any, write_config: Any, capsys: Any) -> None:
    values = sft_values({"training_args.max_steps": 1, "run_conf.resume_from_checkpoint": "auto"})
    assert main(["sft", str(write_config(values))]) == 0, capsys.readouterr().err
    code, out, err = dry(values)
    assert code == 0, err
    assert out.endswith("The run is complete: its final model is saved, and nothing would be trained.\n")
    assert "No problem" not in out


def test_a_refusal_that_the_dry_run_does_not_make_fails_the_test_of_it(
    train: Any, sft_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise ConfigError("only in the run")

    monkeypatch.setattr("finetuning.training.run.load_model", refuse)
    with pytest.raises(ConfigError):
        train(sft_values())
    assert len(dry_run_refusals.missed) == 1 and "only in the run" in dry_run_refusals.missed[0]
    dry_run_refusals.missed.clear()
    monkeypatch.setattr("finetuning.training.run.load_tokenizer", refuse)
    monkeypatch.setattr("finetuning.training.dry_run.load_tokenizer", refuse)
    with pytest.raises(ConfigError):
        train(sft_values())
    assert not dry_run_refusals.missed


def test_an_adapter_that_does_not_exist_is_refused(dry: Dry, sft_values: Any, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "adapter_model.bin").touch()
    conf = {"peft_type": "PRETRAINED_PEFT", "name_or_path": str(folder)}
    code, _, err = dry(sft_values({"peft_conf": conf}))
    assert code == 1 and "has a pickled adapter" in err


def test_errors_keep_the_class_of_the_first(sft_values: Any, write_config: Any, monkeypatch: Any) -> None:
    from finetuning.training.dry_run import DryRun

    dry = DryRun()
    with dry.check("a"):
        raise ModelError("first")
    with dry.check("b"):
        raise ConfigError("second")
    with pytest.raises(ModelError) as caught:
        dry.raise_errors()
    assert [problem.message for problem in caught.value.problems] == ["first", "second"]
    assert dry.checked == []
