"""How a chat template ends an assistant's turn, found by asking it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from finetuning.data.chat.template import SIGNS, TemplateRenderer, TemplateRenderError
from finetuning.data.samples import MaskNotFound

_TALK = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "second"},
    {"role": "user", "content": "third"},
    {"role": "assistant", "content": "fourth"},
]


@dataclass(frozen=True)
class EndOfTurn:
    """The text from some point to the end of a turn, its end-of-turn marker included."""

    text: str


@dataclass(frozen=True)
class _Probe:
    marker: str
    """What every answer ends with: tokens that are special, or text."""
    suffix: str
    """What the template writes after the marker of the last answer."""
    prompt: str
    """The generation prompt."""
    problem: str = "the template writes nothing after an answer, so the model could not learn to stop"
    """Why there is no marker, where there is none."""


class EndOfTurnFinder:
    """Knows the end-of-turn marker of one template."""

    def __init__(self, renderer: TemplateRenderer, stop_tokens: Iterable[str] = ()):
        self._renderer = renderer
        eos = renderer.tokenizer.eos_token
        self._stops = {token for token in (*stop_tokens, eos) if token}

    @property
    def generation_prompt(self) -> str:
        """What the template adds to a user's message to let the model write; may be empty."""
        return self._probe.prompt

    @property
    def marker(self) -> str:
        return self._probe.marker

    def is_end(self, text: str) -> bool:
        """Whether the text ends as a turn must."""
        return text.endswith(tuple({self._probe.marker, *self._stops} - {""}))

    def ends_at(self, text: str, position: int) -> bool:
        """Whether an answer without words ends right there."""
        marker = self._probe.marker
        return bool(marker) and text[position : position + len(marker) + 64].lstrip().startswith(marker)

    def match_plain(self, rest: str, content: str, turn: int) -> int:
        """The length of what ends a turn, at the beginning of `rest`, the text after the words of its content.

        White space at the end of the content comes first, where the template keeps it.
        """
        marker = self._probe.marker
        if not marker:
            raise MaskNotFound(self._probe.problem, turn)
        kept = content[len(content.rstrip()) :] + marker
        for text in (kept, marker):
            if rest.startswith(text):
                return len(text)
        shown = rest[: len(marker) + 12]
        raise MaskNotFound(f"it is followed by {shown!r}, where an answer must end with {marker!r}", turn)

    def of_tail(self, tail: str, turn: int) -> EndOfTurn:
        """The ending in `tail`, what the template writes from some point on when the turn is the last message."""
        probe = self._probe
        if not probe.marker:
            raise MaskNotFound(probe.problem, turn)
        if tail.endswith(probe.marker + probe.suffix):
            return EndOfTurn(tail[: len(tail) - len(probe.suffix)])
        text = tail.rstrip()
        if not text.endswith(tuple(self._stops)):
            raise MaskNotFound(f"it ends with {text[-30:]!r}, not with {probe.marker!r}", turn)
        return EndOfTurn(text)

    @cached_property
    def _probe(self) -> _Probe:
        try:
            marker, suffix = self._find_marker()
        except (TemplateRenderError, MaskNotFound) as error:
            return _Probe("", "", self._find_prompt(), f"a plain question and answer shows no end of a turn: {error}")
        return _Probe(marker, suffix, self._find_prompt())

    def _find_marker(self) -> tuple[str, str]:
        last = self._tail(_TALK[:2], 1)
        try:
            middle = self._tail(_TALK, 1)
        except TemplateRenderError:
            middle = last
        marker = last.rstrip()
        if not middle.startswith(marker):
            marker = self._shared_units(last, middle) or self._units(last)[0].rstrip()
        # A template may write the next header whether it is asked to or not.
        marker = self._to_first_stop(marker)
        return marker, last[len(marker) :]

    def _to_first_stop(self, marker: str) -> str:
        ends = [marker.index(stop) + len(stop) for stop in self._stops if stop in marker]
        return marker[: min(ends)] if ends else marker

    def _tail(self, messages: list[dict[str, str]], turn: int) -> str:
        marked = SIGNS.unmark(self._renderer.text(SIGNS.mark(messages)))
        if SIGNS.closing(turn) not in marked.positions:
            raise MaskNotFound("the template leaves out the answer")
        return marked.after(SIGNS.closing(turn))

    def _units(self, text: str) -> list[str]:
        special = "|".join(re.escape(token) for token in self._renderer.special_tokens)
        return [unit for unit in re.split(f"({special})", text) if unit] or [""] if special else [text]

    def _shared_units(self, left: str, right: str) -> str:
        shared = ""
        for one, other in zip(self._units(left), self._units(right), strict=False):
            if one != other:
                break
            shared += one
        return shared.rstrip()

    def _find_prompt(self) -> str:
        try:
            plain = SIGNS.unmark(self._renderer.text(SIGNS.mark(_TALK[:1])))
            prompt = SIGNS.unmark(self._renderer.text(SIGNS.mark(_TALK[:1]), prompt=True))
        except TemplateRenderError:
            return ""
        sign = SIGNS.closing(0)
        if sign not in plain.positions or sign not in prompt.positions:
            return ""
        ending, whole = plain.after(sign), prompt.after(sign)
        if whole.startswith(ending):
            return whole[len(ending) :]
        return whole[len(self._shared_units(whole, ending)) :].lstrip()
