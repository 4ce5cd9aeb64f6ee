"""Rows on disk as they come: an Arrow file without a name, mapped into memory when all rows are in it.

Arrow tables to datasets."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuning.errors import StorageError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_ROWS = 1 << 14
_BYTES = 1 << 23


class ArrowSpool:
    """Tables of one schema, laid end to end on disk.

    The file has no name, so that nothing of it is left when the process ends, however it ends.
    """

    def __init__(self, folder: Path | None = None):
        """Opens a file in the folder, by default in that for temporary files."""
        self._folder = str(folder) if folder is not None and folder.is_dir() else tempfile.gettempdir()
        self._file: Any = self._guarded(lambda: tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115
        self._writer: Any = None

    def add(self, table: pa.Table) -> None:
        """Writes the rows.

        Raises:
            StorageError: there is no room for them.
        """
        import pyarrow as pa

        if self._writer is None:
            self._writer = pa.ipc.new_stream(self._file, table.schema)
        self._guarded(lambda: self._writer.write_table(table))

    def table(self) -> pa.Table:
        """All rows, mapped into memory; none can be added any more."""
        import pyarrow as pa

        if self._writer is None:
            return pa.table({})
        self._guarded(self._writer.close)
        self._guarded(self._file.flush)
        with self._file as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()

    def _guarded(self, step: Any) -> Any:
        try:
            return step()
        except OSError as error:
            raise StorageError(
                f"prepared rows cannot be kept in {self._folder}: {error}",
                hint="Set data_conf.cache, or TMPDIR, to a folder with room.",
            ) from error


def take_rows(table: pa.Table, rows: np.ndarray, folder: Path | None = None) -> pa.Table:
    """These rows of a table, in this order, on disk."""
    batches = [batch for batch in table.to_batches() if batch.num_rows]
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    slab = max(1, min(_ROWS, _BYTES * table.num_rows // max(table.nbytes, 1)))
    spool = ArrowSpool(folder)
    for first in range(0, len(rows), slab):
        spool.add(_gathered(batches, starts, rows[first : first + slab]))
    return spool.table()


def _gathered(batches: Sequence[pa.RecordBatch], starts: np.ndarray, rows: np.ndarray) -> pa.Table:
    """These rows of batches. Arrow would lay all batches end to end in memory to take rows out of them."""
    import pyarrow as pa

    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    borders = np.searchsorted(ascending, starts)
    parts = [
        batch.take(pa.array(ascending[begin:end] - start))
        for batch, start, begin, end in zip(batches, starts, borders, borders[1:], strict=False)
        if end > begin
    ]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.Table.from_batches(parts).combine_chunks().take(pa.array(back))


def as_dataset(table: pa.Table) -> datasets.Dataset:
    """The table, in memory or mapped into it, as a dataset with the features of its columns."""
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
    # By default the fingerprint of a table without a file of its own is a digest of a copy of all that it holds.
    return datasets.Dataset(InMemoryTable(table), info=info, fingerprint=generate_random_fingerprint())
