"""The shapes that rows come in: one file each, and one line here."""

from __future__ import annotations

from finetuning.data.formats import (
    chosen_rejected,
    completion_label,
    input_output,
    messages,
    preference,
    prompt,
    prompt_completion,
    response_template,
    text,
    tokens,
    unpaired,
)
from finetuning.data.formats import instruction as alpaca
from finetuning.data.formats.row_format import Options, RowFormat

__all__ = ["FORMATS", "KINDS", "Options", "RowFormat"]

FORMATS: dict[str, RowFormat] = {
    "messages": messages.FORMAT,
    "alpaca": alpaca.FORMAT,
    "prompt_completion": prompt_completion.FORMAT,
    "input_output": input_output.FORMAT,
    "text": text.FORMAT,
    "response_template": response_template.FORMAT,
    "tokens": tokens.FORMAT,
    "preference": preference.FORMAT,
    "chosen_rejected": chosen_rejected.FORMAT,
    "unpaired": unpaired.FORMAT,
    "completion_label": completion_label.FORMAT,
    "prompt": prompt.FORMAT,
}
KINDS: dict[str, tuple[RowFormat, ...]] = {
    "sft": tuple(
        FORMATS[name]
        for name in (
            "messages",
            "tokens",
            "prompt_completion",
            "alpaca",
            "input_output",
            "text",
            "response_template",
        )
    ),
    "preference": (preference.FORMAT, chosen_rejected.FORMAT),
    "unpaired": (unpaired.FORMAT, completion_label.FORMAT, completion_label.PAIR),
    "prompt": (prompt.FORMAT,),
}
"""What each kind of training takes, in the order in which the formats are tried; the first is named where none fits."""
