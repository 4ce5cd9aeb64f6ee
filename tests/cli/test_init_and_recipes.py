"""From nothing to a config: `finetuning init` writes one that is valid, and recipes work where they were copied to."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from finetuning.algorithms import ALGORITHMS
from finetuning.cli.completion import script
from finetuning.cli.main import SUBCOMMANDS, main
from finetuning.cli.recipes import list_recipes
from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document

ROOT = Path(__file__).resolve().parents[2]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PAIR = {"chosen": CHAT["messages"], "rejected": CHAT["messages"]}
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    """A function that runs `finetuning` in an empty folder: exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (CHAT, [], {"method": "sft", "format": "messages"}),
        (PAIR, [], {"method": "dpo", "format": "chosen_rejected"}),
        (PAIR, ["--method", "reward", "--adapter", "none"], {"method": "reward", "format": "chosen_rejected"}),
        ({"prompt": "a", "completion": "b", "label": True}, [], {"method": "kto", "format": "completion_label"}),
        ({"prompt_messages": CHAT["messages"][:1], "answer": "4"}, [], {"method": "grpo", "format": "prompt"}),
        ({"prompt": CHAT["messages"][:1], "answer": "4"}, [], {"method": "grpo", "format": "prompt"}),
        ({"text": "a"}, ["--adapter", "qlora"], {"method": "sft", "format": "text"}),
        (
            {"question": "a", "answer": "b"},
            [],
            {"method": "sft", "format": "alpaca", "columns": {"question": "instruction", "answer": "output"}},
        ),
    ],
)
def test_a_config_is_made_of_the_rows(
    say: Say, chatml_llama_dir: Path, tmp_path: Path, row: Any, options: list[str], expected: dict[str, Any]
) -> None:
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 30)
    code, out, err = say("init", "--model", chatml_llama_dir, "--data", "rows.jsonl", *options)
    assert code == 0, err
    document = read_document("config.yaml")
    method = document.values["method"]
    validated = validate(document, EXPERIMENTS[method])
    assert not validated.warnings
    (source,) = validated.experiment.data_conf.training_data.datasets
    written = {"method": method, "format": source.format, **({"columns": source.columns} if source.columns else {})}
    assert written == expected
    assert f"finetuning {method} config.yaml --dry-run" in out and "30 rows" in out
    if method != "grpo":
        # What is held out is evaluated, and decides which model is kept.
        assert validated.experiment.data_conf.validation_data.type == "AUTO_SPLIT"
        assert validated.experiment.training_args.load_best_model_at_end
    code, _, err = say("init", "--model", chatml_llama_dir, "--data", "rows.jsonl")
    assert code == 1 and "config.yaml exists" in err


def test_the_config_of_init_passes_a_dry_run(say: Say, chatml_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text((json.dumps(CHAT) + "\n") * 30)
    assert say("init", "--model", chatml_llama_dir, "--data", "rows.jsonl")[0] == 0
    code, out, err = say("sft", "config.yaml", "--dry-run")
    assert (code, err) == (0, "") and "chat template: its own" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "m"], "--data is required without a terminal"),
        (["--data", "none.jsonl", "--model", "m"], "none.jsonl: no such file"),
        (["--data", "odd.jsonl", "--model", "m"], "no row format has the columns x, y"),
        (
            ["--data", "odd.jsonl", "--model", "m", "--method", "sft"],
            "messages or prompt + completion or instruction +",
        ),
        (["--data", "rows.jsonl", "--model", "./m"], "there is no folder"),
        (["--data", "rows.jsonl", "--model", "row"], 'Did you mean "rows"?'),
        (["--data", "rows.jsonl", "--model", "m", "--output", "rws/a.yaml"], 'does not exist. Did you mean "rows"?'),
        (["--data", "rows.jsonl", "--model", "m", "--output", "odd.jsonl/a.yaml"], "odd.jsonl is not a folder"),
    ],
)
def test_what_init_cannot_use_is_named(say: Say, tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(CHAT) + "\n")
    (tmp_path / "odd.jsonl").write_text('{"x": 1, "y": 2}\n')
    (tmp_path / "rows").mkdir()
    code, _, err = say("init", *options)
    assert code == 1 and message in err, err
    assert not (tmp_path / "config.yaml").exists()


