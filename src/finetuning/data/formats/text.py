"""One text: a column of it, or what a template makes of the columns."""

from __future__ import annotations

from finetuning.data.formats.fields import problem_of, require_columns, text_field
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.samples import Row, Text
from finetuning.data.text_template import CannotFormat
from finetuning.errors import Problem

COLUMNS = ("text",)


def parse(row: Row, options: Options = PLAIN) -> Text | Problem:
    """The text, all of it trained."""
    try:
        return Text(text_of(row, options), row.place, None, options.add_eos)
    except FieldError as error:
        return problem_of(row, error)


def text_of(row: Row, options: Options) -> str:
    """What the row says: through the template, where there is one."""
    if options.formatter is None:
        require_columns(row, (options.text_field,), "text")
        return text_field(row, options.text_field)
    try:
        return options.formatter(row.values, options.special_tokens)
    except CannotFormat as error:
        raise FieldError("", str(error)) from None


FORMAT = RowFormat("text", COLUMNS, parse)
