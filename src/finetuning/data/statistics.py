"""Row statistics: what happened to each input row, and the counts per split.

Every input row is kept, truncated or dropped with a reason. The counts go to the console and to `data_report.json`,
the truncated and dropped rows to `rejects.jsonl`. A limit on invalid rows stops the run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from finetuning.config.redaction import redacted_json
from finetuning.data.arrow import row_lengths
from finetuning.errors import DataError, Location, Problem

if TYPE_CHECKING:
    import datasets  # pyright: ignore[reportMissingTypeStubs]

REPORT_NAME = "data_report.json"
REJECTS_NAME = "rejects.jsonl"
KEPT, TRUNCATED, DROPPED = "kept", "truncated", "dropped"
TOO_LONG = "longer than the limit"
MAX_SHOWN = 10
_FILTERED_WARNING = 0.05
# Names in cache entries and stream states that earlier versions wrote.
_OLD_COUNTS = {"part": "split", "noticed": "warnings", "firsts": "first_dropped"}  # old name
_OLD_OUTCOME = {"place": "location", "what": "outcome", "is_fault": "is_invalid"}


@dataclass(frozen=True)
class RowOutcome:
    """What happened to one input row that was truncated or dropped.

    `is_invalid` separates a row that could not be used from one that was filtered by length, as configured.
    """

    location: Location
    outcome: str
    reason: str = ""
    detail: str = ""
    is_invalid: bool = False
    tokens: int = 0
    tokens_cut: int = 0
    answer_cut: bool = False

    def problem(self) -> Problem:
        return Problem(f"{self.reason}: {self.detail}" if self.detail else self.reason, self.location)


class SplitReport(TypedDict):
    """The counts of one split in `data_report.json`."""

    split: str
    formats: dict[str, str]
    rows: int
    kept: int
    tokens: int
    trained_tokens: int
    truncated: int
    tokens_cut: int
    answers_cut: int
    dropped: dict[str, int]
    invalid_rows: int
    filtered_by_length: int
    warnings: dict[str, int]
    epochs: NotRequired[int]
    """How often all rows of a stream were read."""


@dataclass
class RowCounts:
    """Counts over the rows of one split. Holds single rows only as examples: the first of each kind of loss."""

    split: str
    limit: int | None = None
    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    answers_cut: int = 0
    invalid: int = 0
    filtered: int = 0
    shortest_dropped: int | None = None
    dropped: Counter[str] = field(default_factory=Counter[str])
    warnings: Counter[str] = field(default_factory=Counter[str])
    formats: dict[str, str] = field(default_factory=dict[str, str])
    first_dropped: dict[str, RowOutcome] = field(default_factory=dict[str, RowOutcome])
    """The first row that was dropped for each reason."""
    first_invalid: list[RowOutcome] = field(default_factory=list[RowOutcome])

    def keep(self, tokens: int, trained: int) -> None:
        """Count a row that is trained on."""
        self.rows += 1
        self.kept += 1
        self.tokens += tokens
        self.trained_tokens += trained

    def count(self, row: RowOutcome) -> None:
        """Count what was lost of a row. The caller counts the row itself, and whether it is kept."""
        if row.outcome == TRUNCATED:
            self.truncated += 1
            self.tokens_cut += row.tokens_cut
            self.answers_cut += row.answer_cut
            return
        self.dropped[row.reason] += 1
        self.first_dropped.setdefault(row.reason, row)
        if row.is_invalid:
            self.invalid += 1
            self.first_invalid = [*self.first_invalid, row][:MAX_SHOWN]
        if row.reason == TOO_LONG:
            self.filtered += 1
            self.shortest_dropped = _minimum(self.shortest_dropped, row.tokens)

    def add(self, more: RowCounts) -> None:
        """Add the counts of further rows of the same split."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(more, name))
        self.shortest_dropped = _minimum(self.shortest_dropped, more.shortest_dropped)
        self.dropped.update(more.dropped)
        self.warnings.update(more.warnings)
        self.formats |= more.formats
        for reason, row in more.first_dropped.items():
            self.first_dropped.setdefault(reason, row)
        self.first_invalid = [*self.first_invalid, *more.first_invalid][:MAX_SHOWN]

    def lines(self) -> list[str]:
        """The counts as text for the console, one line per fact."""
        lines = [
            f"{self.split}: {counted(self.kept, 'row')} of {self.rows} kept, {counted(self.tokens, 'token')},"
            f" {self.trained_tokens} trained"
        ]
        lines += [f"  {name}: {source_format}" for name, source_format in self.formats.items()]
        if self.truncated:
            lines.append(
                f"  truncated: {counted(self.truncated, 'row')}, {counted(self.tokens_cut, 'token')} cut off;"
                f" {counted(self.answers_cut, 'answer')} cut"
            )
        for reason, count in self.dropped.most_common():
            example = self.first_dropped[reason]
            detail = f": {example.detail}" if example.detail else ""
            lines.append(f"  dropped: {counted(count, 'row')}, {reason}; first {example.location}{detail}")
        lines += [f"  note: {counted(count, 'row')}: {warning}" for warning, count in sorted(self.warnings.items())]
        share = self.filtered / self.rows if self.rows else 0.0
        if share > _FILTERED_WARNING:
            lines.append(
                f"  warning: {share:.1%} of the rows are longer than {self.limit} tokens and were dropped;"
                " raise the limit, or set length_handling: truncate, or length_handling: split for plain text"
            )
        return lines

    def report(self) -> SplitReport:
        """The counts as JSON types, for `data_report.json`."""
        return {
            "split": self.split,
            "formats": self.formats,
            "rows": self.rows,
            "kept": self.kept,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "truncated": self.truncated,
            "tokens_cut": self.tokens_cut,
            "answers_cut": self.answers_cut,
            "dropped": dict(self.dropped),
            "invalid_rows": self.invalid,
            "filtered_by_length": self.filtered,
            "warnings": dict(self.warnings),
        }

    def check(self, max_lost_fraction: float) -> None:
        """Raise DataError if no row is left, or if more than `max_lost_fraction` of the rows are invalid."""
        if self.rows and not self.kept and self.first_dropped:
            first = next(iter(self.first_dropped.values()))
            raise NoRowsLeftError(self._nothing_left(first), location=Location(file=first.location.file))
        if self.rows and self.invalid > max_lost_fraction * self.rows:
            share = self.invalid / self.rows
            head = Problem(
                f"{self.invalid} of {self.rows} {self.split} rows ({share:.1%}) are invalid,"
                f" more than data_conf.max_lost_fraction {max_lost_fraction:g}"
            )
            raise DataError([head, *(row.problem() for row in self.first_invalid)])

    def _nothing_left(self, first: RowOutcome) -> str:
        if set(self.dropped) == {TOO_LONG}:
            return (
                f"all {self.rows} rows dropped: shortest is {self.shortest_dropped} tokens, max_seq_length {self.limit}"
            )
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.most_common())
        return f"all {self.rows} rows dropped: {reasons}; first at {first.location}: {first.detail or first.reason}"

    def state_dict(self) -> dict[str, object]:
        """The counts as JSON types, for `from_state_dict`."""
        return {**asdict(self), "dropped": dict(self.dropped), "warnings": dict(self.warnings)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RowCounts:
        """The counts that `state_dict` describes; the names of earlier versions are understood."""
        values: dict[str, Any] = {_OLD_COUNTS.get(key, key): value for key, value in state.items()}
        values["invalid"] = values.pop("faults", values.get("invalid", 0))
        values["first_invalid"] = values.pop("first_faults", values.get("first_invalid", []))
        values |= {
            "dropped": Counter(values["dropped"]),
            "warnings": Counter(values["warnings"]),
            "first_dropped": {reason: outcome_of(row) for reason, row in values["first_dropped"].items()},
            "first_invalid": [outcome_of(row) for row in values["first_invalid"]],
        }
        return cls(**values)


_SUMS = (
    "rows", "kept", "tokens", "trained_tokens", "truncated", "tokens_cut", "answers_cut", "invalid", "filtered",
)  # fmt: skip


def _minimum(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def outcome_of(values: Mapping[str, Any]) -> RowOutcome:
    """The outcome that `asdict` turned into JSON types; the names of earlier versions are understood."""
    renamed: dict[str, Any] = {_OLD_OUTCOME.get(key, key): value for key, value in values.items()}
    renamed["location"] = Location(**renamed["location"])
    return RowOutcome(**renamed)


def counted(number: int, noun: str) -> str:
    """
    >>> counted(1, "row"), counted(3, "row")
    ('1 row', '3 rows')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass
class SplitStatistics:
    """The counts of one split, and the outcome of each of its rows that was truncated or dropped."""

    counts: RowCounts
    outcomes: list[RowOutcome] = field(default_factory=list[RowOutcome])

    @property
    def split(self) -> str:
        """`training` or `validation`."""
        return self.counts.split

    def keep(self, tokens: int, trained: int) -> None:
        """Count a row that is trained on unchanged, with its tokens and its trained tokens."""
        self.counts.keep(tokens, trained)

    def truncate(self, location: Location, tokens: int, trained: int, tokens_cut: int, answer_cut: bool) -> None:
        """Count a row that is trained on without its end."""
        self.counts.keep(tokens, trained)
        detail = f"{tokens_cut} tokens cut off" + (", including part of the answer" if answer_cut else "")
        self._record(
            RowOutcome(
                location, TRUNCATED, "truncated", detail, tokens=tokens, tokens_cut=tokens_cut, answer_cut=answer_cut
            )
        )

    def drop(
        self, location: Location, reason: str, detail: str = "", *, is_invalid: bool = True, tokens: int = 0
    ) -> None:
        """Count a row that is not trained on."""
        self.counts.rows += 1
        self._record(RowOutcome(location, DROPPED, reason, detail, is_invalid=is_invalid, tokens=tokens))

    def _record(self, row: RowOutcome) -> None:
        self.outcomes.append(row)
        self.counts.count(row)

    def warn(self, warning: str, count: int = 1) -> None:
        """Count rows with a property worth knowing that does not cost them their place."""
        if count:
            self.counts.warnings[warning] += count

    def add(self, more: SplitStatistics) -> None:
        """Add the statistics of further rows of the same split."""
        self.counts.add(more.counts)
        self.outcomes += more.outcomes

    def state_dict(self) -> dict[str, object]:
        """The statistics as JSON types, for `from_state_dict`."""
        return {"counts": self.counts.state_dict(), "outcomes": [asdict(row) for row in self.outcomes]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> SplitStatistics:
        """The statistics that `state_dict` describes; the names of earlier versions are understood."""
        counts, outcomes = state.get("counts") or state["totals"], state.get("outcomes", state.get("fates"))  # old name
        return cls(RowCounts.from_state_dict(counts), [outcome_of(row) for row in outcomes or ()])


class NoRowsLeftError(DataError):
    """Every row of a split was dropped."""

    statistics: DatasetStatistics | None = None
    """What became of the rows of all splits."""


@dataclass(frozen=True)
class DatasetStatistics:
    """The statistics of all splits."""

    splits: tuple[SplitStatistics, ...]

    def lines(self) -> list[str]:
        """The statistics as text for the console."""
        return [line for split in self.splits for line in split.counts.lines()]

    def report(self) -> list[SplitReport]:
        """The statistics as JSON types."""
        return [split.counts.report() for split in self.splits]

    def check(self, max_lost_fraction: float) -> None:
        """Raise DataError if a split has no row left, or if more than `max_lost_fraction` of its rows are invalid."""
        for split in self.splits:
            try:
                split.counts.check(max_lost_fraction)
            except NoRowsLeftError as error:
                error.statistics = self
                raise

    def write(self, directory: str | Path) -> None:
        """Write `data_report.json` with all counts and `rejects.jsonl` with each truncated or dropped row."""
        write_report(Path(directory), self.report())
        _write_atomically(
            Path(directory) / REJECTS_NAME, "".join(line for split in self.splits for line in reject_lines(split))
        )


def raise_bad_rows(problems: Sequence[Problem]) -> None:
    """Raise DataError with the first problems and their number, if there are any."""
    if not problems:
        return
    # Rows that are wrong in the same way count as one: the kinds of errors fit on a screen.
    groups: dict[tuple[str, str | None, str | None], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.message, problem.location.file, problem.location.key), []).append(problem)
    listed = [_first_of(rows) for rows in list(groups.values())[:MAX_SHOWN]]
    rest = len(groups) - len(listed)
    summary = f"{counted(len(problems), 'bad row')}" + (f", the first {MAX_SHOWN} kinds shown" if rest else "")
    listed.append(Problem(f"{summary}. Set data_conf.on_bad_row: skip to drop and count bad rows."))
    raise DataError(listed)


def _first_of(problems: Sequence[Problem]) -> Problem:
    """Return the first of equal problems, with the number of their rows."""
    first, number = problems[0], len(problems)
    return first if number == 1 else replace(first, message=f"{first.message} ({counted(number, 'row')} like this)")


def write_report(folder: Path, report: list[SplitReport]) -> None:
    """Write `data_report.json` atomically."""
    _write_atomically(folder / REPORT_NAME, redacted_json(report, indent=2, ensure_ascii=False) + "\n")


def reject_lines(split: SplitStatistics) -> Iterator[str]:
    """The lines of `rejects.jsonl` for the rows of a split that were truncated or dropped."""
    for row in split.outcomes:
        values = {
            "file": row.location.file,
            "line": row.location.line,
            "element": row.location.element,
            "key": row.location.key,
            "split": split.split,
            "outcome": row.outcome,
            "reason": row.reason,
            "detail": row.detail,
            "tokens": row.tokens,
            "tokens_cut": row.tokens_cut,
            "invalid": row.is_invalid,
        }
        present = {key: value for key, value in values.items() if value not in (None, "", 0)}
        yield redacted_json(present, ensure_ascii=False) + "\n"


def _write_atomically(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.partial")
    with open(staging, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(staging, path)


@dataclass(frozen=True)
class PaddingStats:
    """How full the batches of a run are: padded, padding-free and packed."""

    rows: int
    packs: int | None
    """Number of packs; None where rows are not packed."""
    filled: float | None
    """Share of the packs' capacity that is used."""
    padded: float
    """Share of tokens that are not padding in random batches that are padded to their longest row."""

    def __str__(self) -> str:
        if self.packs is None:
            return f"padding-free; padding would be {1 - self.padded:.0%} of a padded batch"
        packs = f"{self.rows:,} rows in {self.packs:,} packs, {self.filled:.1%} full"
        return f"{packs}; padding would be {1 - self.padded:.0%} of a padded batch"


def padding_stats(dataset: datasets.Dataset, capacity: int, batch_size: int) -> PaddingStats:
    """Statistics for batches of `batch_size` rows; `capacity` is that of packs."""
    lengths = row_lengths(dataset)
    packed = "lengths" in dataset.column_names
    filled = float(lengths.sum() / (len(dataset) * capacity)) if packed else None
    return PaddingStats(len(lengths), len(dataset) if packed else None, filled, _padded_share(lengths, batch_size))


def _padded_share(lengths: np.ndarray, batch_size: int) -> float:
    order = np.random.default_rng(0).permutation(len(lengths))
    starts = np.arange(0, len(lengths), batch_size)
    longest = np.maximum.reduceat(lengths[order], starts)
    sizes = np.diff(np.append(starts, len(lengths)))
    return float(lengths.sum() / (longest * sizes).sum())
