"""Row formats of preferences, for DPO, ORPO, CPO and reward models.

- `preference`: `prompt_messages`, `chosen_messages` and `rejected_messages`, lists of messages.
- `chosen_rejected`, as in TRL: `prompt`, `chosen` and `rejected`, texts or lists of messages. Without `prompt`, the
  prompt is what both answers begin with. Also the columns of LLaMA-Factory, ms-swift and the OpenAI API.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from finetuning.data.formats.instruction import history_field, with_input
from finetuning.data.formats.messages import chat_field, messages_column, with_system
from finetuning.data.formats.row_format import (
    DEFAULT_OPTIONS,
    FieldError,
    Options,
    RowFormat,
    check_completion,
    is_chat,
    is_chat_of_texts,
    is_like_prompt,
    other_fields,
    problem_of,
    refuse_in_text,
    require_columns,
    text_field,
    with_columns,
    yaml_name,
)
from finetuning.data.samples import JsonObject, JsonValue, Message, Preference, Row
from finetuning.errors import Problem

PREFERENCE_COLUMNS = ("prompt_messages", "chosen_messages", "rejected_messages")


def parse_preference(row: Row, options: Options = DEFAULT_OPTIONS) -> Preference | Problem:
    """Return the preference of a row, or what is wrong with it."""
    try:
        require_columns(row, PREFERENCE_COLUMNS, "preference")
        prompt, chosen, rejected = (chat_field(row, column) for column in PREFERENCE_COLUMNS)
        prompt = with_system(row, prompt)
        for column, messages in (("chosen_messages", chosen), ("rejected_messages", rejected)):
            check_completion(row, column, messages)
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, **other_fields(row))
    except FieldError as error:
        return problem_of(row, error)


PREFERENCE = RowFormat("preference", PREFERENCE_COLUMNS, parse_preference)


CHOSEN_REJECTED_COLUMNS = ("chosen", "rejected")
QUESTIONS = ("instruction", "question", "query")
"""Columns of text with the prompt of a chat."""
_ANSWER_PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_conversations", "rejected_conversations"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
)
_INPUT = "input."
"""Before the names of what OpenAI's `input` holds in addition to messages and tools."""
_REJECTED = ("rejected_response", "rejected_messages")
"""ms-swift's columns of the rejected answer; the chosen one is `response`, or the last of `messages`."""


def has_preference(values: Mapping[str, object]) -> bool:
    """Return whether a row has two answers, under one of the names that they have elsewhere."""
    if "prompt_messages" in values:
        return False
    has_pair = any(values.keys() >= set(pair) for pair in _ANSWER_PAIRS) or "rejected_response" in values
    return has_pair or ("rejected_messages" in values and messages_column(values) is not None) or _has_two(values)


def _has_two(values: Mapping[str, object]) -> bool:
    """Return whether `output` holds the better and the worse answer of an instruction, as in older Alpaca files."""
    output = JsonObject.get(dict(values), "output") if "instruction" in values else None
    answers = cast("list[object]", output) if isinstance(output, list) else []
    return len(answers) == len(CHOSEN_REJECTED_COLUMNS) and all(isinstance(answer, str) for answer in answers)


def parse_chosen_rejected(row: Row, options: Options = DEFAULT_OPTIONS) -> Preference | Problem:
    """Return the preference of a row, or what is wrong with it."""
    try:
        row = _with_usual_names(row)
        require_columns(row, CHOSEN_REJECTED_COLUMNS, "chosen_rejected")
        is_text = False
        if is_chat(row.values["chosen"]):
            prompt, chosen, rejected = _chats(row, options)
        elif before := chat_before(row, options):
            answers = (text_field(row, column) for column in CHOSEN_REJECTED_COLUMNS)
            prompt, (chosen, rejected) = before, ([{"role": "assistant", "content": answer}] for answer in answers)
        else:
            prompt, chosen, rejected, is_text = *_texts(row), True
        if is_text:
            refuse_in_text(row)
        for column, messages in (("chosen", chosen), ("rejected", rejected)):
            check_completion(row, column, messages)
        nested = tuple(name for name in row.values if name.startswith(_INPUT))
        return Preference(
            prompt=prompt, chosen=chosen, rejected=rejected, is_text=is_text, unused=nested, **other_fields(row)
        )
    except FieldError as error:
        return problem_of(row, error)


