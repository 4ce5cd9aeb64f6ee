"""What becomes of input rows, each told and all counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from finetuning.errors import DataError, Place, Problem

KEPT, TRUNCATED, DROPPED = "kept", "truncated", "dropped"
TOO_LONG = "longer than the limit"
SHOWN = 10
_FILTERED_WARNING = 0.05


@dataclass(frozen=True)
class Fate:
    """What became of one input row.

    `is_fault` tells a row that is lost to a fault from one that was filtered by length, as asked for.
    """

    place: Place
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
class Totals:
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
    firsts: dict[str, Fate] = field(default_factory=dict)
    """The first row that was dropped for each reason."""
    first_faults: list[Fate] = field(default_factory=list)

    def keep(self, tokens: int, trained: int) -> None:
        """Counts a row that is trained on."""
        self.rows += 1
        self.kept += 1
        self.tokens += tokens
        self.trained_tokens += trained

    def count(self, fate: Fate) -> None:
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

    def add(self, other: Totals) -> None:
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
            raise DataError(self._nothing_left(first), place=Place(file=first.place.file))
        if self.rows and self.faults > max_lost_fraction * self.rows:
            share = self.faults / self.rows
            head = Problem(
                f"{self.faults} of {self.rows} {self.part} rows ({share:.1%}) would be lost to faults,"
                f" more than data_conf.max_lost_fraction {max_lost_fraction:g}"
            )
            raise DataError([head, *(fate.problem() for fate in self.first_faults)])

    def _nothing_left(self, first: Fate) -> str:
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


def totals_of(values: dict[str, Any]) -> Totals:
    """Totals that `asdict` has made JSON of."""
    return Totals(
        **{
            **values,
            "dropped": Counter(values["dropped"]),
            "noticed": Counter(values["noticed"]),
            "firsts": {reason: fate_of(one) for reason, one in values["firsts"].items()},
            "first_faults": [fate_of(one) for one in values["first_faults"]],
        }
    )


def values_of(totals: Totals) -> dict[str, Any]:
    """The totals as JSON types."""
    return asdict(totals) | {"dropped": dict(totals.dropped), "noticed": dict(totals.noticed)}


def fate_of(values: dict[str, Any]) -> Fate:
    return Fate(**{**values, "place": Place(**values["place"])})


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
