"""The fate of each input row: kept, cut, or dropped for a reason; nothing is lost without a line here."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetuning.data.fates import DROPPED, SHOWN, TOO_LONG, TRUNCATED, Fate, Totals, counted
from finetuning.errors import DataError, Place, Problem

__all__ = ["TOO_LONG", "Fate", "Ledger", "PartLedger", "raise_bad_rows"]

REJECTS_NAME = "rejects.jsonl"


@dataclass
class PartLedger:
    """The fates of the rows of one part of the data (`training` or `validation`), and what was noticed on the way."""

    part: str
    limit: int | None = None
    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    shortest_dropped: int | None = None
    fates: list[Fate] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)
    """The format of each dataset, and how it is known."""

    def keep(self, tokens: int, trained: int) -> None:
        """Counts a row that is trained on as it is; tokens are counted in `tokens` and `trained`."""
        self.rows += 1
        self.kept += 1
        self.tokens += tokens
        self.trained_tokens += trained

    def truncate(self, place: Place, tokens: int, trained: int, tokens_cut: int, answer_cut: bool) -> None:
        """Counts a row that is trained on without its end."""
        self.keep(tokens, trained)
        detail = f"{tokens_cut} tokens cut off" + (", part of the answer among them" if answer_cut else "")
        self.fates.append(
            Fate(place, TRUNCATED, "truncated", detail, tokens=tokens, tokens_cut=tokens_cut, answer_cut=answer_cut)
        )

    def drop(self, place: Place, reason: str, detail: str = "", *, is_fault: bool = True, tokens: int = 0) -> None:
        """Counts a row that is not trained on."""
        self.rows += 1
        if reason == TOO_LONG and (self.shortest_dropped is None or tokens < self.shortest_dropped):
            self.shortest_dropped = tokens
        self.fates.append(Fate(place, DROPPED, reason, detail, is_fault=is_fault, tokens=tokens))

    def note(self, what: str, count: int = 1) -> None:
        """Counts something worth knowing that costs no row."""
        if count:
            self.counts[what] += count

    def add(self, other: PartLedger) -> None:
        """Takes up the fates of further rows."""
        self.rows += other.rows
        self.kept += other.kept
        self.tokens += other.tokens
        self.trained_tokens += other.trained_tokens
        shortest = [one for one in (self.shortest_dropped, other.shortest_dropped) if one is not None]
        self.shortest_dropped = min(shortest, default=None)
        self.fates += other.fates
        self.counts.update(other.counts)

    def totals(self) -> Totals:
        """All fates, counted."""
        totals = Totals(
            part=self.part,
            limit=self.limit,
            rows=self.rows,
            kept=self.kept,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            noticed=Counter(self.counts),
            formats=dict(self.formats),
        )
        totals.count(self.fates)
        return totals

    def lines(self) -> list[str]:
        """The ledger for people, a line for each thing to know."""
        return self.totals().lines()

    def report(self) -> dict[str, Any]:
        """The ledger for machines; JSON types only."""
        return self.totals().report()

    def check(self, max_lost_fraction: float) -> None:
        """Nothing, when enough rows are left.

        Raises:
            DataError: no row is left, or more than `max_lost_fraction` of them were lost to faults.
        """
        self.totals().check(max_lost_fraction)


def raise_bad_rows(problems: Sequence[Problem]) -> None:
    """Nothing without problems.

    Raises:
        DataError: the first ten, and how many there are.
    """
    if not problems:
        return
    shown = list(problems[:SHOWN])
    rest = len(problems) - len(shown)
    more = f"{counted(len(problems), 'bad row')}" + (f", the first {SHOWN} shown" if rest else "")
    shown.append(Problem(f"{more}. Set data_conf.on_bad_row: skip to leave bad rows out, counted."))
    raise DataError(shown)


@dataclass(frozen=True)
class Ledger:
    """The ledgers of all parts of the data."""

    parts: tuple[PartLedger, ...]

    def lines(self) -> list[str]:
        """The ledgers for people, line by line."""
        return [line for part in self.parts for line in part.lines()]

    def report(self) -> list[dict[str, Any]]:
        """The ledgers for machines; JSON types only."""
        return [part.report() for part in self.parts]

    def check(self, max_lost_fraction: float) -> None:
        """Nothing, when enough rows of each part are left.

        Raises:
            DataError: a part has no row left, or lost more than `max_lost_fraction` of its rows to faults.
        """
        for part in self.parts:
            part.check(max_lost_fraction)

    def write(self, directory: str | Path) -> None:
        """`data_report.json` with all counts, and `rejects.jsonl` with each row that was cut or dropped."""
        write_report(Path(directory), self.report())
        _write_whole(
            Path(directory) / REJECTS_NAME, "".join(line for part in self.parts for line in reject_lines(part))
        )


def write_report(folder: Path, report: list[dict[str, Any]]) -> None:
    """`data_report.json`, whole."""
    _write_whole(folder / "data_report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def reject_lines(part: PartLedger) -> Iterator[str]:
    """The lines of `rejects.jsonl` on the rows of a part that were cut or dropped."""
    for fate in part.fates:
        values = {
            "file": fate.place.file,
            "line": fate.place.line,
            "key": fate.place.key,
            "part": part.part,
            "fate": fate.what,
            "reason": fate.reason,
            "detail": fate.detail,
            "tokens": fate.tokens,
            "tokens_cut": fate.tokens_cut,
            "fault": fate.is_fault,
        }
        told = {key: one for key, one in values.items() if one not in (None, "", 0)}
        yield json.dumps(told, ensure_ascii=False) + "\n"


def _write_whole(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.partial")
    with open(staging, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(staging, path)
