"""Token ids, ready: `input_ids` and `labels`."""

from __future__ import annotations

from finetuning.data.formats.fields import problem_of, require_columns
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.samples import Row, TokenIds, json_type
from finetuning.errors import Problem

COLUMNS = ("input_ids", "labels")


def parse(row: Row, options: Options = PLAIN) -> TokenIds | Problem:
    """The ids as they are; every label is -100 or the id at its place."""
    try:
        require_columns(row, COLUMNS, "tokens")
        ids, labels = (_ids(row, column) for column in COLUMNS)
        if len(ids) != len(labels):
            raise FieldError("labels", f"has {len(labels)} items, input_ids has {len(ids)}")
        for index, (one, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (-100, one):
                raise FieldError(f"labels[{index}]", f"is {label}; expected -100 or {one}, the token at its place")
        return TokenIds(ids, labels, row.place)
    except FieldError as error:
        return problem_of(row, error)


def _ids(row: Row, column: str) -> list[int]:
    value = row.values[column]
    if not isinstance(value, list):
        raise FieldError(column, f"expected a list of numbers, got {json_type(value)}")
    if not value:
        raise FieldError(column, "needs at least one token, got an empty list")
    for index, one in enumerate(value):
        if isinstance(one, bool) or not isinstance(one, int):
            raise FieldError(f"{column}[{index}]", f"expected a whole number, got {json_type(one)}")
    return value


FORMAT = RowFormat("tokens", COLUMNS, parse)
