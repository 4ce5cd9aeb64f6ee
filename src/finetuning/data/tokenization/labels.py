"""Text with trained spans to token ids with a mask, and the proof that the mask is the spans.

A text is tokenised once, whole. A span is a run of tokens when a token begins where it begins and one ends where it
ends; decoded, the run must give back the span. Where every token stands for certain bytes, the tokens of a text must be
its bytes, one after another: that shows where each of them lies, and all that they spell. Where a token reaches over
the beginning of a span, or the prompt alone has other tokens, the text is cut there and tokenised in pieces, as it is
when the model is served: the prompt alone, then what the model writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuning.data.samples import MaskError, Span
from finetuning.data.tokenization.byte_offsets import TokenBytes, TokenLayout, layout_tokens, token_bytes_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CUT_AT_BORDER = "tokens would reach over the beginning of a turn: cut there, as the served model is prompted"
_NEAR = 64
_AT_ONCE = 64
"""Texts that are tokenised together where nothing but ids is asked for: what the tokenizer makes of them besides stays
in the processor's cache, which is some percent faster than 1,024 at once."""


@dataclass(slots=True)
class TokenizedText:
    """Token ids, int32, and the runs [first, last) of them that are trained."""

    ids: np.ndarray
    runs: tuple[Span, ...]
    warning: str | None = None
    ready: np.ndarray | None = None
    """The labels, where they were made for all texts of a batch at once."""

    def labels(self, untrained: int) -> np.ndarray:
        """The ids where they are trained, `untrained` elsewhere; int32."""
        if self.ready is not None:
            return self.ready
        labels = np.empty_like(self.ids)
        labels.fill(untrained)
        for first, last in self.runs:
            labels[first:last] = self.ids[first:last]
        return labels


