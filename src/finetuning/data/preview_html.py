"""The first rows as one HTML page that needs nothing else: to be scrolled, searched, and passed on."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources

from finetuning.data.preview import PreviewRow, pattern_of


def to_html(
    rows: Sequence[PreviewRow], title: str, facts: Sequence[tuple[str, str]], special_tokens: Sequence[str]
) -> str:
    """The page; `facts` stand above the rows, a name and a value each."""
    page = resources.files("finetuning.data").joinpath("preview.html").read_text("utf-8")
    listed = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts)
    values = {
        "title": html.escape(title),
        "facts": listed,
        "count": str(len(rows)),
        "rows": "\n".join(_row(row, special_tokens) for row in rows),
    }
    for name, value in values.items():
        page = page.replace(f"<!--{name}-->", value)
    return page


def _row(row: PreviewRow, special_tokens: Sequence[str]) -> str:
    share = f"{row.trained / row.tokens:.0%}" if row.tokens else "0%"
    body = "".join(
        f'<span class="trained">{_text(text, special_tokens)}</span>' if trained else _text(text, special_tokens)
        for text, trained in row.segments
    )
    cut = f'<span class="cut">✂ {row.tokens_cut:,} tokens cut off here</span>' if row.tokens_cut else ""
    return (
        f'<article><header><b>{html.escape(str(row.place))}</b><span class="kind">{html.escape(row.title)}</span>'
        f'<span class="count">{row.tokens:,} tokens</span>'
        f'<span class="count on">{row.trained:,} trained · {share}</span>'
        f"</header><pre>{body}{cut}</pre></article>"
    )


def _text(text: str, special_tokens: Sequence[str]) -> str:
    pattern = pattern_of(special_tokens)
    if pattern is None:
        return html.escape(text)
    parts, position = [], 0
    for match in pattern.finditer(text):
        parts.append(html.escape(text[position : match.start()]))
        parts.append(f'<span class="special">{html.escape(match.group())}</span>')
        position = match.end()
    return "".join([*parts, html.escape(text[position:])])
