"""Row formats of preferences, for DPO, ORPO, CPO and reward models.

- `preference`: `prompt_messages`, `chosen_messages` and `rejected_messages`, lists of messages.
- `chosen_rejected`, as in TRL: `prompt`, `chosen` and `rejected`, texts or lists of messages. Without `prompt`, the
  prompt is what both answers begin with. Also the columns of LLaMA-Factory, ms-swift and the OpenAI API.
"""

from __future__ import annotations

from collections.abc import Mapping

from finetuning.data.formats.instruction import history_field
from finetuning.data.formats.messages import chat_field, messages_column
from finetuning.data.formats.row_format import (
    DEFAULT_OPTIONS,
    FieldError,
    Options,
    RowFormat,
    check_completion,
    is_chat,
    other_fields,
    problem_of,
    require_columns,
    text_field,
    with_columns,
)
from finetuning.data.samples import JsonObject, JsonValue, Message, Preference, Row
from finetuning.errors import Problem

PREFERENCE_COLUMNS = ("prompt_messages", "chosen_messages", "rejected_messages")


def parse_preference(row: Row, options: Options = DEFAULT_OPTIONS) -> Preference | Problem:
    """Return the preference of a row, or what is wrong with it."""
    try:
        require_columns(row, PREFERENCE_COLUMNS, "preference")
        prompt, chosen, rejected = (chat_field(row, column) for column in PREFERENCE_COLUMNS)
        for column, messages in (("chosen_messages", chosen), ("rejected_messages", rejected)):
            check_completion(row, column, messages)
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, **other_fields(row))
    except FieldError as error:
        return problem_of(row, error)


PREFERENCE = RowFormat("preference", PREFERENCE_COLUMNS, parse_preference)


CHOSEN_REJECTED_COLUMNS = ("chosen", "rejected")
_QUESTIONS = ("instruction", "question", "query")
"""Columns of text with the prompt of a chat."""
_ANSWER_PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
)


def has_preference(values: Mapping[str, object]) -> bool:
    """Return whether a row has two answers, under one of the names that they have elsewhere."""
    if "prompt_messages" in values:
        return False
    return any(values.keys() >= set(pair) for pair in _ANSWER_PAIRS) or "rejected_response" in values


def parse_chosen_rejected(row: Row, options: Options = DEFAULT_OPTIONS) -> Preference | Problem:
    """Return the preference of a row, or what is wrong with it."""
    try:
        row = _with_usual_names(row)
        require_columns(row, CHOSEN_REJECTED_COLUMNS, "chosen_rejected")
        is_text = False
        if is_chat(row.values["chosen"]):
            prompt, chosen, rejected = _chats(row)
        elif JsonObject.get(row.values, "prompt") is None and (before := _chat_before(row)):
            answers = (text_field(row, column) for column in CHOSEN_REJECTED_COLUMNS)
            prompt, (chosen, rejected) = before, ([{"role": "assistant", "content": answer}] for answer in answers)
        else:
            prompt, chosen, rejected, is_text = *_texts(row), True
        for column, messages in (("chosen", chosen), ("rejected", rejected)):
            check_completion(row, column, messages)
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, is_text=is_text, **other_fields(row))
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
        extra = {"tools": before["tools"]} if before.get("tools") else {}
        new = {"chosen": values["preferred_output"], "rejected": values.get("non_preferred_output"), **extra}
        return with_columns(row, ("input", *_ANSWER_PAIRS[2]), {**new, "prompt": before["messages"]})
    if "chosen_messages" in values and "chosen" not in values:
        new = {"chosen": values["chosen_messages"], "rejected": values.get("rejected_messages")}
        return with_columns(row, _ANSWER_PAIRS[1], new)
    if "rejected_response" in values and "rejected" not in values:
        # ms-swift's: the chat ends with the chosen answer.
        column = messages_column(values) or "messages"
        chat = chat_field(row, column) if column in values else []
        if len(chat) < 2 or chat[-1]["role"] != "assistant":
            raise FieldError(
                column, "expected a chat that ends with the chosen answer, as there is a rejected_response"
            )
        rejected: JsonValue = values["rejected_response"]
        answer = rejected if isinstance(rejected, list) else [{"role": "assistant", "content": rejected}]
        new = {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": answer}
        return with_columns(row, (column, "rejected_response"), new)
    return row


def _chat_before(row: Row) -> list[Message] | None:
    """Return the messages before the answers, which other columns than `prompt` hold; None if there are none."""
    column = messages_column(row.values)
    if column is not None:
        messages = chat_field(row, column)
    else:
        question = next((name for name in _QUESTIONS if JsonObject.get(row.values, name)), None)
        if question is None:
            return None
        text = text_field(row, question)
        if row.values.get("input"):
            text = f"{text}\n\n{text_field(row, 'input')}"
        messages = [*history_field(row), {"role": "user", "content": text}]
    if messages[0]["role"] != "system" and row.values.get("system"):
        messages = [{"role": "system", "content": text_field(row, "system")}, *messages]
    return messages


def as_messages(prompt: str, *answers: str) -> list[list[Message]]:
    """Return texts as messages; the row is marked with `is_text`, so that no chat template is applied."""
    return [[{"role": "user", "content": prompt}], *([{"role": "assistant", "content": answer}] for answer in answers)]


def _chats(row: Row) -> list[list[Message]]:
    chosen, rejected = (chat_field(row, column) for column in CHOSEN_REJECTED_COLUMNS)
    if is_chat(JsonObject.get(row.values, "prompt")):
        return [chat_field(row, "prompt"), chosen, rejected]
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) == len(rejected):
        # Equal chats: the prompt ends before the last assistant turn, and the processor drops and counts the row
        # like any other pair of equal answers.
        common = max((index for index, message in enumerate(chosen) if message["role"] != "assistant"), default=-1) + 1
    if common:
        prompt: JsonValue = JsonObject.get(row.values, "prompt")
        if isinstance(prompt, str) and any(message.get("content") == prompt for message in chosen[:common]):
            row.values.get("prompt")  # as read: it is the text of one of the messages
        return [chosen[:common], chosen[common:], rejected[common:]]
    if isinstance(JsonObject.get(row.values, "prompt"), str):
        return [[{"role": "user", "content": text_field(row, "prompt")}], chosen, rejected]
    before = _chat_before(row)
    if before is None:
        raise FieldError("chosen", "has no first message in common with rejected, and there is no `prompt`")
    return [before, chosen, rejected]


def _texts(row: Row) -> list[list[Message]]:
    chosen, rejected = (text_field(row, column) for column in CHOSEN_REJECTED_COLUMNS)
    if row.values.get("prompt") is not None:
        return as_messages(text_field(row, "prompt"), chosen, rejected)
    columns = [name for name in row.values if name not in CHOSEN_REJECTED_COLUMNS]
    candidates = [name for name in columns if _is_prose(JsonObject.get(row.values, name))]
    if candidates:
        first = candidates[0]
        raise FieldError(
            "",
            f"there is no `prompt`, but {first} could be it: set columns: {{{first}: prompt}}, or, if the answers begin"
            f" with the prompt, ignore_columns: [{', '.join(candidates)}]",
        )
    prompt = common_words(chosen, rejected)
    if not prompt:
        raise FieldError("chosen", "has no first word in common with rejected, and there is no `prompt`")
    return as_messages(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def _is_prose(value: object) -> bool:
    """Return whether a value is a text of several words, unlike names and ids."""
    return isinstance(value, str) and len(value.split()) > 1


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
