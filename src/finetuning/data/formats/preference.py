"""Preferences: `prompt_messages`, `chosen_messages` and `rejected_messages`, lists of chat messages."""

from __future__ import annotations

from finetuning.data.formats.fields import (
    messages_field,
    meta_fields,
    problem_of,
    require_columns,
    template_kwargs_field,
    tools_field,
)
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.rows import Preference, Row
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
            for index, message in enumerate(messages):
                if message["role"] != "assistant":
                    raise FieldError(f"{column}[{index}].role", f'expected "assistant", got "{message["role"]}"')
        return Preference(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            place=row.place,
            tools=tools_field(row),
            template_kwargs=template_kwargs_field(row),
            meta=meta_fields(row),
        )
    except FieldError as error:
        return problem_of(row, error)


FORMAT = RowFormat("preference", COLUMNS, parse)
