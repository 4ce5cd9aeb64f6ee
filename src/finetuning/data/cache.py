"""The cache of prepared rows, and the folders that `finetuning prepare --output` writes.

One folder per entry, named by a digest of everything that the rows depend on, under $FINETUNING_CACHE or
~/.cache/finetuning. A folder holds memory-mapped Arrow files, the row statistics, a preview and its cache key. It
appears atomically and is read only if its files match its manifest. Processes of one machine that need the same entry
wait at a lock: the first prepares, the others read.
"""

# pyarrow and datasets have no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetuning.atomic_io import atomic_directory, find_manifest_mismatch, try_lock, write_manifest
from finetuning.data.arrow import as_dataset
from finetuning.data.preview import PreviewRow
from finetuning.data.sources.files import PREPARED_META
from finetuning.data.statistics import DatasetStatistics, SplitStatistics
from finetuning.distributed import announce_wait, read_topology
from finetuning.errors import DataError, Location, StorageError, first_line, parse_json

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

logger = logging.getLogger(__name__)
META = PREPARED_META
FORM = 2
"""Version of the folder's layout. A folder of another version is not read."""
VARIABLE = "FINETUNING_CACHE"
_MAX_COMPARED = 200
_STARTED = time.time()
_MOST_PREPARING = 3600.0
"""Seconds before an entry was written in which its images are taken to be unread yet."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that prepared rows depend on, as digests and texts."""

    data: dict[str, str]
    """SHA-256 of each file or dataset, in order, by name."""
    template: str
    tokenizer: str
    rules: dict[str, str]
    """Settings of the method and of `data_conf`, by key."""
    versions: dict[str, str]

    def changes_since(self, earlier: CacheKey) -> list[str]:
        """What differs from an earlier key, one phrase per difference."""
        changes: list[str] = []
        if self.data != earlier.data:
            changed = [name for name, digest in self.data.items() if earlier.data.get(name) != digest]
            removed = [name for name in earlier.data if name not in self.data]
            changes.append(f"the data ({', '.join((changed + removed)[:3]) or 'its order'})")
        changes += ["the chat template"] * (self.template != earlier.template)
        changes += ["the tokenizer"] * (self.tokenizer != earlier.tokenizer)
        for new, old in ((self.rules, earlier.rules), (self.versions, earlier.versions)):
            for key in dict.fromkeys([*new, *old]):
                if new.get(key) != old.get(key):
                    changes.append(f"{key} ({old.get(key, 'unset')} before, {new.get(key, 'unset')} now)")
        return changes


@dataclass(frozen=True)
class CacheEntry:
    """The contents of a folder of prepared rows."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    statistics: DatasetStatistics
    preview: list[PreviewRow]
    key: CacheKey


def write_entry(
    target: Path,
    train: datasets.Dataset,
    validation: datasets.Dataset | None,
    statistics: DatasetStatistics,
    preview: list[PreviewRow],
    key: CacheKey,
    *,
    shards: int = 1,
) -> None:
    """Write a folder of prepared rows.

    Raises:
        StorageError: `target` exists and is not empty.
    """
    with atomic_directory(target) as folder:
        for name, dataset in (("train", train), ("validation", validation)):
            if dataset is not None:
                for index in range(shards):
                    part = dataset.shard(shards, index, contiguous=True) if shards > 1 else dataset
                    _write_table(folder / f"{name}-{index:05}-of-{shards:05}.arrow", part)
        meta = {
            "form": FORM,
            "rows": len(train),
            "inputs": asdict(key),
            "project": _project(),
            "statistics": [split.state_dict() for split in statistics.splits],
            "preview": [asdict(row) for row in preview],
        }
        (folder / META).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
        write_manifest(folder)


def _project() -> str:
    """Return a digest of the working directory: entries of other projects in a shared cache are not described."""
    return hashlib.sha256(os.path.abspath(os.curdir).encode(errors="surrogateescape")).hexdigest()[:16]


def read_entry(folder: Path) -> CacheEntry | str:
    """The contents of a folder, or why it cannot be used."""
    mismatch = find_manifest_mismatch(folder, (META, "*.arrow"))
    if mismatch:
        return mismatch
    try:
        meta = parse_json((folder / META).read_text(encoding="utf-8"))
        if meta.get("form") != FORM:
            return "it was written by another version of finetuning"
        train, validation = (_read_tables(folder, name) for name in ("train", "validation"))
        if train is None:
            return "there are no training rows in it"
        return CacheEntry(
            train,
            validation,
            DatasetStatistics(
                tuple(map(SplitStatistics.from_state_dict, meta.get("statistics") or meta["ledger"]))  # old name
            ),
            [_preview(row) for row in meta["preview"]],
            _parse_key(meta),
        )
    except _MALFORMED as error:
        return f"its content is malformed: {first_line(error)}"


_MALFORMED = (OSError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError)
"""What reading JSON and Arrow files of another form raises; pyarrow's errors are among them."""


