"""JSON files: JSON Lines, an array of objects, or objects of several lines; each row keeps its line.

Lines are left unparsed (`Line`), so that worker processes can parse them. An array, or indented objects one after the
other as jq writes them, are read one by one: no more is held in memory than one of them and what was read ahead.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, BinaryIO, NamedTuple

from finetuning.data.samples import JsonValue, Row, json_type
from finetuning.errors import DataError, Location, Problem, RepeatedKeyError, unique_keys

_READ_AHEAD = 1 << 20
_MAX_TOKEN = 32
"""Longest literal, escape or number, in characters. So close to the end of what was read, JSON that seems invalid may
only be incomplete."""
_WHITE_SPACE = " \t\n\r"


class _Window:
    """A part of a file's text that moves forward, with the line and column of its positions in the file."""

    def __init__(self, path: str, stream: BinaryIO, offset: int, read_ahead: int):
        self.text = ""
        self._counted = (0, 1)
        self._column = 0
        self._path = path
        self._stream = stream
        self._offset = offset
        self._read_ahead = read_ahead
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._at_end = False

    def advance(self, position: int) -> bool:
        """Discard the text before a position, and read more; return False at the end of the file.

        At least twice the remaining text is read, so that a long element is parsed again only a few times.
        """
        if self._at_end:
            return False
        self._discard(position)
        data = self._stream.read(max(self._read_ahead, 2 * len(self.text)))
        self._at_end = not data
        if b"\0" in data:
            where = data.index(b"\0")
            self.text += self._decoder.decode(data[:where], final=False)
            message = f"NUL byte at byte {self._offset + where}; the file is damaged or not text"
            raise self.error(message, len(self.text))
        pending = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            where = self._offset - pending + error.start
            self.text += error.object[: error.start].decode()
            raise self.error(
                f"invalid UTF-8 at byte {where} (0x{error.object[error.start]:02x})", len(self.text)
            ) from None
        self._offset += len(data)
        return True

    def _discard(self, position: int) -> None:
        self._column = self.column(position) - 1
        self._counted = (0, self.line_of(position))
        self.text = self.text[position:]

    def line_of(self, position: int) -> int:
        """Return the line of a position, from 1. Positions must not decrease from call to call."""
        counted, line = self._counted
        self._counted = (position, line + self.text.count("\n", counted, position))
        return self._counted[1]

    def column(self, position: int) -> int:
        """Return the column of a position, from 1."""
        newline = self.text.rfind("\n", 0, position)
        return position - newline if newline >= 0 else self._column + position + 1

    def error(self, message: str, position: int) -> DataError:
        """Return an error with the line of a position."""
        return DataError(message, location=Location(file=self._path, line=self.line_of(position)))

    def next_character(self, position: int) -> tuple[str, int]:
        """Return the first character that is not white space, and its position; empty at the end of the file."""
        while True:
            while position < len(self.text) and self.text[position] in _WHITE_SPACE:
                position += 1
            if position < len(self.text):
                return self.text[position], position
            if not self.advance(position):
                return "", len(self.text)
            position = 0

    def value(self, position: int) -> tuple[Any, int, int]:
        """Return the JSON value at a position, and its start and end in the text, which may have moved."""
        while True:
            try:
                value, end = self._decode(position)
                if len(self.text) - end > _MAX_TOKEN or not self.advance(position):
                    return value, position, end
            except json.JSONDecodeError as error:
                is_incomplete = error.msg.startswith("Unterminated") or error.pos > len(self.text) - _MAX_TOKEN
                if not is_incomplete or not self.advance(position):
                    raise self.error(
                        f"invalid JSON at column {self.column(error.pos)}: {error.msg}", error.pos
                    ) from None
            except RecursionError:
                raise self.error("invalid JSON: nested too deeply", position) from None
            except ValueError as error:
                raise self.error(_invalid(error), position) from None
            position = 0

    def _decode(self, position: int) -> tuple[JsonValue | RepeatedKeyError, int]:
        """Return the JSON value at a position, or its RepeatedKeyError, and its end."""
        try:
            return _DECODER.raw_decode(self.text, position)
        except RepeatedKeyError as error:
            return error, json.JSONDecoder().raw_decode(self.text, position)[1]


def read_array(
    path: str, stream: BinaryIO, offset: int, read_ahead: int = _READ_AHEAD
) -> Iterator[tuple[Any, str, int]]:
    """Yield each element of a file that is one array, with its text and line.

    Args:
        path: the name of the file in errors.
        stream: the file.
        offset: the position of the stream in bytes.
        read_ahead: bytes to read at once.

    Raises:
        DataError: the file is not valid JSON, or something follows the array.
    """
    window = _Window(path, stream, offset, read_ahead)
    _, position = window.next_character(0)
    character, position = window.next_character(position + 1)
    while character != "]":
        line = window.line_of(position)
        value, begin, end = window.value(position)
        yield value, window.text[begin:end], line
        character, position = window.next_character(end)
        if character == "]":
            break
        if character != ",":
            raise window.error(f"invalid JSON at column {window.column(position)}: Expecting ',' delimiter", position)
        character, position = window.next_character(position + 1)
    character, position = window.next_character(position + 1)
    if character:
        raise window.error("unexpected data after the array", position)


