"""The tokens of many texts, end to end, and where spans of characters lie among them, by the bytes of each token.

Positions are counted for all texts at once: characters to bytes, bytes to tokens. A span is exact where a token begins
at its first byte and one ends at its last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from finetuning.data.chat.spans import Span
from finetuning.data.collators import UNTRAINED
from finetuning.data.tokenization.spelling import Spelling

_LAST_INSIDE = -65
"""The greatest byte, as a signed number, that is not the first of a character in UTF-8."""


@dataclass(frozen=True)
class Flat:
    """Texts by their tokens; those that the tokens do not spell byte for byte have no spans here."""

    ids: np.ndarray
    """int32, of all texts."""
    labels: np.ndarray
    """int32, the ids within spans, untrained elsewhere."""
    firsts: np.ndarray
    """Where each text begins among the ids, and where the last one ends."""
    is_whole: list[bool]
    """Of each text, whether its tokens spell it."""
    spans: list[Sequence[Span]]
    """Of each text, its spans of characters."""
    places: np.ndarray
    """Of each span of all texts, its first token and the token after its last, among all ids; (spans, 2)."""
    inside: np.ndarray
    """The same, counted from the beginning of the span's text."""
    is_exact: np.ndarray
    """Of each span, whether it is not empty and tokens begin and end where it does."""


def lay_out(
    texts: Sequence[str],
    rows: Iterable[Sequence[Sequence[int]]],
    spans: Iterable[Sequence[Span] | None],
    spelling: Spelling,
) -> Flat:
    """Texts with the ids of their tokens, which come in groups, and their spans; None for spans stands for all of a
    text, and counts as none here."""
    ids, firsts = _end_to_end(rows)
    begins = np.concatenate([[0], np.cumsum(spelling.sizes[ids])])
    encoded = [text.encode() for text in texts]
    limits = _sums(encoded)
    data = b"".join(encoded)
    is_whole = [True] * len(texts)
    if not np.array_equal(begins[firsts], limits) or not spelling.spells(ids, data):
        parts = [ids[first:end] for first, end in pairwise(firsts.tolist())]
        is_whole = [spelling.spells(part, one) for part, one in zip(parts, encoded, strict=True)]
    kept = [own if own and whole else () for own, whole in zip(spans, is_whole, strict=True)]
    owners = np.repeat(np.arange(len(texts)), [2 * len(one) for one in kept])
    borders = _in_bytes(texts, data, kept, owners) - limits[owners] + begins[firsts[owners]]
    places = np.searchsorted(begins, borders)
    is_met = (begins[places] == borders).reshape(-1, 2).all(axis=1)
    labels = _labels(ids, places)
    inside = (places - firsts[owners]).reshape(-1, 2)
    places = places.reshape(-1, 2)
    return Flat(ids, labels, firsts, is_whole, kept, places, inside, is_met & (places[:, 0] < places[:, 1]))


def _end_to_end(groups: Iterable[Sequence[Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all rows, and where each row begins among them; no group is held longer than it takes."""
    ids, firsts = [], [np.zeros(1, dtype=np.int64)]
    for rows in groups:
        own = _sums(rows)
        ids.append(np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(own[-1])))
        firsts.append(own[1:] + firsts[-1][-1])
    return np.concatenate(ids), np.concatenate(firsts)


def _sums(values: Sequence[Sized]) -> np.ndarray:
    """Where each value begins when all are laid end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(np.fromiter(map(len, values), dtype=np.int64, count=len(values)))])


def _in_bytes(texts: Sequence[str], data: bytes, spans: Sequence[Sequence[Span]], owners: np.ndarray) -> np.ndarray:
    """The borders of all spans as positions among the bytes of all texts."""
    borders = np.fromiter(chain.from_iterable(chain.from_iterable(spans)), dtype=np.int64, count=len(owners))
    characters = _sums(texts)
    borders += characters[owners]
    if characters[-1] == len(data):
        return borders
    starts = np.flatnonzero(np.frombuffer(data, dtype=np.int8) > _LAST_INSIDE)
    return np.append(starts, len(data))[borders]


def _labels(ids: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """The ids between each border of even number and the next, untrained elsewhere; borders ascend."""
    steps = np.zeros(len(ids) + 1, dtype=np.int8)
    np.add.at(steps, borders[::2], 1)
    np.subtract.at(steps, borders[1::2], 1)
    return np.where(np.cumsum(steps[:-1], dtype=np.int8) > 0, ids, np.int32(UNTRAINED))
