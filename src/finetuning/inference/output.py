"""Answers to a file: spooled batch by batch, put together at the end in the order of the prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from finetuning.errors import ConfigError, Location, StorageError


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Plain YAML: no anchors, and text of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # A block that keeps several line ends closes the document, and there is another record after this one.
    is_block = "\n" in text and not text.endswith("\n\n") and text != "\n"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if is_block else None)


_Dumper.add_representer(str, _represent_text)


def _write_yaml(records: list[dict[str, Any]], stream: TextIO) -> None:
    # Record by record: the memory of one document tree of all records would be many times theirs.
    for record in records:
        yaml.dump([record], stream, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    if not records:
        stream.write("[]\n")


def _write_json(records: list[dict[str, Any]], stream: TextIO) -> None:
    json.dump(records, stream, ensure_ascii=False, indent=4)
    stream.write("\n")


def _write_jsonl(records: list[dict[str, Any]], stream: TextIO) -> None:
    for record in records:
        stream.write(json.dumps(record, ensure_ascii=False) + "\n")


FORMATS: dict[str, Callable[[list[dict[str, Any]], TextIO], None]] = {
    ".yaml": _write_yaml,
    ".yml": _write_yaml,
    ".json": _write_json,
    ".jsonl": _write_jsonl,
}


def check_output(path: Path) -> None:
    """Nothing, when answers can be written to `path`; its folder is made if need be.

    Raises:
        ConfigError: the file's ending is none that we write.
        StorageError: the folder cannot be made or written, or `path` is a folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"{path}: the ending says in which format to write; it must be one of {', '.join(FORMATS)}",
            place=Location(key="OUT"),
        )
    if path.is_dir():
        raise StorageError(f"{path} is a folder; the output must be a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path.parent} cannot be made: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"{path.parent} cannot be written")


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes the records in the format of the file's ending; the file appears whole or not at all."""
    write_atomically(path, lambda stream: FORMATS[path.suffix.lower()](records, stream))


def write_atomically(path: Path, write: Callable[[TextIO], None]) -> None:
    """Writes a text file beside `path`, flushes it to disk and gives it its name."""
    staging = path.with_name(f".{path.name}.partial")
    try:
        with open(staging, "w", encoding="utf-8") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


class RecordSpool:
    """Records of prompts that are done, one JSON line each, kept until the output is complete.

    A spool of the same job, left by a run that was stopped, is gone on with: its records need not be made again.
    """

    def __init__(self, output: Path, fingerprint: str):
        """Opens the spool beside `output`; `fingerprint` stands for all that decides over the records."""
        self.path = output.with_name(f".{output.name}.spool.jsonl")
        self.records: dict[int, list[dict[str, Any]]] = {}
        kept = self._read(fingerprint)
        self._stream = open(self.path, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._line({"fingerprint": fingerprint})
        for index, records in kept.items():
            self.add({index: records})

    def _read(self, fingerprint: str) -> dict[int, list[dict[str, Any]]]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        kept: dict[int, list[dict[str, Any]]] = {}
        for number, text in enumerate(lines):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                # The last line of a run that was killed while writing it.
                break
            if number == 0:
                if line.get("fingerprint") != fingerprint:
                    return {}
            else:
                kept[line["prompt"]] = line["records"]
        return kept

    def add(self, done: Mapping[int, list[dict[str, Any]]]) -> None:
        """Keeps the records of some prompts, by the prompts' indexes."""
        for index, records in done.items():
            self.records[index] = records
            self._line({"prompt": index, "records": records})
        self._stream.flush()

    def _line(self, value: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(value, ensure_ascii=False) + "\n")

    def in_order(self) -> list[dict[str, Any]]:
        """All records so far, in the order of the prompts."""
        return [record for index in sorted(self.records) for record in self.records[index]]

    def close(self, *, remove: bool) -> None:
        """Closes the file; removes it when nothing is left to do."""
        self._stream.close()
        if remove:
            self.path.unlink(missing_ok=True)

    def missing(self, indexes: Iterable[int]) -> list[int]:
        """Those of the indexes that have no records yet."""
        return [index for index in indexes if index not in self.records]
