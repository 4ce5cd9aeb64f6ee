"""What `finetuning data doctor` concludes from its measures: a verdict on each property of the data, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from finetuning.config.sections.data import AutoSplit, DataConfig, NoData
from finetuning.data.chat.end_of_turn import EndOfTurnFinder
from finetuning.data.chat.template import TemplateRenderer, TemplateRenderError
from finetuning.data.doctor import measures as m
from finetuning.data.doctor.measures import MAX_WORST, Measures, Worst
from finetuning.data.doctor.minhash import near_duplicates
from finetuning.data.samples import Message
from finetuning.data.statistics import TOO_LONG, RowOutcome, SplitStatistics, counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_BARS = 24
_MANY = 0.01
"""Share of the rows from which on duplicates and repeated questions deserve a look."""
_LENGTH_BIAS = 0.7
_MIN_PAIRS = 20
_BALANCE = (0.25, 4.0)
"""Desirable per undesirable rows that need no weights."""
_DENSE = 0.4
"""Of the median of characters per token: rows below are split unusually."""


THE_FILE = "the file"
"""What to change where no key of the config helps."""


class Verdict(StrEnum):
    """What to do about a property of the data."""

    OK = "OK"
    LOOK = "look"
    STOP = "stop"


@dataclass(frozen=True)
class Finding:
    """A property of the data, what was found, and the key that changes it."""

    title: str
    verdict: Verdict
    text: str
    key: str = ""
    rows: tuple[Worst, ...] = ()
    """The worst rows, worst first."""

    @property
    def is_config_key(self) -> bool:
        """Whether `key` is in the config, and not the data itself."""
        return self.key != THE_FILE


@dataclass(frozen=True)
class Histogram:
    """Rows by their number of tokens, in bars of equal width; the last one holds all longer rows."""

    bars: tuple[int, ...]
    width: int
    limit: int | None

    @property
    def longest_bar(self) -> int:
        return max(self.bars, default=0)


@dataclass(frozen=True)
class Examined:
    """All rows of a run, measured."""

    data_conf: DataConfig
    limit: int | None
    limit_key: str
    splits: Mapping[str, Measures]
    statistics: Mapping[str, SplitStatistics]
    template_notes: Sequence[tuple[Verdict, str]] = ()
    """What the chat template itself does that deserves a look."""
    was_scanned: bool = False
    """Whether the texts were searched for personal data."""
    empty_datasets: Sequence[str] = ()
    """Training datasets of which no row is left, where there are others."""

    @property
    def training(self) -> Measures:
        return self.splits.get("training", Measures())

    def outcomes(self) -> list[RowOutcome]:
        return [row for split in self.statistics.values() for row in split.outcomes]

    def worst(self, kind: str) -> tuple[Worst, ...]:
        """Return the worst rows of a kind, of all splits."""
        rows = [row for split in self.splits.values() for row in split.worst.get(kind, ())]
        return tuple(sorted(rows, reverse=True)[:MAX_WORST])

    def count(self, kind: str) -> int:
        return sum(split.counts[kind] for split in self.splits.values())


def histogram(lengths: NDArray[np.int64], limit: int | None) -> Histogram:
    """Return the distribution of lengths, up to twice the limit where there are longer rows."""
    longest = int(lengths.max(initial=1))
    end = min(longest, 2 * limit) if limit else longest
    width = max(1, -(-end // NUM_BARS))
    bars = np.bincount(np.minimum((lengths - 1) // width, NUM_BARS - 1), minlength=NUM_BARS)
    used = max(1, int(np.flatnonzero(bars).max(initial=0)) + 1)
    return Histogram(tuple(bars[:used].tolist()), width, limit)


def all_findings(examined: Examined) -> list[Finding]:
    """Return a finding for each property that the rows have, those to stop at first."""
    # Where no row is left to train on, there is nothing to say about those that are.
    checks = _CHECKS if examined.training.rows else _CHECKS_OF_INPUT
    findings = [finding for check in checks for finding in check(examined)]
    order = [Verdict.STOP, Verdict.LOOK, Verdict.OK]
    return sorted(findings, key=lambda finding: order.index(finding.verdict))


def _finding(
    title: str, count: int, total: int, text: str, *, bad: str, key: str, rows: Sequence[Worst] = (), many: float = 0.0
) -> Finding:
    """Return a finding that is OK where at most a share `many` of the rows has a property."""
    if not count:
        return Finding(title, Verdict.OK, f"no row {text}")
    verdict = Verdict.LOOK if count > many * total else Verdict.OK
    rest = text if count == 1 else bad
    return Finding(
        title, verdict, f"{counted(count, 'row')} of {total} ({count / max(total, 1):.1%}) {rest}", key, tuple(rows)
    )


def _rows(examined: Examined) -> int:
    """Return the number of input rows. Those of a split by a fraction are counted where they were read."""
    return sum(split.counts.rows for name, split in examined.statistics.items() if name in examined.splits)


def _invalid_rows(examined: Examined) -> Finding:
    invalid = [row for row in examined.outcomes() if row.is_invalid]
    total = _rows(examined)
    conf = examined.data_conf
    empty = [name for name, split in examined.statistics.items() if split.counts.rows and not split.counts.kept]
    if empty:
        lost = [row for name in empty for row in examined.statistics[name].outcomes]
        reasons = Counter(row.reason for row in lost)
        text = f"no {' and no '.join(empty)} row is left of {counted(total, 'row')}: " + ", ".join(
            f"{reason} ({count})" for reason, count in reasons.most_common()
        )
        key = examined.limit_key if reasons.keys() == {TOO_LONG} else THE_FILE
        return Finding("Rows", Verdict.STOP, text, key, tuple(_lost(row) for row in lost[:MAX_WORST]))
    if not invalid:
        return Finding("Rows", Verdict.OK, f"all of {counted(total, 'row')} can be read")
    stops = conf.on_bad_row == "error" or len(invalid) > conf.max_lost_fraction * total
    key = (
        "data_conf.on_bad_row: skip"
        if len(invalid) <= conf.max_lost_fraction * total
        else "data_conf.max_lost_fraction"
    )
    text = f"{counted(len(invalid), 'row')} of {total} ({len(invalid) / total:.1%}) cannot be trained on"
    verdict = Verdict.STOP if stops else Verdict.LOOK
    return Finding("Rows", verdict, text, key, tuple(_lost(row) for row in invalid[:MAX_WORST]))


def _empty_datasets(examined: Examined) -> Finding | None:
    if not examined.empty_datasets:
        return None
    text = f"every row of {' and of '.join(examined.empty_datasets)} was dropped"
    return Finding("Datasets", Verdict.STOP, text, "data_conf.training_data")


def _lost(row: RowOutcome) -> Worst:
    return Worst(0, row.location, f"{row.reason}: {row.detail}" if row.detail else row.reason)


def _lengths(examined: Examined) -> Finding | None:
    lengths = m.joined(examined.training.lengths)
    if not len(lengths):
        return None
    middle, high = np.percentile(lengths, [50, 99]).astype(int).tolist()
    text = f"half of the rows have up to {middle} tokens, 99 % up to {high}, the longest has {int(lengths.max())}"
    limit = examined.limit
    over = [row for row in examined.outcomes() if row.tokens_cut or row.reason == TOO_LONG]
    if limit is None or not over:
        return Finding(
            "Lengths", Verdict.OK, f"{text}; {'no limit is set' if limit is None else f'all fit into {limit}'}"
        )
    cut = sum(row.tokens_cut for row in over)
    answers = sum(row.answer_cut for row in over)
    dropped = sum(row.reason == TOO_LONG for row in over)
    what = [f"{counted(dropped, 'row')} dropped"] if dropped else []
    what += [f"{counted(cut, 'token')} cut off, of {counted(answers, 'answer')} the end"] if cut else []
    worst = sorted(over, key=lambda row: row.tokens + row.tokens_cut, reverse=True)[:MAX_WORST]
    rows = tuple(Worst(0, row.location, f"{row.tokens + row.tokens_cut} tokens") for row in worst)
    share = len(over) / max(_rows(examined), 1)
    verdict = Verdict.LOOK if share > _MANY or answers else Verdict.OK
    text = f"{text}; {counted(len(over), 'row')} ({share:.1%}) longer than {limit}: {', '.join(what)}"
    return Finding("Lengths", verdict, text, examined.limit_key, rows)


def _unused(examined: Examined) -> Finding:
    notes = [
        f"{warning} ({counted(count, 'row')})"
        for split in examined.statistics.values()
        for warning, count in sorted(split.counts.warnings.items())
        if " is not used" in warning
    ]
    if not notes:
        return Finding("Unused columns", Verdict.OK, "every column and key is used")
    return Finding("Unused columns", Verdict.LOOK, "; ".join(notes), "ignore_columns")


def _other_warnings(examined: Examined) -> Finding | None:
    notes = [
        f"{warning} ({counted(count, 'row')})"
        for split in examined.statistics.values()
        for warning, count in sorted(split.counts.warnings.items())
        if " is not used" not in warning and not warning.startswith("the same as")
    ]
    return Finding("Notes on rows", Verdict.LOOK, "; ".join(notes)) if notes else None


def _images(examined: Examined) -> Finding | None:
    """Say how many images the rows have, and how large they are; broken ones are among the invalid rows."""
    batches = [batch for batch in examined.training.images if len(batch)]
    if not batches:
        return None
    sizes = np.concatenate(batches)
    with_images = sum(len(np.unique(batch[:, 0])) for batch in batches)
    most = max(int(np.unique(batch[:, 0], return_counts=True)[1].max()) for batch in batches)
    edges = sizes[:, 1:]
    smallest, middle, largest = edges[np.argsort(edges.prod(axis=1))][[0, len(edges) // 2, -1]].tolist()
    described = f"{counted(len(sizes), 'image')} in {counted(with_images, 'row')} of {examined.training.rows}"
    described += f", at most {most} in one; from {smallest[0]} x {smallest[1]} to {largest[0]} x {largest[1]} pixels"
    return Finding("Images", Verdict.OK, f"{described}, the median has {middle[0]} x {middle[1]}", "data_conf.images")


def _turns(examined: Examined) -> Finding | None:
    turns = examined.training.turns
    if not turns:
        return None
    parts = [f"{number}: {counted(count, 'row')}" for number, count in sorted(turns.items())[:MAX_WORST]]
    return Finding("Turns", Verdict.OK, f"answers per chat: {', '.join(parts)}")


def _scripts(examined: Examined) -> Finding | None:
    scripts = examined.training.scripts
    total = scripts.total()
    if not total:
        return None
    parts = [f"{name} {count / total:.1%}" for name, count in scripts.most_common(MAX_WORST)]
    return Finding("Scripts", Verdict.OK, ", ".join(parts))


def _exact_duplicates(examined: Examined) -> Finding:
    training = examined.training
    hashes = m.joined(training.hashes)
    _, firsts, inverse, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    copies = np.flatnonzero(firsts[inverse] != np.arange(len(hashes)))
    worst: list[Worst] = []
    for group in np.argsort(counts, kind="stable")[::-1][:MAX_WORST]:
        if counts[group] > 1:
            detail = f"the same text as {counted(int(counts[group]) - 1, 'other row')}"
            worst.append(Worst(float(counts[group]), training.locations[firsts[group]], detail))
    return _finding(
        "Duplicates", len(copies), len(hashes), "is the same as another",
        bad="are the same as an earlier row: they are trained on as often as they occur", key=THE_FILE, rows=worst,
        many=_MANY,
    )  # fmt: skip


def _near_duplicates(examined: Examined) -> Finding:
    training = examined.training
    near = near_duplicates(m.joined_signatures(training), m.joined(training.hashes))
    order = np.argsort(near.similarities, kind="stable")[::-1][:MAX_WORST]
    worst = [
        Worst(
            float(near.similarities[index]),
            training.locations[near.rows[index]],
            f"about {near.similarities[index]:.0%} of the words as in {training.locations[near.originals[index]]}",
        )
        for index in order.tolist()
    ]
    return _finding(
        "Near duplicates", len(near.rows), training.rows, "is nearly the same as another",
        bad="are nearly the same as an earlier row", key=THE_FILE, rows=worst, many=_MANY,
    )  # fmt: skip


def _leaks(examined: Examined) -> Finding | None:
    conf = examined.data_conf.validation_data
    if isinstance(conf, NoData):
        return None
    statistics = examined.statistics.get("validation")
    total = statistics.counts.kept if statistics else 0
    exact = statistics.counts.warnings["the same as a training row"] if statistics else 0
    validation = examined.splits.get("validation")
    near = 0
    worst: list[Worst] = []
    if validation is not None:
        training = examined.training
        values = np.concatenate([m.joined_signatures(training), m.joined_signatures(validation)])
        hashes = np.concatenate([m.joined(training.hashes), m.joined(validation.hashes)])
        pairs = near_duplicates(values, hashes)
        locations = [*training.locations, *validation.locations]
        is_leak = (pairs.rows >= training.rows) & (pairs.originals < training.rows)
        near = int(is_leak.sum())
        for index in np.flatnonzero(is_leak)[:MAX_WORST]:
            detail = f"about {pairs.similarities[index]:.0%} of the words as in {locations[pairs.originals[index]]}"
            worst.append(Worst(float(pairs.similarities[index]), locations[pairs.rows[index]], detail))
    if not exact and not near:
        return Finding("Validation rows", Verdict.OK, f"none of {counted(total, 'row')} is a training row")
    text = f"{counted(exact, 'row')} of {total} are training rows, too" + (f", {near} more nearly so" if near else "")
    key = "data_conf.validation_data"
    if isinstance(conf, AutoSplit):
        text += ": copies of a row are on both sides of a random split"
    verdict = Verdict.LOOK if exact + near <= 0.1 * max(total, 1) else Verdict.STOP
    return Finding("Validation rows", verdict, text, key, tuple(sorted(worst, reverse=True)))


def _pairs(examined: Examined) -> list[Finding]:
    pairs = examined.training.pairs
    if not pairs:
        return []
    chosen, rejected = np.concatenate(pairs).T
    same = [row for row in examined.outcomes() if row.reason == "the chosen and the rejected answer are the same"]
    findings = [
        _finding(
            "Equal pairs", len(same), _rows(examined), "has two equal answers", bad="have two equal answers",
            key=THE_FILE, rows=[Worst(0, row.location, row.reason) for row in same[:MAX_WORST]],
        ),
        _finding(
            "Empty answers", examined.count(m.EMPTY), _rows(examined), "has an empty answer",
            bad="have an empty answer", key=THE_FILE, rows=examined.worst(m.EMPTY),
        ),
    ]  # fmt: skip
    longer = float((chosen > rejected).mean() + (chosen == rejected).mean() / 2)
    ratio = chosen.mean() / rejected.mean()
    text = f"the chosen answer is the longer one in {longer:.0%} of the pairs, {ratio:.2f} times as long"
    is_biased = len(chosen) >= _MIN_PAIRS and not 1 - _LENGTH_BIAS <= longer <= _LENGTH_BIAS
    if is_biased:
        text += (
            f": the model can learn to write {'longer' if longer > 0.5 else 'shorter'} answers instead of better ones"
        )
    verdict = Verdict.LOOK if is_biased else Verdict.OK
    return [*findings, Finding("Length of answers", verdict, text, "training_args.loss_type" if is_biased else "")]


def _classes(examined: Examined) -> Finding | None:
    labels = examined.training.labels
    if not labels:
        return None
    desirable, undesirable = labels[True], labels[False]
    text = f"{counted(desirable, 'desirable row')}, {undesirable} undesirable"
    if not desirable or not undesirable:
        return Finding("Labels", Verdict.LOOK, f"{text}: KTO learns from the contrast of both", THE_FILE)
    if _BALANCE[0] <= desirable / undesirable <= _BALANCE[1]:
        return Finding("Labels", Verdict.OK, text)
    name = "undesirable_weight" if desirable > undesirable else "desirable_weight"
    ratio = max(desirable, undesirable) / min(desirable, undesirable)
    return Finding("Labels", Verdict.LOOK, f"{text}: weigh the rarer ones {ratio:.1f} times", f"training_args.{name}")


def _calls(examined: Examined) -> Finding:
    return _finding(
        "Tool calls", examined.count(m.BAD_CALL), _rows(examined), "calls a tool against its schema",
        bad="call tools against their schemas", key=THE_FILE, rows=examined.worst(m.BAD_CALL),
    )  # fmt: skip


def _repeated(examined: Examined) -> Finding:
    return _finding(
        "Repeated questions", examined.count(m.REPEATED), _rows(examined), "repeats its question in the answer",
        bad="repeat the question in the answer", key=THE_FILE, rows=examined.worst(m.REPEATED), many=_MANY,
    )  # fmt: skip


def _tokens(examined: Examined) -> Finding:
    training = examined.training
    density = np.concatenate(training.densities) if training.densities else np.empty(0)
    median = float(np.median(density)) if len(density) else 0.0
    unusual = np.flatnonzero((density < _DENSE * median) & (density > 0))
    order: list[int] = unusual[np.argsort(density[unusual], kind="stable")][:MAX_WORST].tolist()
    worst = [
        Worst(-float(density[index]), training.locations[index], f"{density[index]:.1f} characters per token")
        for index in order
    ]
    unknown = examined.count(m.UNKNOWN)
    text = f"{median:.1f} characters per token in the middle row"
    if unknown:
        text = f"{counted(unknown, 'row')} with characters that the tokenizer does not know; {text}"
        return Finding("Tokens", Verdict.LOOK, text, "run_conf.tokenizer", examined.worst(m.UNKNOWN))
    if not len(unusual):
        return Finding("Tokens", Verdict.OK, text)
    text += f"; {counted(len(unusual), 'row')} with less than {_DENSE * median:.1f}"
    verdict = Verdict.LOOK if len(unusual) > _MANY * training.rows else Verdict.OK
    return Finding("Tokens", verdict, text, THE_FILE, tuple(worst))


def _double_bos(examined: Examined) -> Finding:
    return _finding(
        "Beginning of sequence", examined.count(m.DOUBLE_BOS), _rows(examined), "begins with two BOS tokens",
        bad="begin with two BOS tokens", key="data_conf.chat_template", rows=examined.worst(m.DOUBLE_BOS),
    )  # fmt: skip


def _ends(examined: Examined) -> Finding:
    return _finding(
        "End of answers", examined.count(m.NO_END), _rows(examined), "ends without a token at which generation stops",
        bad="end without a token at which generation stops: the model does not learn to stop",
        key="add_eos_token or data_conf.chat_template", rows=examined.worst(m.NO_END),
    )  # fmt: skip


def _template(examined: Examined) -> Finding | None:
    # A run on plain texts does not use the template.
    if not examined.template_notes or not (
        examined.training.turns or examined.training.pairs or examined.training.labels
    ):
        return None
    verdicts = {verdict for verdict, _ in examined.template_notes}
    verdict = next(verdict for verdict in (Verdict.STOP, Verdict.LOOK, Verdict.OK) if verdict in verdicts)
    return Finding(
        "Chat template", verdict, "; ".join(text for _, text in examined.template_notes), "data_conf.chat_template"
    )


def _pii(examined: Examined) -> Finding | None:
    total = sum((split.pii for split in examined.splits.values()), start=type(examined.training.pii)())
    if not total:
        return Finding("Personal data", Verdict.OK, "none was found") if examined.was_scanned else None
    parts = [f"{count} x {kind}" for kind, count in total.most_common()]
    text = f"{counted(examined.count(m.PII), 'row')} with what looks like personal data: {', '.join(parts)}"
    return Finding("Personal data", Verdict.LOOK, text, THE_FILE, examined.worst(m.PII))


def _single(check: Callable[[Examined], Finding | None]) -> Callable[[Examined], list[Finding]]:
    return lambda examined: [finding] if (finding := check(examined)) is not None else []


_CHECKS_OF_INPUT = tuple(map(_single, (_invalid_rows, _empty_datasets, _lengths)))
_CHECKS: tuple[Callable[[Examined], list[Finding]], ...] = (
    *_CHECKS_OF_INPUT,
    *map(_single, (_unused, _other_warnings, _leaks, _exact_duplicates, _near_duplicates)),
    _pairs,
    *map(
        _single, (_classes, _calls, _repeated, _ends, _double_bos, _template, _tokens, _pii, _images, _turns, _scripts)
    ),
)
"""The checks, in the order in which findings of one verdict are listed."""


def lint_template(finder: EndOfTurnFinder, renderer: TemplateRenderer) -> list[tuple[Verdict, str]]:
    """Return what a chat template does with an example: how it ends turns, and whether it rewrites earlier ones."""
    if not finder.end_of_turn:
        return [(Verdict.STOP, "no end of a turn is found in it, so the model cannot learn to stop")]
    notes = [(Verdict.OK, f"turns end with {' or '.join(map(repr, finder.stops))}")]
    question: Message = {"role": "user", "content": "first"}
    for content, what in (("second", "answers"), ("<think>\nwhy\n</think>\n\nsecond", "the reasoning of answers")):
        chat = [question, {"role": "assistant", "content": content}]
        try:
            before, after = renderer.text(chat), renderer.text([*chat, question])
        except TemplateRenderError:
            continue
        end = before.rfind("second") + len("second")
        if not after.startswith(before[:end]):
            notes.append((Verdict.LOOK, f"it rewrites {what} once another message follows, also when it is served"))
            break
    return notes
