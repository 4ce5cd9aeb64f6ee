"""What a dataset's `path` stands for: files, folders, globs, or a dataset on the hub."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from finetuning.config.sections.data import DatasetSource
from finetuning.data.samples import Row
from finetuning.data.sources.files import TABLES, TEXTS, FileShard, check_source
from finetuning.data.sources.hub import HubShard
from finetuning.data.sources.json_reader import Line
from finetuning.data.sources.opening import kind_of
from finetuning.errors import DataError, Place, Problem

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
            raise DataError(f"{path}: no file matches (working directory {os.getcwd()})", place=Place(key=key))
    elif not os.path.exists(path) and _HUB_ID.fullmatch(path) and kind_of(path) not in (*TABLES, *TEXTS):
        return [HubShard(path, source.split or "train", source.subset, source.revision, streaming)]
    else:
        files = [path]
    for file in files:
        check_source(file, key)
    return [FileShard(file, source.text_unit) for file in files]


def _files_below(folder: Path, split: str | None, key: str) -> list[str]:
    """The data files of a folder, of one split where there are several; texts only where there is no table."""
    place = Place(key=key)
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in _NO_DATA
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]
    files = [path for path in found if kind_of(path.name) in TABLES]
    files = files or [path for path in found if kind_of(path.name) in TEXTS]
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
