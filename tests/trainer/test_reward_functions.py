"""Rewards give one number a completion, or say which of them did not and why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from finetuning.config.sections.rewards import GRPOArgs
from finetuning.errors import ConfigError
from finetuning.trainer.reward_functions import build_rewards, needed_columns


def build(*confs: dict[str, Any]) -> list[Any]:
    return build_rewards(GRPOArgs.model_validate({"rewards": list(confs)}))


def values(conf: dict[str, Any], texts: list[str], **columns: Any) -> list[float | None]:
    columns.setdefault("completion_ids", [[0] * len(text) for text in texts])
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return build(conf)[0](prompts=[[]] * len(texts), completions=completions, trainer_state=None, **columns)


def test_exact_match() -> None:
    texts = [" Paris ", "paris", "Rome", "4", ""]
    right = ["Paris", "Paris", ["Paris", "Rome"], 4, "a"]
    assert values({"type": "exact_match"}, texts, correct_answers=right) == [1, 0, 1, 1, 0]
    ignoring = {"type": "exact_match", "ignore_case": True, "column": "answer"}
    assert values(ignoring, texts, answer=right) == [1, 1, 1, 1, 0]
    boxed = {"type": "exact_match", "pattern": r"<a>(.*?)</a>"}
    assert values(boxed, ["<a>x</a> <a> 5\n</a>", "5", "<a></a>"], correct_answers=["5"] * 3) == [1, 0, 0]
    assert values({"type": "exact_match", "pattern": r"\d+"}, ["1, so 42"], correct_answers=[42]) == [1]


def test_regex() -> None:
    conf = {"type": "regex", "pattern": "^<think>.+</think>.+$"}
    assert values(conf, ["<think>a\nb</think>c", "<think></think>", "x <think>a</think>b"]) == [1, 0, 0]


def test_json_valid() -> None:
    texts = ['{"a": 1}', "[1]", "3", "{", "", '{"a": 1, "b": 2} x']
    assert values({"type": "json_valid"}, texts) == [1, 1, 1, 0, 0, 0]
    assert values({"type": "json_valid", "keys": ["a"]}, texts) == [1, 0, 0, 0, 0, 0]


def test_length() -> None:
    result = values({"type": "length", "target": 4}, ["", "ab", "abcd", "abcdef", "abcdefgh", "a" * 20])
    assert result == [0, 0.5, 1, 0.5, 0, 0]


@pytest.fixture
def own_rewards(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(
        "import numpy, torch\n"
        "def named(completions, city, factor=1): return [factor * len(one) for one in city]\n"
        "def everything(prompts, completions, **columns): return [float(len(columns))] * len(completions)\n"
        "def some(completions): return [None, 2.0]\n"
        "def array(completions): return numpy.ones(len(completions))\n"
        "def tensor(completions): return torch.ones(len(completions))\n"
        "def truth(completions): return [True, False]\n"
        "def broken(completions):\n    return [1 / 0 for one in completions]\n"
        "def few(completions): return [1.0]\n"
        "def one(completions): return 1.0\n"
        "def text(completions): return ['a', 'b']\n"
        "def infinite(completions): return [1.0, float('inf')]\n"
        "def needs(completions, missing): return [1.0, 1.0]\n"
        "async def later(completions): return [1.0, 1.0]\n"
        "number = 3\n"
    )
    return path


def test_functions_are_given_what_they_name(own_rewards: Path) -> None:
    def call(name: str, **more: Any) -> list[float | None]:
        return values({"type": "function", "path": f"{own_rewards}:{name}", **more}, ["a", "b"], city=["x", "yy"])

    assert call("named") == [1, 2]
    assert call("named", arguments={"factor": 3}) == [3, 6]
    assert call("everything") == [3, 3]
    assert call("some") == [None, 2]
    assert call("array") == call("tensor") == [1, 1]
    assert call("truth") == [1, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"raised ZeroDivisionError: division by zero \(own\.py, line 9\)"),
        ("few", "returned 1 rewards for 2 completions"),
        ("one", "returned float, not a list of numbers"),
        ("text", "returned 'a' for completion 0"),
        ("infinite", "returned inf for completion 1; a reward must be finite"),
        ("needs", "raised TypeError: .*missing"),
    ],
)
def test_a_wrong_function_is_named(own_rewards: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        values({"type": "function", "path": f"{own_rewards}:{name}"}, ["a", "b"])
    assert str(raised.value).startswith(f"grpo_args.rewards[0]: the reward function {own_rewards}:{name} ")
    assert raised.value.exit_code == 1


def test_running_out_of_memory_is_not_the_rewards_fault(tmp_path: Path) -> None:
    path = tmp_path / "large.py"
    path.write_text("import torch\ndef large(completions): raise torch.OutOfMemoryError('out of memory')\n")
    with pytest.raises(torch.OutOfMemoryError):
        values({"type": "function", "path": f"{path}:large"}, ["a"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "no_such_package.rewards:fn",
            "cannot import the reward function .*: No module named 'no_such_package'.*PYTHONPATH",
        ),
        ("missing.py:fn", "there is no file missing.py"),
        ("{own}:nothing", "has no function nothing.*It has: .*named"),
        ("{own}:number", "has no function number"),
        ("{own}:later", "is async"),
        ("json:dumpz", "json has no function dumpz"),
    ],
)
def test_a_function_that_is_not_there_is_named(own_rewards: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"type": "function", "path": path.format(own=own_rewards)})


def test_a_file_that_fails_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("x = 1\nraise RuntimeError('at import')\n")
    with pytest.raises(ConfigError, match=re.escape("raised RuntimeError: at import (bad.py, line 2)")):
        build({"type": "function", "path": f"{path}:fn"})


def test_functions_of_installed_packages_are_found() -> None:
    assert build({"type": "function", "path": "trl.rewards:think_format_reward"})[0].name.endswith(
        "think_format_reward"
    )


def test_rewards_of_one_name_are_distinguished() -> None:
    made = build({"type": "regex", "pattern": "a"}, {"type": "json_valid"}, {"type": "regex", "pattern": "b"})
    assert [reward.__name__ for reward in made] == ["regex-0", "json_valid", "regex-2"]


def test_the_columns_that_are_needed() -> None:
    args = GRPOArgs.model_validate({"rewards": [{"type": "exact_match", "column": "x"}, {"type": "json_valid"}]})
    assert needed_columns(args) == {"x": "the reward exact_match"}


@pytest.mark.parametrize(
    "conf",
    [
        {"type": "regex", "pattern": "("},
        {"type": "regex"},
        {"type": "length", "target": 0},
        {"type": "function", "path": "no_colon"},
        {"type": "exact_match", "colum": "a"},
        {"type": "accuracy"},
    ],
)
def test_a_wrong_reward_is_refused_by_the_config(conf: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GRPOArgs.model_validate({"rewards": [conf]})


def test_a_reward_knows_whether_it_has_judged_anything(own_rewards: Path, tmp_path: Path) -> None:
    (tmp_path / "silent.py").write_text("def silent(completions):\n    return [None] * len(completions)\n")
    mute, judge = build({"type": "function", "path": f"{tmp_path}/silent.py:silent"}, {"type": "json_valid"})
    for reward in (mute, judge):
        assert not reward.has_judged
        reward(prompts=[[]], completions=[[{"role": "assistant", "content": "a"}]], completion_ids=[[1]])
    assert (mute.has_judged, judge.has_judged) == (False, True)
