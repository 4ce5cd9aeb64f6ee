"""A batch of rows to what became of it, in few and flat values that pass between processes at little cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuning.data.ledger import PartLedger
from finetuning.data.processors.base import Example, Lost, Maker
from finetuning.data.samples import Row, Skipped
from finetuning.data.sources import Line
from finetuning.errors import Place, Problem

if TYPE_CHECKING:
    import pyarrow as pa

SAME_AS_BEFORE = "the same as a row before"
_ROWS = 1024
_BYTES = 4 << 20
_NOT_MADE = (Problem, Skipped)


@dataclass
class Batch:
    """What became of the rows of a batch."""

    ledger: PartLedger
    alive: np.ndarray
    """Of each row, whether it is trained on."""
    columns: dict[str, Column]
    hashes: np.ndarray
    """Of the text of each row that is trained on, int64, as Python has them: alike in this process and its clones."""
    sizes: np.ndarray
    """Tokens and trained tokens of each of them, int64, (rows, 2)."""
    problems: list[Problem] = field(default_factory=list)
    shown: list[tuple[Example, Place]] = field(default_factory=list)
    """The first rows, as many as were asked for."""

    def table(self) -> pa.Table:
        """The rows that are trained on."""
        import pyarrow as pa

        return pa.table({name: column.to_arrow() for name, column in self.columns.items()})


@dataclass(frozen=True)
class Column:
    """The values of all rows, and where they are lists, laid end to end, the length of each."""

    values: np.ndarray | list[Any]
    sizes: np.ndarray | None

    @classmethod
    def of(cls, rows: list[Any]) -> Column:
        """A column of int32 arrays, of truth values or of texts."""
        if isinstance(rows[0], np.ndarray):
            return cls(np.concatenate(rows), np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))
        return cls(rows, None)

    def to_arrow(self) -> pa.Array:
        import pyarrow as pa

        if self.sizes is not None:
            return pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(self.sizes)]), pa.array(self.values))
        return pa.array(self.values, type=pa.bool_() if isinstance(self.values[0], bool) else pa.large_string())


def in_batches(rows: Iterable[Any], row_of: Callable[[Any], Any] | None = None) -> Iterator[list[Any]]:
    """The rows in lists of no more than 1024, and of few megabytes where rows are long; `row_of` takes a row out of
    what stands for it."""
    batch: list[Any] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _bytes_of(row_of(row) if row_of else row)
        if len(batch) == _ROWS or size > _BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bytes_of(row: Any) -> int:
    """The size of a line; of a row that is parsed already, that of its texts."""
    if isinstance(row, Line):
        return len(row.data)
    return sum(len(one) for one in row.values.values() if isinstance(one, str)) if isinstance(row, Row) else 0


def typed(rows: Iterable[Any], parse: Callable[[Any], Any]) -> list[Any]:
    """What the rows of a file are to a method; a row can be several."""
    found = []
    for row in rows:
        one = parse(row)
        found += one if isinstance(one, list) else (one,)
    return found


def make_batch(rows: Sequence[Any], make: Maker, ledger: PartLedger, want: int) -> Batch:
    """What becomes of typed rows, told in a ledger of their own; `want` counts the rows to show."""
    made = iter(make([one for one in rows if not isinstance(one, _NOT_MADE)]))
    alive = np.zeros(len(rows), dtype=bool)
    kept: list[Example] = []
    batch = Batch(ledger, alive, {}, np.empty(0, dtype=np.int64), np.empty((0, 2), dtype=np.int64))
    for index, row in enumerate(rows):
        if isinstance(row, Problem):
            example: Example | Lost = Lost("bad row", row.message, is_bad=True)
        else:
            example = Lost(row.reason, is_fault=False) if isinstance(row, Skipped) else next(made)
        if isinstance(example, Lost):
            if example.is_bad:
                batch.problems.append(row if isinstance(row, Problem) else Problem(_why(example), row.place))
            ledger.drop(row.place, example.reason, example.detail, is_fault=example.is_fault, tokens=example.tokens)
            continue
        alive[index] = True
        kept.append(example)
        if example.tokens_cut:
            ledger.truncate(row.place, example.tokens, example.trained, example.tokens_cut, example.answer_cut)
        else:
            ledger.keep(example.tokens, example.trained)
        for note in example.notes:
            ledger.note(note)
        if len(kept) <= want:
            batch.shown.append((example, row.place))
    if kept:
        batch.sizes = np.array([(one.tokens, one.trained) for one in kept], dtype=np.int64)
        batch.columns = {name: Column.of([one.columns[name] for one in kept]) for name in kept[0].columns}
        batch.hashes = np.array([hash(one.text) for one in kept], dtype=np.int64)
    return batch


def _why(lost: Lost) -> str:
    return f"{lost.reason}: {lost.detail}" if lost.detail else lost.reason


class Repeats:
    """Which texts came before, told by their hashes of 64 bits."""

    def __init__(self) -> None:
        self._former: dict[str, np.ndarray] = {}
        self._own: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> None:
        self._own.append(hashes)

    def note_former(self, hashes: np.ndarray, ledger: PartLedger) -> None:
        """Counts texts that came in another part before; nothing of them is kept."""
        for part, former in self._former.items():
            ledger.note(f"the same as a {part} row", int(np.isin(hashes, former).sum()))

    def note(self, ledger: PartLedger) -> None:
        """Counts the texts of a part, which ends here, that came before."""
        own = np.concatenate(self._own) if self._own else np.empty(0, dtype=np.int64)
        self._own = []
        for part, former in self._former.items():
            again = np.isin(own, former)
            ledger.note(f"the same as a {part} row", int(again.sum()))
            own = own[~again]
        once = np.unique(own)
        ledger.note(SAME_AS_BEFORE, len(own) - len(once))
        self._former[ledger.part] = once