def _with_usual_names(row: Row) -> Row:
    """Return the row with the columns `chosen` and `rejected`, and the prompt where its format keeps it elsewhere."""
    values = row.values
    if isinstance(JsonObject.get(values, "chosen"), dict):
        # LLaMA-Factory's: each answer is one message.
        return with_columns(row, (), {name: [values[name]] for name in CHOSEN_REJECTED_COLUMNS if name in values})
    if "preferred_output" in values:
        # OpenAI's: the prompt and its tools are below `input`.
        before: JsonValue = values.get("input")
        if not isinstance(before, dict) or not isinstance(before.get("messages"), list):
            raise FieldError("input", "expected an object with messages")
        # The other keys become columns that nothing reads, and are reported as such.
        extra = {
            name if name == "tools" else f"{_INPUT}{name}": value
            for name, value in before.items()
            if name != "messages" and value not in (None, [])
        }
        new = {"chosen": values["preferred_output"], "rejected": values.get("non_preferred_output"), **extra}
        return with_columns(row, ("input", *_ANSWER_PAIRS[-1]), {**new, "prompt": before["messages"]})
    if "chosen" in values or "rejected" in values:
        return row
    for pair in _ANSWER_PAIRS[1:-1]:
        if values.keys() >= set(pair):
            new = {"chosen": values[pair[0]], "rejected": values[pair[1]]}
            return with_columns(row, pair, new)
    if _has_two(values):
        chosen, rejected = values["output"]
        return with_columns(row, ("output",), {"chosen": chosen, "rejected": rejected})
    column = next((name for name in _REJECTED if name in values), None)
    return row if column is None else _with_rejected(row, column)


