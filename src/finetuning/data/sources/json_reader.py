"""JSON Lines, line by line, or one JSON document, an array or an object; each row keeps its line.

A JSON array, element by element; no more of it is held than an element and what was read ahead."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from finetuning.data.samples import Row, json_type
from finetuning.errors import DataError, Location, Problem

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
        return DataError(message, place=Location(file=self._path, line=self.line_of(position)))

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


_INCOMPLETE = object()
_PEEK = 1 << 16
_DECODER = json.JSONDecoder()


class Line(NamedTuple):
    """A line of JSON Lines that is not parsed yet, and the byte of the file that it begins at."""

    file: str
    number: int
    offset: int
    data: bytes

    def row(self) -> Row | Problem:
        """The row of the line, or what is wrong with it."""
        place = Location(file=self.file, line=self.number)
        text = _to_text(self.data, place, self.offset)
        return text if isinstance(text, Problem) else _parse_line(text, place)


def read_json(path: str, stream: BinaryIO) -> Iterator[Row | Problem | Line]:
    """The rows of a file in order: lines, or a Problem in place of what is no row.

    JSONL is read line by line, an array element by element; a file that holds one object over several lines is read
    whole. A byte order mark is skipped, empty lines are not rows.
    """
    start = len(codecs.BOM_UTF8) if stream.read(4).startswith(codecs.BOM_UTF8) else 0
    stream.seek(start)
    first = _first_byte(stream)
    stream.seek(start)
    if first == b"[":
        for value, text, line in read_array(path, stream, start):
            yield _to_row(value, text, Location(file=path, line=line))
        return
    line = _first_line(stream) if first == b"{" else b""
    stream.seek(start)
    row = _read_object(path, stream.read(), start) if line and _is_cut(line) else None
    if row is None:
        stream.seek(start)
        yield from _read_lines(path, stream, start)
    else:
        yield row


def _first_byte(stream: Any) -> bytes:
    """The first byte of the file that is not white space."""
    while chunk := stream.read(_PEEK):
        if chunk.strip():
            return chunk.strip()[:1]
    return b""


def _first_line(stream: Any) -> bytes:
    for line in stream:
        if line.strip():
            return line.strip()
    return b""


def _is_cut(line: bytes) -> bool:
    """Whether a line opens an object that it does not close."""
    return _decode(line.decode("utf-8", "replace")) is _INCOMPLETE


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        return error
    except json.JSONDecodeError as error:
        return _INCOMPLETE if error.pos >= len(text) else error


def _read_lines(path: str, stream: Any, offset: int) -> Iterator[Line]:
    for number, line in enumerate(stream, start=1):
        if not line.isspace():
            yield Line(path, number, offset, line)
        offset += len(line)


def _parse_line(text: str, place: Location) -> Row | Problem:
    try:
        values, end = _DECODER.raw_decode(text)
        if not (end == len(text) or text[end:].isspace()):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError:
        return _parse_strictly(text, place)
    except RecursionError:
        return Problem("invalid JSON: nested too deeply", place)
    return _to_row(values, text, place)


def _parse_strictly(text: str, place: Location) -> Row | Problem:
    """The same for a line that is no plain object at its beginning: with white space before it, or wrong."""
    try:
        values = json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        return Problem(f"invalid JSON at column {error.colno}: {error.msg}", place)
    except RecursionError:
        return Problem("invalid JSON: nested too deeply", place)
    return _to_row(values, text, place)


def _read_object(path: str, data: bytes, offset: int) -> Row | Problem | None:
    """The row of a file that holds one object and nothing else; None for any other file."""
    text = _to_text(data, Location(file=path, line=1), offset)
    if isinstance(text, Problem):
        raise DataError([text])
    position = len(text) - len(text.lstrip())
    try:
        values, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError:
        return None
    if text[end:].strip():
        return None
    return _to_row(values, text, Location(file=path, line=1 + text.count("\n", 0, position)))


def _to_text(line: bytes, place: Location, offset: int) -> str | Problem:
    if b"\0" in line:
        return Problem(f"NUL byte at byte {offset + line.index(0)}; the file is damaged or not text", place)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        line_number = (place.line or 1) + line.count(b"\n", 0, error.start)
        where = Location(file=place.file, line=line_number)
        return Problem(f"invalid UTF-8 at byte {offset + error.start} (0x{line[error.start]:02x})", where)


def _to_row(values: Any, text: str, place: Location) -> Row | Problem:
    if not isinstance(values, dict):
        return Problem(f"expected an object, got {json_type(values)}", place)
    # Only an escape can bring these past the UTF-8 decoder; no tokenizer takes half a pair.
    if "\\u" in text:
        strings = "".join(_strings(values))
        if "\0" in strings:
            return Problem("a string holds a NUL character (\\u0000)", place)
        if any("\ud800" <= character <= "\udfff" for character in strings):
            return Problem("a string holds half of a surrogate pair (\\ud800 to \\udfff), which is no text", place)
    return Row(values, place)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
