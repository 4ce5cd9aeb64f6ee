from __future__ import annotations

import json
from typing import Any

import pytest

from finetuning.data.formats import FORMATS, KINDS, Options
from finetuning.data.formats.row_format import propose_columns
from finetuning.data.samples import Conversation, Preference, Row
from finetuning.errors import Location, Problem

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def said(*parts: str) -> dict[str, Any]:
    """A user's message of parts."""
    return {"role": "user", "content": [{"type": "text", "text": part} for part in parts]}


def parse(values: dict[str, Any], name: str = "messages") -> Any:
    return FORMATS[name].parse(Row(values, Location("train.jsonl", 6)))


def test_all_fields_of_a_conversation_are_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}], "x": 1}
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": [USER, call], "tools": tools, "documents": [{"title": "t"}], "other": 1}
    parsed = parse(row)
    assert isinstance(parsed, Conversation)
    assert parsed.messages == [USER, call]
    assert parsed.tools == tools
    assert parsed.template_kwargs == {"documents": [{"title": "t"}]}
    assert parsed.location == Location("train.jsonl", 6)


def test_tools_can_be_a_json_string() -> None:
    assert parse({"messages": [USER], "tools": '[{"type": "function"}]'}).tools == [{"type": "function"}]


def test_all_fields_of_a_preference_are_kept() -> None:
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
        ({"messages": [said("a", "b")]}, "messages[0].content: expected text, got 2 parts of text: join them into one"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content: expected text, got a part of type image_url",
        ),
        (
            {"messages": [USER, {"role": "asistant", "content": "a"}]},
            'messages[1].role: unknown role "asistant". Did you mean "assistant"?',
        ),
        ({"messages": [{"role": 3, "content": "a"}]}, "messages[0].role: expected text, got a number"),
        ({"messages": [{"from": "humna", "value": "a"}]}, 'messages[0].role: unknown role "humna"'),
        ({"messages": [{"from": "human", "value": 1}]}, "messages[0].content: expected text, got a number"),
        ({"messages": '[{"role": '}, "messages: expected a list of messages, got text that is not valid JSON"),
        ({"messages": []}, "messages: needs at least one message, got an empty list"),
        ({"messages": "Hi"}, "messages: expected a list of messages, got text"),
        ({"messages": ["Hi"]}, "messages[0]: expected an object with role and content, got text"),
        ({"messages": [USER], "tools": "{"}, "tools: expected a list of tools, got text that is not valid JSON"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages[1].tool_calls[0]: expected an object whose function has a name",
        ),
    ],
)
def test_errors_name_the_key(row: dict[str, Any], message: str) -> None:
    problem = parse(row)
    assert isinstance(problem, Problem)
    assert str(problem).startswith(f"train.jsonl:6: {message}")


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"prompt_messages": 1, "chosen_messages": 1, "rejected_messages": 1}, "preferences: run `finetuning dpo`"),
        ({"instruction": "a", "output": "b"}, "These rows look like `alpaca`"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences: run `finetuning dpo`"),
        ({"message": []}, "below the path of the dataset: columns: {message: messages}"),
        ({"question": "a", "answer": "b"}, "columns: {question: prompt, answer: completion}"),
        ({"Question": "a", "Response": "b", "id": 1}, "columns: {Question: prompt, Response: completion}"),
        ({"content": "a"}, "columns: {content: text}"),
        ({"text": "a"}, "expected messages; found text"),
    ],
)
def test_missing_columns_report_columns_and_likely_format(row: dict[str, Any], advice: str) -> None:
    problem = parse(row)
    assert isinstance(problem, Problem)
    assert str(problem).startswith("train.jsonl:6: expected messages; found ")
    assert advice in str(problem)


def test_preference_answers_must_be_assistant_messages() -> None:
    row = {"prompt_messages": [USER], "chosen_messages": [ANSWER], "rejected_messages": [USER]}
    problem = parse(row, "preference")
    assert str(problem) == 'train.jsonl:6: rejected_messages[0].role: expected "assistant", got "user"'


