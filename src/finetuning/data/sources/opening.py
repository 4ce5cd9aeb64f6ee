"""A file to the stream of its bytes, whatever it is compressed with."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from finetuning.errors import DataError, MissingPackageError, Place

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_CHUNK = 1 << 20


def kind_of(path: str) -> str:
    """The ending of a file's name that says what it holds, in lower case, without that of its compression.

    >>> kind_of("a.JSONL.gz"), kind_of("a.parquet"), kind_of("a")
    ('.jsonl', '.parquet', '')
    """
    stem, ending = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if ending in COMPRESSED else ending


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
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
            raise DataError(f"the compressed file is damaged: {error}", place=Place(file=path)) from None
        except OSError as error:
            # What bz2 raises for damaged data is a bare OSError without a number.
            if error.errno is not None:
                raise
            raise DataError(f"the compressed file is damaged: {error}", place=Place(file=path)) from None


def _zstd_opener(path: str) -> type:
    try:
        import zstandard
    except ImportError:
        raise MissingPackageError(
            "reading .zst files needs the package zstandard", place=Place(file=path), hint="pip install zstandard"
        ) from None
    return zstandard.open


def digest_file(path: str, digest: hashlib._Hash) -> None:
    """Feeds the file's bytes, as they lie on the disk."""
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
