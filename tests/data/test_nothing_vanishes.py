"""What could vanish from a row without a word: it is read, named as unused, or the row is refused by name."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetuning.config.sections.data import DatasetSource
from finetuning.config.sections.rewards import GRPOArgs
from finetuning.data.formats import Options
from finetuning.data.open_dataset import open_dataset
from finetuning.data.pipeline import prepare_dpo, prepare_prompts
from finetuning.errors import DataError, Problem
from finetuning.trainer.reward_functions import needed_columns, read_columns

from .conversations import assistant, user
from .test_loss_mask_matrix import source_of
from .test_pipeline import config, sft

TALK = [user("What is 1?"), assistant("It is 1.")]
CALL = {"name": "f", "arguments": {"a": 1}}


@pytest.fixture
def parsed(tmp_path: Path) -> Callable[..., list[Any]]:
    """A function that parses rows, as values or as the text of a file."""

    def call(kind: str, *rows: Any, name: str = "a.jsonl", **settings: Any) -> list[Any]:
        texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
        source = DatasetSource.model_validate({"path": str(tmp_path / name), **settings})
        return list(open_dataset(source, "data_conf.x", kind, Options(chats="assistant")).rows)

    return call


def problem_of(rows: list[Any]) -> str:
    (problem,) = rows
    assert isinstance(problem, Problem), problem
    return str(problem).rpartition("/")[2]


TWICE = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'


def test_a_key_that_is_twice_in_an_object_is_refused(parsed: Callable[..., Any], tmp_path: Path) -> None:
    message = 'invalid JSON: the key "content" is twice in one object'
    assert problem_of(parsed("sft", TWICE)) == f"a.jsonl:1: {message}"
    assert problem_of(parsed("sft", f" {TWICE}")) == f"a.jsonl:1: {message}"
    bad, good = parsed("sft", f"[{TWICE},\n", json.dumps({"messages": TALK}), "]", name="a.json")
    assert str(bad).endswith(f"a.json:1 (element 1): {message}") and good.messages == TALK
    cut = parsed("sft", '{\n"text": "a",\n"text": "b"}\n{"text":\n"c"}', name="b.json")
    assert str(cut[0]).endswith('b.json:1: invalid JSON: the key "text" is twice in one object')
    assert cut[1].text == "c"
    in_cell = {"messages": TALK, "tools": '[{"name": "f", "name": "g"}]'}
    assert 'the key "name" is twice' in problem_of(parsed("sft", in_cell))


def test_a_number_that_python_does_not_read_is_refused(parsed: Callable[..., Any]) -> None:
    row = '{"text": "a", "n": ' + "1" * 5000 + "}"
    assert "invalid JSON: Exceeds the limit (4300 digits)" in problem_of(parsed("sft", row))
    with pytest.raises(DataError, match=r"a\.json:1: invalid JSON: Exceeds the limit"):
        parsed("sft", f"[{row}]", name="a.json")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"from": "gpt", "value": "a", "content": "b"}, "conversations[1]: has both value and content: remove one"),
        ({"role": "assistant", "content": None, "function_call": CALL, "tool_calls": [{"function": CALL}]},
         "conversations[1]: has both function_call and tool_calls: remove one"),
        ({"role": "tool_call", "content": json.dumps(CALL), "tool_calls": [{"function": CALL}]},
         "conversations[1]: has both content and tool_calls: remove one"),
        ({"role": "tool_call", "content": '{"name": "f", "parameters": {"a": 1}}'},
         "conversations[1].tool_calls[0].parameters: is not read: the arguments of a call belong in arguments"),
        ({**assistant("a"), "tool_calls": [{"function": {"name": "f", "args": {"a": 1}}}]},
         "conversations[1].tool_calls[0].args: is not read"),
        ({**user("a"), "images": ["a.png"]}, "conversations[1].images: holds images, which is not read from here"),
        ({**user("a"), "videos": ["a.mp4"]}, "conversations[1].videos: holds video, which is not read from here"),
        ({**assistant("a"), "loss_scale": 0.5}, "conversations[1].loss_scale: is not read: use train: true or false"),
        ({**assistant("a"), "trainable": False}, "conversations[1].trainable: is not read: use train: true or false"),
    ],
)  # fmt: skip
def test_what_would_change_the_meaning_of_a_message_is_refused(
    message: dict[str, Any], expected: str, parsed: Callable[..., Any]
) -> None:
    assert expected in problem_of(parsed("sft", {"conversations": [user("q"), message]}))


@pytest.mark.parametrize("as_text", [False, True])
def test_keys_inside_of_messages_can_be_ignored(as_text: bool, parsed: Callable[..., Any]) -> None:
    part = {"type": "text", "text": "What is 1?", "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [part], "images": ["a.png"]}, TALK[1]]
    column = json.dumps(messages) if as_text else messages
    ignored = ["messages.images", "messages.content.cache_control"]
    (row,) = parsed("sft", {"messages": column}, ignore_columns=ignored)
    assert row.messages == TALK


def test_keys_of_content_parts_and_blocks_are_named(write_lines: Callable[..., str], make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("byte-level", source_of("qwen3"))
    cached = {"cache_control": {"type": "ephemeral"}}
    question = {"role": "user", "content": [{"type": "text", "text": "What is 1?", **cached}]}
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
        {"type": "text", "text": "It is 1.", "citations": [{"url": "x"}]},
        {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}, "caller": {"type": "direct"}},
    ]
    result = {"type": "tool_result", "tool_use_id": "1", "content": [], "is_error": True}
    row = {"messages": [question, {"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]}
    data = sft(config(write_lines("a.jsonl", row), chat_template_name="keep-original"), tokenizer)
    notes = data.statistics.report()[0]["warnings"]
    for name in ("cache_control", "signature", "citations", "caller", "is_error"):
        assert notes[f"message key content.{name} is not used: the chat template does not read it"] == 1


def test_arguments_and_keys_that_the_template_does_not_print_are_named(
    write_lines: Callable[..., str], make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer("byte-level", source_of("qwen3"))
    named = {"messages": [{**TALK[0], "name": "rosa"}, TALK[1]], "chat_template_kwargs": {"depth": 3}}
    expected = {
        # The template has the word, for the names of tools.
        "message key name is not used: the chat template does not read it": 1,
        "chat_template_kwargs.depth is not used: the chat template does not read it": 1,
    }
    conf = config(write_lines("a.jsonl", named), chat_template_name="keep-original")
    notes = sft(conf, tokenizer).statistics.report()[0]["warnings"]
    assert expected.items() <= notes.items()
    pair = {"prompt": named["messages"][:1], "chosen": TALK[1:], "rejected": [assistant("No.")]}
    pair |= {"chat_template_kwargs": {"depth": 3}}
    conf = config(write_lines("b.jsonl", pair), chat_template_name="keep-original")
    assert expected.items() <= prepare_dpo(conf, None, tokenizer).statistics.report()[0]["warnings"].items()


def test_keys_of_tool_calls_are_named(write_lines: Callable[..., str], make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("byte-level", source_of("qwen3"))
    call = {"id": "1", "index": 0, "type": "function", "signature": "c2ln", "function": {**CALL, "strict": True}}
    row = {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    notes = sft(config(write_lines("a.jsonl", row), chat_template_name="keep-original"), tokenizer).statistics.report()
    assert {note for note in notes[0]["warnings"] if "is not used" in note} == {
        f"message key tool_calls.{name} is not used: the chat template does not read it"
        for name in ("signature", "strict")
    }


@pytest.mark.parametrize("system", [5, ["a"], {"text": "a"}])
def test_a_system_column_that_is_no_text_is_refused(system: Any, parsed: Callable[..., Any]) -> None:
    assert "system: expected text, got" in problem_of(parsed("sft", {"messages": TALK, "system": system}))


def test_the_system_column_of_a_prompt_is_its_first_message(parsed: Callable[..., Any]) -> None:
    (row,) = parsed("prompt", {"prompt": TALK[:1], "system": "Be kind.", "answer": "1"})
    assert row.messages == [{"role": "system", "content": "Be kind."}, TALK[0]]


def test_texts_of_a_dataset_with_a_system_column_are_all_chats(parsed: Callable[..., Any], tmp_path: Path) -> None:
    rows = {"prompt": ["a", "b"], "completion": ["c", "d"], "system": [None, "Be kind."]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = DatasetSource(path=str(tmp_path / "a.parquet"))
    for row in open_dataset(source, "data_conf.x", "sft", Options(chats="assistant")).rows:
        assert row.messages[-2]["role"] == "user"
    late = [*[{"prompt": "a", "completion": "b"}] * 40, {"prompt": "a", "completion": "b", "system": "Be kind."}]
    assert "system: the first rows of this dataset have no such column" in problem_of(parsed("sft", *late)[40:])


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", {"prompt": "a", "completion": "b"}),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("unpaired", {"prompt": "a", "completion": "b", "label": 1}),
    ],
)
@pytest.mark.parametrize("column", ["tools", "documents"])
def test_texts_have_no_place_for_tools(kind: str, row: dict[str, Any], column: str, parsed: Callable[..., Any]) -> None:
    expected = f"{column}: has no place in a text, to which no chat template is applied"
    assert expected in problem_of(parsed(kind, {**row, column: [{"name": "f"}]}))
    (left, *_) = parsed(kind, {**row, column: [{"name": "f"}]}, ignore_columns=[column])
    assert not isinstance(left, Problem)


QUESTION = user("Why?")
COMMON = {"chosen": [assistant("Well."), assistant("Yes.")], "rejected": [assistant("Well."), assistant("No.")]}
RULES = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Why?", **COMMON}, [QUESTION, assistant("Well.")]),
        ({"question": "Why?", **COMMON}, [QUESTION, assistant("Well.")]),
        ({"prompt": "Why?", "system": "Be kind.", **COMMON}, [RULES, QUESTION, assistant("Well.")]),
        ({"prompt": "Why?", "chosen": [RULES, assistant("Yes.")], "rejected": [RULES, assistant("No.")]},
         [RULES, QUESTION]),
    ],
)  # fmt: skip
def test_a_question_outside_of_the_chats_is_not_lost(
    row: dict[str, Any], prompt: list[Any], parsed: Callable[..., Any]
) -> None:
    (pair,) = parsed("preference", row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, [assistant("Yes.")], [assistant("No.")])
    assert pair.unused == ()


@pytest.mark.parametrize(
    ("column", "value"), [("input", "sky"), ("q", "Why?"), ("q", "天空为什么是蓝色的"), ("a b", "What is it")]
)
def test_a_column_that_could_be_the_prompt_is_offered(column: str, value: str, parsed: Callable[..., Any]) -> None:
    row = {column: value, "chosen": "The sky is blue.", "rejected": "The sky is black."}
    name = json.dumps(column) if " " in column else column
    assert f"set columns: {{{name}: prompt}}" in problem_of(parsed("preference", row))
    (pair,) = parsed("preference", row, columns={column: "prompt"})
    assert pair.prompt == [user(value)]


def test_objects_are_not_offered_as_texts(parsed: Callable[..., Any]) -> None:
    row = {"request": {"messages": TALK}, "response": {"choices": []}}
    assert problem_of(parsed("sft", row)) == "a.jsonl:1: expected messages; found request, response"


def test_json_in_a_file_of_text_is_refused(parsed: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"a\.txt:1: the file holds JSON objects, .*Name it \.jsonl"):
        parsed("sft", {"text": "a"}, name="a.txt")
    assert [row.text for row in parsed("sft", '{"a": 1} and so on', "{}", name="b.md")] == ['{"a": 1} and so on', "{}"]


@pytest.mark.parametrize(
    ("data", "what"), [(b"PAR1\x15\x04", "Parquet: name it"), (b"PK\x03\x04\x14\0", "a ZIP archive")]
)
def test_files_of_another_kind_are_named(data: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=f"the file is {what}"):
        open_dataset(DatasetSource(path=str(tmp_path / "a.json")), "data_conf.x", "sft", Options())


def test_columns_of_parquet_with_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="columns with the same name: text"):
        open_dataset(DatasetSource(path=str(tmp_path / "a.parquet")), "data_conf.x", "sft", Options())


def test_a_map_of_parquet_is_an_object(tmp_path: Path) -> None:
    function = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    calls = pa.list_(pa.struct([("function", function)]))
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", calls)])
    chat = [user("q"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [("a", "1")]}}]}]
    pq.write_table(pa.table({"messages": pa.array([chat], type=pa.list_(message))}), tmp_path / "a.parquet")
    source = DatasetSource(path=str(tmp_path / "a.parquet"))
    (row,) = open_dataset(source, "data_conf.x", "sft", Options(chats="assistant")).rows
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": "1"}


def test_a_column_that_reward_functions_cannot_get_is_a_bad_row(tmp_path: Path, make_tokenizer: Any) -> None:
    table = pa.table({"prompt": [TALK[:1]], "day": [datetime.datetime(2024, 1, 1)]})
    pq.write_table(table, tmp_path / "a.parquet")
    tokenizer = make_tokenizer("byte-level", source_of("qwen3"))
    conf = config(str(tmp_path / "a.parquet"), chat_template_name="keep-original")
    with pytest.raises(DataError, match=r"column day is not JSON.*ignore_columns: \[day\]"):
        prepare_prompts(conf, None, {}, tokenizer)


def test_a_column_without_a_name_is_named(write_lines: Callable[..., str], make_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",prompt,completion\n0,a,b\n", encoding="utf-8")
    tokenizer = make_tokenizer("byte-level", source_of("qwen3"))
    notes = sft(config(str(tmp_path / "a.csv")), tokenizer).statistics.report()[0]["warnings"]
    assert notes == {"column '' is not used": 1}


def test_columns_that_get_one_name_are_refused(parsed: Callable[..., Any]) -> None:
    columns = {"q": "prompt", "question": "prompt", "a": "completion"}
    first, second = parsed("sft", {"q": "a", "a": "b"}, {"q": "a", "question": "c", "a": "b"}, columns=columns)
    assert first.text == "ab"
    assert "q and question cannot both be prompt: ignore_columns leaves one of them out" in second.message
    chat = [{"role": "user", "said": "a", "content": "b"}, TALK[1]]
    expected = "said and content cannot both be content"
    assert expected in problem_of(parsed("sft", {"messages": chat}, columns={"messages.said": "content"}))


def test_a_column_that_a_handler_replaces_is_named(parsed: Callable[..., Any]) -> None:
    arguments = {"input_column_name": "question", "output_column_name": "answer"}
    handler = {"name": "tokenize_and_apply_input_masking", "arguments": arguments}
    (row,) = parsed("sft", {"question": "a", "answer": "b", "input": "c"}, handlers=[handler])
    assert (row.text, row.unused) == ("a b", ("input (of the file)",))


def test_a_prompt_that_ends_with_an_answer_is_noted(write_lines: Callable[..., str], make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("byte-level", source_of("qwen3"))
    conf = config(write_lines("a.jsonl", {"prompt": "Why?", **COMMON}), chat_template_name="keep-original")
    notes = prepare_dpo(conf, None, tokenizer).statistics.report()[0]["warnings"]
    assert notes["the prompt ends with an answer: the one that is trained is a turn of its own after it"] == 1


def test_columns_that_no_reward_reads_are_named(tmp_path: Path, write_lines: Any, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("byte-level", source_of("qwen3"))
    row = {"prompt": TALK[:1], "system": "Be kind.", "answer": "1", "level": 3, "source": None}
    conf = config(write_lines("a.jsonl", row), chat_template_name="keep-original")
    (tmp_path / "rewards.py").write_text(
        "def some(completions, level):\n    return [0.0]\n\ndef every(completions, **kwargs):\n    return [0.0]\n"
    )

    def notes(*functions: str) -> dict[str, int]:
        rewards = [{"type": "function", "path": f"{tmp_path}/rewards.py:{name}"} for name in functions]
        args = GRPOArgs.model_validate({"rewards": [{"type": "exact_match", "column": "answer"}, *rewards]})
        data = prepare_prompts(conf, None, needed_columns(args), tokenizer, read_columns=read_columns(args))
        return data.statistics.report()[0]["warnings"]

    assert notes() == {"column level is not used: no reward reads it": 1}
    assert notes("some") == notes("every") == {}
