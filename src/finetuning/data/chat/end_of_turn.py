"""Detection of the text with which a chat template ends an assistant's turn.

Templates do not declare their end-of-turn token, so it is detected by rendering a short example conversation. What
the template writes after the answer that is the last message, and what it writes after the same answer when a user's
message follows, begin alike: that common beginning is the end-of-turn text, such as `<|im_end|>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from finetuning.data.chat.template import DEFAULT_MARKERS, TemplateRenderer, TemplateRenderError
from finetuning.data.samples import MaskNotFound, Message

_EXAMPLE: list[Message] = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "second"},
    {"role": "user", "content": "third"},
    {"role": "assistant", "content": "fourth"},
]
_MAX_WHITE_SPACE = 64
"""Characters of white space that a template may write between an empty answer and its end-of-turn text."""


@dataclass(frozen=True)
class _Detected:
    """What rendering the example showed."""

    end_of_turn: str
    """What every answer ends with, special tokens or plain text; empty if not detected."""
    suffix: str
    """What the template writes after the end-of-turn text of the last message."""
    generation_prompt: str
    problem: str = "the template writes nothing after an answer, so the model could not learn to stop"
    """Why `end_of_turn` is empty."""


class EndOfTurnFinder:
    """Finds the end of assistant turns in texts rendered by one chat template."""

    def __init__(self, renderer: TemplateRenderer, stop_tokens: Iterable[str] = ()):
        """`stop_tokens` are tokens that end a turn in addition to the tokenizer's end-of-sequence token."""
        self._renderer = renderer
        eos = renderer.tokenizer.eos_token
        self._stop_tokens = {token for token in (*stop_tokens, eos) if isinstance(token, str) and token}

    @property
    def generation_prompt(self) -> str:
        """What the template appends to a user's message to make the model answer; may be empty."""
        return self._detected.generation_prompt

    @property
    def end_of_turn(self) -> str:
        """What the template writes at the end of every answer; empty if it writes nothing, or omits the answer."""
        return self._detected.end_of_turn

    def is_complete_turn(self, text: str) -> bool:
        """Return whether the text ends with the end-of-turn text or with a stop token."""
        return text.endswith(tuple({self.end_of_turn, *self._stop_tokens} - {""}))

    def is_empty_turn_at(self, text: str, position: int) -> bool:
        """Return whether nothing but white space comes before the next end-of-turn text."""
        end = self.end_of_turn
        return bool(end) and text[position : position + len(end) + _MAX_WHITE_SPACE].lstrip().startswith(end)

    def match_after_content(self, rest: str, content: str, turn: int) -> int:
        """Return the length of the end of a turn at the beginning of `rest`, the text after its stripped content.

        White space at the end of the content comes before the end-of-turn text if the template keeps it.

        Raises:
            MaskNotFound: `rest` begins with something else.
        """
        end = self.end_of_turn
        if not end:
            raise MaskNotFound(self._detected.problem, turn)
        with_white_space = content[len(content.rstrip()) :] + end
        for candidate in (with_white_space, end):
            if rest.startswith(candidate):
                return len(candidate)
        excerpt = rest[: len(end) + 12]
        raise MaskNotFound(f"it is followed by {excerpt!r} instead of the end-of-turn text {end!r}", turn)

    def match_last_message(self, tail: str, turn: int) -> str:
        """Return the part of `tail` up to the end of the turn, without what the template writes after the turn.

        `tail` is the rendered text from some point in a turn on, where that turn is the last message.

        Raises:
            MaskNotFound: it ends neither with the end-of-turn text nor with a stop token.
        """
        detected = self._detected
        if not detected.end_of_turn:
            raise MaskNotFound(detected.problem, turn)
        if tail.endswith(detected.end_of_turn + detected.suffix):
            return tail[: len(tail) - len(detected.suffix)]
        text = tail.rstrip()
        if not text.endswith(tuple(self._stop_tokens)):
            raise MaskNotFound(f"it ends with {text[-30:]!r}, not with {detected.end_of_turn!r}", turn)
        return text

    @cached_property
    def _detected(self) -> _Detected:
        try:
            end_of_turn, suffix = self._detect_end_of_turn()
        except (TemplateRenderError, MaskNotFound) as error:
            problem = f"no end of turn can be detected in a plain question and answer: {error}"
            return _Detected("", "", self._detect_generation_prompt(), problem)
        return _Detected(end_of_turn, suffix, self._detect_generation_prompt())

    def _detect_end_of_turn(self) -> tuple[str, str]:
        """Return the end-of-turn text, and what follows it at the end of a conversation."""
        as_last = self._text_after_answer(_EXAMPLE[:2], 1)
        try:
            in_middle = self._text_after_answer(_EXAMPLE, 1)
        except TemplateRenderError:
            # Some templates accept a single exchange only.
            in_middle = as_last
        end_of_turn = as_last.rstrip()
        if not in_middle.startswith(end_of_turn):
            end_of_turn = self._common_prefix(as_last, in_middle) or self._split(as_last)[0].rstrip()
        # A template may write the header of the next answer even without a generation prompt.
        end_of_turn = self._up_to_stop_token(end_of_turn)
        return end_of_turn, as_last[len(end_of_turn) :]

    def _up_to_stop_token(self, text: str) -> str:
        ends = [text.index(token) + len(token) for token in self._stop_tokens if token in text]
        return text[: min(ends)] if ends else text

    def _text_after_answer(self, messages: list[Message], turn: int) -> str:
        markers = DEFAULT_MARKERS
        rendered = markers.strip(self._renderer.text(markers.insert(messages)))
        if markers.after_content(turn) not in rendered.positions:
            raise MaskNotFound("the template omits the answer")
        return rendered.after(markers.after_content(turn))

    def _split(self, text: str) -> list[str]:
        """Split a text into special tokens and what lies between them."""
        special = "|".join(re.escape(token) for token in self._renderer.special_tokens)
        return [part for part in re.split(f"({special})", text) if part] or [""] if special else [text]

    def _common_prefix(self, left: str, right: str) -> str:
        """Return the longest common beginning that splits no special token and no text between two."""
        common = ""
        for left_part, right_part in zip(self._split(left), self._split(right), strict=False):
            if left_part != right_part:
                break
            common += left_part
        return common.rstrip()

    def _detect_generation_prompt(self) -> str:
        """Return what `add_generation_prompt` adds after a user's message."""
        markers = DEFAULT_MARKERS
        messages = markers.insert(_EXAMPLE[:1])
        try:
            without_prompt = markers.strip(self._renderer.text(messages))
            with_prompt = markers.strip(self._renderer.text(messages, prompt=True))
        except TemplateRenderError:
            return ""
        marker = markers.after_content(0)
        if marker not in without_prompt.positions or marker not in with_prompt.positions:
            return ""
        end_of_user, tail = without_prompt.after(marker), with_prompt.after(marker)
        if tail.startswith(end_of_user):
            return tail[len(end_of_user) :]
        # The template closes the conversation when no prompt is asked for, for example with the end of sequence.
        return tail[len(self._common_prefix(tail, end_of_user)) :].lstrip()