def test_sft_rows_in_dpo_are_recognized() -> None:
    assert "`messages`: chats, for `finetuning sft`" in str(parse({"messages": [USER]}, "preference"))


def turns(values: dict[str, Any], name: str = "messages", **options: Any) -> Any:
    parsed = FORMATS[name].parse(Row(values, Location("train.jsonl", 6)), Options(**options))
    return parsed.turns if isinstance(parsed, Conversation) else str(parsed)


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns"])
def test_message_columns_have_several_names(column: str) -> None:
    assert parse({column: [USER, ANSWER]}).messages == [USER, ANSWER]
    assert parse({column: json.dumps([USER, ANSWER])}).messages == [USER, ANSWER]
    assert str(parse({column: [USER, {"role": "assistant"}]})).startswith(f"train.jsonl:6: {column}[1].content: ")


def test_single_text_part_is_the_content() -> None:
    row = {"messages": [said("Hi") | {"name": "ann"}, ANSWER]}
    assert parse(row).messages == [USER | {"name": "ann"}, ANSWER]
    assert isinstance(row["messages"][0]["content"], list), "the row stays as it was"


def test_from_and_value_become_role_and_content() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    talk = [
        {"from": "human", "value": "Hi", "id": 3},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "Hello"},
    ]
    assert parse({"conversations": talk, "system": "Be kind.", "tools": "[]"}).messages == [
        {"role": "system", "content": "Be kind."},
        {**USER, "id": 3},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "1"},
        ANSWER,
    ]
    problem = parse({"conversations": [{"from": "function_call", "value": "{"}]})
    assert str(problem).startswith("train.jsonl:6: conversations[0].value: expected a function call as JSON")


def test_alpaca_rows_are_chats() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "S", "history": [["a", "b"]]}
    parsed = parse(row, "alpaca")
    assert [(item["role"], item["content"]) for item in parsed.messages] == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add.\n\n1 2"),
        ("assistant", "3"),
    ]
    assert parsed.turns == (4,)
    assert turns(row, "alpaca", completions="all") == "all"
    assert parse({"instruction": "Add.", "output": "3", "input": ""}, "alpaca").messages[0]["content"] == "Add."
    problem = parse({**row, "history": [["a"]]}, "alpaca")
    assert str(problem) == "train.jsonl:6: history[0]: expected a pair of texts: a question and its answer"


