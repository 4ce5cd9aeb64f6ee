"""The runs that the page may show: found below the given directories, and read no further than these reach."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from finetuning.report.run_folder import RECORD_NAME, STOP_FILE, JsonRecord, files_read
from finetuning.report.run_list import RunState, find_records, last_rows, read_state
from finetuning.tracking.tracker import METRICS_LOG_NAME

Signature: TypeAlias = tuple[tuple[str, int, int], ...]
"""Path, size and time of change of files: while it is the same, nothing has to be read again."""

_RATE_LOGS = 10
"""Logs that the time left is estimated from."""


@dataclass(frozen=True)
class WatchedRun:
    """A run, with what the list shows of it."""

    id: str
    """Its name in addresses: a digest, so that no path is ever taken from a request."""
    folder: Path
    """Its output directory, without links."""
    root: Path
    """The given directory that it is in, without links."""
    name: str
    """As the user names it."""
    state: RunState
    rows: tuple[JsonRecord, ...]
    """The newest logged rows, oldest first."""

    @property
    def is_running(self) -> bool:
        return self.state.state == "running"

    @property
    def may_run(self) -> bool:
        """Whether it runs here, or may run on another machine."""
        return self.is_running or self.state.state.startswith("on ")

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to stop, and has not yet."""
        return self.may_run and (self.folder / STOP_FILE).exists()

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the last logs, evaluation and saving included; None where nothing is known."""
        logs = [
            (row["step"], row["time"])
            for row in self.rows
            if row.get("kind") == "training"
            and isinstance(row.get("step"), int)
            and isinstance(row.get("time"), int | float)
        ]
        if not self.is_running or len(logs) < 2 or not self.state.steps:
            return None
        (first, began), (last, ended) = logs[-_RATE_LOGS - 1 :][0], logs[-1]
        return (ended - began) / (last - first) * max(self.state.steps - last, 0) if last > first else None

    def losses(self, most: int = 120) -> list[tuple[int, float]]:
        """Return the last training losses with their steps."""
        points = [
            (row["step"], row["loss"])
            for row in self.rows
            if isinstance(row.get("loss"), int | float) and isinstance(row.get("step"), int)
        ]
        return points[-most:]


class RunFolders:
    """The runs in and below directories. May be used by several threads.

    A directory that does not exist yet is looked for again each time. Links to directories are not followed, except
    where the user names one.
    """

    def __init__(self, roots: Sequence[Path]):
        self._roots = tuple(roots)
        self._lock = threading.Lock()
        self._entries: dict[str, tuple[Signature, WatchedRun]] = {}

    def refresh(self) -> list[WatchedRun]:
        """Look for runs, and return them: those that run first, then the newest."""
        with self._lock:
            entries: dict[str, tuple[Signature, WatchedRun]] = {}
            for root in self._roots:
                resolved = root.resolve()
                for record in find_records(resolved):
                    run_id = hashlib.blake2b(os.fsencode(record.parent), digest_size=8).hexdigest()
                    if run_id not in entries and (entry := self._read(run_id, record.parent, resolved, root)):
                        entries[run_id] = entry
            self._entries = entries
            runs = [run for _, run in entries.values()]
        runs.sort(key=lambda run: (run.state.started or "", run.name), reverse=True)
        return sorted(runs, key=lambda run: not run.is_running)

    def find(self, run_id: str) -> WatchedRun | None:
        """Return a run as it is now; None if there is none of this id, or it was deleted."""
        with self._lock:
            entry = self._entries.get(run_id)
        if entry is None:
            self.refresh()
            with self._lock:
                entry = self._entries.get(run_id)
            return entry[1] if entry else None
        run = entry[1]
        entry = self._read(run_id, run.folder, run.root, None)
        return entry[1] if entry else None

    def _read(self, run_id: str, folder: Path, root: Path, named: Path | None) -> tuple[Signature, WatchedRun] | None:
        """Read what the list shows of a run, unless nothing has changed.

        Args:
            named: the root as the user names it; None for a run whose name is known.
        """
        files = (folder / RECORD_NAME, folder / METRICS_LOG_NAME)
        if not all(is_inside(path, root) for path in files):
            return None
        before = self._entries.get(run_id)
        signature = signature_of(files)
        if before is not None and before[0] == signature and not before[1].is_running:
            return before
        state = read_state(folder)
        if state is None:
            return None
        name = str(named / folder.relative_to(root)) if named is not None else before[1].name if before else ""
        name = name if name != "." else folder.name
        return signature, WatchedRun(run_id, folder, root, name, state, tuple(last_rows(folder)))


def signature_of(files: Sequence[Path]) -> Signature:
    """Return size and time of change of files; those that do not exist are left out."""
    result: list[tuple[str, int, int]] = []
    for path in files:
        try:
            status = path.stat()
        except OSError:
            continue
        result.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(result)


def is_inside(path: Path, root: Path) -> bool:
    """Return whether a file is below a directory when all links are followed."""
    return path.resolve().is_relative_to(root)


def links_outside(run: WatchedRun) -> list[Path]:
    """Return the files of a run that are links to outside of the given directory: they must not be read."""
    return [path for path in files_read(run.folder) if not is_inside(path, run.root)]


def request_stop(run: WatchedRun) -> bool:
    """Ask a run to stop at its next step, with a checkpoint. Return whether it was not asked before.

    Raises:
        OSError: its output directory cannot be written to.
    """
    try:
        # Never through a link: the file is new.
        os.close(os.open(run.folder / STOP_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    return True
