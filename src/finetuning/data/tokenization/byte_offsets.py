"""Character spans to token positions by the bytes of each token, for a whole batch of texts at once.

A byte-level or byte-fallback tokenizer splits a text into tokens whose bytes, one after another, are those of the text.
Where that is verified, every token lies exactly at the sum of the sizes of the tokens before it, and a character span
maps to tokens by two array look-ups: characters to bytes, bytes to tokens. This needs neither the tokenizer's offsets,
which leave out white space for some of them, nor decoding, and it takes one call for the whole batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, cast

import numpy as np

from finetuning.data.collators import UNTRAINED
from finetuning.data.samples import JsonObject, Span

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

_UNKNOWN = b"\xff"
"""For tokens without known bytes: this byte occurs in no UTF-8 text, so that no text matches."""
_SPACE = "▁"
"""What SentencePiece writes for a space."""
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes of each token of a vocabulary."""

    def __init__(self, tokens: list[bytes]):
        # Filled by slice: the constructor of np.array would make fixed-size byte strings of them.
        self._tokens = np.empty(len(tokens), dtype=object)
        self._tokens[:] = tokens
        self.sizes: NDArray[np.int64] = np.array([len(token) for token in tokens], dtype=np.int64)
        """Bytes of each token, by id."""

    def matches(self, ids: NDArray[np.int32], text: bytes) -> bool:
        """Return whether the bytes of the tokens, one after another, are the text."""
        return b"".join(self._tokens[ids].tolist()) == text


def token_bytes_of(backend: Tokenizer) -> TokenBytes | None:
    """Return the bytes of each token; None if the tokenizer's decoder does more than join them."""
    bytes_of = _token_decoder(backend)
    if bytes_of is None:
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = [_UNKNOWN] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        tokens[index] = bytes_of(token) or _UNKNOWN
    for index, token in backend.get_added_tokens_decoder().items():
        # An added token is its own text, except that some decoders turn the mark for a space in it into one.
        tokens[index] = _UNKNOWN if _SPACE in token.content else token.content.encode() or _UNKNOWN
    return TokenBytes(tokens)


def _token_decoder(backend: Tokenizer) -> Callable[[str], bytes] | None:
    """Return the function from a token's name in the vocabulary to its bytes, by the kind of the decoder."""
    if backend.decoder is None:
        return None
    state: JsonObject = json.loads(backend.decoder.__getstate__())
    steps: list[JsonObject] = state.get("decoders", [state]) if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_bytes
    # A final Strip removes the space that the tokenizer puts in front of a text. The bytes of a text then match its
    # tokens, or differ by that space and do not: such a text is aligned by offsets.
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        replaces_space = steps[0]["pattern"] == {"String": _SPACE} and steps[0]["content"] == " "
        return _byte_fallback_bytes if replaces_space else None
    return None


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_byte_table()).encode("latin-1")
    except UnicodeEncodeError:
        return b""


def _byte_fallback_bytes(token: str) -> bytes:
    if byte := _BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE, " ").encode()


@cache
def _byte_table() -> dict[int, int]:
    """Map the characters of a byte-level vocabulary to bytes, and other Latin-1 characters to an invalid one.

    Source: GPT-2's `bytes_to_unicode`. Printable Latin-1 bytes stand for themselves; the others, in ascending order,
    are written as the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: 0x10FFFF for byte in range(256)}
    table |= {byte: byte for byte in printable}
    unprintable = [byte for byte in range(256) if byte not in set(printable)]
    return table | {256 + index: byte for index, byte in enumerate(unprintable)}


_LAST_CONTINUATION_BYTE = -65
"""The greatest UTF-8 continuation byte, 0xBF, as int8. Bytes above it, as int8, begin a character."""


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of several texts, concatenated, and the tokens of their spans."""

    ids: NDArray[np.int32]
    """Token ids of all texts."""
    labels: NDArray[np.int32]
    """The ids within spans, -100 elsewhere."""
    text_starts: NDArray[np.int64]
    """Where each text begins in `ids`, and where the last one ends; (texts + 1,)."""
    is_matched: list[bool]
    """Per text, whether the bytes of its tokens are those of the text. Texts that are not have no spans here."""
    spans: list[Sequence[Span]]
    """Per text, its character spans."""
    token_spans: NDArray[np.int64]
    """Per span of all texts, its first token in `ids`, and the one after its last; (spans, 2)."""
    token_spans_in_text: NDArray[np.int64]
    """The same, counted from the beginning of the text."""
    is_aligned: NDArray[np.bool_]
    """Per span, whether it has tokens, and its borders are borders of tokens."""