def test_prompts_and_completions_are_texts_or_chats() -> None:
    parsed = parse({"prompt": "The sky is", "completion": " blue."}, "prompt_completion")
    assert (parsed.text, parsed.spans) == ("The sky is blue.", ((10, 16),))
    parsed = parse({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, "prompt_completion")
    assert (parsed.messages, parsed.turns) == ([USER, ANSWER, USER, ANSWER], (3,))
    assert "completion: expected a list of messages, got text" in str(
        parse({"prompt": [USER], "completion": "a"}, "prompt_completion")
    )
    assert "prompt: expected text, got a number" in str(parse({"prompt": 1, "completion": "a"}, "prompt_completion"))


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
TOOL = {"role": "tool", "content": "1"}


@pytest.mark.parametrize(
    ("train_on", "chosen"), [("all", "all"), ("assistant", (1, 3, 5)), ("last", (5,)), ("completions", (3, 5))]
)
def test_turns_are_chosen_by_train_on(train_on: str, chosen: Any) -> None:
    assert turns({"messages": [USER, ANSWER, USER, CALL, TOOL, ANSWER]}, chats=train_on) == chosen


@pytest.mark.parametrize(
    ("flags", "train_on", "chosen"),
    [
        ([{}, {"train": False}, {}, {"train": True}], "assistant", (3,)),
        ([{}, {"weight": 0}, {}, {"weight": 1}], "assistant", (3,)),
        ([{}, {"weight": 1.0}, {}, {}], "last", (1, 3)),
        ([{}, {"train": "False"}, {}, {"weight": "1"}], "assistant", (3,)),
        ([{}, {"training": False}, {}, {}], "assistant", (3,)),
        ([{}, {"loss": 0}, {}, {"loss": True}], "assistant", (3,)),
        ([{}, {"masked": True}, {}, {"masked": False}], "assistant", (3,)),
        ([{"train": False}, {}, {"train": False}, {}], "assistant", (1, 3)),
        ([{}, {"train": True}, {}, {}], "all", "all"),
    ],
)
def test_message_flags_override_train_on(flags: Any, train_on: str, chosen: Any) -> None:
    messages = [{**item, **flag} for item, flag in zip([USER, ANSWER, USER, ANSWER], flags, strict=True)]
    parsed = FORMATS["messages"].parse(Row({"messages": messages}, Location("a")), Options(chats=train_on))
    assert parsed.turns == chosen
    assert parsed.messages == [USER, ANSWER, USER, ANSWER], "templates do not see the flags"


@pytest.mark.parametrize(
    ("index", "flag", "train_on", "message"),
    [
        (1, {"weight": 0.5}, "assistant", "messages[1].weight: expected 0 or 1, got 0.5"),
        (1, {"weight": []}, "assistant", "messages[1].weight: expected true or false, got a list"),
        (1, {"train": "no"}, "assistant", "messages[1].train: expected true or false, got 'no'"),
        (1, {"loss": True, "masked": 1}, "assistant", "messages[1].masked: is 1, but loss is true"),
        (
            1,
            {"mask": 0},
            "assistant",
            "messages[1].mask: is not read, which may mean either: use train: true or false,",
        ),
        (1, {"train_detail": [{}]}, "assistant", "messages[1].train_detail: is not read, parts of a message: use"),
        (1, {"train": True, "weight": 0}, "assistant", "messages[1].weight: is 0, but train is true"),
        (0, {"train": True}, "assistant", 'messages[0]: cannot be trained: its role is "user", not "assistant"'),
        (1, {"train": False}, "all", "messages[1]: is not to be trained, but the run trains on every token"),
    ],
)
def test_contradictory_flags_are_errors(index: int, flag: Any, train_on: str, message: str) -> None:
    messages = [{**item, **(flag if at == index else {})} for at, item in enumerate([USER, ANSWER])]
    assert turns({"messages": messages}, chats=train_on).startswith(f"train.jsonl:6: {message}")


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [CALL]}, ([USER], [ANSWER], [CALL])),
        ({"chosen": [USER, ANSWER], "rejected": [USER, CALL]}, ([USER], [ANSWER], [CALL])),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, CALL]}, ([USER], [ANSWER], [CALL])),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, ([USER], [ANSWER], [ANSWER])),
    ],
)
def test_trl_preferences_of_messages(row: dict[str, Any], pair: Any) -> None:
    parsed = parse(row, "chosen_rejected")
    assert (parsed.prompt, parsed.chosen, parsed.rejected, parsed.is_text) == (*pair, False)


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": "Sky:", "chosen": " blue", "rejected": " bleak"}, ("Sky:", " blue", " bleak")),
        ({"chosen": "The sky is blue.", "rejected": "The sky is bleak."}, ("The sky is", " blue.", " bleak.")),
        ({"chosen": "The sky", "rejected": "The sky is bleak."}, ("The", " sky", " sky is bleak.")),
    ],
)
def test_trl_preferences_of_text(row: dict[str, Any], pair: Any) -> None:
    parsed = parse(row, "chosen_rejected")
    assert tuple(item[0]["content"] for item in (parsed.prompt, parsed.chosen, parsed.rejected)) == pair
    assert parsed.is_text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": [USER], "rejected": [ANSWER]}, "chosen: has no first message in common with rejected"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "rejected: has no messages after the prompt"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, USER]}, 'rejected[1].role: expected "assistant", got "user"'),
        ({"chosen": "a", "rejected": "b"}, "chosen: has no first word in common with rejected"),
        ({"prompt": 1, "chosen": "a", "rejected": "b"}, "prompt: expected text, got a number"),
        ({"prompt": "a", "chosen": "b"}, "expected chosen, rejected; found chosen, prompt"),
    ],
)
def test_errors_in_pairs_are_reported(row: dict[str, Any], message: str) -> None:
    assert str(parse(row, "chosen_rejected")).startswith(f"train.jsonl:6: {message}")


