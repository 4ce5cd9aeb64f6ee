"""Rated answers: `prompt_messages`, `completion_messages` and `label`; or preferences, each of which is two of them.

Rated answers as TRL has them: `prompt`, `completion` and `label`, texts or messages."""

from __future__ import annotations

from finetuning.data.formats.messages import chat_field
from finetuning.data.formats.preference import (
    CHOSEN_REJECTED_COLUMNS,
    PREFERENCE,
    as_messages,
    parse_chosen_rejected,
    parse_preference,
)
from finetuning.data.formats.row_format import (
    PLAIN,
    FieldError,
    Options,
    RowFormat,
    check_answer,
    label_field,
    messages_field,
    other_fields,
    problem_of,
    require_columns,
    text_field,
)
from finetuning.data.samples import Preference, Row, UnpairedPreference
from finetuning.errors import Problem

UNPAIRED_COLUMNS = ("prompt_messages", "completion_messages", "label")


def parse_unpaired(row: Row, options: Options = PLAIN) -> UnpairedPreference | list[UnpairedPreference] | Problem:
    """The row's rated answer, the two of a preference, or what is wrong with the row."""
    if "completion_messages" not in row.values and PREFERENCE.is_of(row):
        return as_unpaired(parse_preference(row))
    try:
        require_columns(row, UNPAIRED_COLUMNS, "unpaired")
        prompt, completion = (messages_field(row, column) for column in UNPAIRED_COLUMNS[:2])
        check_answer(row, "completion_messages", completion)
        return UnpairedPreference(prompt=prompt, completion=completion, label=label_field(row), **other_fields(row))
    except FieldError as error:
        return problem_of(row, error)


def as_unpaired(found: Preference | Problem) -> list[UnpairedPreference] | Problem:
    """A preference as a desirable and an undesirable answer to one prompt."""
    if isinstance(found, Problem):
        return found
    return [
        UnpairedPreference(
            found.prompt, answer, label, found.place, found.tools, found.template_kwargs, found.meta, found.is_text
        )
        for answer, label in ((found.chosen, True), (found.rejected, False))
    ]


UNPAIRED = RowFormat("unpaired", UNPAIRED_COLUMNS, parse_unpaired)


COMPLETION_LABEL_COLUMNS = ("prompt", "completion", "label")


def parse_completion_label(row: Row, options: Options = PLAIN) -> UnpairedPreference | Problem:
    """The row's rated answer, or what is wrong with it."""
    try:
        require_columns(row, COMPLETION_LABEL_COLUMNS, "completion_label")
        is_text = not isinstance(row.values["prompt"], list)
        if is_text:
            prompt, completion = as_messages(text_field(row, "prompt"), text_field(row, "completion"))
        else:
            prompt, completion = chat_field(row, "prompt"), chat_field(row, "completion")
            check_answer(row, "completion", completion)
        label = label_field(row)
        return UnpairedPreference(
            prompt=prompt, completion=completion, label=label, is_text=is_text, **other_fields(row)
        )
    except FieldError as error:
        return problem_of(row, error)


def parse_pair(row: Row, options: Options = PLAIN) -> list[UnpairedPreference] | Problem:
    """The two answers of one of TRL's preferences, rated."""
    return as_unpaired(parse_chosen_rejected(row, options))


COMPLETION_LABEL = RowFormat("completion_label", COMPLETION_LABEL_COLUMNS, parse_completion_label)
CHOSEN_REJECTED_PAIR = RowFormat("chosen_rejected", CHOSEN_REJECTED_COLUMNS, parse_pair)
