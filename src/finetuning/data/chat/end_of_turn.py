"""Detection of the texts with which a chat template ends an assistant's turn.

Templates do not declare their end-of-turn token, so it is detected by rendering a short example conversation. What
the template writes after the answer that is the last message, and what it writes after the same answer when a user's
message follows, begin alike: that common beginning is the end-of-turn text, such as `<|im_end|>`. There are exceptions:

- The last answer and an earlier one end differently, as in gpt-oss: with `<|return|>` and `<|end|>`. Only a token at
  which generation stops is trained. gpt-oss writes `<|end|>` after its reasoning as well, and must not stop there.
- The template writes nothing after the last answer, and the token of the next role after an earlier one, as in GLM.
  The model stops by writing that token, so it is trained, and appended to the last answer.
- A message that calls tools ends with a token of its own, such as `<|call|>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from finetuning.data.chat.template import DEFAULT_MARKERS, TemplateRenderer, TemplateRenderError
from finetuning.data.samples import JsonObject, MaskNotFound, Message

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
    earlier_end: str = ""
    """What an answer ends with that is not the last message, where that differs."""
    is_implied: bool = False
    """Whether the template writes `end_of_turn` only where another message follows: it is the token of its role."""


@dataclass(frozen=True)
class TurnEnd:
    """Where a turn ends in the text that follows a position in it."""

    length: int
    """Characters up to the end of what is trained."""
    is_trained: bool = True
    """Whether the end-of-turn text is included; False if generation does not stop at it."""
    appended: str = ""
    """The end-of-turn text to append, where the turn is the last one and the template writes none."""


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

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer or a tool call, without white space, most important first."""
        end = self.end_of_turn.strip()
        return tuple(dict.fromkeys((end, self._end_of_call or end))) if end else ()

    def is_complete_turn(self, text: str) -> bool:
        """Return whether the text ends with an end-of-turn text or with a stop token."""
        ends = {self.end_of_turn, self._detected.earlier_end, self._end_of_call, *self._stop_tokens}
        return text.endswith(tuple(ends - {""}))

    def is_empty_turn_at(self, text: str, position: int) -> bool:
        """Return whether nothing but white space comes before the next end-of-turn text."""
        end = self.end_of_turn
        return bool(end) and text[position : position + len(end) + _MAX_WHITE_SPACE].lstrip().startswith(end)

    def match_after_content(self, rest: str, content: str, turn: int) -> TurnEnd:
        """Return the end of a turn at the beginning of `rest`, the text after its stripped content.

        White space at the end of the content comes before the end-of-turn text if the template keeps it.

        Raises:
            MaskNotFound: `rest` begins with something else.
        """
        if not self.end_of_turn:
            raise MaskNotFound(self._detected.problem, turn)
        for white_space in dict.fromkeys((content[len(content.rstrip()) :], "")):
            if (end := self._end_at(rest, white_space)) is not None:
                return end
        excerpt = rest[: len(self.end_of_turn) + 12]
        raise MaskNotFound(f"it is followed by {excerpt!r} instead of the end-of-turn text {self.end_of_turn!r}", turn)

    def _end_at(self, rest: str, before: str) -> TurnEnd | None:
        """Return the end of a turn in a text that begins with `before` and an end-of-turn text; None if it does not."""
        detected = self._detected
        if rest.startswith(before + detected.end_of_turn):
            return TurnEnd(len(before) + len(detected.end_of_turn))
        if detected.earlier_end and rest.startswith(before + detected.earlier_end):
            if detected.earlier_end in self._stop_tokens:
                return TurnEnd(len(before) + len(detected.earlier_end))
            return TurnEnd(len(before), is_trained=False)
        if detected.is_implied and rest.rstrip() == before.rstrip():
            return TurnEnd(len(rest), appended=detected.end_of_turn)
        return None

    def match_as_last(self, tail: str, rest: str, turn: int, *, is_call: bool) -> TurnEnd:
        """Return the end of a turn at the beginning of `rest`, from what the template writes where it is the last one.

        Args:
            tail: the rendered text from some point in the turn on, where that turn is the last message.
            rest: the rendered text of the whole conversation from the same point on.
            turn: the index of the message, for errors.
            is_call: whether the message calls tools.

        Raises:
            MaskNotFound: `tail` ends neither with an end-of-turn text nor with a stop token, or `rest` differs from it.
        """
        detected = self._detected
        if not detected.end_of_turn:
            raise MaskNotFound(detected.problem, turn)
        if detected.is_implied:
            return self._implied_end(tail, rest, turn, is_call)
        if tail.endswith(detected.end_of_turn + detected.suffix):
            ending = tail[: len(tail) - len(detected.suffix)]
            body = ending.removesuffix(detected.end_of_turn)
            if (end := self._end_at(rest, body)) is not None:
                return end
        else:
            ending = tail.rstrip()
            if not ending.endswith(tuple({*self._stop_tokens, self._end_of_call} - {""})):
                raise MaskNotFound(f"it ends with {ending[-30:]!r}, not with {detected.end_of_turn!r}", turn)
            if rest.startswith(ending):
                return TurnEnd(len(ending))
        actual = rest[: len(ending)]
        raise MaskNotFound(
            f"it ends with {ending[-40:]!r} when it is the last message, but with {actual[-40:]!r} here", turn
        )

    def _implied_end(self, tail: str, rest: str, turn: int, is_call: bool) -> TurnEnd:
        """Return the end of a turn of which the template writes no end where it is the last message."""
        body = tail.rstrip()
        if not rest.startswith(body):
            actual = rest[: len(body)]
            raise MaskNotFound(
                f"it ends with {body[-40:]!r} when it is the last message, but with {actual[-40:]!r} here", turn
            )
        after = rest[len(body) :]
        if not after.strip():
            # Tool calls end with the token of the tool's role: that of a user would say that no tool is called.
            return TurnEnd(len(rest), appended=(self._end_of_call if is_call else "") or self.end_of_turn)
        for end in self.stops:
            if after.lstrip().startswith(end):
                return TurnEnd(len(body) + len(after) - len(after.lstrip()) + len(end))
        raise MaskNotFound(f"it is followed by {after[:32]!r}, at which generation does not stop", turn)

    @cached_property
    def _detected(self) -> _Detected:
        prompt = self._detect_generation_prompt()
        try:
            return self._detect_end_of_turn(prompt)
        except (TemplateRenderError, MaskNotFound) as error:
            problem = f"no end of turn can be detected in a plain question and answer: {error}"
            return _Detected("", "", prompt, problem)

    def _detect_end_of_turn(self, prompt: str) -> _Detected:
        """Return the end-of-turn texts, and what follows the last one at the end of a conversation."""
        as_last = self._text_after_answer(_EXAMPLE[:2], 1)
        try:
            in_middle = self._text_after_answer(_EXAMPLE, 1)
        except TemplateRenderError:
            # Some templates accept a single exchange only.
            in_middle = as_last
        end_of_turn = as_last.rstrip()
        first = self._split(in_middle.lstrip())[0]
        if not end_of_turn and first in self._renderer.special_tokens:
            end_of_turn = in_middle[: len(in_middle) - len(in_middle.lstrip())] + first
            return _Detected(end_of_turn, as_last, prompt, is_implied=True)
        earlier_end = ""
        if not in_middle.startswith(end_of_turn):
            end_of_turn = self._common_prefix(as_last, in_middle)
            if not end_of_turn:
                end_of_turn = self._split(as_last)[0].rstrip()
                earlier_end = first if first in self._renderer.special_tokens and in_middle.startswith(first) else ""
        # A template may write the header of the next answer even without a generation prompt.
        end_of_turn = self._up_to_stop_token(end_of_turn)
        return _Detected(end_of_turn, as_last[len(end_of_turn) :], prompt, earlier_end=earlier_end)

    @cached_property
    def _end_of_call(self) -> str:
        """The token that ends a message that calls a tool, if it is another one than the end of an answer."""
        if "tool_calls" not in (self._renderer.message_keys or ()):
            return ""
        from finetuning.data.chat.tool_calls import EXAMPLE_TOOLS, examples

        calling, answered = examples(self._renderer.tool_call_style)
        try:
            tail = self._text_after_call(calling, EXAMPLE_TOOLS)
            special = self._renderer.special_tokens
            if self._detected.is_implied:
                rest = self._text_after_call(answered, EXAMPLE_TOOLS)
                after = self._split(rest[len(tail) :].lstrip())[0]
                return after if rest.startswith(tail) and after in special else ""
        except TemplateRenderError:
            return ""
        last = self._split(tail)[-1]
        is_other = last in special and self.end_of_turn.strip() not in tail
        return last if is_other and last not in self.generation_prompt else ""

    def _text_after_call(self, messages: list[Message], tools: list[JsonObject]) -> str:
        """Return what the template writes after the name of the function that the second message calls."""
        markers = DEFAULT_MARKERS
        text = self._renderer.text(markers.insert(messages), tools=tools)
        return markers.strip(text.partition(markers.after_call(1))[2]).text.rstrip()

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