def test_unpaired_rows_come_from_labels_and_pairs() -> None:
    parsed = parse({"prompt": "a", "completion": " b", "label": True}, "completion_label")
    assert (parsed.is_text, parsed.label, parsed.completion[0]["content"]) == (True, True, " b")
    assert parse({"prompt": [USER], "completion": [ANSWER], "label": False}, "completion_label").completion == [ANSWER]
    assert "label: expected true or false, got 'yes'" in str(
        parse({"prompt": "a", "completion": " b", "label": "yes"}, "completion_label")
    )
    pair = next(item for item in KINDS["unpaired"] if item.name == "chosen_rejected")
    result = pair.parse(Row({"chosen": [USER, ANSWER], "rejected": [USER, CALL]}, Location("a")))
    assert [(item.label, item.completion) for item in result] == [(True, [ANSWER]), (False, [CALL])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "labels: has 1 items, input_ids has 2"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "labels[1]: is 3; expected -100 or 2, the token at this position"),
        ({"input_ids": [1, True], "labels": [1, 1]}, "input_ids[1]: expected an integer, got a boolean"),
        ({"input_ids": [], "labels": []}, "input_ids: needs at least one token, got an empty list"),
        ({"input_ids": "1", "labels": []}, "input_ids: expected a list of numbers, got text"),
    ],
)
def test_tokenized_rows_are_checked(row: dict[str, Any], message: str) -> None:
    assert str(parse(row, "tokens")) == f"train.jsonl:6: {message}"


@pytest.mark.parametrize("column", ["prompt_messages", "messages", "prompt"])
def test_prompt_columns_have_three_names(column: str) -> None:
    parsed = parse({column: [USER], "solution": 4}, "prompt")
    assert (parsed.messages, parsed.columns) == ([USER], {"solution": 4})
    assert "is an answer, but the model generates the answer" in str(parse({column: [USER, ANSWER]}, "prompt"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi"}, "prompt: expected a list of messages, got text"),
        ({"prompt": [USER], "completion": 1}, "completion: is the name of another argument of reward functions"),
        ({"prompt_messages": [USER], "prompt": 1}, "prompt: is the name of another argument of reward functions"),
        ({"question": 1}, "expected prompt_messages; found question"),
    ],
)
def test_errors_in_prompts_are_reported(row: dict[str, Any], message: str) -> None:
    assert str(parse(row, "prompt")).startswith(f"train.jsonl:6: {message}")


@pytest.mark.parametrize(
    ("values", "name", "columns"),
    [
        (
            {"query": "a", "better": "b", "worse": "c"},
            "preference",
            {"query": "prompt", "better": "chosen", "worse": "rejected"},
        ),
        ({"better": "b", "worse": "c"}, "chosen_rejected", {"better": "chosen", "worse": "rejected"}),
        (
            {"question": "a", "answer": "b", "liked": True},
            "unpaired",
            {"question": "prompt", "answer": "completion", "liked": "label"},
        ),
        ({"question": "a", "label": True}, "completion_label", {}),
        ({"problem": "a"}, "prompt", {"problem": "prompt"}),
        ({"x": 1}, "messages", {}),
    ],
)
def test_columns_to_rename_are_proposed(values: dict[str, Any], name: str, columns: dict[str, str]) -> None:
    assert propose_columns(values, name) == columns
