"""Rows that were prepared before, found again by all that they depend on.

One folder an entry, named by the digest of its inputs, under $FINETUNING_CACHE or ~/.cache/finetuning. Processes of one
machine that want the same entry queue at a lock: the first prepares, the others read what it wrote. An entry takes its
name when it is whole, so that a preparation that was killed leaves nothing that is taken for one.
"""

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

from finetuning.data.store import FORM, META, Inputs, Stored, inputs_of, read
from finetuning.errors import DataError, Place, StorageError

VARIABLE = "FINETUNING_CACHE"


@dataclass(frozen=True)
class Found:
    """Prepared rows, and whether they were there already, in a sentence."""

    stored: Stored
    why: str


def cache_folder(setting: str) -> Path | None:
    """Where entries lie: as `data_conf.cache` says, by default as the environment says; None without a cache."""
    chosen = setting if setting != "auto" else os.environ.get(VARIABLE) or "auto"
    if chosen == "off":
        return None
    if chosen == "auto":
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetuning" / "prepared"
    return Path(chosen).expanduser()


def find_or_make(folder: Path, inputs: Inputs, make: Callable[[Path], None]) -> Found:
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
            if isinstance(stored, Stored):
                os.utime(entry / META)
                return Found(stored, f"as prepared before: same data, template, tokenizer and rules ({entry})")
            why = _why_anew(folder, inputs) if stored == "no entry" else f"the entry could not be used: {stored}"
            shutil.rmtree(entry, ignore_errors=True)
            make(entry)
            stored = read(entry)
    except OSError as error:
        raise StorageError(
            f"the cache of prepared rows, {folder}, cannot be written: {error}",
            place=Place(key="data_conf.cache"),
            hint=f"Set data_conf.cache: off, or {VARIABLE} to a folder that can be.",
        ) from error
    if isinstance(stored, str):
        raise StorageError(f"{entry}, just written, cannot be read: {stored}")
    return Found(stored, f"prepared now, kept in {entry}: {why}")


def digest_of(inputs: Inputs) -> str:
    """The name of the entry of these inputs."""
    # The order of files is part of what is prepared, the order of settings is not.
    values = asdict(inputs) | {"data": list(inputs.data.items()), "form": FORM}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def read_prepared(folder: Path, inputs: Inputs) -> Found:
    """What `finetuning prepare --output` wrote, for rows that are made in the same way; the data is not compared.

    Raises:
        DataError: it is not there, not whole, or was made in another way.
    """
    stored = prepared_in(folder)
    former = Inputs({}, stored.inputs.template, stored.inputs.tokenizer, _own(stored.inputs), {})
    changes = Inputs({}, inputs.template, inputs.tokenizer, _own(inputs), {}).changes_since(former)
    if changes:
        place = Place(key="data_conf.prepared")
        raise DataError(f"{folder} was prepared in another way: {'; '.join(changes)}", place=place)
    return Found(stored, f"as prepared ahead of time in {folder}")


def prepared_in(folder: Path) -> Stored:
    """What a folder of prepared rows holds.

    Raises:
        DataError: it is not there, or not whole.
    """
    key = Place(key="data_conf.prepared")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder", place=key)
    stored = read(folder)
    if isinstance(stored, str):
        raise DataError(f"{folder}: {stored}", place=key, hint="Prepare it again: finetuning prepare --output.")
    return stored


def _own(inputs: Inputs) -> dict[str, str]:
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


def _why_anew(folder: Path, inputs: Inputs) -> str:
    """What changed against the entry that is most alike."""
    entries = sorted((one for one in folder.iterdir() if (one / META).is_file()), key=_last_used, reverse=True)
    former = [known for one in entries[:200] if (known := inputs_of(one)) is not None]
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
