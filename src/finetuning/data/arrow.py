"""Arrow tables on disk: written batch by batch to an unnamed file and memory-mapped, so that rows need no memory."""

# pyarrow and datasets have no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import numpy as np

from finetuning.errors import StorageError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

Result = TypeVar("Result")
_MAX_ROWS = 1 << 14
_MAX_BYTES = 1 << 23


class ArrowTableWriter:
    """Appends tables of one schema to an unnamed temporary file.

    An unnamed file leaves nothing behind when the process ends, however it ends.
    """

    def __init__(self, folder: Path | None = None):
        """Open a file in `folder`, by default in the folder for temporary files."""
        self._folder = str(folder) if folder is not None and folder.is_dir() else tempfile.gettempdir()
        self._file: IO[bytes] = self._guarded(lambda: tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Append the rows of a table.

        Raises:
            StorageError: the disk is full.
        """
        import pyarrow as pa

        if self._writer is None:
            self._writer = pa.ipc.new_stream(self._file, table.schema)
        self._guarded(partial(self._writer.write_table, table))

    def table(self) -> pa.Table:
        """All rows, memory-mapped. No rows can be added afterwards."""
        import pyarrow as pa

        if self._writer is None:
            return pa.table({})
        self._guarded(self._writer.close)
        self._guarded(self._file.flush)
        with self._file as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()

    def _guarded(self, step: Callable[[], Result]) -> Result:
        try:
            return step()
        except OSError as error:
            raise StorageError(
                f"cannot write prepared rows to {self._folder}: {error}",
                hint="Set data_conf.cache, or TMPDIR, to a folder with free space.",
            ) from error


def take_rows(table: pa.Table, rows: np.ndarray, folder: Path | None = None) -> pa.Table:
    """The given rows of a table, in the given order, on disk."""
    batches = [batch for batch in table.to_batches() if batch.num_rows]
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    group = max(1, min(_MAX_ROWS, _MAX_BYTES * table.num_rows // max(table.nbytes, 1)))
    writer = ArrowTableWriter(folder)
    for first in range(0, len(rows), group):
        writer.add(_gather(batches, starts, rows[first : first + group]))
    return writer.table()


def _gather(batches: Sequence[pa.RecordBatch], starts: np.ndarray, rows: np.ndarray) -> pa.Table:
    """The given rows of batches. `Table.take` would concatenate all batches in memory first."""
    import pyarrow as pa

    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    borders = np.searchsorted(ascending, starts)
    parts = [
        batch.take(pa.array(ascending[begin:end] - start))
        for batch, start, begin, end in zip(batches, starts, borders, borders[1:], strict=False)
        if end > begin
    ]
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return pa.Table.from_batches(parts).combine_chunks().take(pa.array(inverse))


def as_dataset(table: pa.Table) -> datasets.Dataset:
    """Wrap a table as a dataset, with features derived from its column types."""
    import datasets
    import pyarrow as pa
    from datasets.fingerprint import generate_random_fingerprint
    from datasets.table import InMemoryTable, Table

    features = datasets.Features()
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        if pa.types.is_large_list(kind):
            features[name] = datasets.LargeList(datasets.Value(str(kind.value_type)))
        else:
            features[name] = datasets.Value("bool" if pa.types.is_boolean(kind) else "large_string")
    info = datasets.DatasetInfo(features=features)
    if isinstance(table, Table):
        return datasets.Dataset(table, info=info)
    # By default, datasets computes the fingerprint of such a table from a copy of all of its content.
    return datasets.Dataset(InMemoryTable(table), info=info, fingerprint=generate_random_fingerprint())


def row_lengths(dataset: datasets.Dataset, column: str = "input_ids") -> np.ndarray:
    """Tokens of each row, int64; in packed datasets, of each row inside the packs."""
    import pyarrow.compute as pc

    table = dataset.with_format("arrow")[:]
    if "lengths" in dataset.column_names:
        return pc.list_flatten(table["lengths"]).to_numpy().astype(np.int64)  # pyright: ignore[reportAttributeAccessIssue]
    return pc.list_value_length(table[column]).to_numpy().astype(np.int64)  # pyright: ignore[reportAttributeAccessIssue]
