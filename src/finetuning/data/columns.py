"""Arrow tables to datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


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
