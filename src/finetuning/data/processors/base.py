"""What all processors share: tokenized and dropped samples, truncation, and warnings about the content of rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from finetuning.data.collators import UNTRAINED
from finetuning.data.samples import Conversation, MaskError, Message, Preference, Prompt, UnpairedPreference
from finetuning.data.statistics import TOO_LONG
from finetuning.data.tokenization.labels import TokenizedText

if TYPE_CHECKING:
    from finetuning.data.chat.template import TemplateRenderer

EMPTY_ANSWER = "an assistant turn without text"
NO_ANSWER = "no assistant message"
SPECIAL_TOKEN_IN_TEXT = "a message contains a special token of the tokenizer as text"


@dataclass(slots=True)
class TokenizedSample:
    """One row ready for training: its columns (int32 arrays, strings or bools), its token counts, and its text."""

    columns: dict[str, Any]
    tokens: int
    trained: int
    text: str
    """The text that was tokenized, for finding duplicates."""
    tokens_cut: int = 0
    answer_cut: bool = False
    warnings: frozenset[str] = frozenset()


@dataclass(frozen=True)
class DroppedSample:
    """A row that is not trained on, and why."""

    reason: str
    detail: str = ""
    is_bad: bool = False
    """The row itself is wrong; such rows are errors unless `on_bad_row` is `skip`."""
    is_invalid: bool = True
    """Counts towards `max_lost_fraction`; False for rows that were filtered as configured."""
    tokens: int = 0


class Processor(Protocol):
    """Turns a batch of parsed rows into samples, one per row and in their order."""

    def __call__(self, rows: Sequence[Any]) -> list[TokenizedSample | DroppedSample]: ...


def unverified_mask(error: MaskError) -> DroppedSample:
    """The row whose loss mask could not be verified."""
    return DroppedSample("the loss mask could not be verified", str(error), is_bad=True)


def find_unprinted(
    row: Conversation | Preference | UnpairedPreference | Prompt, renderer: TemplateRenderer, text: str
) -> DroppedSample | None:
    """Return the row as dropped if its rendered text lacks its tools, documents or system message; None if it does not.

    The model would learn to call tools, or to follow instructions, that it was not given.
    """
    missing = None
    if row.tools and "tools" not in renderer.variables:
        missing = "tools"
    elif row.template_kwargs.get("documents") and "documents" not in renderer.variables:
        missing = "documents"
    else:
        messages = row.messages if isinstance(row, Conversation | Prompt) else row.prompt
        content = messages[0].get("content") if messages and messages[0]["role"] in ("system", "developer") else None
        longest = max(str(content or "").splitlines(), key=len, default="").strip()
        # Templates may remove the switches of reasoning, and nothing else that begins with a slash.
        if longest not in text and re.sub(r"\s*/(no_)?think\b", "", longest).strip() not in text:
            missing = "system"
    if missing is None:
        return None
    detail = f"choose another template (data_conf.chat_template_name), or leave it out with ignore_columns: [{missing}]"
    name = "the system message" if missing == "system" else f"the {missing} of the row"
    return DroppedSample(f"the chat template does not print {name}", detail, is_bad=True)


def too_long(size: int, max_length: int) -> DroppedSample:
    """A row that is longer than the limit and may not be truncated."""
    return DroppedSample(TOO_LONG, f"{size} tokens, the limit is {max_length}", is_invalid=False, tokens=size)


@dataclass
class MessageWarnings:
    """Finds messages that are likely mistakes: assistant turns without text, special tokens written as text, and keys
    that the chat template does not read.
    """

    special_tokens: tuple[str, ...]
    known_keys: Collection[str] | None = None
    """Keys that the template reads; None if it may read any."""

    @cached_property
    def _first_characters(self) -> tuple[str, ...]:
        return tuple({token[0] for token in self.special_tokens if token})

    def of_batch(self, rows: Sequence[Sequence[Message]]) -> Sequence[Collection[str]]:
        """The warnings of each row.

        Most batches have none. That is decided for the batch as a whole, which is much faster than row by row.
        """
        if any([len(message) > 2 for messages in rows for message in messages]):
            return [self(messages) for messages in rows]
        contents = [message.get("content") or " " for messages in rows for message in messages]
        joined = "\n".join(contents)
        if any(map(str.isspace, contents)) or any(character in joined for character in self._first_characters):
            return [self(messages) for messages in rows]
        return [()] * len(rows)

    def __call__(self, messages: Sequence[Message]) -> set[str]:
        """The warnings of one row."""
        warnings: set[str] = set()
        if self.known_keys is not None:
            keys = {key for message in messages for key, value in message.items() if value not in (None, "", [], {})}
            unused = keys - {"role", "content"} - set(self.known_keys)
            warnings |= {f"message key {key} is not used: the chat template does not read it" for key in unused}
        contents = [message.get("content") or " " for message in messages]
        if not any(map(str.isspace, contents)) and not self._has_special_token("\n".join(contents)):
            return warnings
        for message in messages:
            content = message.get("content") or ""
            if message["role"] == "assistant" and not content.strip() and not message.get("tool_calls"):
                warnings.add(EMPTY_ANSWER)
            if self._has_special_token(content):
                warnings.add(SPECIAL_TOKEN_IN_TEXT)
        return warnings

    def _has_special_token(self, content: str) -> bool:
        for character in self._first_characters:
            if character in content:
                return any(token in content for token in self.special_tokens)
        return False


def truncate(
    tokens: TokenizedText | MaskError,
    max_length: int,
    may_truncate: bool,
    text: str = "",
    warnings: Iterable[str] = (),
) -> TokenizedSample | DroppedSample:
    """Make `input_ids` and `labels` (int32, -100 where no loss is taken), truncated on the right if that is allowed."""
    if isinstance(tokens, MaskError):
        return unverified_mask(tokens)
    size = len(tokens.ids)
    # The usual case first: the row fits, and a part of it is trained.
    if 0 < size <= max_length and (trained := sum([last - first for first, last in tokens.runs])):
        columns = {"input_ids": tokens.ids, "labels": tokens.labels(UNTRAINED)}
        all_warnings = frozenset([*warnings, tokens.warning] if tokens.warning else warnings)
        return TokenizedSample(columns, size, trained, text, warnings=all_warnings)
    if not any(last > first for first, last in tokens.runs):
        return DroppedSample("nothing to train on", NO_ANSWER)
    if size > max_length and not may_truncate:
        return too_long(size, max_length)
    ids, labels = tokens.ids[:max_length], tokens.labels(UNTRAINED)[:max_length]
    trained = sum(max(min(last, max_length) - first, 0) for first, last in tokens.runs)
    if trained == 0:
        return DroppedSample("nothing left to train on", f"the answer begins after {max_length} tokens", tokens=size)
    return TokenizedSample(
        columns={"input_ids": ids, "labels": labels},
        tokens=len(ids),
        trained=trained,
        text=text,
        tokens_cut=max(size - max_length, 0),
        answer_cut=tokens.runs[-1][1] > max_length,
        warnings=frozenset([*warnings, tokens.warning] if tokens.warning else warnings),
    )
