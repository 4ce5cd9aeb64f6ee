"""The ledger of a stream: counted as rows go by, and written on the way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetuning.data.statistics import (
    REJECTS_NAME,
    DatasetStatistics,
    RowCounts,
    SplitStatistics,
    reject_lines,
    write_report,
)


class StreamStatistics:
    """What has become of the rows so far. Rows that were cut or dropped go into the file of rejects, and are not held.

    Where that is, `write` says before the first row is given; a process that never calls it writes no rejects.
    """

    def __init__(self, totals: RowCounts, others: Sequence[SplitStatistics]):
        self.totals = totals
        self.passes = 0
        """Passes over the data that have ended; rows are counted in the first."""
        self._others = DatasetStatistics(tuple(others))
        self._head = "".join(line for part in others for line in reject_lines(part)).encode()
        self._waiting = b""
        self._folder: Path | None = None
        self._path: Path | None = None
        self._kept: int | None = None
        self.rejects = len(self._head)
        """Bytes of the file of rejects."""

    def fold(self, block: SplitStatistics) -> None:
        """Counts the fates of further rows."""
        self.totals.add(block.totals)
        self._waiting = "".join(reject_lines(block)).encode()
        self.rejects += len(self._waiting)
        if self._path is not None:
            self._append(self._path)

    def restore(self, totals: RowCounts, passes: int, rejects: int) -> None:
        """Goes on from former totals, and from a file of rejects of so many bytes."""
        self.totals, self.passes = totals, passes
        self.rejects = self._kept = rejects
        self._waiting = b""

    def lines(self) -> list[str]:
        """The ledger for people, line by line."""
        again = [f"  all rows were read: this is pass {self.passes + 1} over them"] if self.passes else []
        return [*self.totals.lines(), *again, *self._others.lines()]

    def report(self) -> list[dict[str, Any]]:
        """The ledger for machines; JSON types only."""
        return [self.totals.report() | {"passes": self.passes}, *self._others.report()]

    def write(self, directory: str | Path) -> None:
        """`data_report.json` with all counts so far; and rejects will go into `rejects.jsonl` beside it."""
        self._folder = Path(directory)
        write_report(self._folder, self.report())

    def begin(self) -> None:
        """Rows begin to be given: the file of rejects is started, or cut to what was known where the stream goes on."""
        if self._folder is None or self._path is not None:
            return
        self._path = self._folder / REJECTS_NAME
        if self._kept is not None and self._path.is_file() and self._path.stat().st_size >= self._kept:
            os.truncate(self._path, self._kept)
        else:
            self._path.write_bytes(self._head)
            self.rejects = len(self._head) + len(self._waiting)
        self._append(self._path)

    def _append(self, path: Path) -> None:
        if self._waiting:
            with open(path, "ab") as stream:
                stream.write(self._waiting)
        self._waiting = b""
