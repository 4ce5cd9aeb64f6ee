"""What becomes of input rows, each told and all counted.

The fate of each input row: kept, cut, or dropped for a reason; nothing is lost without a line here."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetuning.errors import DataError, Location, Problem

KEPT, TRUNCATED, DROPPED = "kept", "truncated", "dropped"
TOO_LONG = "longer than the limit"
SHOWN = 10
_FILTERED_WARNING = 0.05


@dataclass(frozen=True)
class RowOutcome:
    """What became of one input row.

    `is_fault` tells a row that is lost to a fault from one that was filtered by length, as asked for.
    """

    place: Location
    what: str
    reason: str = ""
    detail: str = ""
    is_fault: bool = False
    tokens: int = 0
    tokens_cut: int = 0
    answer_cut: bool = False

    def problem(self) -> Problem:
        return Problem(f"{self.reason}: {self.detail}" if self.detail else self.reason, self.place)


@dataclass
class RowCounts:
    """The fates of a part's rows, counted: of single rows it holds no more than an example of each kind of loss."""

    part: str
    limit: int | None = None
    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    answers_cut: int = 0
    faults: int = 0
    filtered: int = 0
    shortest_dropped: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    noticed: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)
    firsts: dict[str, RowOutcome] = field(default_factory=dict)
    """The first row that was dropped for each reason."""
    first_faults: list[RowOutcome] = field(default_factory=list)

    def keep(self, tokens: int, trained: int) -> None:
        """Counts a row that is trained on."""
        self.rows += 1
        self.kept += 1
        self.tokens += tokens
        self.trained_tokens += trained

    def count(self, fate: RowOutcome) -> None:
        """Counts what was lost of a row; that it is a row, and whether it is kept, is counted by whoever adds it."""
        if fate.what == TRUNCATED:
            self.truncated += 1
            self.tokens_cut += fate.tokens_cut
            self.answers_cut += fate.answer_cut
            return
        self.dropped[fate.reason] += 1
        self.firsts.setdefault(fate.reason, fate)
        if fate.is_fault:
            self.faults += 1
            self.first_faults = [*self.first_faults, fate][:SHOWN]
        if fate.reason == TOO_LONG:
            self.filtered += 1
            self.shortest_dropped = _least(self.shortest_dropped, fate.tokens)

    def add(self, other: RowCounts) -> None:
        """Counts what other rows of the same part came to."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.shortest_dropped = _least(self.shortest_dropped, other.shortest_dropped)
        self.dropped.update(other.dropped)
        self.noticed.update(other.noticed)
        self.formats |= other.formats
        for reason, fate in other.firsts.items():
            self.firsts.setdefault(reason, fate)
        self.first_faults = [*self.first_faults, *other.first_faults][:SHOWN]

    def lines(self) -> list[str]:
        """The totals for people, a line for each thing to know."""
        lines = [
            f"{self.part}: {counted(self.kept, 'row')} of {self.rows} kept, {counted(self.tokens, 'token')},"
            f" {self.trained_tokens} trained"
        ]
        lines += [f"  {name}: {how}" for name, how in self.formats.items()]
        if self.truncated:
            lines.append(
                f"  truncated: {counted(self.truncated, 'row')}, {counted(self.tokens_cut, 'token')} cut off;"
                f" {counted(self.answers_cut, 'answer')} cut"
            )
        for reason, count in self.dropped.most_common():
            example = self.firsts[reason]
            detail = f": {example.detail}" if example.detail else ""
            lines.append(f"  dropped: {counted(count, 'row')}, {reason}; first {example.place}{detail}")
        lines += [f"  noticed: {counted(count, 'row')}, {what}" for what, count in sorted(self.noticed.items())]
        share = self.filtered / self.rows if self.rows else 0.0
        if share > _FILTERED_WARNING:
            lines.append(
                f"  warning: {share:.1%} of the rows are longer than {self.limit} tokens and left out;"
                " a larger limit or length_handling: truncate keeps them, length_handling: split all of texts"
            )
        return lines

    def report(self) -> dict[str, Any]:
        """The totals for machines; JSON types only."""
        return {
            "part": self.part,
            "formats": self.formats,
            "rows": self.rows,
            "kept": self.kept,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "truncated": self.truncated,
            "tokens_cut": self.tokens_cut,
            "answers_cut": self.answers_cut,
            "dropped": dict(self.dropped),
            "lost_to_faults": self.faults,
            "filtered_by_length": self.filtered,
            "noticed": dict(self.noticed),
        }

    def check(self, max_lost_fraction: float) -> None:
        """Nothing, when enough rows are left.

        Raises:
            DataError: no row is left, or more than `max_lost_fraction` of them were lost to faults.
        """
        if self.rows and not self.kept and self.firsts:
            first = next(iter(self.firsts.values()))
            raise DataError(self._nothing_left(first), place=Location(file=first.place.file))
        if self.rows and self.faults > max_lost_fraction * self.rows:
            share = self.faults / self.rows
            head = Problem(
                f"{self.faults} of {self.rows} {self.part} rows ({share:.1%}) would be lost to faults,"
                f" more than data_conf.max_lost_fraction {max_lost_fraction:g}"
            )
            raise DataError([head, *(fate.problem() for fate in self.first_faults)])

    def _nothing_left(self, first: RowOutcome) -> str:
        if set(self.dropped) == {TOO_LONG}:
            return (
                f"all {self.rows} rows dropped: shortest is {self.shortest_dropped} tokens, max_seq_length {self.limit}"
            )
        parts = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.most_common())
        return f"all {self.rows} rows dropped: {parts}; first at {first.place}: {first.detail or first.reason}"


_SUMS = (
    "rows", "kept", "tokens", "trained_tokens", "truncated", "tokens_cut", "answers_cut", "faults", "filtered",
)  # fmt: skip


def _least(*numbers: int | None) -> int | None:
    return min((one for one in numbers if one is not None), default=None)


def counts_of(values: dict[str, Any]) -> RowCounts:
    """Totals that `asdict` has made JSON of."""
    return RowCounts(
        **{
            **values,
            "dropped": Counter(values["dropped"]),
            "noticed": Counter(values["noticed"]),
            "firsts": {reason: outcome_of(one) for reason, one in values["firsts"].items()},
            "first_faults": [outcome_of(one) for one in values["first_faults"]],
        }
    )


def values_of(totals: RowCounts) -> dict[str, Any]:
    """The totals as JSON types."""
    return asdict(totals) | {"dropped": dict(totals.dropped), "noticed": dict(totals.noticed)}


def outcome_of(values: dict[str, Any]) -> RowOutcome:
    return RowOutcome(**{**values, "place": Location(**values["place"])})


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


__all__ = ["TOO_LONG", "DatasetStatistics", "RowOutcome", "SplitStatistics", "raise_bad_rows"]

REJECTS_NAME = "rejects.jsonl"


@dataclass
class SplitStatistics:
    """What became of the rows of one part of the data: their number, and the fate of each that was cut or dropped."""

    totals: RowCounts
    fates: list[RowOutcome] = field(default_factory=list)

    @property
    def part(self) -> str:
        """`training` or `validation`."""
        return self.totals.part

    def keep(self, tokens: int, trained: int) -> None:
        """Counts a row that is trained on as it is; tokens are counted in `tokens` and `trained`."""
        self.totals.keep(tokens, trained)

    def truncate(self, place: Location, tokens: int, trained: int, tokens_cut: int, answer_cut: bool) -> None:
        """Counts a row that is trained on without its end."""
        self.totals.keep(tokens, trained)
        detail = f"{tokens_cut} tokens cut off" + (", part of the answer among them" if answer_cut else "")
        self._meet(
            RowOutcome(
                place, TRUNCATED, "truncated", detail, tokens=tokens, tokens_cut=tokens_cut, answer_cut=answer_cut
            )
        )

    def drop(self, place: Location, reason: str, detail: str = "", *, is_fault: bool = True, tokens: int = 0) -> None:
        """Counts a row that is not trained on."""
        self.totals.rows += 1
        self._meet(RowOutcome(place, DROPPED, reason, detail, is_fault=is_fault, tokens=tokens))

    def _meet(self, fate: RowOutcome) -> None:
        self.fates.append(fate)
        self.totals.count(fate)

    def note(self, what: str, count: int = 1) -> None:
        """Counts something worth knowing that costs no row."""
        if count:
            self.totals.noticed[what] += count

    def add(self, other: SplitStatistics) -> None:
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
class DatasetStatistics:
    """The ledgers of all parts of the data."""

    parts: tuple[SplitStatistics, ...]

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


def reject_lines(part: SplitStatistics) -> Iterator[str]:
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
