"""Row statistics of a stream: counted as rows are read, and written during training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from finetuning.data.statistics import (
    REJECTS_NAME,
    DatasetStatistics,
    RowCounts,
    SplitReport,
    SplitStatistics,
    reject_lines,
    write_report,
)


class StreamStatistics:
    """The counts so far. Truncated and dropped rows are appended to `rejects.jsonl` and not kept in memory.

    `write` sets the folder, before the first row is yielded. A process that never calls it writes no rejects.
    """

    def __init__(self, counts: RowCounts, other_splits: Sequence[SplitStatistics]):
        self.counts = counts
        self.epochs = 0
        """Epochs that have ended. Rows are counted in the first."""
        self._other_splits = DatasetStatistics(tuple(other_splits))
        self._header = "".join(line for split in other_splits for line in reject_lines(split)).encode()
        self._pending = b""
        self._folder: Path | None = None
        self._path: Path | None = None
        self._resumed_bytes: int | None = None
        self.rejects_bytes = len(self._header)
        """Size of `rejects.jsonl`."""

    def add(self, block: SplitStatistics) -> None:
        """Add the statistics of further rows."""
        self.counts.add(block.counts)
        self._pending = "".join(reject_lines(block)).encode()
        self.rejects_bytes += len(self._pending)
        if self._path is not None:
            self._append(self._path)

    def restore(self, counts: RowCounts, epochs: int, rejects_bytes: int) -> None:
        """Continue from earlier counts, and from the first `rejects_bytes` bytes of `rejects.jsonl`."""
        self.counts, self.epochs = counts, epochs
        self.rejects_bytes = self._resumed_bytes = rejects_bytes
        self._pending = b""

    def lines(self) -> list[str]:
        """The statistics as text for the console."""
        epoch = [f"  all rows were read; this is epoch {self.epochs + 1}"] if self.epochs else []
        return [*self.counts.lines(), *epoch, *self._other_splits.lines()]

    def report(self) -> list[SplitReport]:
        """The statistics as JSON types."""
        return [{**self.counts.report(), "epochs": self.epochs}, *self._other_splits.report()]

    def write(self, directory: str | Path) -> None:
        """Write `data_report.json` with the counts so far, and from now on `rejects.jsonl` in this folder."""
        self._folder = Path(directory)
        write_report(self._folder, self.report())

    def open_rejects(self) -> None:
        """Start `rejects.jsonl`, or truncate it to the rows before the checkpoint that the stream resumes from."""
        if self._folder is None or self._path is not None:
            return
        self._path = self._folder / REJECTS_NAME
        if (
            self._resumed_bytes is not None
            and self._path.is_file()
            and self._path.stat().st_size >= self._resumed_bytes
        ):
            os.truncate(self._path, self._resumed_bytes)
        else:
            self._path.write_bytes(self._header)
            self.rejects_bytes = len(self._header) + len(self._pending)
        self._append(self._path)

    def _append(self, path: Path) -> None:
        if self._pending:
            with open(path, "ab") as stream:
                stream.write(self._pending)
        self._pending = b""
