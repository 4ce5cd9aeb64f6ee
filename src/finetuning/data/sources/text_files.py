"""Text files: each line, paragraph or file is a row with one column, `text`."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from finetuning.data.samples import Row
from finetuning.errors import Place, Problem

COLUMN = "text"


def read_text(path: str, stream: BinaryIO, unit: str) -> Iterator[Row | Problem]:
    """The rows of a text file, with the line that each begins in; `unit` is `line`, `paragraph` or `document`.

    Paragraphs end at empty lines. What holds nothing but white space is no row.
    """
    kept: list[str] = []
    first = 1
    for number, data in enumerate(stream, start=1):
        if number == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        try:
            line = data.decode("utf-8")
        except UnicodeDecodeError as error:
            place = Place(file=path, line=number)
            yield Problem(f"invalid UTF-8 at byte {error.start} of the line (0x{data[error.start]:02x})", place)
            continue
        if unit == "line" or (unit == "paragraph" and not line.strip()):
            yield from _row(path, kept, first)
            kept = []
        if kept or line.strip():
            first = first if kept else number
            kept.append(line)
    yield from _row(path, kept, first)


def _row(path: str, lines: list[str], first: int) -> Iterator[Row]:
    text = "".join(lines)
    if text:
        yield Row({COLUMN: text.rstrip("\r\n")}, Place(file=path, line=first))
