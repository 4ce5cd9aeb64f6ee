"""Tokenization of rendered texts, and the trained tokens of each: those of its spans, exactly.

A text is tokenized once, as a whole. A span is trained as a run of tokens if a token begins where the span begins and
another ends where it ends, and if the run, decoded, is the text of the span. There are two ways to find the run:

- by bytes (`byte_offsets.py`), if the bytes of the tokens are those of the text;
- by the tokenizer's offsets, with a decoding of each run, for all other texts and tokenizers.

The tokens before a span must also be those of the prompt alone, because a served model is given those. Where they are
not, or where a token extends over the beginning of a span, the text is split at the borders of its spans, and the
pieces are tokenized one by one, as in serving: first the prompt, then what the model writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, cast

import numpy as np

from finetuning.data.samples import MaskError, Span
from finetuning.data.tokenization.byte_offsets import TokenBytes, TokenLayout, layout_tokens, token_bytes_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

SPLIT_AT_TURN = "the text was split before a turn, because a token would extend over its beginning"
_CONTEXT = 64
"""Characters of a prompt, before a turn, that can change its last tokens if no special token comes between."""
_GROUP_SIZE = 64
"""Texts per call where only ids are needed: the encodings stay in the CPU's cache, a few per cent faster than 1,024."""


@dataclass(slots=True)
class TokenizedText:
    """Token ids of a text, int32, and the runs [first, last) of them that are trained."""

    ids: NDArray[np.int32]
    runs: tuple[Span, ...]
    warning: str | None = None
    batch_labels: NDArray[np.int32] | None = None
    """The labels, where they were made for a whole batch at once."""

    def labels(self, untrained: int) -> NDArray[np.int32]:
        """Return the ids where they are trained, `untrained` elsewhere; int32."""
        if self.batch_labels is not None:
            return self.batch_labels
        labels = np.empty_like(self.ids)
        labels.fill(untrained)
        for first, last in self.runs:
            labels[first:last] = self.ids[first:last]
        return labels


