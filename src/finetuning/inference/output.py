"""Write records to the output file, and keep unfinished ones in a journal from which a run can continue."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TextIO, TypeAlias

import yaml

from finetuning.errors import ConfigError, Location, StorageError, parse_json

Record: TypeAlias = dict[str, object]
"""An answer with its prompt, as JSON values."""


class _RecordDumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """YAML without anchors, and with multi-line text as a block."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # A block with several trailing newlines would swallow the record that follows it.
    is_block = "\n" in text and not text.endswith("\n\n") and text != "\n"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if is_block else None)


_RecordDumper.add_representer(str, _represent_text)


def _write_yaml(records: list[Record], stream: TextIO) -> None:
    # One record at a time: the document tree of all records would take many times their memory.
    for record in records:
        yaml.dump([record], stream, Dumper=_RecordDumper, sort_keys=False, allow_unicode=True, width=120)
    if not records:
        stream.write("[]\n")


def _write_json(records: list[Record], stream: TextIO) -> None:
    json.dump(records, stream, ensure_ascii=False, indent=4)
    stream.write("\n")


def _write_jsonl(records: list[Record], stream: TextIO) -> None:
    for record in records:
        stream.write(json.dumps(record, ensure_ascii=False) + "\n")


FORMATS: dict[str, Callable[[list[Record], TextIO], None]] = {
    ".yaml": _write_yaml,
    ".yml": _write_yaml,
    ".json": _write_json,
    ".jsonl": _write_jsonl,
}


def check_output(path: Path) -> None:
    """Check that `path` can be written, and create its folder.

    Raises:
        ConfigError: the extension is not supported.
        StorageError: the folder cannot be created or is not writable, or `path` is a folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"{path}: the extension selects the format; it must be one of {', '.join(FORMATS)}",
            location=Location(key="OUT"),
        )
    if path.is_dir():
        raise StorageError(f"{path} is a folder; the output must be a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {path.parent}: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"{path.parent} is not writable")


def write_records(path: Path, records: list[Record]) -> None:
    """Write the records atomically, in the format of the file's extension."""
    write_atomically(path, lambda stream: FORMATS[path.suffix.lower()](records, stream))


def write_atomically(path: Path, write: Callable[[TextIO], object]) -> None:
    """Write a text file atomically: to a temporary file in the same folder, flushed to disk and renamed."""
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


def journal_path(output: Path) -> Path:
    """Return the file that holds the records of an unfinished run, in the folder of its output."""
    return output.with_name(f".{output.name}.spool.jsonl")  # old name


class RecordJournal:
    """The records of finished prompts, one JSON line each, kept until the output is complete.

    An interrupted run leaves its journal; the next run of the same job continues from it.
    """

    def __init__(self, output: Path, fingerprint: str):
        """Open the journal in the folder of `output`.

        Args:
            fingerprint: hash of everything the records depend on; a journal with another one is discarded.
        """
        self.path = journal_path(output)
        self.records: dict[int, list[Record]] = {}
        records_by_prompt = self._read(fingerprint)
        self._stream = open(self.path, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._write_line({"fingerprint": fingerprint})
        for index, records in records_by_prompt.items():
            self.add({index: records})

    def _read(self, fingerprint: str) -> dict[int, list[Record]]:
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        records_by_prompt: dict[int, list[Record]] = {}
        for number, text in enumerate(lines):
            try:
                line = parse_json(text)
                if number > 0:
                    records_by_prompt[int(line["prompt"])] = [dict(record) for record in line["records"]]
                elif line["fingerprint"] != fingerprint:
                    return {}
            except (ValueError, TypeError, LookupError):
                # The last line is incomplete if the run was killed while it wrote it. After a damaged one, the rest is
                # generated again.
                break
        return records_by_prompt

    def add(self, done: Mapping[int, list[Record]]) -> None:
        """Add the records of prompts, by prompt index."""
        for index, records in done.items():
            self.records[index] = records
            self._write_line({"prompt": index, "records": records})
        self._stream.flush()

    def _write_line(self, value: Mapping[str, object]) -> None:
        self._stream.write(json.dumps(value, ensure_ascii=False) + "\n")

    def in_order(self) -> list[Record]:
        """Return all records so far, in the order of the prompts."""
        return [record for index in sorted(self.records) for record in self.records[index]]

    def close(self, *, remove: bool) -> None:
        """Close the file, and delete it if `remove` is true."""
        self._stream.close()
        if remove:
            self.path.unlink(missing_ok=True)

    def missing(self, indexes: Iterable[int]) -> list[int]:
        """Return the indexes that have no records yet."""
        return [index for index in indexes if index not in self.records]