def layout_tokens(
    texts: Sequence[str],
    id_groups: Iterable[Sequence[Sequence[int]]],
    spans: Iterable[Sequence[Span] | None],
    token_bytes: TokenBytes,
) -> TokenLayout:
    """Find the tokens of the spans of texts.

    Args:
        texts: the texts.
        id_groups: the token ids of each text, in groups of several texts.
        spans: the character spans of each text, in order and disjoint; None, for a text that is trained whole, counts
            as none.
        token_bytes: the bytes of each token.
    """
    ids, text_starts = _concatenate(id_groups)
    token_starts = np.concatenate([[0], np.cumsum(token_bytes.sizes[ids])])
    encoded = [text.encode() for text in texts]
    text_byte_starts = _starts(encoded)
    data = b"".join(encoded)
    is_matched = [True] * len(texts)
    # Compared in one piece first: nearly always all texts match.
    if not np.array_equal(token_starts[text_starts], text_byte_starts) or not token_bytes.matches(ids, data):
        parts = [ids[start:end] for start, end in pairwise(text_starts.tolist())]
        is_matched = [token_bytes.matches(part, text) for part, text in zip(parts, encoded, strict=True)]
    kept: list[Sequence[Span]] = [
        text_spans if text_spans and matched else () for text_spans, matched in zip(spans, is_matched, strict=True)
    ]
    text_of_border = np.repeat(np.arange(len(texts)), [2 * len(text_spans) for text_spans in kept])
    borders = _byte_borders(texts, data, kept, text_of_border)
    # Texts before this one may not match, so that their tokens have another number of bytes than they have.
    borders += token_starts[text_starts[text_of_border]] - text_byte_starts[text_of_border]
    tokens = np.searchsorted(token_starts, borders)
    is_aligned = (token_starts[tokens] == borders).reshape(-1, 2).all(axis=1)
    labels = _labels(ids, tokens)
    in_text = (tokens - text_starts[text_of_border]).reshape(-1, 2)
    tokens = tokens.reshape(-1, 2)
    is_aligned &= tokens[:, 0] < tokens[:, 1]
    return TokenLayout(ids, labels, text_starts, is_matched, kept, tokens, in_text, is_aligned)


def _concatenate(groups: Iterable[Sequence[Sequence[int]]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the ids of all texts, and where each text begins; each group can be freed before the next is made."""
    ids: list[NDArray[np.int32]] = []
    starts = [np.zeros(1, dtype=np.int64)]
    for group in groups:
        group_starts = _starts(group)
        ids.append(np.fromiter(chain.from_iterable(group), dtype=np.int32, count=int(group_starts[-1])))
        starts.append(group_starts[1:] + starts[-1][-1])
    return np.concatenate(ids), np.concatenate(starts)


def _starts(values: Sequence[Sized]) -> NDArray[np.int64]:
    """Return where each value begins when all are concatenated, and where the last one ends."""
    sizes = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


def _byte_borders(
    texts: Sequence[str], data: bytes, spans: Sequence[Sequence[Span]], text_of_border: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the starts and ends of all spans as positions in `data`, the UTF-8 bytes of all texts."""
    borders = np.fromiter(chain.from_iterable(chain.from_iterable(spans)), dtype=np.int64, count=len(text_of_border))
    text_starts = _starts(texts)
    borders += text_starts[text_of_border]
    if text_starts[-1] == len(data):
        # All texts are ASCII.
        return borders
    character_starts = np.flatnonzero(np.frombuffer(data, dtype=np.int8) > _LAST_CONTINUATION_BYTE)
    return np.append(character_starts, len(data))[borders]


def _labels(ids: NDArray[np.int32], borders: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the ids between each pair of borders, -100 elsewhere."""
    steps = np.zeros(len(ids) + 1, dtype=np.int8)
    # The unbuffered form: a span that ends where the next begins changes one element twice.
    np.add.at(steps, borders[::2], 1)
    np.subtract.at(steps, borders[1::2], 1)
    return cast("NDArray[np.int32]", np.where(np.cumsum(steps[:-1], dtype=np.int8) > 0, ids, np.int32(UNTRAINED)))
