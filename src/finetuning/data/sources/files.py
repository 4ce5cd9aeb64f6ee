"""Datasets on disk: what a `path` of the config refers to, and the rows of each file.

A path is a file, a folder, a glob or a dataset of the Hugging Face Hub; `find_shards` resolves it to shards. A file is
decompressed, and read by what its name ends with: Parquet, Arrow, CSV, text, or else JSON.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import json
import lzma
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Protocol, cast

from finetuning.config.sections.data import DatasetSource
from finetuning.config.validation.suggestions import near_file
from finetuning.data.samples import Row
from finetuning.data.sources.hub import Digest, HubShard
from finetuning.data.sources.json_reader import Line, read_json
from finetuning.data.sources.tables import read_arrow, read_csv, read_parquet
from finetuning.errors import DataError, Location, MissingPackageError, Problem, reading

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_Opener = Callable[[str, str], AbstractContextManager[IO[bytes]]]
_OPENERS = cast("dict[str, _Opener]", {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open})
_SIGNATURES = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_CHUNK = 1 << 20


def file_format(path: str) -> str:
    """Return the extension of a file name in lower case, ignoring that of a compression.

    >>> file_format("a.JSONL.gz"), kind_of("a.parquet"), kind_of("a")
    ('.jsonl', '.parquet', '')
    """
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if ending in COMPRESSED else ending


@contextmanager
def open_file(path: str) -> Generator[BinaryIO, None, None]:
    """Open a file for reading, with decompression if its name or its first bytes say so.

    Raises:
        DataError: the compressed data is damaged or truncated; also raised while reading.
        MissingPackageError: the file is compressed with Zstandard, and zstandard is not installed.
    """
    ending = os.path.splitext(path.lower())[1]
    if ending not in COMPRESSED:
        ending = _compression_of(path)
    opener = _zstd_opener(path) if ending == ".zst" else _OPENERS.get(ending, open)
    with opener(path, "rb") as stream:
        problem = "cannot be read" if opener is open else "the compressed file is damaged"
        with reading(problem, DataError, location=Location(file=path)):
            yield cast("BinaryIO", stream)


def _compression_of(path: str) -> str:
    """Return the ending of a compression by the first bytes of a file; empty if it is not compressed."""
    with open(path, "rb") as stream:
        head = stream.read(max(map(len, _SIGNATURES)))
    return next((ending for signature, ending in _SIGNATURES.items() if head.startswith(signature)), "")


def _zstd_opener(path: str) -> _Opener:
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingPackageError(
            "reading .zst files needs the package zstandard", location=Location(file=path), hint="pip install zstandard"
        ) from None
    return cast("_Opener", zstandard.open)  # pyright: ignore[reportUnknownMemberType]


def digest_file(path: str, digest: Digest) -> None:
    """Add the bytes of a file, as stored, to a digest."""
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)


TEXT_COLUMN = "text"


def read_text(path: str, stream: BinaryIO, unit: str) -> Iterator[Row | Problem]:
    """Yield the rows of a text file, each a `line`, `paragraph` or `document` (`unit`) in the column `text`.

    Paragraphs end at empty lines. Rows of white space only are skipped. `location` is the first line of a row.
    """
    lines: list[str] = []
    first_line = 1
    for number, data in enumerate(stream, start=1):
        if number == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        try:
            line = data.decode("utf-8")
        except UnicodeDecodeError as error:
            location = Location(file=path, line=number)
            yield Problem(f"invalid UTF-8 at byte {error.start} of the line (0x{data[error.start]:02x})", location)
            continue
        if unit == "line" or (unit == "paragraph" and not line.strip()):
            yield from _text_row(path, lines, first_line)
            lines = []
        if lines or line.strip():
            first_line = first_line if lines else number
            lines.append(line)
    yield from _text_row(path, lines, first_line)


def _text_row(path: str, lines: list[str], first_line: int) -> Iterator[Row]:
    text = "".join(lines)
    if text:
        yield Row({TEXT_COLUMN: text.rstrip("\r\n")}, Location(file=path, line=first_line))


_BYTE_ORDER_MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
_OTHER_FILES = {
    b"PAR1": "Parquet: name it .parquet",
    b"ARRO": "Arrow: name it .arrow",
    b"PK\x03\x04": "a ZIP archive: unpack it",
}
"""What a file is by its first bytes, and what to do where its name says something else."""
_COLUMNAR = {".parquet": read_parquet, ".arrow": read_arrow}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXT_FORMATS = (".txt", ".md")
TABLE_FORMATS = (".json", ".jsonl", ".ndjson", *_SEPARATORS, *_COLUMNAR)


@dataclass(frozen=True)
class FileShard:
    """One file of a dataset."""

    path: str
    text_unit: str = "line"

    @property
    def name(self) -> str:
        return self.path

    def rows(self) -> Iterator[Row | Problem]:
        """Yield the rows in order. Raises DataError like `read_rows`."""
        return read_rows(self.path, text_unit=self.text_unit)

    def unparsed(self) -> Iterator[Row | Problem | Line]:
        """Yield the rows, lines of JSON unparsed. Raises DataError like `read_rows`."""
        return _not_empty(self.path, _read(self.path, self.text_unit))

    def update_digest(self, digest: Digest) -> None:
        """Add the file's bytes to a digest."""
        digest_file(self.path, digest)


