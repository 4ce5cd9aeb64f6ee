"""The shapes that rows come in: one file each, and one line here."""

from __future__ import annotations

from finetuning.data.formats import messages, preference
from finetuning.data.formats.fields import RowFormat

FORMATS: dict[str, RowFormat] = {
    "messages": messages.FORMAT,
    "preference": preference.FORMAT,
}
