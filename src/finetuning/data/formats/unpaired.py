"""Rated answers: `prompt_messages`, `completion_messages` and `label`; or preferences, each of which is two of them."""

from __future__ import annotations

from finetuning.data.formats import preference
from finetuning.data.formats.fields import (
    messages_field,
    meta_fields,
    problem_of,
    require_columns,
    template_kwargs_field,
    tools_field,
)
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.rows import Preference, Rated, Row, json_type
from finetuning.errors import Problem

COLUMNS = ("prompt_messages", "completion_messages", "label")


def parse(row: Row, options: Options = PLAIN) -> Rated | list[Rated] | Problem:
    """The row's rated answer, the two of a preference, or what is wrong with the row."""
    if "completion_messages" not in row.values and preference.FORMAT.is_of(row):
        return both_answers(preference.parse(row))
    try:
        require_columns(row, COLUMNS, "unpaired")
        prompt, completion = (messages_field(row, column) for column in COLUMNS[:2])
        for index, message in enumerate(completion):
            if message["role"] != "assistant":
                raise FieldError(f"completion_messages[{index}].role", f'expected "assistant", got "{message["role"]}"')
        label = row.values["label"]
        if not isinstance(label, bool):
            raise FieldError("label", f"expected true or false, got {json_type(label)}")
        return Rated(
            prompt=prompt,
            completion=completion,
            label=label,
            place=row.place,
            tools=tools_field(row),
            template_kwargs=template_kwargs_field(row),
            meta=meta_fields(row),
        )
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
