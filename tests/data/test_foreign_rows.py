"""Rows in the shapes of other engines and of the OpenAI API: each is read, with the right prompt and answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetuning.data.formats import FORMATS, KINDS, Options
from finetuning.data.formats.row_format import ReadValues
from finetuning.data.samples import Conversation, Preference, Problem, Row, UnpairedPreference
from finetuning.errors import Location

from .conversations import assistant, user

SYSTEM = {"role": "system", "content": "Be kind."}
QUESTION, GOOD, BAD = user("What is the sum?"), assistant("It is 4."), assistant("It is 5.")
HUMAN = {"from": "human", "value": "What is the sum?"}
GPT, OTHER_GPT = {"from": "gpt", "value": "It is 4."}, {"from": "gpt", "value": "It is 5."}
TEXTS = {"chosen": "It is 4.", "rejected": "It is 5."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def parse(kind: str, values: dict[str, Any]) -> Any:
    """Parse a row as a dataset of its own, and return it with the columns that were not read."""
    row = Row(ReadValues(values), Location("a.jsonl", 1))
    row_format = next((item for item in KINDS[kind] if item.matches(row)), KINDS[kind][0])
    parsed = row_format.parse(row)
    assert not isinstance(parsed, Problem), parsed
    assert row.values.unread() == (), row_format.name
    return parsed


PREFERENCES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "LLaMA-Factory, alpaca": (
        {"instruction": "Add.", "input": "2 and 2", **TEXTS},
        [user("Add.\n\n2 and 2")],
    ),
    "LLaMA-Factory, sharegpt": ({"conversations": [HUMAN], "chosen": GPT, "rejected": OTHER_GPT}, [QUESTION]),
    "system and question": ({"system": "Be kind.", "question": "What is the sum?", **TEXTS}, [SYSTEM, QUESTION]),
    "history": (
        {"instruction": "What is the sum?", "history": [["Hi", "Ho"]], **TEXTS},
        [user("Hi"), assistant("Ho"), QUESTION],
    ),
    "ms-swift": ({"messages": [SYSTEM, QUESTION, GOOD], "rejected_response": "It is 5."}, [SYSTEM, QUESTION]),
    "OpenAI": (
        {"input": {"messages": [QUESTION]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        [QUESTION],
    ),
    "chosen_messages and rejected_messages": (
        {"chosen_messages": [SYSTEM, QUESTION, GOOD], "rejected_messages": [SYSTEM, QUESTION, BAD]},
        [SYSTEM, QUESTION],
    ),
    "messages and texts": ({"messages": [QUESTION], **TEXTS}, [QUESTION]),
    "a prompt of text and answers of messages": (
        {"prompt": "What is the sum?", "chosen": [GOOD], "rejected": [BAD]},
        [QUESTION],
    ),
    "chats with their prompt as text": (
        {"prompt": "What is the sum?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        [QUESTION],
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name: str) -> None:
    values, prompt = PREFERENCES[name]
    parsed = parse("preference", values)
    assert isinstance(parsed, Preference) and not parsed.is_text
    assert (parsed.prompt, parsed.chosen, parsed.rejected) == (prompt, [GOOD], [BAD])


def test_tools_of_the_openai_api_are_kept() -> None:
    before = {"messages": [QUESTION], "tools": [CALL], "parallel_tool_calls": True}
    parsed = parse("preference", {"input": before, "preferred_output": [GOOD], "non_preferred_output": [BAD]})
    assert parsed.tools == [CALL]


@pytest.mark.parametrize("column", ["context", "user_prompt", "Frage"])
def test_a_prompt_is_not_guessed_where_a_column_could_be_it(column: str) -> None:
    values = {column: "What is the sum?", "id": "a-1", **TEXTS}
    problem = FORMATS["chosen_rejected"].parse(Row(values, Location("a.jsonl", 1)))
    assert isinstance(problem, Problem)
    assert f"could be it: set columns: {{{column}: prompt}}" in problem.message
    del values[column]
    parsed = FORMATS["chosen_rejected"].parse(Row(values, Location("a.jsonl", 1)))
    assert isinstance(parsed, Preference) and parsed.is_text
    assert [parsed.prompt[0]["content"], parsed.chosen[0]["content"]] == ["It is", " 4."]


UNPAIRED: dict[str, dict[str, Any]] = {
    "ms-swift": {"messages": [QUESTION, GOOD], "label": True},
    "LLaMA-Factory, sharegpt": {"conversations": [HUMAN, GPT], "kto_tag": True},
    "LLaMA-Factory, alpaca": {"instruction": "What is the sum?", "input": "", "output": "It is 4.", "kto_tag": True},
    "a label of CSV": {"messages": [QUESTION, GOOD], "label": "true"},
    "a label of Parquet": {"messages": [QUESTION, GOOD], "label": 1},
}


@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_preferences(name: str) -> None:
    parsed = parse("unpaired", UNPAIRED[name])
    assert isinstance(parsed, UnpairedPreference)
    assert (parsed.prompt, parsed.completion, parsed.label, parsed.is_text) == ([QUESTION], [GOOD], True, False)


@pytest.mark.parametrize(
    ("label", "expected"), [(0, False), (1.0, True), ("0", False), ("False", False), (" TRUE ", True)]
)
def test_labels_may_be_numbers_and_texts(label: Any, expected: bool) -> None:
    assert parse("unpaired", {"prompt": "a", "completion": "b", "label": label}).label is expected


def test_a_chat_without_a_label_is_an_error() -> None:
    problem = FORMATS["completion_label"].parse(Row({"messages": [QUESTION, GOOD]}, Location("a.jsonl", 1)))
    assert isinstance(problem, Problem) and problem.message.startswith("expected label; found messages.")


@pytest.mark.parametrize("label", [2, 0.5, "yes", None, []])
def test_other_labels_are_errors(label: Any) -> None:
    values = {"prompt": "a", "completion": "b", "label": label}
    problem = FORMATS["completion_label"].parse(Row(values, Location("a.jsonl", 1)))
    assert isinstance(problem, Problem) and problem.location.key == "label"


CALLING_ALONE: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
CHATS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "query and response": (
        {"query": "What is the sum?", "response": "It is 4.", "history": [["Hi", "Ho"]], "system": "Be kind."},
        [SYSTEM, user("Hi"), assistant("Ho"), QUESTION, GOOD],
    ),
    "instruction and response": ({"instruction": "What is the sum?", "response": "It is 4."}, [QUESTION, GOOD]),
    "pairs of human and assistant": (
        {"conversation": [{"human": "Hi", "assistant": "Ho"}, {"human": "What is the sum?", "assistant": "It is 4."}]},
        [user("Hi"), assistant("Ho"), QUESTION, GOOD],
    ),
    "roles of ShareGPT": (
        {"messages": [{"role": "human", "content": "What is the sum?"}, {"role": "gpt", "content": "It is 4."}]},
        [QUESTION, GOOD],
    ),
    "calls as roles": (
        {
            "messages": [
                QUESTION,
                {"role": "tool_call", "content": '{"name": "add"}'},
                {"role": "tool_response", "content": "4"},
                GOOD,
            ]
        },
        [QUESTION, CALLING, {"role": "tool", "content": "4"}, GOOD],
    ),
    "blocks of the Anthropic API": (
        {
            "system": [{"type": "text", "text": "Be kind."}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "What is the sum?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Add them.", "signature": "x"},
                        {"type": "text", "text": "A moment."},
                        {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "4"}]},
                        {"type": "text", "text": "And?"},
                    ],
                },
                GOOD,
            ],
        },
        [
            SYSTEM,
            QUESTION,
            {
                "role": "assistant",
                "content": "A moment.",
                "reasoning_content": "Add them.",
                "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
                "content.signature": "x",  # so that it is reported as unused
            },
            {"role": "tool", "content": "4", "tool_call_id": "t1"},
            user("And?"),
            GOOD,
        ],
    ),
    "parts with a value": (
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "What is the sum?"}]}, GOOD]},
        [QUESTION, GOOD],
    ),
    "parts of the Responses API": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "What is the sum?"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "It is 4."}]},
            ]
        },
        [QUESTION, GOOD],
    ),
    "ShareGPT's keys as JSON text": ({"conversations": json.dumps([HUMAN, GPT])}, [QUESTION, GOOD]),
    "a prompt and a completion as JSON text": (
        {"prompt": json.dumps([QUESTION]), "completion": json.dumps([GOOD])},
        [QUESTION, GOOD],
    ),
    "tool calls as JSON text": (
        {"messages": [QUESTION, {**CALLING_ALONE, "tool_calls": json.dumps(CALLING_ALONE["tool_calls"])}, GOOD]},
        [QUESTION, CALLING_ALONE, GOOD],
    ),
    "a legacy function call": (
        {"messages": [QUESTION, {"role": "assistant", "content": None, "function_call": {"name": "add"}}, GOOD]},
        [QUESTION, CALLING, GOOD],
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_chats(name: str) -> None:
    values, messages = CHATS[name]
    parsed = parse("sft", values)
    assert isinstance(parsed, Conversation)
    assert parsed.messages == messages


def test_a_context_without_a_place_is_reported() -> None:
    row = Row(ReadValues({"instruction": "a", "context": "b", "response": "c"}), Location("a.jsonl", 1))
    assert isinstance(FORMATS["alpaca"].parse(row), Conversation)
    assert row.values.unread() == ("context",)


FUNCTION = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    ("column", "tools"),
    [
        ("tools", [WRAPPED]),
        ("tools", json.dumps([WRAPPED])),
        ("tools", [json.dumps(WRAPPED)]),
        ("tools", [FUNCTION]),
        ("tools", [{"function": FUNCTION}]),
        ("functions", [FUNCTION]),
        ("tools", [{"name": "add", "description": "Adds.", "input_schema": FUNCTION["parameters"]}]),
    ],
)
def test_tools_are_those_that_servers_pass_to_a_template(column: str, tools: Any) -> None:
    assert parse("sft", {"messages": [QUESTION, GOOD], column: tools}).tools == [WRAPPED]


BLOCKS: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "a text after a call": (
        "assistant",
        [{"type": "tool_use", "name": "add", "input": {}}, {"type": "text", "text": "a"}],
        "text comes after a tool call",
    ),
    "a result after a text": (
        "user",
        [{"type": "text", "text": "a"}, {"type": "tool_result", "content": "4"}],
        "comes after a text: put the results first",
    ),
    "several texts": (
        "assistant",
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "tool_use", "name": "add"}],
        "got 2 parts of text: join them into one",
    ),
    "encrypted reasoning": ("assistant", [{"type": "redacted_thinking", "data": "x"}], "reasoning that is encrypted"),
    "a document": ("user", [{"type": "document", "source": {}}], "holds a document"),
    "another type": ("user", [{"type": "search_result"}], "a part of type search_result"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_without_a_place_are_errors(name: str) -> None:
    role, content, message = BLOCKS[name]
    problem = FORMATS["messages"].parse(Row({"messages": [{"role": role, "content": content}]}, Location("a", 1)))
    assert isinstance(problem, Problem) and message in problem.message
    assert (problem.location.key or "").startswith("messages[0].content")


def test_a_list_in_the_notation_of_python_is_named() -> None:
    row = Row({"messages": str([QUESTION, GOOD])}, Location("a.csv", 2))
    problem = FORMATS["messages"].parse(row)
    assert (
        isinstance(problem, Problem) and "It is Python's notation: write the column with json.dumps" in problem.message
    )


def test_rows_inside_of_an_object_are_named() -> None:
    problem = FORMATS["alpaca"].parse(
        Row({"version": 1, "data": [{"instruction": "a", "output": "b"}]}, Location("a", 1))
    )
    assert isinstance(problem, Problem)
    assert problem.message.endswith("The rows seem to be in data: write them alone, with jq -c '.data[]'")


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"items": [{"from": "human", "value": "Hi"}]}, "columns: {items: messages}"),
        ({"id": "1", "dialogue": "A: Tea?", "summary": "Tea."}, "columns: {dialogue: prompt, summary: completion}"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": None, "refusal": "No."}]},
            "got null: the text is in refusal; write it as content to train on it",
        ),
        ({"segments": [{"text": "a", "label": None}]}, "expected true or false, got null"),
        ({"segments": [{"text": "a", "label": True, "weight": 1}]}, "expected an object with a text and a label"),
    ],
)
def test_rows_that_are_nearly_known_are_refused_with_the_remedy(values: dict[str, Any], advice: str) -> None:
    name = "segments" if "segments" in values else "messages"
    problem = FORMATS[name].parse(Row(values, Location("a", 1)))
    assert isinstance(problem, Problem) and advice in problem.message


def test_what_joins_an_instruction_and_its_input() -> None:
    line_break = Options(input_separator="\n")
    row = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    for options, expected in ((Options(), "Add.\n\n2, 2"), (line_break, "Add.\n2, 2")):
        parsed = FORMATS["alpaca"].parse(Row(row, Location("a", 1)), options)
        assert parsed.messages[0]["content"] == expected
        pair = Row({**row, "chosen": "4", "rejected": "5"}, Location("a", 1))
        assert FORMATS["chosen_rejected"].parse(pair, options).prompt[0]["content"] == expected
        labeled = Row({**row, "kto_tag": True}, Location("a", 1))
        assert FORMATS["completion_label"].parse(labeled, options).prompt[0]["content"] == expected
    parsed = FORMATS["alpaca"].parse(Row({**row, "instruction": ""}, Location("a", 1)), line_break)
    assert parsed.messages[0]["content"] == "2, 2"


@pytest.mark.parametrize(("train_on", "turns"), [("completions", (3,)), ("last", (3,)), ("assistant", (1, 3))])
def test_the_answers_of_a_history_are_turns_of_the_assistant(train_on: Any, turns: tuple[int, ...]) -> None:
    row = Row({"instruction": "b?", "output": "B", "history": [["a?", "A"]]}, Location("a", 1))
    assert FORMATS["alpaca"].parse(row, Options(completions=train_on)).turns == turns


def test_a_system_column_is_part_of_every_format_with_a_prompt() -> None:
    system = {"role": "system", "content": "Be kind."}
    rows = {
        "prompt_completion": {"prompt": [QUESTION], "completion": [GOOD]},
        "preference": {"prompt_messages": [QUESTION], "chosen_messages": [GOOD], "rejected_messages": [BAD]},
        "chosen_rejected": {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        "unpaired": {"prompt_messages": [QUESTION], "completion_messages": [GOOD], "label": True},
        "completion_label": {"prompt": [QUESTION], "completion": [GOOD], "label": True},
    }
    for name, values in rows.items():
        parsed = FORMATS[name].parse(Row({**values, "system": "Be kind."}, Location("a", 1)))
        messages = parsed.messages if name == "prompt_completion" else parsed.prompt
        assert messages[0] == system, name
