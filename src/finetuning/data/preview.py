"""A preview of the first rows as the model sees them, with the trained tokens marked: as text and as an HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise

import numpy as np

from finetuning.config.redaction import redact_texts
from finetuning.data.collators import UNTRAINED
from finetuning.data.processors.base import TokenizedSample
from finetuning.data.tokenization.labels import LabelBuilder
from finetuning.errors import Location

_OPEN, _CLOSE = "⟦", "⟧"
_GREEN, _DIM, _RESET, _REVERSE, _FORWARD = "\x1b[32m", "\x1b[2m", "\x1b[0m", "\x1b[7m", "\x1b[27m"
_CUT = "✂"
_HEADING = re.compile(
    r"^--- (?P<file>.*?)(?::(?P<line>\d+))? \((?P<title>[^()\n]*)\): (?P<tokens>\d+) tokens, (?P<trained>\d+) trained"
    r"(?:, (?P<cut>\d+) tokens cut off)?$",
    re.MULTILINE,
)
_IMAGE = re.compile(r"\nimage: (.+)")
_REPEATED = re.compile(r"(<[^<>\s]{1,40}>|\[[A-Z_]{1,20}\])\1{3,}")


@dataclass(frozen=True)
class PreviewRow:
    """One row as segments of text, each trained or not. `title` names the part of a row that has several."""

    location: Location
    title: str
    segments: tuple[tuple[str, bool], ...]
    tokens: int
    trained: int
    tokens_cut: int = 0
    system: str | None = None
    """The text of its system message."""
    images: tuple[str, ...] = ()
    """Its images: the file of each, or that the row holds it, and its size in pixels."""
    pictures: tuple[str, ...] = ()
    """Small pictures of those that the row itself holds, as `data:` URIs; empty for files."""


def preview_of(
    sample: TokenizedSample, location: Location, label_builder: LabelBuilder, system: str | None = None
) -> list[PreviewRow]:
    """Decode a sample from its token ids. Secrets in its text are redacted.

    Gives one row for SFT, KTO and GRPO, and two for preferences: chosen and rejected.

    Args:
        system: the text of the row's system message; what writes it redacts it.
    """
    rows = [replace(row, system=system) for row in _decoded(sample, location, label_builder)]
    references = sample.columns.get("images")
    if not isinstance(references, str) or not references:
        return rows
    from finetuning.data.images.files import read_references
    from finetuning.data.images.thumbnails import image_label, thumbnail

    images = read_references(references)
    labels, pictures = tuple(map(image_label, images)), tuple(map(thumbnail, images))
    return [
        replace(row, segments=tuple(map(_shortened, row.segments)), images=labels, pictures=pictures) for row in rows
    ]


def _shortened(segment: tuple[str, bool]) -> tuple[str, bool]:
    """Return a segment in which a token that is repeated many times, as those of images are, is written once."""
    return _REPEATED.sub(lambda match: f"{match[1]}×{len(match[0]) // len(match[1])}", segment[0]), segment[1]


def shared_system_prompt(rows: Sequence[PreviewRow]) -> str | None:
    """Return the system prompt that all rows have; None if they have different ones, or one has none."""
    prompts = {row.system for row in rows}
    return prompts.pop() if len(prompts) == 1 else None


def _decoded(sample: TokenizedSample, location: Location, label_builder: LabelBuilder) -> list[PreviewRow]:
    columns = sample.columns
    if "labels" in columns:
        mask = columns["labels"] != UNTRAINED
        return [_row(location, "row", columns["input_ids"], mask, sample.tokens_cut, label_builder)]
    prompt = columns["prompt_ids"]
    if "completion_ids" in columns:
        answers = {"desirable" if columns["label"] else "undesirable": columns["completion_ids"]}
    elif "chosen_ids" in columns:
        answers = {"chosen": columns["chosen_ids"], "rejected": columns["rejected_ids"]}
    else:
        answers = {"prompt": prompt[:0]}
    rows: list[PreviewRow] = []
    for name, answer in answers.items():
        mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
        rows.append(_row(location, name, np.concatenate([prompt, answer]), mask, sample.tokens_cut, label_builder))
    return rows


def _row(
    location: Location, title: str, ids: np.ndarray, mask: np.ndarray, tokens_cut: int, label_builder: LabelBuilder
) -> PreviewRow:
    boundaries = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1).tolist(), len(ids)]
    spans = [(start, end) for start, end in pairwise(boundaries) if end > start]
    texts = redact_texts(label_builder.decode(ids[start:end].tolist()) for start, end in spans)
    segments = tuple((text, bool(mask[start])) for text, (start, _) in zip(texts, spans, strict=True))
    return PreviewRow(location, title, segments, len(ids), int(mask.sum()), tokens_cut)


def to_text(rows: Sequence[PreviewRow], *, color: bool = False, special_tokens: Sequence[str] = ()) -> str:
    """The rows as text: trained text in ⟦ ⟧, or in green with special tokens in reverse video if `color` is set."""
    opening, closing = (_RESET + _GREEN, _RESET + _DIM) if color else (_OPEN, _CLOSE)
    special = pattern_of(special_tokens) if color else None
    parts: list[str] = []
    for row in rows:
        body = ""
        for text, trained in row.segments:
            styled = special.sub(rf"{_REVERSE}\g<0>{_FORWARD}", text) if special else text
            body += f"{opening}{styled}{closing}" if trained else styled
        cut = f"{_CUT} {row.tokens_cut} tokens cut off here" if row.tokens_cut else ""
        images = "".join(f"image: {image}\n" for image in row.images)
        parts.append(f"--- {head_of(row)}\n{images}{_DIM + body + _RESET if color else body}{cut}\n")
    return "\n".join(parts)


def parse_text(text: str) -> list[PreviewRow]:
    """Read the rows that `to_text` wrote without color, but for line breaks at the end of a row.

    A marker in the text of a row is taken for one of ours.
    """
    headings = list(_HEADING.finditer(text))
    ends = [*(heading.start() for heading in headings[1:]), len(text)][: len(headings)]
    rows: list[PreviewRow] = []
    for heading, end in zip(headings, ends, strict=True):
        location = Location(file=heading["file"], line=int(heading["line"]) if heading["line"] else None)
        counts = int(heading["tokens"]), int(heading["trained"]), int(heading["cut"] or 0)
        position, images = heading.end(), list[str]()
        while match := _IMAGE.match(text, position, end):
            images.append(match[1])
            position = match.end()
        body = text[position:end].strip("\n")
        row = PreviewRow(location, heading["title"], tuple(_marked_segments(body)), *counts, images=tuple(images))
        rows.append(row)
    return rows


def _marked_segments(body: str) -> Iterator[tuple[str, bool]]:
    trained = False
    for part in re.split(f"([{_OPEN}{_CLOSE}])", body):
        if part in (_OPEN, _CLOSE):
            trained = part == _OPEN
        elif part:
            yield part, trained


def head_of(row: PreviewRow) -> str:
    """The heading of a row: its location and its counts."""
    cut = f", {row.tokens_cut} tokens cut off" if row.tokens_cut else ""
    return f"{row.location} ({row.title}): {row.tokens} tokens, {row.trained} trained{cut}"


def pattern_of(special_tokens: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern that matches special tokens, longest first; None if there are none."""
    names = sorted(filter(None, special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def to_html(
    rows: Sequence[PreviewRow], title: str, facts: Sequence[tuple[str, str]], special_tokens: Sequence[str]
) -> str:
    """A self-contained HTML page; `facts` are (name, value) pairs shown above the rows."""
    page = resources.files("finetuning.data").joinpath("preview.html").read_text("utf-8")
    listed = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts)
    values = {
        "title": html.escape(title),
        "facts": listed,
        "count": str(len(rows)),
        "rows": "\n".join(_html_row(row, special_tokens) for row in rows),
    }
    for name, value in values.items():
        page = page.replace(f"<!--{name}-->", value)
    return page


def _html_row(row: PreviewRow, special_tokens: Sequence[str]) -> str:
    share = f"{row.trained / row.tokens:.0%}" if row.tokens else "0%"
    body = "".join(
        f'<span class="trained">{_text(text, special_tokens)}</span>' if trained else _text(text, special_tokens)
        for text, trained in row.segments
    )
    cut = f'<span class="cut">✂ {row.tokens_cut:,} tokens cut off here</span>' if row.tokens_cut else ""
    return (
        f'<article><header><b>{html.escape(str(row.location))}</b><span class="kind">{html.escape(row.title)}</span>'
        f'<span class="count">{row.tokens:,} tokens</span>'
        f'<span class="count on">{row.trained:,} trained · {share}</span>'
        f"</header>{_html_pictures(row)}<pre>{body}{cut}</pre></article>"
    )


def _html_pictures(row: PreviewRow) -> str:
    if not row.images:
        return ""
    from finetuning.data.images.thumbnails import thumbnail_of_label

    pictures = "".join(
        f'<figure><img src="{html.escape(picture or thumbnail_of_label(label))}" alt="">'
        f"<figcaption>{html.escape(label)}</figcaption></figure>"
        for label, picture in zip(row.images, row.pictures, strict=True)
    )
    return f'<div class="pictures">{pictures}</div>' if pictures else ""


def _text(text: str, special_tokens: Sequence[str]) -> str:
    pattern = pattern_of(special_tokens)
    if pattern is None:
        return html.escape(text)
    parts: list[str] = []
    position = 0
    for match in pattern.finditer(text):
        parts.append(html.escape(text[position : match.start()]))
        parts.append(f'<span class="special">{html.escape(match.group())}</span>')
        position = match.end()
    return "".join([*parts, html.escape(text[position:])])
