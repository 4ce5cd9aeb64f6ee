"""The shapes that rows come in: one file each, and one line here."""

from __future__ import annotations

from finetuning.data.formats import messages, preference, prompt, unpaired
from finetuning.data.formats.fields import RowFormat

FORMATS: dict[str, RowFormat] = {
    "messages": messages.FORMAT,
    "preference": preference.FORMAT,
    "unpaired": unpaired.FORMAT,
    "prompt": prompt.FORMAT,
}