class LabelBuilder:
    """Tokenises batches of rendered texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._headers: dict[str, list[int]] = {}
        self._heads: dict[str, list[int] | None] = {}

    def encode(
        self,
        texts: Sequence[str],
        spans: Sequence[Sequence[Span] | None],
        heads: Sequence[Sequence[str]] | None = None,
    ) -> list[TokenizedText | MaskError]:
        """The tokens of each text; None for spans trains on all of them. `heads` are those of `Marked`.

        The beginning-of-sequence token is there once: as the text has it, else in front where the tokenizer adds one.
        """
        if not texts:
            return []
        results = self._by_bytes(texts, spans, heads or [()] * len(texts)) if self._spelling else [None] * len(texts)
        left = [index for index, result in enumerate(results) if result is None]
        for index, result in zip(
            left, self._by_offsets([texts[one] for one in left], [spans[one] for one in left]), strict=True
        ):
            results[index] = result
        for index, result in enumerate(results):
            if isinstance(result, MaskError):
                results[index] = self._in_pieces(texts[index], spans[index] or ())
            else:
                results[index] = self._with_bos(texts[index], result, spans[index] is None)
        return results

    def _by_offsets(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span] | None]
    ) -> list[TokenizedText | MaskError]:
        if not texts:
            return []
        encodings = self._encode(texts)
        results = [self._align(text, one, wanted) for text, one, wanted in zip(texts, encodings, spans, strict=True)]
        self._prove(texts, spans, results)
        return results

    def _by_bytes(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span] | None], heads: Sequence[Sequence[str]]
    ) -> list[TokenizedText | None]:
        """The tokens of each text that they spell byte for byte, with a border at each border of its spans."""
        flat = layout_tokens(texts, self._ids(texts), spans, self._spelling)
        runs, shown = list(map(tuple, flat.inside.tolist())), self._served(flat, heads)
        results: list[TokenizedText | None] = []
        used = 0
        for index, (first, end) in enumerate(pairwise(flat.firsts.tolist())):
            ids = flat.ids[first:end]
            if spans[index] is None or not flat.is_whole[index]:
                results.append(TokenizedText(ids, ((0, end - first),), None, ids) if flat.is_whole[index] else None)
                continue
            until = used + len(flat.spans[index])
            own = tuple(runs[used:until])
            fits = all(shown[used:until]) or (
                flat.is_exact[used:until].all() and self._all_served(texts[index], ids.tolist(), flat.spans[index], own)
            )
            results.append(TokenizedText(ids, own, None, flat.labels[first:end]) if fits else None)
            used = until
        return results

    def _ids(self, texts: Sequence[str]) -> Iterator[list[list[int]]]:
        for first in range(0, len(texts), _AT_ONCE):
            group = texts[first : first + _AT_ONCE]
            yield [one.ids for one in self._backend.encode_batch_fast(group, add_special_tokens=False)]

    def _served(self, flat: TokenLayout, heads: Sequence[Sequence[str]]) -> list[bool]:
        """Of each span, whether it is exact and the tokens before it are those of its head; False where that has to be
        looked up in the text."""
        named = list(
            chain.from_iterable(own or [""] * len(spans) for own, spans in zip(heads, flat.spans, strict=True) if spans)
        )
        shown = np.zeros(len(named), dtype=bool)
        numbers = {head: number for number, head in enumerate(dict.fromkeys(named))}
        of_span = np.fromiter(map(numbers.__getitem__, named), dtype=np.int64, count=len(named))
        for head, number in numbers.items():
            tokens = self._head(head) if head else None
            if tokens:
                chosen = np.flatnonzero((of_span == number) & (flat.inside[:, 0] >= len(tokens)))
                before = flat.places[chosen, :1] - np.arange(len(tokens), 0, -1)
                shown[chosen] = (flat.ids[before] == tokens).all(axis=1)
        return (shown & flat.is_exact).tolist()

    def _all_served(self, text: str, ids: list[int], spans: Sequence[Span], runs: Sequence[Span]) -> bool:
        return all(
            not text[start - 1 : start].isspace() or self._is_served(text[:start], ids[:first])
            for (start, _), (first, _) in zip(spans, runs, strict=True)
        )

    def _head(self, head: str) -> list[int] | None:
        """The tokens of a text before a turn, from its last special token on; None when it has none."""
        if head not in self._heads:
            specials = list(self._special.finditer(head)) if self._special else []
            self._heads[head] = self._encode([head[specials[-1].start() :]])[0].ids if specials else None
        return self._heads[head]

    def split(self, text: str) -> list[str]:
        """The text, cut at its tokens."""
        encoding = self._encode([text])[0]
        borders = sorted({0, len(text), *(end for _, end in encoding.offsets)})
        return [text[start:end] for start, end in pairwise(borders)]

    def decode(self, ids: Sequence[int]) -> str:
        """What the tokens spell, special tokens included."""
        return self._backend.decode([int(one) for one in ids], skip_special_tokens=False)

    def _encode(self, texts: Sequence[str]) -> Sequence[Any]:
        # Through the tokenizer, which clears a truncation or padding that its file was saved with.
        batch = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return batch.encodings

    @cached_property
    def _spelling(self) -> TokenBytes | None:
        self._encode(["a"])
        return token_bytes_of(self._backend)

    @cached_property
    def _added_bos(self) -> int | None:
        """The beginning-of-sequence token, when the tokenizer puts one in front by itself."""
        bos = self._tokenizer.bos_token_id
        ids = self._tokenizer("a", verbose=False)["input_ids"]
        return bos if bos is not None and ids[:1] == [bos] else None

    def _with_bos(self, text: str, tokens: TokenizedText, trained: bool) -> TokenizedText:
        if self._added_bos is None or text.startswith(self._tokenizer.bos_token):
            return tokens
        ids = np.concatenate([np.array([self._added_bos], dtype=np.int32), tokens.ids])
        runs = ((0, len(ids)),) if trained else tuple((first + 1, last + 1) for first, last in tokens.runs)
        return TokenizedText(ids, runs, tokens.warning)

    def _align(self, text: str, encoding: Any, spans: Sequence[Span] | None) -> TokenizedText | MaskError:
        """The runs of tokens that cover the spans exactly, by the tokenizer's own offsets."""
        ids = np.array(encoding.ids, dtype=np.int32)
        if spans is None:
            return TokenizedText(ids, ((0, len(ids)),))
        runs = []
        for start, end in spans:
            first = _token_from(encoding, start, end)
            if first is None:
                return MaskError("a turn has no token")
            begins, _ = encoding.token_to_chars(first)
            # The white space in front of a word belongs to its token; some tokenizers leave it out of the offsets.
            if begins != start and (begins < start or text[start:begins].strip()):
                return MaskError("a token reaches over the beginning of a turn")
            if text[start - 1 : start].isspace() and not self._is_served(text[:start], encoding.ids[:first]):
                return MaskError("the prompt alone has other tokens")
            last = _token_from(encoding, end, len(text))
            last = len(ids) if last is None else last
            if last <= first or encoding.token_to_chars(last - 1)[1] > end or _begins(encoding, last, end) < end:
                return MaskError("a token reaches over the end of a turn")
            runs.append((first, last))
        return TokenizedText(ids, tuple(runs))

    def _is_served(self, prompt: str, ids: list[int]) -> bool:
        """Whether the tokens before a turn are those of the prompt alone, which the served model is given.

        A pre-tokenizer may look ahead past white space, so that what follows a line break changes its token. Text
        before a special token has no part in that.
        """
        near = max(len(prompt) - _NEAR, 0)
        specials = list(self._special.finditer(prompt, near)) if self._special else []
        header = prompt[specials[-1].start() :] if specials else prompt
        if header not in self._headers:
            found = self._encode([header])[0].ids
            if not specials:
                return found == ids
            self._headers[header] = found
        found = self._headers[header]
        return ids[len(ids) - len(found) :] == found

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        added = self._tokenizer.added_tokens_decoder.values()
        names = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile("|".join(re.escape(name) for name in names)) if names else None

    def _prove(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span] | None], results: list[TokenizedText | MaskError]
    ) -> None:
        """Decodes each run and refuses the rows whose run is not its span."""
        runs, wanted, owners = [], [], []
        for index, result in enumerate(results):
            if isinstance(result, TokenizedText) and spans[index] is not None:
                ids = result.ids.tolist()
                for (first, last), (start, end) in zip(result.runs, spans[index], strict=True):
                    runs.append(ids[first:last])
                    wanted.append(texts[index][start:end])
                    owners.append(index)
        decoded = self._backend.decode_batch(runs, skip_special_tokens=False)
        for run, text, shown, owner in zip(runs, wanted, decoded, owners, strict=True):
            if shown != text and not self._is_same(run, text, shown):
                results[owner] = MaskError(f"the trained tokens spell {shown[:60]!r}, the turn is {text[:60]!r}")

    def _is_same(self, run: list[int], text: str, shown: str) -> bool:
        """Whether a run stands for a text by the tokenizer's own rules.

        A tokenizer may drop the space before the first word of what it decodes, and may normalise what it encodes.
        """
        if self._drops_first_space:
            anchored = self.decode([*self._anchor, *run])
            if anchored == self.decode(self._anchor) + text:
                return True
        again = self.decode(self._encode([text])[0].ids)
        return again == shown or (self._drops_first_space and again.removeprefix(" ") == shown.removeprefix(" "))

    @cached_property
    def _anchor(self) -> list[int]:
        return self._encode(["a"])[0].ids

    @cached_property
    def _drops_first_space(self) -> bool:
        ids = self._encode(["a a"])[0].ids
        return bool(ids) and self.decode(ids[-1:]) == "a" and self.decode(ids) == "a a"

    def _in_pieces(self, text: str, spans: Sequence[Span]) -> TokenizedText | MaskError:
        """The tokens of a text that is cut at the borders of its spans, if they still spell the text."""
        borders = [0, *(position for span in spans for position in span), len(text)]
        pieces = [text[start:end] for start, end in pairwise(borders)]
        ids: list[int] = []
        runs = []
        for index, encoding in enumerate(self._encode(pieces)):
            piece = encoding.ids
            if index % 2:
                runs.append((len(ids), len(ids) + len(piece)))
                shown = self.decode(piece)
                if shown != pieces[index] and not self._is_same(piece, pieces[index], shown):
                    return MaskError(f"the trained tokens spell {shown[:60]!r}, the turn is {pieces[index][:60]!r}")
            ids.extend(piece)
        if self.decode(ids) != self.decode(self._encode([text])[0].ids):
            return MaskError("a token reaches over the beginning of a turn, and the text cannot be cut there")
        return self._with_bos(text, TokenizedText(np.array(ids, dtype=np.int32), tuple(runs), CUT_AT_BORDER), False)


def _begins(encoding: Any, token: int, default: int) -> int:
    return encoding.token_to_chars(token)[0] if token < len(encoding.ids) else default


def _token_from(encoding: Any, start: int, stop: int) -> int | None:
    """The first token at or after a character; None when there is none before `stop`."""
    for position in range(start, stop):
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return None
