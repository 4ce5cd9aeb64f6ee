"""Rated answers as TRL has them: `prompt`, `completion` and `label`, texts or messages."""

from __future__ import annotations

from finetuning.data.formats import chosen_rejected
from finetuning.data.formats.chosen_rejected import as_messages
from finetuning.data.formats.fields import (
    besides_messages,
    check_answer,
    label_field,
    problem_of,
    require_columns,
    text_field,
)
from finetuning.data.formats.messages import chat_field
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.formats.unpaired import both_answers
from finetuning.data.samples import Rated, Row
from finetuning.errors import Problem

COLUMNS = ("prompt", "completion", "label")


def parse(row: Row, options: Options = PLAIN) -> Rated | Problem:
    """The row's rated answer, or what is wrong with it."""
    try:
        require_columns(row, COLUMNS, "completion_label")
        is_text = not isinstance(row.values["prompt"], list)
        if is_text:
            prompt, completion = as_messages(text_field(row, "prompt"), text_field(row, "completion"))
        else:
            prompt, completion = chat_field(row, "prompt"), chat_field(row, "completion")
            check_answer(row, "completion", completion)
        label = label_field(row)
        return Rated(prompt=prompt, completion=completion, label=label, is_text=is_text, **besides_messages(row))
    except FieldError as error:
        return problem_of(row, error)


def parse_pair(row: Row, options: Options = PLAIN) -> list[Rated] | Problem:
    """The two answers of one of TRL's preferences, rated."""
    return both_answers(chosen_rejected.parse(row, options))


FORMAT = RowFormat("completion_label", COLUMNS, parse)
PAIR = RowFormat("chosen_rejected", chosen_rejected.COLUMNS, parse_pair)
