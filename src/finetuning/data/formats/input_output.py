"""`input` and `output`: two texts that become one, of which the output is trained."""

from __future__ import annotations

from finetuning.data.formats.fields import problem_of, require_columns, text_field
from finetuning.data.formats.prompt_completion import joined
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.samples import Row, Text
from finetuning.errors import Problem

COLUMNS = ("input", "output")
_SPACES = (" ", "\n", "\t")


def parse(row: Row, options: Options = PLAIN) -> Text | Problem:
    """The output follows the input; between them comes one space, unless a space, line break or tab is there.

    Source: fms-hf-tuning, `combine_sequence`.
    """
    try:
        require_columns(row, COLUMNS, "input_output")
        start, end = (text_field(row, column) for column in COLUMNS)
        gap = "" if start.endswith(_SPACES) or end.startswith(_SPACES) else " "
        # The space goes with the output, as a tokenizer takes it: in front of the word that follows.
        return joined(row, start, gap + end, options)
    except FieldError as error:
        return problem_of(row, error)


FORMAT = RowFormat("input_output", COLUMNS, parse)