def check_source(path: str, key: str) -> None:
    """Check that a file can be read; `key` names it in the config.

    Raises:
        DataError: it is missing, a folder, unreadable or empty.
    """
    location = Location(key=key)
    if os.path.isdir(path):
        raise DataError(f"{path} is a directory; expected a file (working directory {os.getcwd()})", location=location)
    if not os.path.exists(path):
        raise DataError(
            f"{path}: no such file (working directory {os.getcwd()})", location=location, hint=near_file(path)
        )
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: no permission to read it", location=location)
    if os.path.getsize(path) == 0:
        raise DataError("0 rows: the file is empty", location=Location(file=path))


def read_rows(path: str, *, text_unit: str = "line") -> Iterator[Row | Problem]:
    """Yield the rows of a file in order, with a Problem in place of each line that is not a row.

    The file is not held in memory.

    Raises:
        DataError: the file has no rows, is damaged, or is not UTF-8.
    """
    for row in _not_empty(path, _read(path, text_unit)):
        yield row.row() if isinstance(row, Line) else row


def _not_empty(path: str, rows: Iterator[Row | Problem | Line]) -> Iterator[Row | Problem | Line]:
    count = 0
    for row in rows:
        count += 1
        yield row
    if count == 0:
        raise DataError("0 rows", location=Location(file=path))


def _read(path: str, text_unit: str) -> Iterator[Row | Problem | Line]:
    kind = file_format(path)
    if kind in _COLUMNAR:
        if path.lower().endswith(COMPRESSED):
            raise DataError(f"{kind} files must not be compressed; decompress it", location=Location(file=path))
        yield from _COLUMNAR[kind](path)
        return
    with open_file(path) as stream:
        _check_encoding(path, stream)
        if kind in _SEPARATORS:
            yield from read_csv(path, stream, _SEPARATORS[kind])
        elif kind in TEXT_FORMATS:
            _check_no_json_lines(path, stream)
            yield from read_text(path, stream, text_unit)
        else:
            yield from read_json(path, stream)


def _check_encoding(path: str, stream: BinaryIO) -> None:
    head = stream.read(4)
    for byte_order_mark, name in _BYTE_ORDER_MARKS:
        if head.startswith(byte_order_mark):
            raise DataError(f"the file is {name}; expected UTF-8", location=Location(file=path))
    if advice := next((advice for mark, advice in _OTHER_FILES.items() if head.startswith(mark)), None):
        raise DataError(f"the file is {advice}", location=Location(file=path))
    stream.seek(0)


def _check_no_json_lines(path: str, stream: BinaryIO) -> None:
    """Raise DataError if the first line of a text file is a JSON object: the source of rows would be trained."""
    first = next((line for line in stream if not line.isspace()), b"").removeprefix(codecs.BOM_UTF8).strip()
    stream.seek(0)
    if not (first.startswith(b"{") and first.endswith(b"}")):
        return
    try:
        is_row = bool(json.loads(first))
    except (ValueError, RecursionError):
        return
    if is_row:
        raise DataError(
            "the file holds JSON objects, and by its name it is plain text",
            location=Location(file=path, line=1),
            hint="Name it .jsonl. To train on the text of the JSON itself, write it into the column text of a table.",
        )


