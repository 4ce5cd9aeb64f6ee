"""Rated answers: `prompt_messages`, `completion_messages` and `label`; or preferences, each of which is two of them."""

from __future__ import annotations

from finetuning.data.formats import preference
from finetuning.data.formats.fields import (
    besides_messages,
    check_answer,
    label_field,
    messages_field,
    problem_of,
    require_columns,
)
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.samples import Preference, Rated, Row
from finetuning.errors import Problem

COLUMNS = ("prompt_messages", "completion_messages", "label")


def parse(row: Row, options: Options = PLAIN) -> Rated | list[Rated] | Problem:
    """The row's rated answer, the two of a preference, or what is wrong with the row."""
    if "completion_messages" not in row.values and preference.FORMAT.is_of(row):
        return both_answers(preference.parse(row))
    try:
        require_columns(row, COLUMNS, "unpaired")
        prompt, completion = (messages_field(row, column) for column in COLUMNS[:2])
        check_answer(row, "completion_messages", completion)
        return Rated(prompt=prompt, completion=completion, label=label_field(row), **besides_messages(row))
    except FieldError as error:
        return problem_of(row, error)


def both_answers(found: Preference | Problem) -> list[Rated] | Problem:
    """A preference as a desirable and an undesirable answer to one prompt."""
    if isinstance(found, Problem):
        return found
    return [
        Rated(found.prompt, answer, label, found.place, found.tools, found.template_kwargs, found.meta, found.is_text)
        for answer, label in ((found.chosen, True), (found.rejected, False))
    ]


FORMAT = RowFormat("unpaired", COLUMNS, parse)
