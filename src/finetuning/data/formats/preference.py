"""Row formats of preferences, for DPO, ORPO, CPO and reward models.

- `preference`: `prompt_messages`, `chosen_messages` and `rejected_messages`, lists of messages.
- `chosen_rejected`, as in TRL: `prompt`, `chosen` and `rejected`, texts or lists of messages. Without `prompt`, the
  prompt is what both answers begin with.
"""

from __future__ import annotations

from finetuning.data.formats.messages import chat_field
from finetuning.data.formats.row_format import (
    DEFAULT_OPTIONS,
    FieldError,
    Options,
    RowFormat,
    check_completion,
    messages_field,
    other_fields,
    problem_of,
    require_columns,
    text_field,
)
from finetuning.data.samples import Message, Preference, Row
from finetuning.errors import Problem

PREFERENCE_COLUMNS = ("prompt_messages", "chosen_messages", "rejected_messages")


def parse_preference(row: Row, options: Options = DEFAULT_OPTIONS) -> Preference | Problem:
    """Return the preference of a row, or what is wrong with it."""
    try:
        require_columns(row, PREFERENCE_COLUMNS, "preference")
        prompt, chosen, rejected = (messages_field(row, column) for column in PREFERENCE_COLUMNS)
        for column, messages in (("chosen_messages", chosen), ("rejected_messages", rejected)):
            check_completion(row, column, messages)
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, **other_fields(row))
    except FieldError as error:
        return problem_of(row, error)


PREFERENCE = RowFormat("preference", PREFERENCE_COLUMNS, parse_preference)


CHOSEN_REJECTED_COLUMNS = ("chosen", "rejected")


def parse_chosen_rejected(row: Row, options: Options = DEFAULT_OPTIONS) -> Preference | Problem:
    """Return the preference of a row, or what is wrong with it."""
    try:
        require_columns(row, CHOSEN_REJECTED_COLUMNS, "chosen_rejected")
        if isinstance(row.values["chosen"], list):
            prompt, chosen, rejected, is_text = *_chats(row), False
        else:
            prompt, chosen, rejected, is_text = *_texts(row), True
        for column, messages in (("chosen", chosen), ("rejected", rejected)):
            check_completion(row, column, messages)
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, is_text=is_text, **other_fields(row))
    except FieldError as error:
        return problem_of(row, error)


def as_messages(prompt: str, *answers: str) -> list[list[Message]]:
    """Return texts as messages; the row is marked with `is_text`, so that no chat template is applied."""
    return [[{"role": "user", "content": prompt}], *([{"role": "assistant", "content": answer}] for answer in answers)]


def _chats(row: Row) -> list[list[Message]]:
    chosen, rejected = (chat_field(row, column) for column in CHOSEN_REJECTED_COLUMNS)
    if isinstance(row.values.get("prompt"), list):
        return [chat_field(row, "prompt"), chosen, rejected]
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == len(chosen) == len(rejected):
        # Equal chats: the prompt ends before the last assistant turn, and the processor drops and counts the row
        # like any other pair of equal answers.
        common = max((index for index, message in enumerate(chosen) if message["role"] != "assistant"), default=-1) + 1
    if not common:
        raise FieldError("chosen", "has no first message in common with rejected, and `prompt` is not a list")
    return [chosen[:common], chosen[common:], rejected[common:]]


def _texts(row: Row) -> list[list[Message]]:
    chosen, rejected = (text_field(row, column) for column in CHOSEN_REJECTED_COLUMNS)
    if row.values.get("prompt") is not None:
        return as_messages(text_field(row, "prompt"), chosen, rejected)
    prompt = common_words(chosen, rejected)
    if not prompt:
        raise FieldError("chosen", "has no first word in common with rejected, and there is no `prompt`")
    return as_messages(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


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


CHOSEN_REJECTED = RowFormat("chosen_rejected", CHOSEN_REJECTED_COLUMNS, parse_chosen_rejected)