_HUB_DATASET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PREPARED_META = "prepared.json"
"""The file that describes a folder of prepared rows; see `data/cache.py`."""
_METADATA_FILES = {PREPARED_META, "dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}
_SPLIT_NAMES = {"train", "validation", "valid", "val", "dev", "test", "eval"}


class Shard(Protocol):
    """A part of a dataset that is read from its beginning: a file, or a split of a hub dataset."""

    @property
    def name(self) -> str:
        """The path, or the name of the hub dataset with its split."""
        ...

    def rows(self) -> Iterator[Row | Problem]:
        """Yield the rows in order."""
        ...

    def unparsed(self) -> Iterator[Row | Problem | Line]:
        """Yield the rows in order, lines of JSON unparsed."""
        ...

    def update_digest(self, digest: Digest) -> None:
        """Add what the rows depend on to a digest."""
        ...


def find_shards(source: DatasetSource, key: str, *, streaming: bool = False) -> list[Shard]:
    """Return the files and hub datasets of a dataset in order, those of a folder or glob by name.

    `key` names the dataset in the config. Files are checked; the hub is not contacted yet. With `streaming` rows on
    the hub are read while training, without downloading the dataset.

    Raises:
        DataError: lists everything that is missing or ambiguous.
    """
    paths = [source.path] if isinstance(source.path, str) else source.path
    shards: list[Shard] = []
    problems: list[Problem] = []
    for index, path in enumerate(paths):
        path_key = f"{key}.path" if isinstance(source.path, str) else f"{key}.path[{index}]"
        try:
            shards.extend(_find(os.path.expanduser(path), source, path_key, streaming))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return shards


def _find(path: str, source: DatasetSource, key: str, streaming: bool) -> list[Shard]:
    if os.path.isdir(path):
        files = _files_below(Path(path), source.split, key)
    elif not os.path.exists(path) and glob.has_magic(path):
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not files:
            raise DataError(f"{path}: no file matches (working directory {os.getcwd()})", location=Location(key=key))
    elif (
        not os.path.exists(path)
        and _HUB_DATASET.fullmatch(path)
        and file_format(path) not in (*TABLE_FORMATS, *TEXT_FORMATS)
    ):
        return [HubShard(path, source.split or "train", source.subset, source.revision, streaming)]
    else:
        files = [path]
    for file in files:
        check_source(file, key)
    return [FileShard(file, source.text_unit) for file in files]


def _files_below(folder: Path, split: str | None, key: str) -> list[str]:
    """Return the data files of a folder, of the split if one is set. Text files count only if there are no others."""
    location = Location(key=key)
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in _METADATA_FILES
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]
    is_prepared = (folder / PREPARED_META).is_file()
    files = [path for path in paths if file_format(path.name) in ((".arrow",) if is_prepared else TABLE_FORMATS)]
    files = files or [path for path in paths if file_format(path.name) in TEXT_FORMATS]
    if not files:
        raise DataError(
            f"{folder}: no data file in this folder; supported are {', '.join((*TABLE_FORMATS, *TEXT_FORMATS))}",
            location=location,
        )
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    names = sorted({name for name in splits.values() if name})
    if split is not None:
        selected = [path for path in files if split in _words(path.relative_to(folder))]
        if not selected:
            raise DataError(
                f"{folder}: no file of the split {split}; found {', '.join(names) or 'none'}", location=location
            )
        return [str(path) for path in selected]
    if len(names) > 1 and is_prepared:
        # `finetuning prepare` writes the validation rows into the same folder.
        return [str(path) for path in files if splits[path] == "train"]
    if len(names) > 1:
        raise DataError(f"{folder} has several splits ({', '.join(names)}); select one with `split`", location=location)
    return [str(path) for path in files]


def _words(path: Path) -> list[str]:
    return re.split(r"[^a-z0-9]+", path.as_posix().lower())


def _split_of(path: Path) -> str | None:
    return next((word for word in _words(path) if word in _SPLIT_NAMES), None)
