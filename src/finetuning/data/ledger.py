"""The fate of each input row: kept, cut, or dropped for a reason; nothing is lost without a line here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetuning.data.statistics import DROPPED, SHOWN, TOO_LONG, TRUNCATED, Fate, Totals, counted
from finetuning.errors import DataError, Place, Problem

__all__ = ["TOO_LONG", "Fate", "Ledger", "PartLedger", "raise_bad_rows"]

REJECTS_NAME = "rejects.jsonl"


@dataclass
class PartLedger:
    """What became of the rows of one part of the data: their number, and the fate of each that was cut or dropped."""

    totals: Totals
    fates: list[Fate] = field(default_factory=list)

    @property
    def part(self) -> str:
        """`training` or `validation`."""
        return self.totals.part

    def keep(self, tokens: int, trained: int) -> None:
        """Counts a row that is trained on as it is; tokens are counted in `tokens` and `trained`."""
        self.totals.keep(tokens, trained)

    def truncate(self, place: Place, tokens: int, trained: int, tokens_cut: int, answer_cut: bool) -> None:
        """Counts a row that is trained on without its end."""
        self.totals.keep(tokens, trained)
        detail = f"{tokens_cut} tokens cut off" + (", part of the answer among them" if answer_cut else "")
        self._meet(
            Fate(place, TRUNCATED, "truncated", detail, tokens=tokens, tokens_cut=tokens_cut, answer_cut=answer_cut)
        )

    def drop(self, place: Place, reason: str, detail: str = "", *, is_fault: bool = True, tokens: int = 0) -> None:
        """Counts a row that is not trained on."""
        self.totals.rows += 1
        self._meet(Fate(place, DROPPED, reason, detail, is_fault=is_fault, tokens=tokens))

    def _meet(self, fate: Fate) -> None:
        self.fates.append(fate)
        self.totals.count(fate)

    def note(self, what: str, count: int = 1) -> None:
        """Counts something worth knowing that costs no row."""
        if count:
            self.totals.noticed[what] += count

    def add(self, other: PartLedger) -> None:
        """Takes up the fates of further rows."""
        self.totals.add(other.totals)
        self.fates += other.fates


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
        return [line for part in self.parts for line in part.totals.lines()]

    def report(self) -> list[dict[str, Any]]:
        """The ledgers for machines; JSON types only."""
        return [part.totals.report() for part in self.parts]

    def check(self, max_lost_fraction: float) -> None:
        """Nothing, when enough rows of each part are left.

        Raises:
            DataError: a part has no row left, or lost more than `max_lost_fraction` of its rows to faults.
        """
        for part in self.parts:
            part.totals.check(max_lost_fraction)

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
