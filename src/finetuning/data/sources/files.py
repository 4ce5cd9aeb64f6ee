"""One file to its rows, by what its name ends with."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from finetuning.data.samples import Row
from finetuning.data.sources.json_reader import Line, read_json
from finetuning.data.sources.opening import COMPRESSED, digest_file, kind_of, opened
from finetuning.data.sources.tables import read_arrow, read_csv, read_parquet
from finetuning.data.sources.text_files import read_text
from finetuning.errors import DataError, Place, Problem

_ENCODINGS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
_COLUMNAR = {".parquet": read_parquet, ".arrow": read_arrow}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXTS = (".txt", ".md")
TABLES = (".json", ".jsonl", ".ndjson", *_SEPARATORS, *_COLUMNAR)


@dataclass(frozen=True)
class FileShard:
    """One file of a dataset."""

    path: str
    text_unit: str = "line"

    @property
    def name(self) -> str:
        return self.path

    def rows(self) -> Iterator[Row | Problem]:
        """The rows in order. Raises DataError as `read_rows`."""
        return read_rows(self.path, text_unit=self.text_unit)

    def unparsed(self) -> Iterator[Row | Problem | Line]:
        """The same, but lines of JSON as they are. Raises DataError as `read_rows`."""
        return _counted(self.path, _read(self.path, self.text_unit))

    def feed(self, digest: hashlib._Hash) -> None:
        """Feeds what the rows depend on: the file's bytes."""
        digest_file(self.path, digest)


def check_source(path: str, key: str) -> None:
    """Nothing, when `path` is a file that can be read.

    Raises:
        DataError: it is missing, a folder, unreadable or empty; says the key that names it and the working directory.
    """
    place = Place(key=key)
    if os.path.isdir(path):
        raise DataError(f"{path} is a directory; expected a file (working directory {os.getcwd()})", place=place)
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file (working directory {os.getcwd()})", place=place)
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: no permission to read it", place=place)
    if os.path.getsize(path) == 0:
        raise DataError("0 rows: the file is empty", place=Place(file=path))


def read_rows(path: str, *, text_unit: str = "line") -> Iterator[Row | Problem]:
    """The rows of a file in order, a Problem in place of each line that is no row.

    Parquet, Arrow, CSV and text are told by the name's ending; everything else is JSON. Rows are read one by one.

    Raises:
        DataError: the file holds no row, is damaged, or is in an encoding other than UTF-8.
    """
    for row in _counted(path, _read(path, text_unit)):
        yield row.row() if isinstance(row, Line) else row


def _counted(path: str, rows: Iterator[Row | Problem | Line]) -> Iterator[Row | Problem | Line]:
    count = 0
    for row in rows:
        count += 1
        yield row
    if count == 0:
        raise DataError("0 rows", place=Place(file=path))


def _read(path: str, text_unit: str) -> Iterator[Row | Problem | Line]:
    kind = kind_of(path)
    if kind in _COLUMNAR:
        if path.lower().endswith(COMPRESSED):
            raise DataError(f"{kind} files cannot be read compressed; decompress it", place=Place(file=path))
        yield from _COLUMNAR[kind](path)
        return
    with opened(path) as stream:
        _check_encoding(path, stream)
        if kind in _SEPARATORS:
            yield from read_csv(path, stream, _SEPARATORS[kind])
        elif kind in TEXTS:
            yield from read_text(path, stream, text_unit)
        else:
            yield from read_json(path, stream)


def _check_encoding(path: str, stream: BinaryIO) -> None:
    head = stream.read(4)
    for mark, name in _ENCODINGS:
        if head.startswith(mark):
            raise DataError(f"the file is {name}; expected UTF-8", place=Place(file=path))
    stream.seek(0)
