"""A JSON array, element by element; no more of it is held than an element and what was read ahead."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from finetuning.errors import DataError, Place

_DECODER = json.JSONDecoder()
_READ_AHEAD = 1 << 20
_LONGEST_WORD = 32
"""Characters before the end of what is read in which JSON may only seem wrong: a word, an escape or a number, cut."""
_WHITE = " \t\n\r"


class _Window:
    """The text of a file from somewhere on, and the line that it begins in."""

    def __init__(self, path: str, stream: BinaryIO, offset: int, read_ahead: int):
        self.text = ""
        self._counted = (0, 1)
        self._column = 0
        self._path = path
        self._stream = stream
        self._offset = offset
        self._read_ahead = read_ahead
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._is_over = False

    def more(self, position: int) -> bool:
        """Drops what lies before a position and reads on, twice as much as is left; False where the file ends."""
        if self._is_over:
            return False
        self._drop(position)
        data = self._stream.read(max(self._read_ahead, 2 * len(self.text)))
        self._is_over = not data
        if b"\0" in data:
            where = data.index(b"\0")
            self.text += self._decoder.decode(data[:where], final=False)
            message = f"NUL byte at byte {self._offset + where}; the file is damaged or not text"
            raise self.fault(message, len(self.text))
        pending = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(data, final=self._is_over)
        except UnicodeDecodeError as error:
            where = self._offset - pending + error.start
            self.text += error.object[: error.start].decode()
            raise self.fault(
                f"invalid UTF-8 at byte {where} (0x{error.object[error.start]:02x})", len(self.text)
            ) from None
        self._offset += len(data)
        return True

    def _drop(self, position: int) -> None:
        self._column = self.column(position) - 1
        self._counted = (0, self.line_of(position))
        self.text = self.text[position:]

    def line_of(self, position: int) -> int:
        """The line of a position, from 1; none before it is asked for again."""
        counted, line = self._counted
        self._counted = (position, line + self.text.count("\n", counted, position))
        return self._counted[1]

    def column(self, position: int) -> int:
        """The column of a position, from 1."""
        newline = self.text.rfind("\n", 0, position)
        return position - newline if newline >= 0 else self._column + position + 1

    def fault(self, message: str, position: int) -> DataError:
        return DataError(message, place=Place(file=self._path, line=self.line_of(position)))

    def next(self, position: int) -> tuple[str, int]:
        """The first character from a position on that is not white space, and where it is; empty at the end."""
        while True:
            while position < len(self.text) and self.text[position] in _WHITE:
                position += 1
            if position < len(self.text):
                return self.text[position], position
            if not self.more(position):
                return "", len(self.text)
            position = 0

    def value(self, position: int) -> tuple[Any, int, int]:
        """The value at a position, with where it begins and ends in what is now held."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, position)
                if len(self.text) - end > _LONGEST_WORD or not self.more(position):
                    return value, position, end
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - _LONGEST_WORD
                if not is_cut or not self.more(position):
                    raise self.fault(
                        f"invalid JSON at column {self.column(error.pos)}: {error.msg}", error.pos
                    ) from None
            except RecursionError:
                raise self.fault("invalid JSON: nested too deeply", position) from None
            position = 0


def read_array(
    path: str, stream: BinaryIO, offset: int, read_ahead: int = _READ_AHEAD
) -> Iterator[tuple[Any, str, int]]:
    """Each element of the array that begins the file, its text and its line; `offset` is the stream's place, and
    `read_ahead` the bytes that are read at once.

    Raises:
        DataError: the file is no JSON array, or there is more in it; lines and columns count from 1.
    """
    window = _Window(path, stream, offset, read_ahead)
    _, position = window.next(0)
    character, position = window.next(position + 1)
    while character != "]":
        line = window.line_of(position)
        value, begin, end = window.value(position)
        yield value, window.text[begin:end], line
        character, position = window.next(end)
        if character == "]":
            break
        if character != ",":
            raise window.fault(f"invalid JSON at column {window.column(position)}: Expecting ',' delimiter", position)
        character, position = window.next(position + 1)
    character, position = window.next(position + 1)
    if character:
        raise window.fault("there is more in the file after the array that it begins with", position)