def cache_key_of(folder: Path, project: str | None = None) -> CacheKey | None:
    """The cache key of a folder; None if it cannot be read, or was not written by the given project."""
    try:
        meta = parse_json((folder / META).read_text(encoding="utf-8"))
        return _parse_key(meta) if project in (None, meta.get("project")) else None
    except _MALFORMED:
        return None


def _parse_key(meta: Mapping[str, Any]) -> CacheKey:
    """The cache key in the content of `prepared.json`.

    Raises:
        TypeError, ValueError, LookupError: it has another form.
    """
    inputs: Mapping[str, Any] = meta["inputs"]
    if not all(isinstance(text, str) for name in ("data", "rules", "versions") for text in inputs[name].values()):
        raise ValueError(f"{META} has a cache key of another form")
    return CacheKey(**inputs)


def _write_table(path: Path, dataset: datasets.Dataset) -> None:
    import pyarrow as pa

    table = cast("pa.Table", dataset.with_format("arrow")[:]).replace_schema_metadata()
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)


def _read_tables(folder: Path, name: str) -> datasets.Dataset | None:
    from datasets.table import MemoryMappedTable, concat_tables

    tables: list[pa.Table] = [MemoryMappedTable.from_file(str(path)) for path in sorted(folder.glob(f"{name}-*.arrow"))]
    if not tables:
        return None
    return as_dataset(tables[0] if len(tables) == 1 else concat_tables(tables))


def _preview(values: dict[str, Any]) -> PreviewRow:
    segments = tuple((text, trained) for text, trained in values["segments"])
    fields: dict[str, Any] = {**values, "segments": segments}
    fields |= {name: tuple(values.get(name, ())) for name in ("images", "pictures")}
    location = fields.pop("location", None) or fields.pop("place")  # old name
    fields["location"] = Location(**location)
    return PreviewRow(**fields)


@dataclass(frozen=True)
class CacheResult:
    """An entry, and whether it was read or prepared now, with the reason."""

    entry: CacheEntry
    origin: str


def cache_folder(setting: str) -> Path | None:
    """The folder of the cache by `data_conf.cache`, or by the environment if that is `auto`; None if it is off.

    A default folder that cannot be written is a warning, and the cache is off: the user did not ask for it.
    """
    chosen = setting if setting != "auto" else os.environ.get(VARIABLE) or "auto"
    if chosen == "off":
        return None
    if chosen == "auto":
        return _default_folder()
    return Path(chosen).expanduser()


def _default_folder() -> Path | None:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetuning" / "prepared"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            if try_lock(probe.fileno()) is None:
                raise OSError(f"the file system of {folder} has no file locks")
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory.
        logger.warning(
            "the default cache of prepared rows cannot be used (%s): the rows are prepared without a cache. Set %s"
            " to a writable folder.",
            first_line(error),
            VARIABLE,
        )
        return None


def job_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """A temporary folder that the processes of a job share on this machine; None if the job is a single process.

    The first of them removes it when it ends. Entries are named by their content, so what a killed job left is valid.
    """
    topology = read_topology(environ)
    if not topology.is_distributed:
        return None
    name = f"finetuning-rows-{os.getuid()}-{os.getppid()}-{environ.get('MASTER_PORT', '0')}"
    folder = Path(tempfile.gettempdir(), name)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StorageError(f"{folder} belongs to another user", hint="Set TMPDIR to a folder of your own.")
    if topology.local_rank == 0:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def load_or_prepare(folder: Path, key: CacheKey, prepare: Callable[[Path], None]) -> CacheResult:
    """Read the entry for this key, or let `prepare` write it; one process at a time prepares it.

    Raises:
        StorageError: the cache cannot be written.
    """
    name = digest_of(key)
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            entry = read_entry(path) if path.exists() else "no entry"
            if isinstance(entry, CacheEntry) and digest_of(entry.key) != name:
                entry = "it holds the rows of another cache key"
            if isinstance(entry, CacheEntry) and "images" in key.rules:
                entry = _image_change(entry, path) or entry
            if isinstance(entry, CacheEntry):
                os.utime(path / META)
                return CacheResult(entry, f"read from the cache: same data, template, tokenizer and rules ({path})")
            reason = _why_prepared(folder, key) if entry == "no entry" else f"the entry could not be used: {entry}"
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            prepare(path)
            entry = read_entry(path)
    except OSError as error:
        raise StorageError(
            f"cannot write the cache of prepared rows {folder}: {error}",
            location=Location(key="data_conf.cache"),
            hint=f"Set data_conf.cache: off, or set {VARIABLE} to a writable folder.",
        ) from error
    if isinstance(entry, str):
        raise StorageError(f"{path} was just written and cannot be read: {entry}")
    return CacheResult(entry, f"prepared now and cached in {path}: {reason}")


