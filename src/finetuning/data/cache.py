"""Rows that were prepared before, found again by all that they depend on.

One folder an entry, named by the digest of its inputs, under $FINETUNING_CACHE or ~/.cache/finetuning. Processes of one
machine that want the same entry queue at a lock: the first prepares, the others read what it wrote. An entry takes its
name when it is whole, so that a preparation that was killed leaves nothing that is taken for one.

Prepared rows as a folder: Arrow files that are mapped into memory, their ledger, their first rows, what they are of.

The folder appears whole or not at all, and is read only where its files are those that its manifest names."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.atomic_io import manifest_fault, staged, write_manifest
from finetuning.data.arrow import as_dataset
from finetuning.data.preview import PreviewRow
from finetuning.data.statistics import DatasetStatistics, SplitStatistics, counts_of, outcome_of, values_of
from finetuning.errors import DataError, Location, StorageError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

META = "prepared.json"
FORM = 2
"""Changes whenever what a folder holds is written in another way."""


@dataclass(frozen=True)
class CacheKey:
    """All that prepared rows depend on; each value is text that tells one from another."""

    data: dict[str, str]
    """SHA-256 of each file or dataset, in order, by name."""
    template: str
    tokenizer: str
    rules: dict[str, str]
    """Settings of the method and of `data_conf`, by key."""
    versions: dict[str, str]

    def changes_since(self, former: CacheKey) -> list[str]:
        """What differs from former inputs, a phrase each."""
        changes = []
        if self.data != former.data:
            changed = [name for name, digest in self.data.items() if former.data.get(name) != digest]
            gone = [name for name in former.data if name not in self.data]
            changes.append(f"the data ({', '.join((changed + gone)[:3]) or 'its order'})")
        changes += ["the chat template"] * (self.template != former.template)
        changes += ["the tokenizer"] * (self.tokenizer != former.tokenizer)
        for ours, theirs in ((self.rules, former.rules), (self.versions, former.versions)):
            for key in dict.fromkeys([*ours, *theirs]):
                if ours.get(key) != theirs.get(key):
                    changes.append(f"{key} ({theirs.get(key, 'unset')} before, {ours.get(key, 'unset')} now)")
        return changes


@dataclass(frozen=True)
class CacheEntry:
    """What a folder of prepared rows holds."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    ledger: DatasetStatistics
    preview: list[PreviewRow]
    inputs: CacheKey


def write(
    target: Path,
    train: datasets.Dataset,
    validation: datasets.Dataset | None,
    ledger: DatasetStatistics,
    preview: list[PreviewRow],
    inputs: CacheKey,
    *,
    shards: int = 1,
) -> None:
    """Writes a folder of prepared rows.

    Raises:
        StorageError: `target` is there and not empty.
    """
    with staged(target) as folder:
        for name, dataset in (("train", train), ("validation", validation)):
            if dataset is not None:
                for index in range(shards):
                    part = dataset.shard(shards, index, contiguous=True) if shards > 1 else dataset
                    _write_table(folder / f"{name}-{index:05}-of-{shards:05}.arrow", part)
        meta = {
            "form": FORM,
            "rows": len(train),
            "inputs": asdict(inputs),
            "ledger": [
                {"totals": values_of(part.totals), "fates": [asdict(fate) for fate in part.fates]}
                for part in ledger.parts
            ],
            "preview": [asdict(row) for row in preview],
        }
        (folder / META).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
        write_manifest(folder)


def read(folder: Path) -> CacheEntry | str:
    """What the folder holds, or why it cannot be used."""
    fault = manifest_fault(folder)
    if fault:
        return fault
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{META} is missing or damaged"
    if meta.get("form") != FORM:
        return "it was written by another version of the engine"
    train, validation = (_read_tables(folder, name) for name in ("train", "validation"))
    if train is None:
        return "there are no training rows in it"
    return CacheEntry(
        train,
        validation,
        DatasetStatistics(
            tuple(
                SplitStatistics(counts_of(one["totals"]), [outcome_of(fate) for fate in one["fates"]])
                for one in meta["ledger"]
            )
        ),
        [_preview(row) for row in meta["preview"]],
        CacheKey(**meta["inputs"]),
    )


