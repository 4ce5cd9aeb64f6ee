"""Preferences: `prompt_messages`, `chosen_messages` and `rejected_messages`, lists of chat messages."""

from __future__ import annotations

from finetuning.data.formats.fields import besides_messages, check_answer, messages_field, problem_of, require_columns
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.samples import Preference, Row
from finetuning.errors import Problem

COLUMNS = ("prompt_messages", "chosen_messages", "rejected_messages")


def parse(row: Row, options: Options = PLAIN) -> Preference | Problem:
    """The row's preference, or what is wrong with it.

    A continuation holds assistant messages only: the loss of a preference is taken over all of it.
    """
    try:
        require_columns(row, COLUMNS, "preference")
        prompt, chosen, rejected = (messages_field(row, column) for column in COLUMNS)
        for column, messages in (("chosen_messages", chosen), ("rejected_messages", rejected)):
            check_answer(row, column, messages)
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, **besides_messages(row))
    except FieldError as error:
        return problem_of(row, error)


FORMAT = RowFormat("preference", COLUMNS, parse)
