"""Training rows laid together in packs, and what packing, or laying end to end, saves over padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuning.data.arrow import Spool
from finetuning.data.columns import as_dataset
from finetuning.data.packing import pack

if TYPE_CHECKING:
    import datasets

_TOKENS = 1 << 19


@dataclass(frozen=True)
class Lying:
    """How rows lie in the packs of a run, and what share of computed tokens is real in each way to lay them."""

    rows: int
    packs: int | None
    """Number of packs; None where rows are not packed."""
    filled: float | None
    """Share of the packs' capacity that holds tokens."""
    padded: float
    """Share of computed tokens that are real in batches drawn by chance and padded to their longest row."""

    def __str__(self) -> str:
        real = f"{self.padded:.0%} of computed tokens are real when padded, 100% end to end"
        if self.packs is None:
            return real
        return f"{self.rows:,} rows in {self.packs:,} packs, {self.filled:.1%} full; {real} or packed"


def row_lengths(dataset: datasets.Dataset, column: str = "input_ids") -> np.ndarray:
    """Tokens of each row, int64, in order; of each row inside the packs, where rows are packed."""
    import pyarrow.compute as pc

    table = dataset.with_format("arrow")[:]
    if "lengths" in dataset.column_names:
        return pc.list_flatten(table["lengths"]).to_numpy().astype(np.int64)
    return pc.list_value_length(table[column]).to_numpy().astype(np.int64)


def lying(dataset: datasets.Dataset, capacity: int, batch: int) -> Lying:
    """How the rows of a dataset lie, and the shares that are real in batches of this many rows."""
    lengths = row_lengths(dataset)
    packed = "lengths" in dataset.column_names
    filled = float(lengths.sum() / (len(dataset) * capacity)) if packed else None
    return Lying(len(lengths), len(dataset) if packed else None, filled, _padded_share(lengths, batch))


def _padded_share(lengths: np.ndarray, batch: int) -> float:
    order = np.random.default_rng(0).permutation(len(lengths))
    starts = np.arange(0, len(lengths), batch)
    longest = np.maximum.reduceat(lengths[order], starts)
    sizes = np.diff(np.append(starts, len(lengths)))
    return float(lengths.sum() / (longest * sizes).sum())


def pack_rows(rows: Sequence[Mapping[str, np.ndarray]], capacity: int) -> list[dict[str, Any]]:
    """The packs of `pack_dataset`, of rows that are at hand."""
    lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
    packing = pack(lengths, capacity)
    packs = []
    for start, end in pairwise(packing.borders):
        chosen = packing.rows[start:end]
        columns = {name: np.concatenate([rows[row][name] for row in chosen]) for name in ("input_ids", "labels")}
        packs.append({**columns, "lengths": lengths[chosen].tolist()})
    return packs


def pack_dataset(dataset: datasets.Dataset, capacity: int) -> datasets.Dataset:
    """The rows in packs of at most `capacity` tokens: `input_ids`, `labels`, and `lengths`, those of the rows in a
    pack, in order."""
    import pyarrow as pa

    lengths = row_lengths(dataset)
    packing = pack(lengths, capacity)
    source = dataset.with_format("arrow")
    columns = ("input_ids", "labels")
    spool = Spool()
    slab = max(1, _TOKENS // capacity)
    for first in range(0, len(packing), slab):
        borders = packing.borders[first : first + slab + 1]
        rows = packing.rows[borders[0] : borders[-1]]
        table = source[rows]
        sizes = lengths[rows]
        ends = np.concatenate([[0], np.cumsum(sizes)])[borders - borders[0]]
        packs = {}
        for name in columns:
            values = pa.chunked_array([chunk.flatten() for chunk in table[name].chunks]).combine_chunks()
            packs[name] = pa.LargeListArray.from_arrays(ends, values)
        packs["lengths"] = pa.LargeListArray.from_arrays(borders - borders[0], pa.array(sizes.astype(np.int32)))
        spool.add(pa.table(packs))
    return as_dataset(spool.table())