def cache_key_of(folder: Path) -> CacheKey | None:
    """What the rows of a folder depend on; None where it cannot be told."""
    try:
        return CacheKey(**json.loads((folder / META).read_text(encoding="utf-8"))["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_table(path: Path, dataset: datasets.Dataset) -> None:
    import pyarrow as pa

    table = dataset.with_format("arrow")[:].replace_schema_metadata()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _read_tables(folder: Path, name: str) -> datasets.Dataset | None:
    from datasets.table import MemoryMappedTable, concat_tables

    tables: list[pa.Table] = [MemoryMappedTable.from_file(str(one)) for one in sorted(folder.glob(f"{name}-*.arrow"))]
    if not tables:
        return None
    return as_dataset(tables[0] if len(tables) == 1 else concat_tables(tables))


def _preview(values: dict[str, Any]) -> PreviewRow:
    segments = tuple((text, trained) for text, trained in values["segments"])
    return PreviewRow(**{**values, "place": Location(**values["place"]), "segments": segments})


VARIABLE = "FINETUNING_CACHE"


@dataclass(frozen=True)
class CacheResult:
    """Prepared rows, and whether they were there already, in a sentence."""

    stored: CacheEntry
    why: str


def cache_folder(setting: str) -> Path | None:
    """Where entries lie: as `data_conf.cache` says, by default as the environment says; None without a cache."""
    chosen = setting if setting != "auto" else os.environ.get(VARIABLE) or "auto"
    if chosen == "off":
        return None
    if chosen == "auto":
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetuning" / "prepared"
    return Path(chosen).expanduser()


def load_or_prepare(folder: Path, inputs: CacheKey, make: Callable[[Path], None]) -> CacheResult:
    """The entry for these inputs, made by `make` where there is none; one process at a time makes it.

    Raises:
        StorageError: the cache cannot be written.
    """
    name = digest_of(inputs)
    entry = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            stored = read(entry) if entry.is_dir() else "no entry"
            if isinstance(stored, CacheEntry):
                os.utime(entry / META)
                return CacheResult(stored, f"as prepared before: same data, template, tokenizer and rules ({entry})")
            why = _why_anew(folder, inputs) if stored == "no entry" else f"the entry could not be used: {stored}"
            shutil.rmtree(entry, ignore_errors=True)
            make(entry)
            stored = read(entry)
    except OSError as error:
        raise StorageError(
            f"the cache of prepared rows, {folder}, cannot be written: {error}",
            place=Location(key="data_conf.cache"),
            hint=f"Set data_conf.cache: off, or {VARIABLE} to a folder that can be.",
        ) from error
    if isinstance(stored, str):
        raise StorageError(f"{entry}, just written, cannot be read: {stored}")
    return CacheResult(stored, f"prepared now, kept in {entry}: {why}")


def digest_of(inputs: CacheKey) -> str:
    """The name of the entry of these inputs."""
    # The order of files is part of what is prepared, the order of settings is not.
    values = asdict(inputs) | {"data": list(inputs.data.items()), "form": FORM}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def read_prepared(folder: Path, inputs: CacheKey) -> CacheResult:
    """What `finetuning prepare --output` wrote, for rows that are made in the same way; the data is not compared.

    Raises:
        DataError: it is not there, not whole, or was made in another way.
    """
    stored = prepared_in(folder)
    former = CacheKey({}, stored.inputs.template, stored.inputs.tokenizer, _own(stored.inputs), {})
    changes = CacheKey({}, inputs.template, inputs.tokenizer, _own(inputs), {}).changes_since(former)
    if changes:
        place = Location(key="data_conf.prepared")
        raise DataError(f"{folder} was prepared in another way: {'; '.join(changes)}", place=place)
    return CacheResult(stored, f"as prepared ahead of time in {folder}")


def prepared_in(folder: Path) -> CacheEntry:
    """What a folder of prepared rows holds.

    Raises:
        DataError: it is not there, or not whole.
    """
    key = Location(key="data_conf.prepared")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder", place=key)
    stored = read(folder)
    if isinstance(stored, str):
        raise DataError(f"{folder}: {stored}", place=key, hint="Prepare it again: finetuning prepare --output.")
    return stored


def _own(inputs: CacheKey) -> dict[str, str]:
    return {key: value for key, value in inputs.rules.items() if not key.startswith("data_conf.")}


def prune(folder: Path, most_bytes: int) -> list[tuple[Path, int]]:
    """Removes what was left half made, and the entries longest unused until the rest holds no more than `most_bytes`.

    An entry that is being made stays. Returns what was removed, with its bytes.
    """
    if not folder.is_dir():
        return []
    for lock in folder.glob("*.lock"):
        with _locked(lock, wait=False) as mine:
            if mine:
                shutil.rmtree(folder / f".{lock.stem}.partial", ignore_errors=True)
    entries = sorted((one for one in folder.iterdir() if (one / META).is_file()), key=_last_used)
    sizes = {one: sum(file.stat().st_size for file in one.iterdir()) for one in entries}
    total, removed = sum(sizes.values()), []
    for entry in entries:
        if total <= most_bytes:
            break
        with _locked(folder / f"{entry.name}.lock", wait=False) as mine:
            if mine:
                shutil.rmtree(entry, ignore_errors=True)
                total -= sizes[entry]
                removed.append((entry, sizes[entry]))
    return removed


def _last_used(entry: Path) -> float:
    return (entry / META).stat().st_mtime


def _why_anew(folder: Path, inputs: CacheKey) -> str:
    """What changed against the entry that is most alike."""
    entries = sorted((one for one in folder.iterdir() if (one / META).is_file()), key=_last_used, reverse=True)
    former = [known for one in entries[:200] if (known := cache_key_of(one)) is not None]
    method = [one for one in former if one.rules.get("method") == inputs.rules.get("method")]
    if not method:
        return "nothing like it was prepared before"
    nearest = min((inputs.changes_since(one) for one in method), key=len)
    if not nearest:
        return "the same rows are there as another version of the engine writes them"
    return f"changed since the nearest entry: {'; '.join(nearest[:6])}"


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a lock that the operating system lets go when the process ends; False where it is taken and not waited
    for."""
    with open(path, "a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
