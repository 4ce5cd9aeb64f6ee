"""Rows to prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.sections.data import DatasetSource
from finetuning.config.sections.experiment import EvalData, OpenInput
from finetuning.errors import ConfigError, DataError
from finetuning.inference.prompts import GenerationPrompt, read_lines, read_prompts

WriteJsonl = Callable[[Path, list[dict[str, Any]]], Path]
USER = {"role": "user", "content": "two plus two?"}
ASSISTANT = {"role": "assistant", "content": "four"}


def eval_data(path: Path) -> EvalData:
    return EvalData(type="eval-data", data=DatasetSource(path=str(path)))


def read(write_jsonl: WriteJsonl, tmp_path: Path, *rows: dict[str, Any]) -> list[GenerationPrompt]:
    return read_prompts(eval_data(write_jsonl(tmp_path / "sums.jsonl", list(rows))))


def test_an_open_prompt_is_repeated_num_samples_times() -> None:
    prompts = read_prompts(OpenInput(type="open-input", input="Once", num_samples=3))
    assert [(prompt.id, prompt.text) for prompt in prompts] == [("0", "Once"), ("1", "Once"), ("2", "Once")]
    assert {prompt.dataset for prompt in prompts} == {"_open_prompt_data_"}  # as in Silogen's engine


def test_the_last_answer_of_messages_is_the_reference_and_not_shown(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    (prompt,) = read(write_jsonl, tmp_path, {"messages": [USER, ASSISTANT]})
    assert prompt.messages == (USER,)
    assert prompt.correct_answers == ("four",)


def test_correct_answers_win_over_the_reference(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, ASSISTANT], "correct_answers": ["4", "four"]},
        {"prompt_messages": [USER, ASSISTANT, USER], "correct_answers": "4"},
        {"messages": [USER]},
    ]
    prompts = read(write_jsonl, tmp_path, *rows)
    assert [prompt.correct_answers for prompt in prompts] == [("4", "four"), ("4",), ()]
    assert prompts[1].messages == (USER, ASSISTANT, USER)


def test_columns_are_carried(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    row = {"prompt": "2 + 2 =", "id": "a", "dataset": "math", "tags": ["easy"], "correct_answers": ["4"]}
    named, bare = read(write_jsonl, tmp_path, row, {"prompt": "3 + 3 ="})
    assert (named.id, named.dataset, named.carried, named.text) == ("a", "math", {"tags": ["easy"]}, "2 + 2 =")
    assert (bare.id, bare.dataset, bare.carried) == (1, "sums", {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, "expected messages, prompt_messages or prompt; got columns question"),
        ({"prompt": 3}, "prompt: expected text, got a number"),
        ({"messages": []}, "messages: needs at least one message"),
        ({"messages": [ASSISTANT]}, "messages: has an assistant message but no user message"),
        ({"messages": [{"role": "usr", "content": "?"}]}, 'unknown role "usr". Did you mean "user"?'),
        ({"prompt": "?", "correct_answers": [4]}, "correct_answers: expected a list of strings"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(
    write_jsonl: WriteJsonl, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as error:
        read(write_jsonl, tmp_path, {"prompt": "fine"}, row)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'sums.jsonl'}:2: ")


def read_data(**settings: Any) -> list[GenerationPrompt]:
    return read_prompts(EvalData(type="eval-data", data=DatasetSource(**settings)))


def test_prompt_datasets_resolve_like_training_datasets(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    sums = write_jsonl(tmp_path / "data" / "sums-test.jsonl", [{"prompt": "1 + 1 ="}, {"prompt": "2 + 2 ="}])
    capitals = tmp_path / "data" / "capitals-test.csv"
    capitals.write_text("prompt,correct_answers\nFrance:,Paris\n")
    write_jsonl(tmp_path / "data" / "sums-train.jsonl", [{"prompt": "3 + 3 ="}])
    listed = read_data(path=[str(capitals), str(sums)])
    assert [(prompt.id, prompt.text, prompt.dataset) for prompt in listed] == [
        (0, "France:", "capitals-test"),
        (1, "1 + 1 =", "sums-test"),
        (2, "2 + 2 =", "sums-test"),
    ]
    assert listed[0].correct_answers == ("Paris",) and listed[0].data_collection == str(capitals)
    assert read_data(path=str(tmp_path / "data" / "*-test.*")) == listed
    assert read_data(path=str(tmp_path / "data"), split="test") == listed
    assert read_data(path=str(tmp_path / "data"), split="test", max_rows=2) == listed[:2]
    with pytest.raises(DataError, match=r"prompt_conf\.data\.path: .*has several splits \(test, train\)"):
        read_data(path=str(tmp_path / "data"))
    with pytest.raises(DataError, match="of the Hugging Face Hub it cannot be fetched"):
        read_data(path="some-one/some-questions", split="test")


def test_columns_of_silogen_are_read_and_others_said(
    write_jsonl: WriteJsonl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "1 + 1 =", "response": "2", "dataset": "sums", "id": "s-1", "difficulty": "easy"}
    (prompt,) = read(write_jsonl, tmp_path, row)
    assert (prompt.correct_answers, prompt.dataset, prompt.data_collection) == (("2",), "sums", "sums")
    assert prompt.id == "s-1"
    (message,) = [record.message for record in caplog.records]
    assert message == "prompt_conf.data: columns that are not read: difficulty"
    both = {"prompt": "1 + 1 =", "response": "3", "correct_answers": ["2"], "data_collection": "all"}
    (prompt,) = read(write_jsonl, tmp_path, both)
    assert (prompt.correct_answers, prompt.data_collection) == (("2",), "all")


def test_columns_of_other_names_and_texts(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "sums.jsonl", [{"question": "1 + 1 =", "answer": "2"}])
    (prompt,) = read_data(path=str(file), columns={"question": "prompt", "answer": "correct_answers"})
    assert (prompt.text, prompt.correct_answers) == ("1 + 1 =", ("2",))
    with pytest.raises(DataError, match=r"got columns answer, question\. .*prompt_conf\.data\.columns: {name: prompt}"):
        read_data(path=str(file))
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    texts = read_data(path=str(tmp_path / "texts.txt"), columns={"text": "prompt"})
    assert [prompt.text for prompt in texts] == ["one", "two"]


@pytest.mark.parametrize("setting", [{"format": "messages"}, {"validation_ratio": 0.5}, {"add_eos_token": False}])
def test_what_only_training_data_has_is_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"prompt_conf\.data\.{next(iter(setting))}: only applies to training data"):
        read_data(path=str(tmp_path / "any.jsonl"), **setting)


def test_at_most_ten_wrong_rows_are_shown(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read(write_jsonl, tmp_path, *[{"prompt": number} for number in range(25)])
    assert len(error.value.problems) == 11
    assert "15 more rows" in str(error.value.problems[-1])


def test_a_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompt_conf\.data\.path: .*no such file"):
        read_prompts(eval_data(tmp_path / "none.jsonl"))


def test_lines_are_stripped_and_empty_ones_left_out(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\ufeffone \n\n  two\n", encoding="utf-8")
    assert read_lines(str(path), "--text_file") == ["one", "two"]
    path.write_text("\n")
    with pytest.raises(ConfigError, match="contains no prompt"):
        read_lines(str(path), "--text_file")
    with pytest.raises(ConfigError, match=r"--text_file: .*No such file"):
        read_lines(str(tmp_path / "none.txt"), "--text_file")
