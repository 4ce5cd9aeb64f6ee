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
