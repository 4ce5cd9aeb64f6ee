"""One file to its rows, by what its name ends with.

What a dataset's `path` stands for: files, folders, globs, or a dataset on the hub.

A file to the stream of its bytes, whatever it is compressed with.

Text files: each line, paragraph or file is a row with one column, `text`."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from finetuning.config.sections.data import DatasetSource
from finetuning.data.samples import Row
from finetuning.data.sources.hub import HubShard
from finetuning.data.sources.json_reader import Line, read_json
from finetuning.data.sources.tables import read_arrow, read_csv, read_parquet
from finetuning.errors import DataError, Location, MissingPackageError, Problem

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_CHUNK = 1 << 20


def file_format(path: str) -> str:
    """The ending of a file's name that says what it holds, in lower case, without that of its compression.

    >>> kind_of("a.JSONL.gz"), kind_of("a.parquet"), kind_of("a")
    ('.jsonl', '.parquet', '')
    """
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if ending in COMPRESSED else ending


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed on the way.

    Raises:
        DataError: the compressed data is damaged, or ends too early; also while it is read.
        MissingPackageError: the file is compressed with Zstandard, which this Python cannot read.
    """
    ending = os.path.splitext(path.lower())[1]
    opener = _zstd_opener(path) if ending == ".zst" else _OPENERS.get(ending, open)
    with opener(path, "rb") as stream:
        try:
            yield stream  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"the compressed file is damaged: {error}", place=Location(file=path)) from None
        except OSError as error:
            # What bz2 raises for damaged data is a bare OSError without a number.
            if error.errno is not None:
                raise
            raise DataError(f"the compressed file is damaged: {error}", place=Location(file=path)) from None


def _zstd_opener(path: str) -> type:
    try:
        import zstandard
    except ImportError:
        raise MissingPackageError(
            "reading .zst files needs the package zstandard", place=Location(file=path), hint="pip install zstandard"
        ) from None
    return zstandard.open


def digest_file(path: str, digest: hashlib._Hash) -> None:
    """Feeds the file's bytes, as they lie on the disk."""
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)


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
            place = Location(file=path, line=number)
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
        yield Row({COLUMN: text.rstrip("\r\n")}, Location(file=path, line=first))


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
    place = Location(key=key)
    if os.path.isdir(path):
        raise DataError(f"{path} is a directory; expected a file (working directory {os.getcwd()})", place=place)
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file (working directory {os.getcwd()})", place=place)
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: no permission to read it", place=place)
    if os.path.getsize(path) == 0:
        raise DataError("0 rows: the file is empty", place=Location(file=path))


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
        raise DataError("0 rows", place=Location(file=path))


def _read(path: str, text_unit: str) -> Iterator[Row | Problem | Line]:
    kind = file_format(path)
    if kind in _COLUMNAR:
        if path.lower().endswith(COMPRESSED):
            raise DataError(f"{kind} files cannot be read compressed; decompress it", place=Location(file=path))
        yield from _COLUMNAR[kind](path)
        return
    with open_file(path) as stream:
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
            raise DataError(f"the file is {name}; expected UTF-8", place=Location(file=path))
    stream.seek(0)


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_NO_DATA = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}
_SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}


class Shard(Protocol):
    """A part of a dataset that is read in one go."""

    @property
    def name(self) -> str: ...

    def rows(self) -> Iterator[Row | Problem]: ...

    def unparsed(self) -> Iterator[Row | Problem | Line]: ...

    def feed(self, digest: hashlib._Hash) -> None: ...


def find_shards(source: DatasetSource, key: str, *, streaming: bool = False) -> list[Shard]:
    """The files or hub datasets that a dataset is made of, in order: those of a folder or glob by name.

    `key` names the dataset in the config. Files are there and not empty; the hub is not asked yet. With `streaming`
    what lies on the hub is read from there, and not kept.

    Raises:
        DataError: with everything that is missing or ambiguous.
    """
    paths = [source.path] if isinstance(source.path, str) else source.path
    shards: list[Shard] = []
    problems: list[Problem] = []
    for index, path in enumerate(paths):
        here = f"{key}.path" if isinstance(source.path, str) else f"{key}.path[{index}]"
        try:
            shards.extend(_find(os.path.expanduser(path), source, here, streaming))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return shards


def _find(path: str, source: DatasetSource, key: str, streaming: bool) -> list[Shard]:
    if os.path.isdir(path):
        files = _files_below(Path(path), source.split, key)
    elif not os.path.exists(path) and glob.has_magic(path):
        files = sorted(one for one in glob.glob(path, recursive=True) if os.path.isfile(one))
        if not files:
            raise DataError(f"{path}: no file matches (working directory {os.getcwd()})", place=Location(key=key))
    elif not os.path.exists(path) and _HUB_ID.fullmatch(path) and file_format(path) not in (*TABLES, *TEXTS):
        return [HubShard(path, source.split or "train", source.subset, source.revision, streaming)]
    else:
        files = [path]
    for file in files:
        check_source(file, key)
    return [FileShard(file, source.text_unit) for file in files]


def _files_below(folder: Path, split: str | None, key: str) -> list[str]:
    """The data files of a folder, of one split where there are several; texts only where there is no table."""
    place = Location(key=key)
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in _NO_DATA
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]
    files = [path for path in found if file_format(path.name) in TABLES]
    files = files or [path for path in found if file_format(path.name) in TEXTS]
    if not files:
        raise DataError(f"{folder}: no data file in this folder; known are {', '.join((*TABLES, *TEXTS))}", place=place)
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    names = sorted({name for name in splits.values() if name})
    if split is not None:
        chosen = [path for path in files if split in _words(path.relative_to(folder))]
        if not chosen:
            raise DataError(f"{folder}: no file of the split {split}; found {', '.join(names) or 'none'}", place=place)
        return [str(path) for path in chosen]
    if len(names) > 1:
        raise DataError(
            f"{folder} holds several splits ({', '.join(names)}); say which to read with `split`", place=place
        )
    return [str(path) for path in files]


def _words(path: Path) -> list[str]:
    return re.split(r"[^a-z0-9]+", path.as_posix().lower())


def _split_of(path: Path) -> str | None:
    return next((word for word in _words(path) if word in _SPLITS), None)
