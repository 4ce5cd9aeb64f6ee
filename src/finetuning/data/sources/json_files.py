"""JSON Lines, line by line, or one JSON document; each row keeps its line."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from finetuning.data.rows import Row, json_type
from finetuning.errors import DataError, Place, Problem

_INCOMPLETE = object()
_DECODER = json.JSONDecoder()


class Line(NamedTuple):
    """A line of JSON Lines that is not parsed yet, and the byte of the file that it begins at."""

    file: str
    number: int
    offset: int
    data: bytes

    def row(self) -> Row | Problem:
        """The row of the line, or what is wrong with it."""
        place = Place(file=self.file, line=self.number)
        text = _to_text(self.data, place, self.offset)
        return text if isinstance(text, Problem) else _parse_line(text, place)


def read_json(path: str, stream: BinaryIO, digest: hashlib._Hash | None = None) -> Iterator[Row | Problem | Line]:
    """The rows of a file in order: lines, or a Problem in place of what is no row.

    JSONL is read line by line; a file that holds one JSON array, or one object over several lines, is read whole. A
    byte order mark is skipped, empty lines are not rows. `digest` is fed all bytes.
    """
    start = len(codecs.BOM_UTF8) if stream.read(4).startswith(codecs.BOM_UTF8) else 0
    stream.seek(start)
    first = _first_line(stream)
    stream.seek(start)
    rows = _read_document(path, stream.read(), start, digest) if _is_document(first) else None
    if rows is None:
        stream.seek(start)
        yield from _read_lines(path, stream, start, digest)
    else:
        yield from rows


def _first_line(stream: Any) -> bytes:
    for line in stream:
        if line.strip():
            return line.strip()
    return b""


def _is_document(first: bytes) -> bool:
    """Whether the file is one JSON document: its first line opens an array, or an object that it does not close."""
    if first.startswith(b"["):
        return True
    return first.startswith(b"{") and _decode(first.decode("utf-8", "replace")) is _INCOMPLETE


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return _INCOMPLETE if error.pos >= len(text) else error


def _read_lines(path: str, stream: Any, offset: int, digest: hashlib._Hash | None) -> Iterator[Line]:
    for number, line in enumerate(stream, start=1):
        if digest is not None:
            digest.update(line)
        if not line.isspace():
            yield Line(path, number, offset, line)
        offset += len(line)


def _parse_line(text: str, place: Place) -> Row | Problem:
    try:
        values, end = _DECODER.raw_decode(text)
        if not (end == len(text) or text[end:].isspace()):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError:
        return _parse_strictly(text, place)
    except RecursionError:
        return Problem("invalid JSON: nested too deeply", place)
    return _to_row(values, text, place)


def _parse_strictly(text: str, place: Place) -> Row | Problem:
    """The same for a line that is no plain object at its beginning: with white space before it, or wrong."""
    try:
        values = json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        return Problem(f"invalid JSON at column {error.colno}: {error.msg}", place)
    except RecursionError:
        return Problem("invalid JSON: nested too deeply", place)
    return _to_row(values, text, place)


def _read_document(path: str, data: bytes, offset: int, digest: hashlib._Hash | None) -> list[Row | Problem] | None:
    """The rows of a JSON array or object; None when the file is neither, and must be lines."""
    place = Place(file=path, line=1)
    text = _to_text(data, place, offset)
    if isinstance(text, Problem):
        raise DataError([text])
    decoder, rows, line = json.JSONDecoder(), [], 1
    position = len(text) - len(text.lstrip())
    is_array = text[position] == "["
    if not is_array:
        try:
            values, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return None
        if text[end:].strip():
            return None
        rows = [_to_row(values, text, Place(file=path, line=1 + text.count("\n", 0, position)))]
    counted, position = 0, position + 1
    while is_array:
        position = _skip(text, position)
        if text[position : position + 1] == "]":
            break
        line, counted = line + text.count("\n", counted, position), position
        try:
            values, end = decoder.raw_decode(text, position)
            position = _skip(text, end)
            if text[position : position + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        except json.JSONDecodeError as error:
            place = Place(file=path, line=error.lineno)
            raise DataError(f"invalid JSON at column {error.colno}: {error.msg}", place=place) from None
        rows.append(_to_row(values, text[counted:end], Place(file=path, line=line)))
        position += text[position] == ","
    if digest is not None:
        digest.update(data)
    return rows


def _skip(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _to_text(line: bytes, place: Place, offset: int) -> str | Problem:
    if b"\0" in line:
        return Problem(f"NUL byte at byte {offset + line.index(0)}; the file is damaged or not text", place)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        line_number = (place.line or 1) + line.count(b"\n", 0, error.start)
        where = Place(file=place.file, line=line_number)
        return Problem(f"invalid UTF-8 at byte {offset + error.start} (0x{line[error.start]:02x})", where)


def _to_row(values: Any, text: str, place: Place) -> Row | Problem:
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
