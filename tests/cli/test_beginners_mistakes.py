"""Thirty mistakes of a first day and more, each with the message that ends it: what is wrong, where, and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.cli.main import main

Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], sft_values: Any, write_config: Any) -> Say:
    """A function that runs `finetuning` with a changed config, which CONFIG names: exit code and standard error."""

    def run(changes: dict[str, Any] | None, *arguments: str) -> tuple[int, str]:
        config = "" if changes is None else str(write_config(sft_values(changes)))
        capsys.readouterr()
        try:
            code = main(
                [argument.replace("CONFIG", config) for argument in arguments or ("sft", "CONFIG", "--dry-run")]
            )
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return code, " ".join(error.split())

    return run


RUN = ("sft", "CONFIG")
IN_THE_CONFIG: dict[str, tuple[dict[str, Any], str]] = {
    "1 a misspelled key": ({"training_args.lerning_rate": 1e-4}, 'unknown key. Did you mean "learning_rate"?'),
    "2 a key in the wrong section": ({"run_conf.learning_rate": 1e-4}, "It belongs under training_args."),
    "3 TRL's name of the length": ({"sft_args.max_length": 512}, 'Did you mean "max_seq_length"?'),
    "4 axolotl's name of the model": ({"run_conf.base_model": "m"}, 'Did you mean "model"?'),
    "5 the Trainer's early stopping": (
        {"training_args.early_stopping_patience": 3},
        "Early stopping is a trainer controller",
    ),
    "6 the Trainer's batch size": (
        {"training_args.per_device_train_batch_size": 4},
        "is computed from batchsize_conf. Remove it here.",
    ),
    "7 gradient accumulation": ({"training_args.gradient_accumulation_steps": 8}, "batchsize_conf"),
    "8 quantization among the arguments of the model": ({"run_conf.load_in_4bit": True}, "under quant_conf"),
    "9 text for a number": ({"training_args.num_train_epochs": "three"}, 'expected a number (got "three")'),
    "10 a negative learning rate": ({"training_args.learning_rate": -1}, "must be >= 0"),
    "11 an unknown schedule": ({"training_args.lr_scheduler_type": "cosin"}, 'Did you mean "cosine"?'),
    "12 an unknown optimizer": ({"training_args.optim": "adamw_tourch"}, 'Did you mean "adamw_torch"?'),
    "13 an unknown adapter": ({"peft_conf": {"peft_type": "LORRA"}}, "LORA"),
    "14 an argument LoRA does not have": (
        {"peft_conf": {"peft_type": "LORA", "peft_kwargs": {"rank": 8}}},
        'Did you mean "r"?',
    ),
    "15 an unknown template": ({"data_conf.chat_template_name": "chatml"}, "chat-ml"),
    "16 no data section": ({"data_conf": None}, "data_conf: is required, but missing"),
    "17 evaluation without data": ({"training_args.eval_strategy": "epoch"}, "validation_data"),
    "a file without the class": ({"run_conf.trainer_mixin": "own.py"}, 'such as path/to/file.py:Name (got "own.py")'),
    "a time in words": ({"run_conf.max_time": "2 hours"}, 'such as 1d12h (got "2 hours")'),
    "a key of another type": (
        {"data_conf.validation_data": {"type": "NONE", "ratio": 0.1}},
        "data_conf.validation_data.ratio: unknown key. It belongs to type AUTO_SPLIT.",
    ),
    "4 bit without a quantization": (
        {"quant_conf": {"quantization_type": "no-quantization", "load_in_4bit": True}},
        "quant_conf.load_in_4bit: unknown key. It belongs to quantization_type bits-and-bytes.",
    ),
    "18 a total that no number of processes gives": (
        {"batchsize_conf.total_train_batch_size": 0},
        "must be > 0",
    ),
}


@pytest.mark.parametrize(("changes", "message"), IN_THE_CONFIG.values(), ids=IN_THE_CONFIG)
def test_in_the_config(say: Say, changes: dict[str, Any], message: str) -> None:
    code, error = say(changes)
    assert code == 1 and message in error, error
    assert "config.yaml" in error


ON_THE_COMMAND_LINE: dict[str, tuple[tuple[str, ...], int, str]] = {
    "19 an option for a key": (("sft", "CONFIG", "--max_steps", "3"), 2, "key.path=value: training_args.max_steps=3"),
    "20 the same with dashes and =": (("sft", "CONFIG", "--learning-rate=1e-4"), 2, "training_args.learning_rate=1e-4"),
    "21 a misspelled option": (("sft", "CONFIG", "--max_step", "3"), 2, "training_args.max_steps=3"),
    "22 a misspelled subcommand": (("sfft", "CONFIG"), 2, 'unknown subcommand "sfft". Did you mean "sft"?'),
    "23 a misspelled method": (("preview", "sftt", "CONFIG"), 2, 'unknown method "sftt". Did you mean "sft"?'),
    "24 no config": (("sft",), 2, "error: the following arguments are required: config"),
    "25 a key without its section": (("sft", "CONFIG", "max_steps=3"), 1, "It belongs under training_args."),
    "26 a value without a key": (("sft", "CONFIG", "3"), 1, "expected key.path=value"),
    "27 a file that does not exist": (("sft", "CONFIGG"), 1, 'config.yaml"?'),
    "a misspelled option that exists": (("sft", "CONFIG", "--dryrun"), 2, 'Did you mean "--dry-run"?'),
    "the same of another subcommand": (("preview", "sft", "CONFIG", "--htlm", "x"), 2, 'Did you mean "--html"?'),
    "an option of others": (("runs", "--jason"), 2, 'unrecognized arguments: --jason. Did you mean "--json"?'),
    "no method": (("train", "CONFIG"), 2, "by the name of the method: finetuning sft config.yaml"),
    "only the config": (("CONFIG",), 2, "by the name of the method: finetuning sft"),
    "a preview without the method": (("preview", "CONFIG"), 2, "Put the method before the config. Methods: sft, dpo"),
    "a folder that does not exist": (("preview", "sft", "CONFIG", "--html", "none/x.html"), 1, "none does not exist"),
    "a run that does not exist": (("generate", "outt"), 1, "outt: no such run, model folder or config."),
    "a model that does not exist": (("chat", "/none/m"), 1, "error: /none/m: there is no folder /none/m"),
    "the start of a recipe's name": (("recipes", "show", "sft/qwen3-4b"), 1, '"sft/qwen3-4b-instruct-lora" or "'),
}


@pytest.mark.parametrize(("arguments", "exit_code", "message"), ON_THE_COMMAND_LINE.values(), ids=ON_THE_COMMAND_LINE)
def test_on_the_command_line(say: Say, arguments: tuple[str, ...], exit_code: int, message: str) -> None:
    code, error = say({}, *arguments)
    assert (code, message in error) == (exit_code, True), error


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that writes rows and gives the change that trains on them."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl", **source: Any) -> dict[str, Any]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"data_conf.training_data.datasets": [{"path": str(tmp_path / name), **source}]}

    return write


def test_28_columns_of_other_names(say: Say, data: Any) -> None:
    rows = [{"question": f"a {number}", "answer": "b"} for number in range(40)]
    code, error = say(data(rows))
    assert code == 1
    assert error.count("error: ") == 2, "equal errors are one, with their number"
    assert "rows.jsonl:1: expected messages; found answer, question. Rename them in the config" in error
    assert "columns: {question: prompt, answer: completion} (40 rows like this)" in error
    assert "error: 40 bad rows." in error


def test_29_a_column_that_does_not_exist(say: Say, data: Any) -> None:
    code, error = say(data([{"question": "a", "answer": "b"}], columns={"questions": "prompt"}))
    assert code == 1 and "none of questions is a column of the first rows" in error
    assert 'Did you mean "question"?' in error


def test_30_a_misspelled_file_and_model(say: Say, data: Any, tmp_path: Path) -> None:
    code, error = say(data([{"text": "a"}], name="row.jsonl"))
    assert code == 1 and "row.jsonl: no such file" in error and f'Did you mean "{tmp_path}/rows.jsonl"?' in error
    (tmp_path / "models" / "llama").mkdir(parents=True)
    code, error = say({"run_conf.model": str(tmp_path / "models" / "lama")})
    assert code == 1 and f'Did you mean "{tmp_path}/models/llama"?' in error


def test_a_model_that_is_neither_here_nor_reachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_config: Any, sft_values: Any, capsys: Any
) -> None:
    (tmp_path / "lama").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["sft", str(write_config(sft_values({"run_conf.model": "llama"}))), "--dry-run"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "model files" in line)
    assert line.startswith("not checked") and line.endswith('Did you mean "lama"?'), line
