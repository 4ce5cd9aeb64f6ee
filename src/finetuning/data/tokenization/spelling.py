"""The bytes that each token stands for, where a tokenizer loses none: a proof of where every token lies in a text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NO_TEXT = b"\xff"
"""A byte that no UTF-8 text holds, for tokens that stand for none."""
_SPACE = "▁"
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Spelling:
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


def spelling_of(backend: Tokenizer) -> Spelling | None:
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
    return Spelling(tokens)


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
