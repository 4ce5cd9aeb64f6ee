"""Bad configs given to the console script: the message, the exit code, no traceback, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

RIGHT = """\
data_conf:
  training_data: {type: CONCATENATION, datasets: [{path: train.jsonl}]}
  validation_data: {type: NONE}
training_args:
  output_dir: out
  learning_rate: 1e-5
batchsize_conf:
  total_train_batch_size: 16
  max_per_device_train_batch_size: 4
peft_conf:
  peft_type: LORA
run_conf:
  model: base
"""
REQUIRED = "data_conf, training_args, batchsize_conf, peft_conf"
MIX = "{type: PRECOMPUTE_WEIGHTED_MIX, datasets: [{path: a.jsonl, sampling_weight: 0}]}"
QUANTIZED = "quant_conf: {quantization_type: bits-and-bytes, load_in_4bit: true}\n"

CASES: dict[str, tuple[str, str]] = {
    "02 empty": ("", f"config.yaml: is empty; required: {REQUIRED}"),
    "03 a list": ("- a\n", "config.yaml:1: expected sections (keys and values), found a list"),
    "03 two documents": (
        f"{RIGHT}---\na: 1\n",
        "config.yaml:14:1: one document expected, the second starts at line 14",
    ),
    "04 a tab": (
        RIGHT.replace("  model:", "\tmodel:"),
        "config.yaml:13:1: a tab cannot indent YAML; use spaces\n     model: base\n    ^",
    ),
    "04 an open bracket": (
        RIGHT.replace("LORA", "[LORA"),
        "config.yaml:12:9: did not find expected ',' or ']', while parsing a flow sequence that begins at line 11\n"
        "    run_conf:\n            ^",
    ),
    "05 an unknown key": (
        RIGHT.replace("  model:", "  modl:"),
        'config.yaml:13:3: run_conf.modl: unknown key. Did you mean "model"?',
    ),
    "06 a key twice": (
        f"{RIGHT}  model: other\n",
        'config.yaml:14:3: "model" is written twice, at line 13 and at line 14',
    ),
    "09 a negative number": (
        RIGHT.replace("16", "-1"),
        "config.yaml:8:3: batchsize_conf.total_train_batch_size: must be > 0 (got -1)",
    ),
    "09 not a number": (
        RIGHT.replace("1e-5", ".nan"),
        "config.yaml:6:3: training_args.learning_rate: must be a finite number (got nan)",
    ),
    "10 a wrong peft_type": (
        RIGHT.replace("LORA", "lora"),
        'config.yaml:11:3: peft_conf.peft_type: unknown peft_type "lora". Did you mean LORA?',
    ),
    "11 wrong peft_kwargs": (
        RIGHT.replace("LORA", "LORA\n  peft_kwargs: {r: eight, lora_alfa: 3}"),
        'config.yaml:12:17: peft_conf.peft_kwargs.r: expected a whole number (got "eight")\n'
        'error: config.yaml:12:27: peft_conf.peft_kwargs.lora_alfa: unknown key. Did you mean "lora_alpha"?',
    ),
    "13 evaluation without data": (
        RIGHT.replace("  learning_rate: 1e-5", "  eval_strategy: steps"),
        'config.yaml:6:3: training_args.eval_strategy: is "steps", but data_conf.validation_data.type is "NONE".'
        " Give validation data, or set eval_strategy: no.",
    ),
    "15 weights of 0": (
        RIGHT.replace("{type: CONCATENATION, datasets: [{path: train.jsonl}]}", MIX),
        "config.yaml:2:77: data_conf.training_data.datasets.0.sampling_weight:"
        ' is 0 for "a.jsonl", as for every dataset: no row would be drawn.',
    ),
    "17 quantized, all weights trained": (
        RIGHT.replace("LORA", "NO_PEFT") + QUANTIZED,
        "config.yaml:11:3: peft_conf.peft_type: is NO_PEFT, but quant_conf quantizes the model: quantized weights"
        " cannot be trained. Choose an adapter such as LORA, or quantization_type: no-quantization.",
    ),
    "18 a dpo config": (
        RIGHT.replace("  learning_rate: 1e-5", "  beta: 0.1"),
        "config.yaml:6:3: training_args.beta: this looks like a dpo config (has beta); run: finetuning dpo config.yaml",
    ),
    "19 a password in the address": (
        RIGHT + "tracking: {mlflow_server_uri: 'http://me:hf_secret@host'}\n",
        "config.yaml:14:12: tracking.mlflow_server_uri: holds a user name or password."
        " Take it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_message_and_nothing_else(case: str, run_cli: Callable, tmp_path: Path) -> None:
    text, message = CASES[case]
    (tmp_path / "config.yaml").write_text(text)
    done = run_cli(["sft", "config.yaml"], cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"error: {message}\n"
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing.yaml", "missing.yaml: no such file"), ("folder", "folder: is a directory, not a YAML file")],
)
def test_files_that_are_none(name: str, message: str, run_cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    done = run_cli(["sft", name], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


def test_what_only_looked_wrong(check: Callable) -> None:
    """Rows 7, 8 and 19: `1e-5` is a number everywhere, `save_strategy: no` is a word, `file://` is an address."""
    text = RIGHT.replace("LORA", "LORA\n  peft_kwargs: {lora_dropout: 1e-1}")
    text += "tracking: {mlflow_server_uri: 'file:///data/mlruns'}\n"
    experiment = check(text.replace("  learning_rate: 1e-5", "  learning_rate: 1e-5\n  save_strategy: no")).experiment
    assert experiment.training_args.learning_rate == 1e-5
    assert experiment.training_args.save_strategy == "no"
    assert experiment.peft_conf.peft_kwargs == {"lora_dropout": 0.1}
    assert experiment.tracking.mlflow_server_uri == "file:///data/mlruns"
