"""Row formats of unpaired preferences, for KTO: a prompt, one completion, and whether that is desirable.

- `unpaired`: `prompt_messages`, `completion_messages` and `label`.
- `completion_label`, as in TRL: `prompt`, `completion` and `label`, texts or lists of messages.

Rows of preferences are accepted as well: each becomes a desirable and an undesirable completion.
"""

from __future__ import annotations

from collections.abc import Mapping

from finetuning.data.formats.instruction import has_alpaca, parse_alpaca
from finetuning.data.formats.messages import (
    chat_field,
    has_messages,
    messages_column,
    parse_messages,
    with_system,
)
from finetuning.data.formats.preference import (
    CHOSEN_REJECTED_COLUMNS,
    PREFERENCE,
    QUESTIONS,
    as_messages,
    chat_before,
    has_preference,
    parse_chosen_rejected,
    parse_preference,
)
from finetuning.data.formats.row_format import (
    DEFAULT_OPTIONS,
    FieldError,
    Options,
    RowFormat,
    check_completion,
    is_chat,
    label_field,
    other_fields,
    problem_of,
    refuse_in_text,
    require_columns,
    text_field,
    with_columns,
)
from finetuning.data.samples import Conversation, Preference, Row, UnpairedPreference
from finetuning.errors import Problem

UNPAIRED_COLUMNS = ("prompt_messages", "completion_messages", "label")


def parse_unpaired(
    row: Row, options: Options = DEFAULT_OPTIONS
) -> UnpairedPreference | list[UnpairedPreference] | Problem:
    """Return the unpaired preference of a row, the two of a preference, or what is wrong with the row."""
    if "completion_messages" not in row.values and PREFERENCE.matches(row):
        return as_unpaired(parse_preference(row))
    try:
        require_columns(row, UNPAIRED_COLUMNS, "unpaired")
        prompt, completion = (chat_field(row, column) for column in UNPAIRED_COLUMNS[:2])
        prompt = with_system(row, prompt)
        check_completion(row, "completion_messages", completion)
        return UnpairedPreference(prompt=prompt, completion=completion, label=label_field(row), **other_fields(row))
    except FieldError as error:
        return problem_of(row, error)


def as_unpaired(preference: Preference | Problem) -> list[UnpairedPreference] | Problem:
    """Return a preference as a desirable and an undesirable completion of its prompt."""
    if isinstance(preference, Problem):
        return preference
    return [
        UnpairedPreference(
            prompt=preference.prompt,
            completion=completion,
            label=label,
            location=preference.location,
            tools=preference.tools,
            template_kwargs=preference.template_kwargs,
            is_text=preference.is_text,
            unused=preference.unused if label else (),
        )
        for completion, label in ((preference.chosen, True), (preference.rejected, False))
    ]


UNPAIRED = RowFormat("unpaired", UNPAIRED_COLUMNS, parse_unpaired)


COMPLETION_LABEL_COLUMNS = ("prompt", "completion", "label")


_LABELS = ("label", "kto_tag")


def has_label(values: Mapping[str, object]) -> bool:
    """Return whether a row has a label, and a prompt and completion, a chat, or an instruction with its answer."""
    has_answer = "completion" in values and any(name in values for name in ("prompt", *QUESTIONS))
    return (has_answer or has_messages(values) or has_alpaca(values)) and any(name in values for name in _LABELS)


def parse_completion_label(row: Row, options: Options = DEFAULT_OPTIONS) -> UnpairedPreference | Problem:
    """Return the unpaired preference of a row, or what is wrong with it."""
    try:
        if "kto_tag" in row.values and "label" not in row.values:
            row = with_columns(row, ("kto_tag",), {"label": row.values["kto_tag"]})
        if "completion" not in row.values and (has_messages(row.values) or has_alpaca(row.values)):
            return _labeled_chat(row, options)
        if "completion" in row.values and (before := chat_before(row, options)):
            answer = {"role": "assistant", "content": text_field(row, "completion")}
            return UnpairedPreference(prompt=before, completion=[answer], label=label_field(row), **other_fields(row))
        require_columns(row, COMPLETION_LABEL_COLUMNS, "completion_label")
        is_text = not is_chat(row.values["prompt"])
        if is_text:
            prompt, completion = as_messages(text_field(row, "prompt"), text_field(row, "completion"))
            refuse_in_text(row)
        else:
            prompt, completion = with_system(row, chat_field(row, "prompt")), chat_field(row, "completion")
            check_completion(row, "completion", completion)
        label = label_field(row)
        return UnpairedPreference(
            prompt=prompt, completion=completion, label=label, is_text=is_text, **other_fields(row)
        )
    except FieldError as error:
        return problem_of(row, error)


def _labeled_chat(row: Row, options: Options) -> UnpairedPreference | Problem:
    """Return a chat, of which the label is about the last message, as in ms-swift and LLaMA-Factory."""
    require_columns(row, ("label",), "completion_label")
    parsed = parse_messages(row) if has_messages(row.values) else parse_alpaca(row, options)
    if not isinstance(parsed, Conversation):
        return parsed
    *prompt, answer = parsed.messages
    column = messages_column(row.values) or "output"
    if not prompt or answer["role"] != "assistant":
        raise FieldError(column, "expected a chat that ends with an answer, as there is a label")
    return UnpairedPreference(prompt=prompt, completion=[answer], label=label_field(row), **other_fields(row))


def parse_pair(row: Row, options: Options = DEFAULT_OPTIONS) -> list[UnpairedPreference] | Problem:
    """Return the two completions of a row in TRL's preference format."""
    return as_unpaired(parse_chosen_rejected(row, options))


COMPLETION_LABEL = RowFormat("completion_label", COMPLETION_LABEL_COLUMNS, parse_completion_label, has_label)
CHOSEN_REJECTED_PAIR = RowFormat("chosen_rejected", CHOSEN_REJECTED_COLUMNS, parse_pair, has_preference)
