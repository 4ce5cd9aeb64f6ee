"""What a proof says: the spans of a text, or why there are none."""

from __future__ import annotations

from dataclasses import dataclass

from finetuning.data.samples import Message

Span = tuple[int, int]
HOLDS_MORE = "the generation prompt holds more than the turn begins with"
BEGINS_DIFFERENTLY = "the generation prompt and the turn begin differently"
NOT_TAKEN = "the chat template does not take this conversation"


@dataclass(slots=True)
class Marked:
    """A rendered conversation, the character spans to train on, in order, and how they were proven."""

    text: str
    spans: tuple[Span, ...]
    method: str
    notes: frozenset[str] = frozenset()
    heads: tuple[str, ...] = ()
    """What stands before each span, back to the content before it, where that is the same in many conversations."""
    unsaid: tuple[str, ...] = ()
    """What each turn would have to begin with for its span to begin later: the prompt would hold that much of it."""


@dataclass(frozen=True)
class Refused:
    """Why no mask could be shown for a conversation; `turn` is the index of the message, where one is to blame."""

    reason: str
    turn: int | None = None

    def __str__(self) -> str:
        return self.reason if self.turn is None else f"messages[{self.turn}]: {self.reason}"


class NotShown(Exception):
    """A span could not be shown to be right; caught in `masking`, never seen by users."""

    def __init__(self, reason: str, turn: int | None = None):
        super().__init__(reason)
        self.turn = turn


def holds_all(message: Message, text: str, turn: int) -> bool:
    """Whether a turn's text holds all that the message says; False when it leaves out what came before an answer.

    Raises:
        NotShown: the answer itself is not there, or a tool call.
    """
    names = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    if any(name not in text for name in names):
        raise NotShown("the template leaves out its tool calls", turn)
    content = (message.get("content") or "").strip()
    if not content or content in text:
        return True
    answer = content.rpartition("</think>")[2].strip()
    if answer and answer not in text and not names:
        raise NotShown("the template leaves out its content", turn)
    return False
