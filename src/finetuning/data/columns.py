"""Examples to Arrow columns, batch by batch, so that no row is kept as Python objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


class Columns:
    """Rows that are added one by one and kept as Arrow arrays: lists of int32, truth values, or texts."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Any]] = {}
        self._chunks: dict[str, list[pa.Array]] = {}

    def add(self, columns: Mapping[str, Any]) -> None:
        for name, value in columns.items():
            self._waiting.setdefault(name, []).append(value)

    def flush(self) -> None:
        """Turns the rows that were added into one more chunk."""
        for name, values in self._waiting.items():
            if values:
                self._chunks.setdefault(name, []).append(_to_arrow(values))
        self._waiting.clear()

    def table(self) -> pa.Table:
        import pyarrow as pa

        self.flush()
        return pa.table({name: pa.chunked_array(chunks) for name, chunks in self._chunks.items()})


def _to_arrow(values: list[Any]) -> pa.Array:
    import pyarrow as pa

    if isinstance(values[0], np.ndarray):
        borders = np.concatenate([[0], np.cumsum([len(value) for value in values], dtype=np.int64)])
        return pa.LargeListArray.from_arrays(borders, np.concatenate(values))
    return pa.array(values, type=pa.bool_() if isinstance(values[0], bool) else pa.large_string())


def as_dataset(table: pa.Table) -> datasets.Dataset:
    """The table, in memory or mapped into it, as a dataset with the features of its columns."""
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable, Table

    features = datasets.Features()
    for name, kind in zip(table.column_names, table.schema.types, strict=True):
        if pa.types.is_large_list(kind):
            features[name] = datasets.LargeList(datasets.Value(str(kind.value_type)))
        else:
            features[name] = datasets.Value("bool" if pa.types.is_boolean(kind) else "large_string")
    held = table if isinstance(table, Table) else InMemoryTable(table)
    return datasets.Dataset(held, info=datasets.DatasetInfo(features=features))