def read_values(
    path: str, stream: BinaryIO, offset: int, read_ahead: int = _READ_AHEAD
) -> Iterator[tuple[Any, str, int]]:
    """Yield each JSON value of a file that has one after the other; arguments and results are those of `read_array`.

    Raises:
        DataError: the file is not valid JSON.
    """
    window = _Window(path, stream, offset, read_ahead)
    character, position = window.next_character(0)
    while character:
        line = window.line_of(position)
        value, begin, end = window.value(position)
        yield value, window.text[begin:end], line
        character, position = window.next_character(end)


_INCOMPLETE = object()
_PEEK = 1 << 16
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


class Line(NamedTuple):
    """An unparsed line of JSON Lines, and the byte of the file at which it begins."""

    file: str
    number: int
    offset: int
    data: bytes

    def row(self) -> Row | Problem:
        """Parse the line: return its row, or what is wrong with it."""
        location = Location(file=self.file, line=self.number)
        text = _to_text(self.data, location, self.offset)
        return text if isinstance(text, Problem) else _parse_line(text, location)


def read_json(path: str, stream: BinaryIO) -> Iterator[Row | Problem | Line]:
    """Yield the rows of a file in order, unparsed lines of JSON Lines among them.

    Objects may also extend over several lines, one after the other. A byte order mark and empty lines are skipped.
    """
    start = len(codecs.BOM_UTF8) if stream.read(4).startswith(codecs.BOM_UTF8) else 0
    stream.seek(start)
    first, opening_line = _first_byte(stream)
    stream.seek(start)
    if first == b"[":
        previous = opening_line
        for number, (value, text, line) in enumerate(read_array(path, stream, start), start=1):
            # On a line of its own, an element is found by that line.
            yield _to_row(value, text, Location(file=path, line=line, element=number if line == previous else None))
            previous = line + text.count("\n")
        return
    line = _first_line(stream) if first == b"{" else b""
    stream.seek(start)
    values = read_values(path, stream, start) if line and _is_unclosed(line) else None
    try:
        head = list(islice(values, 1)) if values else []
    except DataError:
        head = []
    if values is None or not head:
        stream.seek(start)
        yield from _read_lines(path, stream, start)
        return
    for value, text, number in chain(head, values):
        yield _to_row(value, text, Location(file=path, line=number))


def _first_byte(stream: BinaryIO) -> tuple[bytes, int]:
    """Return the first byte of the file that is not white space, and its line."""
    line = 1
    while chunk := stream.read(_PEEK):
        if stripped := chunk.lstrip():
            return stripped[:1], line + chunk[: len(chunk) - len(stripped)].count(b"\n")
        line += chunk.count(b"\n")
    return b"", line


def _first_line(stream: BinaryIO) -> bytes:
    for line in stream:
        if line.strip():
            return line.strip()
    return b""


def _is_unclosed(line: bytes) -> bool:
    """Return whether a line begins an object that it does not end."""
    return _decode(line.decode("utf-8", "replace")) is _INCOMPLETE


def _decode(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return _INCOMPLETE if error.pos >= len(text) else error
    except (RecursionError, ValueError) as error:
        return error


def _read_lines(path: str, stream: BinaryIO, offset: int) -> Iterator[Line]:
    for number, line in enumerate(stream, start=1):
        if not line.isspace():
            yield Line(path, number, offset, line)
        offset += len(line)


def _invalid(error: ValueError) -> str:
    """Return what is wrong with JSON that is well-formed: a key that is twice in an object, a number of 4300 digits."""
    return f"invalid JSON: {str(error).partition(';')[0]}"


def _parse_line(text: str, location: Location) -> Row | Problem:
    try:
        values, end = _DECODER.raw_decode(text)
        if not (end == len(text) or text[end:].isspace()):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError:
        return _parse_strictly(text, location)
    except RecursionError:
        return Problem("invalid JSON: nested too deeply", location)
    except ValueError as error:
        return Problem(_invalid(error), location)
    return _to_row(values, text, location)


def _parse_strictly(text: str, location: Location) -> Row | Problem:
    """Parse a line that begins with white space, or is invalid."""
    try:
        values = json.loads(text.rstrip(), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        return Problem(f"invalid JSON at column {error.colno}: {error.msg}", location)
    except RecursionError:
        return Problem("invalid JSON: nested too deeply", location)
    except ValueError as error:
        return Problem(_invalid(error), location)
    return _to_row(values, text, location)


def _to_text(line: bytes, location: Location, offset: int) -> str | Problem:
    if b"\0" in line:
        return Problem(f"NUL byte at byte {offset + line.index(0)}; the file is damaged or not text", location)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        line_number = (location.line or 1) + line.count(b"\n", 0, error.start)
        where = Location(file=location.file, line=line_number)
        return Problem(f"invalid UTF-8 at byte {offset + error.start} (0x{line[error.start]:02x})", where)


def _to_row(values: JsonValue | RepeatedKeyError, text: str, location: Location) -> Row | Problem:
    if isinstance(values, RepeatedKeyError):
        return Problem(_invalid(values), location)
    if not isinstance(values, dict):
        return Problem(f"expected an object, got {json_type(values)}", location)
    # Only a JSON escape can produce these in UTF-8 input, and no tokenizer accepts half of a surrogate pair.
    if "\\u" in text:
        strings = "".join(_strings(values))
        if "\0" in strings:
            return Problem("a string holds a NUL character (\\u0000)", location)
        if any("\ud800" <= character <= "\udfff" for character in strings):
            return Problem("a string holds half of a surrogate pair (\\ud800 to \\udfff), which is not text", location)
    return Row(values, location)


def _strings(value: JsonValue) -> Iterator[str]:
    """Yield all strings in a value, the keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
