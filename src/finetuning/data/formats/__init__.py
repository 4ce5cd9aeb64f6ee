"""The table of row formats: to add one, write its module and add a line to `FORMATS` and to `KINDS`."""

from __future__ import annotations

from finetuning.data.formats.instruction import ALPACA, INPUT_OUTPUT, PROMPT_COMPLETION
from finetuning.data.formats.messages import MESSAGES
from finetuning.data.formats.preference import CHOSEN_REJECTED, PREFERENCE
from finetuning.data.formats.row_format import Options, RowFormat
from finetuning.data.formats.text import PROMPT, RESPONSE_TEMPLATE, SEGMENTS, TEXT, TOKENS
from finetuning.data.formats.unpaired import CHOSEN_REJECTED_PAIR, COMPLETION_LABEL, UNPAIRED

__all__ = ["FORMATS", "KINDS", "Options", "RowFormat"]

FORMATS: dict[str, RowFormat] = {
    "messages": MESSAGES,
    "alpaca": ALPACA,
    "prompt_completion": PROMPT_COMPLETION,
    "input_output": INPUT_OUTPUT,
    "segments": SEGMENTS,
    "text": TEXT,
    "response_template": RESPONSE_TEMPLATE,
    "tokens": TOKENS,
    "preference": PREFERENCE,
    "chosen_rejected": CHOSEN_REJECTED,
    "unpaired": UNPAIRED,
    "completion_label": COMPLETION_LABEL,
    "prompt": PROMPT,
}
KINDS: dict[str, tuple[RowFormat, ...]] = {
    "sft": (MESSAGES, TOKENS, SEGMENTS, PROMPT_COMPLETION, ALPACA, INPUT_OUTPUT, TEXT, RESPONSE_TEMPLATE),
    "preference": (PREFERENCE, CHOSEN_REJECTED),
    "unpaired": (UNPAIRED, COMPLETION_LABEL, CHOSEN_REJECTED_PAIR),
    "prompt": (PROMPT,),
}
"""The formats of each kind of rows, in the order in which they are tried. If none matches, errors name the first."""