class LabelBuilder:
    """Tokenizes batches of rendered texts with their spans."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._prompt_ids: dict[str, list[int]] = {}
        self._header_ids: dict[str, list[int] | None] = {}

    def encode(
        self,
        texts: Sequence[str],
        spans: Sequence[Sequence[Span] | None],
        headers: Sequence[Sequence[str]] | None = None,
    ) -> list[TokenizedText | MaskError]:
        """Tokenize texts, and find the tokens of their spans.

        There is one beginning-of-sequence token: that of the text, or one in front if the tokenizer adds it.

        Args:
            texts: the texts, special tokens included.
            spans: the character spans of each; None to train on the whole text.
            headers: the text before each span, as in `MaskedText`, if known.
        """
        if not texts:
            return []
        results: dict[int, TokenizedText | MaskError] = {}
        if self._token_bytes is not None:
            results |= self._align_by_bytes(texts, spans, headers or [()] * len(texts), self._token_bytes)
        rest = [index for index in range(len(texts)) if index not in results]
        by_offsets = self._align_by_offsets([texts[index] for index in rest], [spans[index] for index in rest])
        results |= zip(rest, by_offsets, strict=True)
        return [
            self._encode_pieces(text, text_spans or ())
            if isinstance(result := results[index], MaskError)
            else self._with_bos(text, result, trains_all=text_spans is None)
            for index, (text, text_spans) in enumerate(zip(texts, spans, strict=True))
        ]

    def split(self, text: str) -> list[str]:
        """Split a text into the texts of its tokens."""
        encoding = self._encode([text])[0]
        borders = sorted({0, len(text), *(end for _, end in encoding.offsets)})
        return [text[start:end] for start, end in pairwise(borders)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special tokens included."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def _align_by_bytes(
        self,
        texts: Sequence[str],
        spans: Sequence[Sequence[Span] | None],
        headers: Sequence[Sequence[str]],
        token_bytes: TokenBytes,
    ) -> dict[int, TokenizedText]:
        """Return the tokens of each text whose bytes match, and whose spans begin and end between tokens."""
        layout = layout_tokens(texts, self._ids(texts), spans, token_bytes)
        all_runs = [(first, last) for first, last in layout.token_spans_in_text.tolist()]
        follows_header = self._follow_headers(layout, headers)
        results: dict[int, TokenizedText] = {}
        span_start = 0
        for index, (first, last) in enumerate(pairwise(layout.text_starts.tolist())):
            ids = layout.ids[first:last]
            if not layout.is_matched[index]:
                continue
            if spans[index] is None:
                results[index] = TokenizedText(ids, ((0, last - first),), None, ids)
                continue
            span_end = span_start + len(layout.spans[index])
            runs = tuple(all_runs[span_start:span_end])
            if all(follows_header[span_start:span_end]) or (
                layout.is_aligned[span_start:span_end].all()
                and self._follow_prompts(texts[index], ids.tolist(), layout.spans[index], runs)
            ):
                results[index] = TokenizedText(ids, runs, None, layout.labels[first:last])
            span_start = span_end
        return results

    def _ids(self, texts: Sequence[str]) -> Iterator[list[list[int]]]:
        for first in range(0, len(texts), _GROUP_SIZE):
            group = texts[first : first + _GROUP_SIZE]
            yield [encoding.ids for encoding in self._backend.encode_batch_fast(group, add_special_tokens=False)]

    def _follow_headers(self, layout: TokenLayout, headers: Sequence[Sequence[str]]) -> list[bool]:
        """Return for each span whether it is aligned and comes after the tokens of its header.

        False also means unknown: without a special token in the header, its tokens may depend on the text before it.
        """
        names = list(
            chain.from_iterable(
                text_headers or [""] * len(spans)
                for text_headers, spans in zip(headers, layout.spans, strict=True)
                if spans
            )
        )
        follows = np.zeros(len(names), dtype=np.bool_)
        # The few different headers of a batch are numbered, so that each is compared for all its spans at once.
        numbers = {header: number for number, header in enumerate(dict.fromkeys(names))}
        header_of_span = np.fromiter(map(numbers.__getitem__, names), dtype=np.int64, count=len(names))
        for header, number in numbers.items():
            ids = self._ids_of_header(header) if header else None
            if ids:
                spans = np.flatnonzero((header_of_span == number) & (layout.token_spans_in_text[:, 0] >= len(ids)))
                before = layout.token_spans[spans, :1] - np.arange(len(ids), 0, -1)
                follows[spans] = (layout.ids[before] == ids).all(axis=1)
        return (follows & layout.is_aligned).tolist()

    def _ids_of_header(self, header: str) -> list[int] | None:
        """Return the tokens of the text before a turn, from its last special token on; None if it has none."""
        if header not in self._header_ids:
            special = list(self._special_tokens.finditer(header)) if self._special_tokens else []
            self._header_ids[header] = self._encode([header[special[-1].start() :]])[0].ids if special else None
        return self._header_ids[header]

    def _follow_prompts(self, text: str, ids: list[int], spans: Sequence[Span], runs: Sequence[Span]) -> bool:
        """Return whether each span comes after the tokens of its prompt alone."""
        return all(
            not text[start - 1 : start].isspace() or self._is_prompt(text[:start], ids[:first])
            for (start, _), (first, _) in zip(spans, runs, strict=True)
        )

    def _is_prompt(self, prompt: str, ids: list[int]) -> bool:
        """Return whether the tokens before a turn are those of the prompt alone, which a served model is given.

        A pre-tokenizer may look ahead past white space: after a line break, what follows can change its token. Only
        such prompts are checked. The text before a special token has no influence on the tokens after it.
        """
        start = max(len(prompt) - _CONTEXT, 0)
        special = list(self._special_tokens.finditer(prompt, start)) if self._special_tokens else []
        if not special:
            return self._encode([prompt])[0].ids == ids
        header = prompt[special[-1].start() :]
        if header not in self._prompt_ids:
            self._prompt_ids[header] = self._encode([header])[0].ids
        expected = self._prompt_ids[header]
        return ids[len(ids) - len(expected) :] == expected

    @cached_property
    def _special_tokens(self) -> re.Pattern[str] | None:
        added = self._tokenizer.added_tokens_decoder.values()
        names = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(re.escape(name) for name in names)) if names else None

    def _encode(self, texts: Sequence[str]) -> Sequence[Encoding]:
        # Through the tokenizer, which clears a truncation or padding that its file was saved with.
        batch = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return cast("list[Encoding]", batch.encodings)

    @cached_property
    def _token_bytes(self) -> TokenBytes | None:
        # `_align_by_bytes` calls the backend directly: this first call clears its truncation and padding.
        self._encode(["a"])
        return token_bytes_of(self._backend)

    @cached_property
    def _added_bos(self) -> int | None:
        """The id of the beginning-of-sequence token, if the tokenizer puts one in front of each text."""
        bos = cast("int | None", self._tokenizer.bos_token_id)
        ids = cast("list[int]", self._tokenizer("a", verbose=False)["input_ids"])
        return bos if bos is not None and ids[:1] == [bos] else None

    def added_to(self, text: str) -> str:
        """Return the beginning-of-sequence token that is put in front of a text; empty if there is none."""
        bos = cast("str", self._tokenizer.bos_token)
        return "" if self._added_bos is None or text.startswith(bos) else bos

    def _with_bos(self, text: str, tokens: TokenizedText, *, trains_all: bool) -> TokenizedText:
        if self._added_bos is None or not self.added_to(text):
            return tokens
        ids = np.concatenate([np.array([self._added_bos], dtype=np.int32), tokens.ids])
        runs = ((0, len(ids)),) if trains_all else tuple((first + 1, last + 1) for first, last in tokens.runs)
        return TokenizedText(ids, runs, tokens.warning)

    def _align_by_offsets(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span] | None]
    ) -> list[TokenizedText | MaskError]:
        if not texts:
            return []
        encodings = self._encode(texts)
        results = [
            self._align(text, encoding, text_spans)
            for text, encoding, text_spans in zip(texts, encodings, spans, strict=True)
        ]
        self._verify_runs(texts, spans, results)
        return results

    def _align(self, text: str, encoding: Encoding, spans: Sequence[Span] | None) -> TokenizedText | MaskError:
        """Find the runs of tokens that cover the spans exactly, by the tokenizer's offsets."""
        ids = np.array(encoding.ids, dtype=np.int32)
        if spans is None:
            return TokenizedText(ids, ((0, len(ids)),))
        runs: list[Span] = []
        for start, end in spans:
            first = _first_token(encoding, start, end)
            if first is None:
                return MaskError("a turn has no token")
            token_start = _token_start(encoding, first, end)
            # The white space in front of a word belongs to its token; some tokenizers leave it out of the offsets.
            if token_start != start and (token_start < start or text[start:token_start].strip()):
                return MaskError("a token extends over the beginning of a turn")
            if text[start - 1 : start].isspace() and not self._is_prompt(text[:start], encoding.ids[:first]):
                return MaskError("the prompt alone has different tokens")
            last = _first_token(encoding, end, len(text))
            last = len(ids) if last is None else last
            if last <= first or _token_end(encoding, last - 1) > end or _token_start(encoding, last, end) < end:
                return MaskError("a token extends over the end of a turn")
            runs.append((first, last))
        return TokenizedText(ids, tuple(runs))

    def _verify_runs(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span] | None], results: list[TokenizedText | MaskError]
    ) -> None:
        """Decode each run, and replace the results of which one is not the text of its span by an error."""
        runs: list[list[int]] = []
        expected: list[str] = []
        owners: list[int] = []
        for index, (result, text_spans) in enumerate(zip(results, spans, strict=True)):
            if isinstance(result, TokenizedText) and text_spans is not None:
                ids: list[int] = result.ids.tolist()
                for (first, last), (start, end) in zip(result.runs, text_spans, strict=True):
                    runs.append(ids[first:last])
                    expected.append(texts[index][start:end])
                    owners.append(index)
        decoded = self._backend.decode_batch(runs, skip_special_tokens=False)
        for run, text, actual, owner in zip(runs, expected, decoded, owners, strict=True):
            if actual != text and not self._is_equivalent(run, text, actual):
                results[owner] = _decoding_error(actual, text)

    def _is_equivalent(self, run: list[int], text: str, decoded: str) -> bool:
        """Return whether a run represents a text although it decodes to another.

        A decoder may drop the space before the first word, and a tokenizer may normalize what it encodes.
        """
        if self._drops_first_space:
            after_word = self.decode([*self._word, *run])
            if after_word == self.decode(self._word) + text:
                return True
        again = self.decode(self._encode([text])[0].ids)
        return again == decoded or (self._drops_first_space and again.removeprefix(" ") == decoded.removeprefix(" "))

    @cached_property
    def _word(self) -> list[int]:
        return self._encode(["a"])[0].ids

    @cached_property
    def _drops_first_space(self) -> bool:
        ids = self._encode(["a a"])[0].ids
        return bool(ids) and self.decode(ids[-1:]) == "a" and self.decode(ids) == "a a"

    def _encode_pieces(self, text: str, spans: Sequence[Span]) -> TokenizedText | MaskError:
        """Tokenize a text that is split at the borders of its spans; its tokens must still decode to the same text."""
        borders = [0, *(position for span in spans for position in span), len(text)]
        pieces = [text[start:end] for start, end in pairwise(borders)]
        ids: list[int] = []
        runs: list[Span] = []
        for index, encoding in enumerate(self._encode(pieces)):
            piece = encoding.ids
            # Pieces alternate: between spans, span, between spans, ...
            if index % 2:
                runs.append((len(ids), len(ids) + len(piece)))
                decoded = self.decode(piece)
                if decoded != pieces[index] and not self._is_equivalent(piece, pieces[index], decoded):
                    return _decoding_error(decoded, pieces[index])
            ids.extend(piece)
        if self.decode(ids) != self.decode(self._encode([text])[0].ids):
            return MaskError("a token extends over the beginning of a turn, and the text cannot be split there")
        tokens = TokenizedText(np.array(ids, dtype=np.int32), tuple(runs), SPLIT_AT_TURN)
        return self._with_bos(text, tokens, trains_all=False)


def _decoding_error(decoded: str, expected: str) -> MaskError:
    return MaskError(f"the trained tokens decode to {decoded[:60]!r}, the turn is {expected[:60]!r}")


def _token_start(encoding: Encoding, token: int, default: int) -> int:
    """Return the first character of a token; `default` if there is no such token."""
    span = encoding.token_to_chars(token) if token < len(encoding.ids) else None
    return default if span is None else span[0]


def _token_end(encoding: Encoding, token: int) -> int:
    span = encoding.token_to_chars(token)
    return 0 if span is None else span[1]


def _first_token(encoding: Encoding, start: int, stop: int) -> int | None:
    """Return the first token at or after a character, or None if there is none before `stop`."""
    for position in range(start, stop):
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return None
