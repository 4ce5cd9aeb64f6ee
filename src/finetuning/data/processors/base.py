"""What all processors share: tokenized and dropped samples, truncation, and warnings about the content of rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from finetuning.data.chat.template import REASONING_KEYS
from finetuning.data.collators import UNTRAINED
from finetuning.data.samples import Conversation, MaskError, Message, Preference, Prompt, UnpairedPreference
from finetuning.data.statistics import TOO_LONG
from finetuning.data.tokenization.labels import SPLIT_AT_TURN, TokenizedText

if TYPE_CHECKING:
    from finetuning.data.chat.template import TemplateRenderer

EMPTY_ANSWER = "an assistant turn without text"
TWO_REASONINGS = "a turn with two blocks of reasoning"
MIXED_REASONING = "some turns hold their reasoning in the content, and others in a key of their own"
TEMPLATE_IN_TEXT = "the text holds special tokens of the tokenizer, as if a chat template had been applied to it"
PROMPT_SPACE = (
    "the prompt ends in white space, which belongs to the first word of the completion: move it to the beginning of the"
    " completion"
)
NO_ANSWER = "no assistant message"
BROKEN_LINKS = {
    "tool_call_id": "a tool's answer whose tool_call_id is the id of no call before it",
    "name": "a tool's answer with the name of a function that is not called before it",
}
INVALID_ARGUMENTS = "a tool call whose arguments are not a JSON object"
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


def unverified_mask(error: MaskError, renderer: TemplateRenderer | None = None) -> DroppedSample:
    """The row whose loss mask could not be verified, with the template of TRL for this model, if it has one."""
    offered = renderer.training_template if renderer is not None else None
    hint = f"; TRL trains this model with another template: set data_conf.chat_template: {offered}" if offered else ""
    return DroppedSample("the loss mask could not be verified", f"{error}{hint}", is_bad=True)


def find_unprinted(
    row: Conversation | Preference | UnpairedPreference | Prompt, renderer: TemplateRenderer, text: str
) -> DroppedSample | None:
    """Return the row as dropped if its text lacks its tools, documents, system message or reasoning; None otherwise.

    The model would learn to call tools, or to follow instructions, that it was not given; or to answer without the
    reasoning that the answer came from. Templates that print the reasoning of some turns only do so in serving, too.
    """
    missing = None
    reasoning = _reasoning_key(row) if renderer.omits_reasoning else None
    if reasoning:
        detail = (
            "choose another template (data_conf.chat_template_name), or leave it out with"
            f" ignore_columns: [messages.{reasoning}], messages being the column of the message"
        )
        return DroppedSample(f"the chat template does not print the {reasoning} of a message", detail, is_bad=True)
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
    detail += " or, where it is a message, remove it from the file" if missing == "system" else ""
    name = "the system message" if missing == "system" else f"the {missing} of the row"
    return DroppedSample(f"the chat template does not print {name}", detail, is_bad=True)


def messages_of(row: object) -> Iterator[list[Message]]:
    """Yield the lists of messages of a row."""
    if isinstance(row, Conversation):
        yield row.messages
        return
    for name in ("messages", "prompt", "chosen", "rejected", "completion"):
        if messages := getattr(row, name, None):
            yield messages


def _reasoning_key(row: object) -> str | None:
    """Return the first key in which a message of the row holds its reasoning; None if there is none."""
    for messages in messages_of(row):
        for message in messages:
            if len(message) > 2 and message["role"] == "assistant":
                for key in sorted(REASONING_KEYS):
                    if message.get(key):
                        return key
    return None


def serve_tool_calls(rows: Iterable[object], renderer: TemplateRenderer) -> None:
    """Write the tool calls of rows, in place, as inference servers pass them to the chat template."""
    for row in rows:
        for messages in messages_of(row):
            if any([len(message) > 2 and bool(message.get("tool_calls")) for message in messages]):
                messages[:] = renderer.tool_call_style.apply(messages)


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
        if (
            any(map(str.isspace, contents))
            or _THINK in joined
            or any(character in joined for character in self._first_characters)
        ):
            return [self(messages) for messages in rows]
        return [()] * len(rows)

    def __call__(self, messages: Sequence[Message]) -> set[str]:
        """The warnings of one row."""
        warnings: set[str] = set()
        answering: Collection[str] = ()
        links: Collection[str] = ()
        if any(message.get("tool_calls") or message.get("tool_call_id") for message in messages):
            from finetuning.data.chat.tool_calls import ANSWERING_ROLES, broken_links, has_invalid_arguments

            if has_invalid_arguments(messages):
                warnings.add(INVALID_ARGUMENTS)
            warnings.update(BROKEN_LINKS[key] for key in broken_links(messages))
            answering, links = ANSWERING_ROLES, BROKEN_LINKS
        if self.known_keys is not None:
            keys = {
                key
                for message in messages
                for key, value in message.items()
                if value not in (None, "", [], {}) and not (key in links and message["role"] in answering)
            }
            unused = keys - {"role", "content"} - set(self.known_keys)
            warnings |= {f"message key {key} is not used: the chat template does not read it" for key in unused}
        contents = [message.get("content") or " " for message in messages]
        warnings |= _reasoning_warnings(messages)
        if not any(map(str.isspace, contents)) and not self.has_special_token("\n".join(contents)):
            return warnings
        for message in messages:
            content = message.get("content") or ""
            if message["role"] == "assistant" and not content.strip() and not message.get("tool_calls"):
                warnings.add(EMPTY_ANSWER)
            if self.has_special_token(content):
                warnings.add(SPECIAL_TOKEN_IN_TEXT)
        return warnings

    def has_special_token(self, content: str) -> bool:
        """Return whether a text holds a special token."""
        for character in self._first_characters:
            if character in content:
                return any(token in content for token in self.special_tokens)
        return False


def unused_arguments(
    row: Conversation | Preference | UnpairedPreference | Prompt, renderer: TemplateRenderer
) -> set[str]:
    """The warnings about arguments of a row, its `chat_template_kwargs`, that the chat template does not read."""
    unread = row.template_kwargs.keys() - renderer.variables if row.template_kwargs else ()
    return {f"chat_template_kwargs.{name} is not used: the chat template does not read it" for name in unread}


_WORD = re.compile(r"[A-Za-z0-9]{3,}")


_NOT_PRINTED = {"role", "content", "type", "id", "tool_call_id", *REASONING_KEYS}
"""Keys of messages that are verified, or which templates need not print."""


def omitted_messages(messages: Sequence[Message], text: str) -> set[str]:
    """The warnings about messages of which the rendered text lacks the longest word, or the text of another key.

    Not of the assistant's contents, which are verified. A template may write a content as JSON, so whole contents say
    less. That a template has the name of a key somewhere does not mean that it prints it for each role.
    """
    warnings: set[str] = set()
    for message in messages:
        for key, value in message.items() if len(message) > 2 else ():
            is_link = key == "name" and message["role"] in ("tool", "function", "ipython")
            if key not in _NOT_PRINTED and not is_link and isinstance(value, str) and value.strip() not in text:
                warnings.add(f"message key {key} is not used: the chat template does not read it")
        if len(message) > 2 and message.get("tool_calls"):
            unprinted = [name for name in _other_keys_of_calls(message) if f'"{name}"' not in text]
            warnings |= {
                f"message key tool_calls.{name} is not used: the chat template does not read it" for name in unprinted
            }
        words = _WORD.findall(message.get("content") or "") if message["role"] != "assistant" else ()
        if words and max(words, key=len) not in text:
            warnings.add(f"the chat template does not print a message of the role {message['role']}")
    return warnings


_KEYS_OF_CALLS = {"id", "type", "index", "function", "name", "arguments"}


def _other_keys_of_calls(message: Message) -> set[str]:
    """Return the keys of a message's tool calls that are no part of a call in the OpenAI API."""
    objects = [item for call in message["tool_calls"] for item in (call, call.get("function", call))]
    return {name for item in objects for name, value in item.items() if value} - _KEYS_OF_CALLS


_THINK = "<think>"


def _reasoning_warnings(messages: Sequence[Message]) -> set[str]:
    """The warnings about reasoning that is in two places, of one turn or of several."""
    inline = [message["role"] == "assistant" and _THINK in (message.get("content") or "") for message in messages]
    separate = [len(message) > 2 and any(message.get(key) for key in REASONING_KEYS) for message in messages]
    warnings: set[str] = set()
    if any(inline):
        if any(
            is_inline and (is_separate or message["content"].count(_THINK) > 1)
            for message, is_inline, is_separate in zip(messages, inline, separate, strict=True)
        ):
            warnings.add(TWO_REASONINGS)
        elif any(separate):
            warnings.add(MIXED_REASONING)
    return warnings


def explain_split(warning: str | None, text: str, start: int) -> str | None:
    """The warning about a text that was split before its completion, and how to write the row so that it is not."""
    return PROMPT_SPACE if warning == SPLIT_AT_TURN and text[start - 1 : start].isspace() else warning


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