def test_init_asks_again_in_a_terminal(
    say: Say, chatml_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text((json.dumps(CHAT) + "\n") * 30)
    keyboard, terminal = os.openpty()
    os.write(keyboard, f"none.jsonl\nrows.jsonl\n./m\n{chatml_llama_dir}\n".encode())
    with os.fdopen(terminal, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        code, out, err = say("init")
    os.close(keyboard)
    assert (code, err) == (0, "")
    assert out.count("Data: a file") == out.count("Model: a folder") == 2
    assert "none.jsonl: no such file" in out and "there is no folder" in out
    assert read_document("config.yaml").get(("run_conf", "model")) == str(chatml_llama_dir)
    # Messages are wrapped. A terminal ends the lines of the questions, with the answers.
    written = out.replace("Data: a file, a folder or a dataset id on the Hub: ", "\n")
    written = written.replace("Model: a folder or an id on the Hub: ", "\n")
    assert all(len(line) <= 80 or str(chatml_llama_dir) in line for line in written.splitlines())


def test_every_recipe_is_listed_with_what_it_needs(say: Say) -> None:
    code, out, _ = say("recipes", "list", "--json")
    assert code == 0
    recipes = {recipe["name"]: recipe for recipe in json.loads(out)}
    folder = ROOT / "src" / "finetuning" / "recipes"
    assert recipes.keys() == {f"{path.parent.name}/{path.stem}" for path in folder.glob("*/*.yaml")}
    assert all(recipe["title"] for recipe in recipes.values())
    assert "24 GB" in recipes["sft/qwen3-4b-instruct-lora"]["hardware"]
    code, out, _ = say("recipes", "list", "qlora")
    assert "sft/llama-3.3-70b-instruct-qlora\n" in out and "quickstart" not in out
    assert all(len(line) <= 80 for line in say("recipes", "list")[1].splitlines())


@pytest.mark.parametrize("name", ["sft/qwen3-4b-instruct-lora", "dpo/quickstart"])
def test_a_copied_recipe_is_valid_and_finds_its_schema(say: Say, tmp_path: Path, name: str) -> None:
    code, _, err = say("recipes", "copy", name, "mine/config.yaml")
    assert code == 0, err
    copied = tmp_path / "mine" / "config.yaml"
    first, text = copied.read_text().split("\n", 1)
    schema = json.loads((copied.parent / first.partition("$schema=")[2]).read_text())
    values = yaml.safe_load(text)
    jsonschema.validate(values, schema)
    method = values["method"]
    assert validate(read_document(copied), ALGORITHMS[method].experiment).warnings == []
    assert f"finetuning {method} mine/config.yaml" in text and "configs/" not in text.partition("method:")[0].replace(
        "configs/README.md", ""
    )
    assert say("recipes", "copy", name, "mine/config.yaml")[0] == 1
    assert say("recipes", "show", name)[1].startswith("# yaml-language-server")


def test_a_recipe_of_another_name_is_suggested(say: Say) -> None:
    for name, near in (
        ("llama-3.3-70b-instruct-qlora", "sft/llama-3.3-70b-instruct-qlora"),
        ("sft/qwen-8b-full", "sft/qwen3-8b-full"),
    ):
        code, _, err = say("recipes", "show", name)
        assert code == 1 and f'there is no recipe "{name}". Did you mean "{near}"?' in err
    assert say("recipes", "show", "../../setup")[0] == 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["fine", "pre"], {"preview", "prepare"}),
        (["fine", "preview", "d"], {"dpo"}),
        (["fine", "sft", "config.yaml", "training_args.max_s"], {"training_args.max_steps="}),
        (["fine", "sft", "config.yaml", "--dry"], {"--dry-run"}),
        (["fine", "comp"], {"completion"}),
    ],
)
def test_a_shell_completes(words: list[str], completed: set[str]) -> None:
    import subprocess

    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f'{script("bash")}\nCOMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}; _finetuning; echo "${{COMPREPLY[@]}}"'
    )
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) == completed, result.stderr


def test_the_scripts_of_all_shells_know_all_subcommands() -> None:
    for shell in ("bash", "zsh", "fish"):
        assert all(name in script(shell) for name in (*SUBCOMMANDS, *ALGORITHMS))


def test_recipes_are_part_of_the_package() -> None:
    assert len(list_recipes()) > 50
    assert (ROOT / "configs").resolve() == ROOT / "src" / "finetuning" / "recipes"
