"""The chat of the page: one model at a time, loaded when it is first asked, and its answers as they are generated."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetuning.config.redaction import redact_text
from finetuning.errors import FinetuningError, first_line

if TYPE_CHECKING:
    from finetuning.inference.chat import Chat

_POLL_S = 0.1


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text of the model, a note about it, or the error that ended it."""

    kind: Literal["text", "note", "error"]
    text: str


class _Answer:
    """An answer that a thread generates, and the server reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: list[Piece] = []
        self.is_done = False
        self.is_abandoned = False

    def add(self, piece: Piece) -> None:
        with self._lock:
            self._pieces.append(piece)

    def take(self) -> list[Piece]:
        with self._lock:
            pieces, self._pieces = self._pieces, []
        return pieces

    def on_text(self, text: str) -> None:
        if self.is_abandoned:
            # As Ctrl-C does in the terminal: the answer ends, and what was generated is kept.
            raise KeyboardInterrupt
        if text:
            self.add(Piece("text", text))


class Conversations:
    """Answers questions with the model of a run. One answer is generated at a time.

    The model of the run that was asked last stays loaded.

    Args:
        open_chat: loads the model of an output directory.
    """

    def __init__(self, open_chat: Callable[[Path], Chat]):
        self._open_chat = open_chat
        self._busy = threading.Lock()
        self._folder: Path | None = None
        self._chat: Chat | None = None

    async def ask(
        self, folder: Path, question: str, *, adapter: bool, is_new: bool, is_stopping: Callable[[], bool]
    ) -> AsyncIterator[Piece]:
        """Yield the answer in pieces.

        When the caller stops to read, or `is_stopping`, the model stops at its next token.

        Args:
            adapter: whether to answer with the adapter, if the model has one.
            is_new: begin a new conversation.
        """
        if not self._busy.acquire(blocking=False):
            yield Piece("error", "The model is answering another question. Ask again when it has finished.")
            return
        answer = _Answer()

        def generate() -> None:
            try:
                self._generate(answer, folder, question, adapter=adapter, is_new=is_new)
            finally:
                answer.is_done = True
                self._busy.release()

        # Not a worker of the event loop: the server can end while it generates.
        threading.Thread(target=generate, name="chat", daemon=True).start()
        try:
            while not is_stopping():
                is_done = answer.is_done
                for piece in answer.take():
                    yield piece
                if is_done:
                    return
                await asyncio.sleep(_POLL_S)
        finally:
            answer.is_abandoned = True

    def _generate(self, answer: _Answer, folder: Path, question: str, *, adapter: bool, is_new: bool) -> None:
        try:
            if self._folder != folder or self._chat is None:
                # The memory of the one before is needed first.
                self._chat = None
                answer.add(Piece("note", "loading the model"))
                self._chat, self._folder = self._open_chat(folder), folder
            chat = self._chat
            if is_new:
                chat.reset()
            if chat.has_adapter:
                chat.set_adapter(adapter)
            turn = chat.ask(question, answer.on_text)
        except FinetuningError as error:
            answer.add(Piece("error", redact_text("\n".join(str(problem) for problem in error.problems))))
        except (MemoryError, OSError, RuntimeError, ValueError) as error:
            # Loading and generating fail in the ways of torch, such as memory that a run of this machine uses.
            self._chat = None
            answer.add(Piece("error", redact_text(f"{type(error).__name__}: {first_line(error)}")))
        else:
            if turn.dropped:
                answer.add(Piece("note", f"its first {turn.dropped} questions do not fit, and were left out"))
