"""The console script `finetuning`: subcommands, options, overrides, dry run, and which imports they avoid."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from finetuning import __version__
from finetuning.algorithms import ALGORITHMS
from finetuning.cli.main import SUBCOMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
KEEPS_TEMPLATE = "data_conf.chat_template_name: keep-original keeps it"
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "mlflow", "bitsandbytes", "pandas")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs the console script in this process and returns exit code, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_version_and_help(say: Any) -> None:
    assert say("--version") == (0, f"finetuning {__version__}\n", "")
    code, out, _ = say("--help")
    assert code == 0
    for option in ("--logging-level", "--num-preprocess-workers", "--mlflow-server-uri", "--experiment-name"):
        assert option in out
    for option in ("--hf-mlflow-log-artifacts", "--dry-run", "key.path=value", "sft", "dpo", "schema"):
        assert option in out


@pytest.mark.parametrize("method", ALGORITHMS)
def test_schemas_are_printed_unredacted(say: Any, method: str) -> None:
    """Output is redacted. The published schemas describe secrets, and hold none."""
    published = (ROOT / "docs" / "schema" / f"{method}.json").read_text(encoding="utf-8")
    assert say("schema", method) == (0, published, "")


def test_help_lists_every_subcommand_with_a_description(say: Any) -> None:
    _, out, _ = say("--help")
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ") and line[2] != " "]
    described = {line[0]: line[1] for line in lines if len(line) == 2}
    for name, algorithm in ALGORITHMS.items():
        assert described[name].startswith(algorithm.title)
    for name, subcommand in SUBCOMMANDS.items():
        assert described[name] == subcommand.summary


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help_with_a_description(say: Any, name: str) -> None:
    code, out, err = say(name, "--help")
    assert (code, err) == (0, "")
    usage, description, *_ = out.split("\n\n")
    assert usage.startswith("usage: ")
    assert description[0].isupper() and not description.startswith("usage")


@pytest.mark.parametrize(
    "name", ["generate", "merge_adapter", "create_vllm_compatible_adapter", "replace_tokens", "sft_trainer"]
)
def test_console_scripts_are_subcommands_with_the_same_help(say: Any, name: str, capsys: Any) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts[name].partition(":")
    with pytest.raises(SystemExit):
        getattr(importlib.import_module(module), function)(["--help"])
    expected = capsys.readouterr().out
    assert expected.startswith(f"usage: {name} ")
    assert say(name, "--help") == (0, expected, "")


def test_options_may_precede_or_follow_positionals(say: Any, sft_values: Any, write_config: Any) -> None:
    config = write_config(sft_values())
    before = say("--dry-run", "--experiment-name", "e", "--mlflow-server-uri", "sqlite:////m.db", "sft", config)
    after = say("sft", config, "--mlflow-server-uri", "sqlite:////m.db", "--experiment-name", "e", "--dry-run")
    between = say("sft", "--dry-run", config, "--experiment-name=e", "--mlflow-server-uri=sqlite:////m.db")
    assert before == after == between
    assert before[0] == 0
    assert "sqlite:////m.db, experiment e" in before[1]


def test_dry_run_prints_a_reason_for_each_decision(
    say: Any, sft_values: Any, write_config: Any, tmp_path: Path
) -> None:
    config = write_config(sft_values({"overrides": {"lr_batch_size_scaling": "sqrt"}}))
    code, out, err = say("sft", config, "--dry-run", "batchsize_conf.total_train_batch_size=514")
    assert code == 0
    assert "514 = 1 x 2 x 257  (processes x per-device rows x accumulation)" in out
    assert "sqrt scaling for 514 rows" in out
    assert "24  (before filtering and dropping)" in out
    assert "Nothing was trained" in out
    assert err.count("warning: ") == 2 and "fewer than the 514 of a batch" in err
    assert not (tmp_path / "out").exists()
    code, out, err = say("sft", config, "--dry-run", "batchsize_conf.total_train_batch_size=514",
                         "batchsize_conf.max_per_device_train_batch_size=8")  # fmt: skip
    assert code == 0
    assert "warning: " in err
    assert "512 (8 x 64) or 520 (8 x 65)" in err


def test_dry_run_counts_prepared_rows_and_marks_streamed_rows_unknown(
    say: Any, sft_values: Any, write_config: Any, write_jsonl: Any, sft_rows: Any, tmp_path: Path
) -> None:
    rows = sft_rows(40)
    rows[3]["messages"][0]["content"] = "word " * 400
    values = sft_values({"data_conf.training_data.datasets": [{"path": str(write_jsonl(tmp_path / "r.jsonl", rows))}]})
    config = write_config(values)
    ready = tmp_path / "ready"
    assert say("prepare", "sft", config, "--output", ready)[0] == 0
    (tmp_path / "r.jsonl").unlink()
    code, out, err = say("sft", config, "--dry-run", f"data_conf.prepared={ready}")
    assert code == 0 and KEEPS_TEMPLATE in err
    assert f"training rows      39  (in {ready}, before packing)" in out
    code, _, err = say("sft", config, "--dry-run", "data_conf.streaming=true")
    assert code == 1
    assert "r.jsonl: no such file" in err
    write_jsonl(tmp_path / "r.jsonl", rows)
    code, out, err = say("sft", config, "--dry-run", "data_conf.streaming=true")
    assert code == 0 and KEEPS_TEMPLATE in err
    assert "training rows      unknown  (data_conf.streaming: rows are read during training)" in out
    assert "optimizer steps    3  (max_steps; the rows of a streaming dataset are not counted)" in out
    code, out, err = say("prepare", "sft", config, "data_conf.streaming=true")
    assert code == 1
    assert "data_conf.streaming: rows are streamed during training, and there is nothing to prepare" in err.replace(
        "\n", " "
    )
    assert say("preview", "sft", config, "data_conf.streaming=true", "--rows", "2")[0] == 0


def test_overrides_win_over_the_file(say: Any, sft_values: Any, write_config: Any) -> None:
    config = write_config(sft_values())
    code, out, _ = say("sft", config, "training_args.learning_rate=2e-4", "training_args.max_steps=7", "--dry-run")
    assert (code, "0.0002" in out, "optimizer steps    7" in out) == (0, True, True)
    code, _, err = say("sft", config, "training_args.learning_rat=2e-4", "--dry-run")
    assert code == 1
    assert 'command line "training_args.learning_rat=2e-4"' in err
    assert 'Did you mean "learning_rate"?' in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--logging-level", "LOUD"], "--logging-level LOUD: choose one of DEBUG, INFO"),
        (["--num-preprocess-workers", "0"], "--num-preprocess-workers 0: must be at least 1"),
        (["--hf-mlflow-log-artifacts", "perhaps"], "expected true or false, got 'perhaps'"),
        (["not an override"], "not an override"),
    ],
)
def test_invalid_options_are_reported_in_one_line(
    say: Any, sft_values: Any, write_config: Any, arguments: list[str], message: str
) -> None:
    code, out, err = say("sft", write_config(sft_values()), "--dry-run", *arguments)
    assert code == 1
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sftt", "x.yaml"], 'unknown subcommand "sftt". Did you mean "sft"?'),
        (["previw", "sft", "x.yaml", "--rows", "3"], 'unknown subcommand "previw". Did you mean "preview"?'),
        (["generat", "--model", "/m"], 'unknown subcommand "generat". Did you mean "generate"?'),
        (["--dry-run", "dpoo", "x.yaml"], 'unknown subcommand "dpoo". Did you mean "dpo"?'),
        (["zzzzzz", "x.yaml"], 'unknown subcommand "zzzzzz". See finetuning --help.'),
        (["--debug", "doctor", "x.yaml"], "put the subcommand first: finetuning doctor ..."),
    ],
)
def test_a_mistyped_subcommand_is_one_line_with_a_suggestion(say: Any, arguments: list[str], message: str) -> None:
    code, out, err = say(*arguments)
    assert (code, out) == (2, "")
    if "--debug" not in arguments:
        assert err == f"error: {message}\n"
    assert f"error: {message}\n" in err


@pytest.mark.parametrize(
    ("environ", "processes"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, 4),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, 1),
    ],
)
def test_world_size_comes_from_the_launcher(
    say: Any,
    sft_values: Any,
    write_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    processes: int,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    code, out, _ = say("sft", write_config(sft_values()), "--dry-run", "batchsize_conf.total_train_batch_size=8")
    assert code == 0
    assert f"8 = {processes} x " in out


def test_only_the_main_process_prints(
    say: Any, sft_values: Any, write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert say("sft", write_config(sft_values()), "--dry-run") == (0, "", "")


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_schema_accepts_the_recipes_and_rejects_a_typo(say: Any, method: str) -> None:
    code, out, err = say("schema", method)
    assert (code, err) == (0, "")
    schema = json.loads(out)
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    recipes = sorted((ROOT / "configs" / method).glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        values = yaml.safe_load(recipe.read_text())
        validator(schema).validate(values)
        values["run_conf"]["modl"] = "x"
        assert list(validator(schema).iter_errors(values))


def test_a_resolved_config_reproduces_the_run(
    say: Any, sft_values: Any, write_config: Any, logged_losses: Any, tmp_path: Path
) -> None:
    legacy = {"training_args.evaluation_strategy": "no", "training_args.warmup_ratio": 0.5, "training_args.lr": None}
    config = write_config(sft_values({**legacy, "training_args.max_steps": 2}))
    code, out, err = say("sft", config)
    assert code == 0, err
    assert "warning: " in err
    assert "Completed after 2 steps" in out
    resolved = tmp_path / "out" / "config.resolved.yaml"
    again = tmp_path / "again.yaml"
    again.write_text(resolved.read_text().replace(str(tmp_path / "out"), str(tmp_path / "again")))
    code, out, err = say("sft", again)
    assert code == 0, err
    assert (tmp_path / "again" / "config.resolved.yaml").read_text() == again.read_text()
    losses = [logged_losses(folder) for folder in (tmp_path / "out", tmp_path / "again")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


LOADED = """
import sys
from finetuning.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit_:
    code = exit_.code
print("loaded", code, *(set({heavy!r}) & set(sys.modules)), file=sys.stderr)
"""


def test_help_and_validation_import_no_heavy_library(sft_values: Any, write_config: Any) -> None:
    config = str(write_config(sft_values()))
    typo = str(write_config(sft_values({"peft_conf": {"peft_type": "LORA", "peft_kwargs": {"rr": 1}}}), "typo.yaml"))
    misplaced = str(write_config(sft_values({"training_args.modl": 1}), "misplaced.yaml"))
    for arguments, code in (
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["merge", "--help"], 0),
        (["sftt", config], 2),
        (["--version"], 0),
        (["sft", typo], 1),
        (["sft", misplaced, "--dry-run"], 1),
        (["schema", "sft"], 0),
    ):
        command = [sys.executable, "-c", LOADED.format(heavy=HEAVY), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stderr.splitlines()[-1] == f"loaded {code}", (arguments, result.stderr)
