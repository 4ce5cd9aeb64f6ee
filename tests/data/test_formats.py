from __future__ import annotations

from typing import Any

import pytest

from finetuning.data.formats import FORMATS
from finetuning.data.rows import Conversation, Preference, Row
from finetuning.errors import Place, Problem

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def parse(values: dict[str, Any], name: str = "messages") -> Any:
    return FORMATS[name].parse(Row(values, Place("train.jsonl", 6)))


def test_a_conversation_is_kept_whole() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}], "x": 1}
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": [USER, call], "tools": tools, "documents": [{"title": "t"}], "id": 7, "tags": ["a"], "other": 1}
    parsed = parse(row)
    assert isinstance(parsed, Conversation)
    assert parsed.messages == [USER, call]
    assert parsed.tools == tools
    assert parsed.template_kwargs == {"documents": [{"title": "t"}]}
    assert parsed.meta == {"id": 7, "tags": ["a"]}
    assert parsed.place == Place("train.jsonl", 6)


def test_tools_can_be_a_json_string() -> None:
    assert parse({"messages": [USER], "tools": '[{"type": "function"}]'}).tools == [{"type": "function"}]


def test_a_preference_is_kept_whole() -> None:
    parsed = parse(
        {"prompt_messages": [USER], "chosen_messages": [ANSWER], "rejected_messages": [ANSWER]}, "preference"
    )
    assert isinstance(parsed, Preference)
    assert (parsed.prompt, parsed.chosen, parsed.rejected) == ([USER], [ANSWER], [ANSWER])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content: expected text, got null"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "messages[1].content: expected text, got a number"),
        ({"messages": [USER, {"role": "assistant", "content": []}]}, "messages[1].content: expected text, got a list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: expected text, got nothing"),
        (
            {"messages": [USER, {"role": "asistant", "content": "a"}]},
            'messages[1].role: unknown role "asistant". Did you mean "assistant"?',
        ),
        ({"messages": [{"role": 3, "content": "a"}]}, "messages[0].role: expected text, got a number"),
        ({"messages": [{"from": "humna", "value": "a"}]}, 'messages[0].role: unknown role "humna"'),
        ({"messages": [{"from": "human", "value": 1}]}, "messages[0].content: expected text, got a number"),
        ({"messages": '[{"role": '}, "messages: expected a list of messages, got text that is no JSON"),
        ({"messages": []}, "messages: needs at least one message, got an empty list"),
        ({"messages": "Hi"}, "messages: expected a list of messages, got text"),
        ({"messages": ["Hi"]}, "messages[0]: expected an object with role and content, got text"),
        ({"messages": [USER], "tools": "{"}, "tools: expected a list of tools, got text that is no JSON"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages[1].tool_calls[0]: expected an object whose function has a name",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_key(row: dict[str, Any], message: str) -> None:
    problem = parse(row)
    assert isinstance(problem, Problem)
    assert str(problem).startswith(f"train.jsonl:6: {message}")


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"prompt_messages": 1, "chosen_messages": 1, "rejected_messages": 1}, "preferences: run `finetuning dpo`"),
        ({"instruction": "a", "output": "b"}, "These rows look like `alpaca`"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences: run `finetuning dpo`"),
        ({"message": []}, 'Did you mean "messages" by "message"?'),
        ({"text": "a"}, "expected messages; found text"),
    ],
)
def test_wrong_columns_name_what_was_found_and_what_it_looks_like(row: dict[str, Any], advice: str) -> None:
    problem = parse(row)
    assert isinstance(problem, Problem)
    assert str(problem).startswith("train.jsonl:6: expected messages; found ")
    assert advice in str(problem)


def test_an_answer_of_a_preference_is_the_assistants() -> None:
    row = {"prompt_messages": [USER], "chosen_messages": [ANSWER], "rejected_messages": [USER]}
    problem = parse(row, "preference")
    assert str(problem) == 'train.jsonl:6: rejected_messages[0].role: expected "assistant", got "user"'


def test_sft_rows_in_dpo_are_recognised() -> None:
    assert "`messages`: chats for supervised fine-tuning" in str(parse({"messages": [USER]}, "preference"))