def _with_rejected(row: Row, rejected: str) -> Row:
    """Return a row of ms-swift with the usual columns."""
    values = row.values
    column = messages_column(values)
    if column is None and rejected == "rejected_response" and "response" in values:
        new = {"chosen": values["response"], "rejected": values[rejected]}
        return with_columns(row, ("response", rejected), new)
    column = column or "messages"
    chat = chat_field(row, column) if column in values else []
    if len(chat) < 2 or chat[-1]["role"] != "assistant":
        raise FieldError(column, f"expected a chat that ends with the chosen answer, as there is a {rejected}")
    if rejected == "rejected_messages":
        return with_columns(row, (column, rejected), {"chosen": chat, "rejected": values[rejected]})
    answer: JsonValue = values[rejected]
    answer = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return with_columns(row, (column, rejected), {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": answer})


def chat_before(row: Row, options: Options) -> list[Message] | None:
    """Return the messages before the answers, which other columns than `prompt` hold; None if there are none.

    A text in `prompt` is a message only next to a column `system`, which has no place in a text.
    """
    has_prompt = JsonObject.get(row.values, "prompt") is not None
    is_text = isinstance(JsonObject.get(row.values, "prompt"), str)
    if has_prompt and not (is_text and is_chat_of_texts(row, options)):
        return None
    column = None if has_prompt else messages_column(row.values)
    if column is not None:
        messages = chat_field(row, column)
    else:
        names = ("prompt",) if has_prompt else QUESTIONS
        question = next((name for name in names if JsonObject.get(row.values, name)), None)
        if question is None:
            return None
        messages = [*history_field(row), {"role": "user", "content": with_input(row, question, options)}]
    return with_system(row, messages)


def as_messages(prompt: str, *answers: str) -> list[list[Message]]:
    """Return texts as messages; the row is marked with `is_text`, so that no chat template is applied."""
    return [[{"role": "user", "content": prompt}], *([{"role": "assistant", "content": answer}] for answer in answers)]


def _chats(row: Row, options: Options) -> list[list[Message]]:
    chosen, rejected = (chat_field(row, column) for column in CHOSEN_REJECTED_COLUMNS)
    if is_chat(JsonObject.get(row.values, "prompt")):
        return [with_system(row, chat_field(row, "prompt")), chosen, rejected]
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) == len(rejected):
        # Equal chats: the prompt ends before the last assistant turn, and the processor drops and counts the row
        # like any other pair of equal answers.
        common = max((index for index, message in enumerate(chosen) if message["role"] != "assistant"), default=-1) + 1
    start, answers = chosen[:common], [chosen[common:], rejected[common:]]
    if any(message["role"] == "user" for message in start):
        prompt: JsonValue = JsonObject.get(row.values, "prompt")
        if isinstance(prompt, str) and any(message.get("content") == prompt for message in start):
            row.values.get("prompt")  # as read: it is the text of one of the messages
        return [with_system(row, start), *answers]
    before = _messages_before(row, options)
    if before is None:
        if not start:
            raise FieldError("chosen", "has no first message in common with rejected, and there is no `prompt`")
        return [with_system(row, start), *answers]
    # What both answers begin with are instructions, which come first, or the beginning of the answer.
    end = 1 if start and start[0]["role"] in ("system", "developer") else 0
    return [[*start[:end], *before, *start[end:]], *answers]


def _messages_before(row: Row, options: Options) -> list[Message] | None:
    """Return the messages that another column holds, `prompt` or another; None if there are none."""
    if isinstance(JsonObject.get(row.values, "prompt"), str):
        return with_system(row, [{"role": "user", "content": text_field(row, "prompt")}])
    return chat_before(row, options)


def _texts(row: Row) -> list[list[Message]]:
    chosen, rejected = (text_field(row, column) for column in CHOSEN_REJECTED_COLUMNS)
    if row.values.get("prompt") is not None:
        return as_messages(text_field(row, "prompt"), chosen, rejected)
    columns = [name for name in row.values if name not in CHOSEN_REJECTED_COLUMNS]
    candidates = [name for name in columns if _could_be_prompt(name, JsonObject.get(row.values, name))]
    if candidates:
        first, *rest = map(yaml_name, candidates)
        raise FieldError(
            "",
            f"there is no `prompt`, but {first} could be it: set columns: {{{first}: prompt}}, or, if the answers begin"
            f" with the prompt, ignore_columns: [{', '.join([first, *rest])}]",
        )
    prompt = common_words(chosen, rejected)
    if not prompt:
        raise FieldError("chosen", "has no first word in common with rejected, and there is no `prompt`")
    return as_messages(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def _could_be_prompt(column: str, value: object) -> bool:
    return _is_prose(value) or (isinstance(value, str) and bool(value.strip()) and is_like_prompt(column))


def _is_prose(value: object) -> bool:
    """Return whether a value is a text of several words or a sentence, unlike names and ids.

    >>> _is_prose("Why is it?"), _is_prose("Why?"), _is_prose("天空为什么是蓝色的"), _is_prose("row-17")
    (True, True, True, False)
    """
    return isinstance(value, str) and bool(len(value.split()) > 1 or _SENTENCE.search(value))


_SENTENCE = re.compile(r"[?!.。？！]\s*$|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{4}")
"""The end of a sentence, or several letters of a script without spaces between words."""


def common_words(left: str, right: str) -> str:
    """Return the words that both texts begin with, without the white space before the first different word.

    >>> common_words("The sky is blue.", "The sky is black.")
    'The sky is'
    """
    end = next((index for index, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None)
    end = min(len(left), len(right)) if end is None else end
    while end and not left[end - 1].isspace():
        end -= 1
    return left[:end].rstrip()


CHOSEN_REJECTED = RowFormat("chosen_rejected", CHOSEN_REJECTED_COLUMNS, parse_chosen_rejected, has_preference)
