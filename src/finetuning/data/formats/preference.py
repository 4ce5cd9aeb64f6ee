"""Preferences: `prompt_messages`, `chosen_messages` and `rejected_messages`, lists of chat messages.

Preferences as TRL has them: `prompt`, `chosen` and `rejected`, texts or messages, the prompt perhaps only in both
answers."""

from __future__ import annotations

from finetuning.data.formats.messages import chat_field
from finetuning.data.formats.row_format import (
    PLAIN,
    FieldError,
    Options,
    RowFormat,
    check_answer,
    messages_field,
    other_fields,
    problem_of,
    require_columns,
    text_field,
)
from finetuning.data.samples import Message, Preference, Row
from finetuning.errors import Problem

PREFERENCE_COLUMNS = ("prompt_messages", "chosen_messages", "rejected_messages")


def parse_preference(row: Row, options: Options = PLAIN) -> Preference | Problem:
    """The row's preference, or what is wrong with it.

    A continuation holds assistant messages only: the loss of a preference is taken over all of it.
    """
    try:
        require_columns(row, PREFERENCE_COLUMNS, "preference")
        prompt, chosen, rejected = (messages_field(row, column) for column in PREFERENCE_COLUMNS)
        for column, messages in (("chosen_messages", chosen), ("rejected_messages", rejected)):
            check_answer(row, column, messages)
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, **other_fields(row))
    except FieldError as error:
        return problem_of(row, error)


PREFERENCE = RowFormat("preference", PREFERENCE_COLUMNS, parse_preference)


CHOSEN_REJECTED_COLUMNS = ("chosen", "rejected")


def parse_chosen_rejected(row: Row, options: Options = PLAIN) -> Preference | Problem:
    """The row's preference, or what is wrong with it. The prompt of two chats is the messages that both begin with."""
    try:
        require_columns(row, CHOSEN_REJECTED_COLUMNS, "chosen_rejected")
        if isinstance(row.values["chosen"], list):
            prompt, chosen, rejected, is_text = *_chats(row), False
        else:
            prompt, chosen, rejected, is_text = *_texts(row), True
        for column, messages in (("chosen", chosen), ("rejected", rejected)):
            check_answer(row, column, messages)
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, is_text=is_text, **other_fields(row))
    except FieldError as error:
        return problem_of(row, error)


def as_messages(prompt: str, *answers: str) -> list[list[Message]]:
    """Texts as messages that no template is to frame."""
    return [[{"role": "user", "content": prompt}], *([{"role": "assistant", "content": one}] for one in answers)]


def _chats(row: Row) -> list[list[Message]]:
    chosen, rejected = (chat_field(row, column) for column in CHOSEN_REJECTED_COLUMNS)
    if isinstance(row.values.get("prompt"), list):
        return [chat_field(row, "prompt"), chosen, rejected]
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        # Nothing tells them apart; the row is kept so that its fate is that of every pair of equal answers.
        shared = max((index for index, one in enumerate(chosen) if one["role"] != "assistant"), default=-1) + 1
    if not shared:
        raise FieldError("chosen", "begins with another message than rejected, and there is no list in `prompt`")
    return [chosen[:shared], chosen[shared:], rejected[shared:]]


def _texts(row: Row) -> list[list[Message]]:
    chosen, rejected = (text_field(row, column) for column in CHOSEN_REJECTED_COLUMNS)
    if row.values.get("prompt") is not None:
        return as_messages(text_field(row, "prompt"), chosen, rejected)
    prompt = shared_words(chosen, rejected)
    if not prompt:
        raise FieldError("chosen", "begins with another word than rejected, and there is no `prompt`")
    return as_messages(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def shared_words(left: str, right: str) -> str:
    """The words that both texts begin with; the space before the first other word goes with that word.

    >>> shared_words("The sky is blue.", "The sky is black.")
    'The sky is'
    """
    end = next((index for index, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None)
    end = min(len(left), len(right)) if end is None else end
    while end and not left[end - 1].isspace():
        end -= 1
    return left[:end].rstrip()


CHOSEN_REJECTED = RowFormat("chosen_rejected", CHOSEN_REJECTED_COLUMNS, parse_chosen_rejected)
