"""The tokens of many texts, end to end, and where spans of characters lie among them, by the bytes of each token.

Positions are counted for all texts at once: characters to bytes, bytes to tokens. A span is exact where a token begins
at its first byte and one ends at its last.

The bytes that each token stands for, where a tokenizer loses none: a proof of where every token lies in a text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from finetuning.data.collators import UNTRAINED
from finetuning.data.samples import Span

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NO_TEXT = b"\xff"
"""A byte that no UTF-8 text holds, for tokens that stand for none."""
_SPACE = "▁"
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Bytes by token.

    A text whose bytes are those of its tokens, one after another, is cut between tokens at exactly the sums of their
    lengths: no offsets are asked for, and what a run of tokens spells needs no decoding.
    """

    def __init__(self, tokens: list[bytes]):
        self._tokens = np.empty(len(tokens), dtype=object)
        self._tokens[:] = tokens
        self.sizes = np.array([len(one) for one in tokens], dtype=np.int64)
        """Bytes of each token, by id."""

    def spells(self, ids: np.ndarray, text: bytes) -> bool:
        """Whether the tokens are the text, byte for byte."""
        return b"".join(self._tokens[ids].tolist()) == text


def token_bytes_of(backend: Tokenizer) -> TokenBytes | None:
    """The bytes of each token; None where the tokenizer does not decode token by token, byte by byte."""
    bytes_of = _reading(backend)
    if bytes_of is None:
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = [_NO_TEXT] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        tokens[index] = bytes_of(token) or _NO_TEXT
    for index, token in backend.get_added_tokens_decoder().items():
        tokens[index] = _NO_TEXT if _SPACE in token.content else token.content.encode() or _NO_TEXT
    return TokenBytes(tokens)


def _reading(backend: Tokenizer) -> Callable[[str], bytes] | None:
    """What a token's name says of its bytes, by the tokenizer's decoder.

    A decoder that strips a space does so where a text begins: tokens spell it with that space, or without.
    """
    if backend.decoder is None:
        return None
    state = json.loads(backend.decoder.__getstate__())
    steps = state.get("decoders", [state]) if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _by_byte_level
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        replaced = steps[0]["pattern"] == {"String": _SPACE} and steps[0]["content"] == " "
        return _by_pieces if replaced else None
    return None


def _by_byte_level(token: str) -> bytes:
    try:
        return token.translate(_byte_table()).encode("latin-1")
    except UnicodeEncodeError:
        return b""


def _by_pieces(token: str) -> bytes:
    """Those of a SentencePiece vocabulary: words with marked spaces, and single bytes."""
    if byte := _BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE, " ").encode()


@cache
def _byte_table() -> dict[int, int]:
    """Characters that stand for bytes in a byte-level vocabulary, to those bytes; others to what is no byte.

    Source: bytes that are printable in Latin-1 stand for themselves, the others for the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: 0x10FFFF for byte in range(256)}
    table |= {byte: byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {256 + index: byte for index, byte in enumerate(others)}


_LAST_INSIDE = -65
"""The greatest byte, as a signed number, that is not the first of a character in UTF-8."""


@dataclass(frozen=True)
class TokenLayout:
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


def layout_tokens(
    texts: Sequence[str],
    rows: Iterable[Sequence[Sequence[int]]],
    spans: Iterable[Sequence[Span] | None],
    spelling: TokenBytes,
) -> TokenLayout:
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
    return TokenLayout(ids, labels, firsts, is_whole, kept, places, inside, is_met & (places[:, 0] < places[:, 1]))


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