def _image_change(entry: CacheEntry, path: Path) -> str | None:
    """Return which image is another than when the rows were prepared: the key is of the rows, which only name them."""
    from finetuning.data.images.files import changed_image, read_references

    written = min(file.stat().st_mtime for file in path.glob("*.arrow"))
    if read_topology(os.environ).is_distributed and written >= _STARTED:
        # Another process of this job has just prepared the rows.
        return None
    if any(split.counts.invalid for split in entry.statistics.splits):
        return "rows were invalid, and their images may be there now"
    # Files may have changed while the rows were prepared, and clocks of file systems differ.
    made = written - _MOST_PREPARING
    for split in (entry.train, entry.validation):
        if split is None or "images" not in split.column_names:
            continue
        texts = cast("list[str]", split.with_format("arrow")[:]["images"].to_pylist())
        changed = changed_image((image for text in texts for image in read_references(text)), made)
        if changed is not None:
            return f"the image {changed} was changed after its row was prepared"
    return None


def digest_of(key: CacheKey) -> str:
    """The folder name of the entry for this key."""
    # The order of files is part of what is prepared, the order of settings is not.
    values = asdict(key) | {"data": list(key.data.items()), "form": FORM}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def read_prepared(folder: Path, key: CacheKey) -> CacheResult:
    """Read what `finetuning prepare --output` wrote, if it was prepared with the same settings.

    The data itself is not compared: it may not be on this machine.

    Raises:
        DataError: the folder is missing or incomplete, or was prepared with other settings.
    """
    entry = read_prepared_folder(folder)
    earlier = CacheKey({}, entry.key.template, entry.key.tokenizer, _method_rules(entry.key), {})
    changes = CacheKey({}, key.template, key.tokenizer, _method_rules(key), {}).changes_since(earlier)
    if changes:
        location = Location(key="data_conf.prepared")
        raise DataError(f"{folder} was prepared with other settings: {'; '.join(changes)}", location=location)
    return CacheResult(entry, f"prepared ahead of time in {folder}")


def read_prepared_folder(folder: Path) -> CacheEntry:
    """The contents of the folder that `data_conf.prepared` names.

    Raises:
        DataError: it is missing or incomplete.
    """
    location = Location(key="data_conf.prepared")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder", location=location)
    entry = read_entry(folder)
    if isinstance(entry, str):
        raise DataError(f"{folder}: {entry}", location=location, hint="Prepare it again: finetuning prepare --output.")
    return entry


def _method_rules(key: CacheKey) -> dict[str, str]:
    return {name: value for name, value in key.rules.items() if not name.startswith("data_conf.")}


def prune(folder: Path, max_bytes: int) -> list[tuple[Path, int]]:
    """Remove incomplete entries, then the least recently used ones until at most `max_bytes` are left.

    An entry that is being prepared is kept. Returns the removed entries with their sizes in bytes.
    """
    if not folder.is_dir():
        return []
    for lock in folder.glob("*.lock"):
        with _locked(lock, wait=False) as acquired:
            if acquired:
                shutil.rmtree(folder / f".{lock.stem}.partial", ignore_errors=True)
    entries = sorted((path for path in folder.iterdir() if (path / META).is_file()), key=_last_used)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in entries}
    total = sum(sizes.values())
    removed: list[tuple[Path, int]] = []
    for entry in entries:
        if total <= max_bytes:
            break
        with _locked(folder / f"{entry.name}.lock", wait=False) as acquired:
            if acquired:
                shutil.rmtree(entry, ignore_errors=True)
                total -= sizes[entry]
                removed.append((entry, sizes[entry]))
    return removed


def _last_used(entry: Path) -> float:
    return (entry / META).stat().st_mtime


def _why_prepared(folder: Path, key: CacheKey) -> str:
    """What changed since the most similar entry of this project: it would name the files of others."""
    entries = sorted((path for path in folder.iterdir() if (path / META).is_file()), key=_last_used, reverse=True)
    project = _project()
    keys = [earlier for path in entries[:_MAX_COMPARED] if (earlier := cache_key_of(path, project)) is not None]
    same_method = [earlier for earlier in keys if earlier.rules.get("method") == key.rules.get("method")]
    if not same_method:
        return "no similar entry in the cache"
    changes = min((key.changes_since(earlier) for earlier in same_method), key=len)
    if not changes:
        return "the entry was written by another version of finetuning"
    return f"changed since the most similar entry: {'; '.join(changes[:6])}"


@contextmanager
def _locked(path: Path, wait: bool = True) -> Generator[bool, None, None]:
    """Hold a lock that the operating system releases when the process ends; False if it is taken and `wait` is off.

    Raises:
        OSError: the file system has no locks.
    """
    with open(path, "a", encoding="utf-8") as stream:
        is_locked = try_lock(stream.fileno())
        if is_locked is None:
            raise OSError("its file system has no file locks")
        if not is_locked:
            if not wait:
                yield False
                return
            with announce_wait(f"another process that prepares the same rows (it holds {path})"):
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield True
