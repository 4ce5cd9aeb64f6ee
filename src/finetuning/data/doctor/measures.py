"""What `finetuning data doctor` measures of each batch of rows, in the processes that prepare them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np

from finetuning.data.collators import UNTRAINED
from finetuning.data.doctor.minhash import NUM_VALUES, signatures
from finetuning.data.samples import (
    Conversation,
    JsonObject,
    JsonValue,
    Message,
    Preference,
    Prompt,
    RowToTokenize,
    Text,
    UnpairedPreference,
)
from finetuning.data.statistics import TOO_LONG, TRUNCATED
from finetuning.errors import Location, parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from finetuning.data.preprocessor import Batch

MAX_WORST = 10
_MIN_QUESTION = 40
"""Characters of a question that an answer repeats; shorter ones are repeated on purpose, as names are."""
REPEATED, BAD_CALL, EMPTY, DOUBLE_BOS, NO_END, UNKNOWN, PII = (
    "repeated", "bad call", "empty", "double BOS", "no end", "unknown", "PII",
)  # fmt: skip
Scan = Callable[[str], Mapping[str, int]]
"""Counts strings that look like personal data in a text, by their kind."""


@dataclass(frozen=True)
class TokenFacts:
    """Token ids that have a meaning; None where the tokenizer has none."""

    bos: int | None
    unknown: int | None
    stops: tuple[int, ...]


@dataclass(frozen=True, order=True)
class Worst:
    """An unusual row, and why; `score` is larger the worse it is."""

    score: float
    location: Location = field(compare=False)
    detail: str = field(compare=False)


@dataclass
class Measures:
    """Measures of rows, one entry in each list per batch. The rows are those that are trained on."""

    rows: int = 0
    lengths: list[NDArray[np.int64]] = field(default_factory=list["NDArray[np.int64]"])
    """Tokens of each row before truncation, and of those that were dropped because they are too long."""
    turns: Counter[int] = field(default_factory=Counter[int])
    densities: list[NDArray[np.float64]] = field(default_factory=list["NDArray[np.float64]"])
    """Characters per token of each row."""
    signatures: list[NDArray[np.uint32]] = field(default_factory=list["NDArray[np.uint32]"])
    hashes: list[NDArray[np.int64]] = field(default_factory=list["NDArray[np.int64]"])
    locations: list[Location] = field(default_factory=list[Location])
    scripts: Counter[str] = field(default_factory=Counter[str])
    """Rows by the script that most of their letters belong to."""
    labels: Counter[bool] = field(default_factory=Counter[bool])
    pairs: list[NDArray[np.int64]] = field(default_factory=list["NDArray[np.int64]"])
    """Tokens of the chosen and the rejected answer of each pair."""
    images: list[NDArray[np.int64]] = field(default_factory=list["NDArray[np.int64]"])
    """Row, width and height of each image, (images, 3); the row counts within its batch."""
    counts: Counter[str] = field(default_factory=Counter[str])
    pii: Counter[str] = field(default_factory=Counter[str])
    worst: dict[str, list[Worst]] = field(default_factory=dict[str, list[Worst]])

    def note(self, kind: str, score: float, location: Location, detail: str) -> None:
        """Count an unusual row, and keep the worst ones."""
        self.counts[kind] += 1
        rows = self.worst.setdefault(kind, [])
        rows.append(Worst(score, location, detail))
        if len(rows) > 4 * MAX_WORST:
            self.worst[kind] = heapq.nlargest(MAX_WORST, rows)

    def add(self, more: Measures) -> None:
        """Add the measures of further rows."""
        self.rows += more.rows
        for name in ("lengths", "densities", "signatures", "hashes", "locations", "pairs", "images"):
            getattr(self, name).extend(getattr(more, name))
        for name in ("turns", "scripts", "labels", "counts", "pii"):
            getattr(self, name).update(getattr(more, name))
        for kind, rows in more.worst.items():
            self.worst[kind] = heapq.nlargest(MAX_WORST, [*self.worst.get(kind, []), *rows])


@dataclass
class RowInspector:
    """Measures the rows of a run while they are prepared."""

    tokens: TokenFacts
    scan: Scan | None = None
    """Looks for personal data; None to leave it out."""
    by_split: dict[str, Measures] = field(default_factory=dict[str, Measures])

    def add(self, split: str, measured: object) -> None:
        """Add the measures of a batch, in the main process."""
        self.by_split.setdefault(split, Measures()).add(cast("Measures", measured))

    def measure(self, rows: Sequence[RowToTokenize], batch: Batch) -> Measures:
        """Return the measures of a batch, in any process."""
        kept = [row for row, is_kept in zip(rows, batch.kept_mask, strict=True) if is_kept]
        result = Measures(len(kept), locations=[row.location for row in kept])
        outcomes = batch.statistics.outcomes
        cut = {row.location: row.tokens_cut for row in outcomes if row.outcome == TRUNCATED}
        too_long = [row.tokens for row in outcomes if row.reason == TOO_LONG]
        if kept:
            sizes = _sizes(batch)
            whole = sizes + np.array([cut.get(row.location, 0) for row in kept], dtype=np.int64)
            texts = [_texts(row) for row in kept]
            joined = ["\n".join(text for _, text in row) for row in texts]
            result.lengths.append(np.concatenate([whole, np.array(too_long, dtype=np.int64)]))
            result.densities.append(np.array(list(map(len, joined))) / np.maximum(sizes, 1))
            # The same question about another image is another row.
            digests = [[image.digest for image in getattr(row, "images", ())] for row in kept]
            said_texts = ["\n".join(_without_system(row)) for row in texts]
            result.signatures.append(
                signatures(
                    [f"{text}\n{digest}" if digest else text for text, digest in zip(said_texts, digests, strict=True)]
                )
            )
            result.images.append(_image_sizes(kept))
            result.hashes.append(batch.hashes)
            result.scripts.update(map(_main_script, joined))
            self._check_tokens(result, batch, kept, set(cut))
            for row, text in zip(kept, joined, strict=True):
                self._check_row(result, row, text)
        elif too_long:
            result.lengths.append(np.array(too_long, dtype=np.int64))
        return result

    def _check_row(self, result: Measures, row: RowToTokenize, text: str) -> None:
        location = row.location
        for question, answer in _exchanges(row):
            if len(question) >= _MIN_QUESTION and question in answer:
                share = len(question) / max(len(answer), 1)
                result.note(REPEATED, share, location, f"{share:.0%} of the answer is the question")
                break
        if isinstance(row, Conversation | Prompt):
            result.turns[sum(message["role"] == "assistant" for message in row.messages)] += 1
        if isinstance(row, UnpairedPreference):
            result.labels[row.label] += 1
        if isinstance(row, Preference):
            for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
                if not any((message.get("content") or "").strip() or message.get("tool_calls") for message in answer):
                    result.note(EMPTY, 1, location, f"the {name} answer has no text")
        problems = [problem for messages, tools in _calls(row) for problem in call_problems(messages, tools)]
        if problems:
            result.note(BAD_CALL, len(problems), location, problems[0])
        if self.scan is not None and (counts := self.scan(text)):
            result.pii.update(counts)
            result.note(PII, sum(counts.values()), location, ", ".join(f"{n} x {kind}" for kind, n in counts.items()))

    def _check_tokens(self, result: Measures, batch: Batch, kept: Sequence[RowToTokenize], cut: set[Location]) -> None:
        """Look at token ids, all rows of the batch at once."""
        columns = batch.columns
        name = "input_ids" if "input_ids" in columns else "prompt_ids"
        ids, sizes = _flattened(batch, name)
        starts = np.cumsum(sizes) - sizes
        if self.tokens.bos is not None:
            has_two = (sizes > 1) & (ids[starts] == self.tokens.bos)
            has_two &= ids[np.minimum(starts + 1, len(ids) - 1)] == self.tokens.bos
            _note_rows(result, DOUBLE_BOS, has_two, kept, "begins with two beginning-of-sequence tokens")
        if self.tokens.unknown is not None:
            unknown = np.add.reduceat(ids == self.tokens.unknown, starts)
            for index in np.flatnonzero(unknown).tolist():
                result.note(UNKNOWN, unknown[index], kept[index].location, f"{unknown[index]} unknown tokens")
        if (last := _last_trained(batch)) is not None and self.tokens.stops:
            is_cut = np.array([row.location in cut for row in kept], dtype=np.bool_)
            no_end = ~np.isin(last, self.tokens.stops) & ~is_cut
            _note_rows(result, NO_END, no_end, kept, "what is trained does not end with a stop token")
        if "chosen_ids" in columns:
            pairs = [_flattened(batch, name)[1] for name in ("chosen_ids", "rejected_ids")]
            result.pairs.append(np.stack(pairs, axis=1))


def _note_rows(
    result: Measures, kind: str, mask: NDArray[np.bool_], kept: Sequence[RowToTokenize], detail: str
) -> None:
    for index in np.flatnonzero(mask).tolist():
        result.note(kind, 1, kept[index].location, detail)


def _flattened(batch: Batch, name: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the values of all rows of a column one after the other, and the number of each."""
    column = batch.columns[name]
    return cast("NDArray[np.int32]", column.values), cast("NDArray[np.int64]", column.sizes)


def _sizes(batch: Batch) -> NDArray[np.int64]:
    """Return the tokens of each row, of a pair those of the prompt and the longer answer."""
    columns = batch.columns
    if "input_ids" in columns:
        return _flattened(batch, "input_ids")[1]
    sizes = _flattened(batch, "prompt_ids")[1]
    answers = [
        _flattened(batch, name)[1] for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in columns
    ]
    return sizes + np.maximum.reduce(answers) if answers else sizes


def _image_sizes(rows: Sequence[RowToTokenize]) -> NDArray[np.int64]:
    sizes = [
        (index, image.width, image.height) for index, row in enumerate(rows) for image in getattr(row, "images", ())
    ]
    return np.array(sizes, dtype=np.int64).reshape(-1, 3)


def _last_trained(batch: Batch) -> NDArray[np.int32] | None:
    """Return the last trained token of each row; None for prompts."""
    columns = batch.columns
    if "labels" in columns:
        labels, sizes = _flattened(batch, "labels")
        ends = np.cumsum(sizes)
        positions = np.where(labels != UNTRAINED, np.arange(len(labels)), -1)
        return labels[np.maximum.reduceat(positions, ends - sizes)]
    name = next((name for name in ("chosen_ids", "completion_ids") if name in columns), None)
    if name is None:
        return None
    ids, sizes = _flattened(batch, name)
    return ids[np.cumsum(sizes) - 1]


def _texts(row: RowToTokenize) -> list[tuple[str, str]]:
    """Return the texts of a row with their roles."""
    if isinstance(row, Text):
        return [("user", row.text)]
    messages: list[Message] = []
    if isinstance(row, Conversation | Prompt):
        messages = row.messages
    elif isinstance(row, Preference):
        messages = [*row.prompt, *row.chosen, *row.rejected]
    elif isinstance(row, UnpairedPreference):
        messages = [*row.prompt, *row.completion]
    return [(message["role"], message.get("content") or "") for message in messages]


def _without_system(texts: Sequence[tuple[str, str]]) -> list[str]:
    """Return the texts that differ from row to row: many rows may have the same instructions."""
    return [text for role, text in texts if role not in ("system", "developer")]


def _exchanges(row: RowToTokenize) -> Iterator[tuple[str, str]]:
    """Yield each question of a row with its answer."""
    if isinstance(row, Text):
        if row.spans:
            start, end = row.spans[0]
            yield row.text[:start].strip(), row.text[start:end]
        return
    chats: list[list[Message]] = []
    if isinstance(row, Conversation):
        chats = [row.messages]
    elif isinstance(row, Preference):
        chats = [[*row.prompt[-1:], *row.chosen[:1]]]
    elif isinstance(row, UnpairedPreference):
        chats = [[*row.prompt[-1:], *row.completion[:1]]]
    for messages in chats:
        for question, answer in pairwise(messages):
            if question["role"] == "user" and answer["role"] == "assistant":
                yield (question.get("content") or "").strip(), answer.get("content") or ""


def _calls(row: RowToTokenize) -> Iterator[tuple[Sequence[Message], list[JsonObject]]]:
    if isinstance(row, Conversation | Preference | UnpairedPreference | Prompt) and row.tools:
        for name in ("messages", "prompt", "chosen", "rejected", "completion"):
            yield getattr(row, name, ()), row.tools


_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
}  # fmt: skip


def call_problems(messages: Sequence[Message], tools: Sequence[JsonObject]) -> list[str]:
    """Return how the tool calls of messages contradict the schemas of the tools, as far as JSON Schema's basics go."""
    functions: list[JsonObject] = [tool.get("function", tool) for tool in tools]
    schemas: dict[str, JsonObject] = {
        str(item.get("name")): item.get("parameters") or JsonObject() for item in functions
    }
    problems: list[str] = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            function: JsonObject = call.get("function", call)
            name = str(function.get("name"))
            if name not in schemas:
                problems.append(f"calls {name}, which is not among its tools")
            else:
                problems += [f"{name}: {problem}" for problem in _argument_problems(function, schemas[name])]
    return problems


def _argument_problems(function: JsonObject, schema: JsonObject) -> Iterator[str]:
    arguments: JsonValue = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        yield "its arguments are not a JSON object"
        return
    properties: JsonObject = schema.get("properties") or {}
    for required in schema.get("required") or ():
        if required not in arguments:
            yield f"{required} is required"
    for key, value in arguments.items():
        if key not in properties:
            if properties and not schema.get("additionalProperties"):
                yield f"{key} is not a parameter"
            continue
        declared: JsonObject = properties[key] if isinstance(properties[key], dict) else {}
        kind: JsonValue = declared.get("type")
        expected = _TYPES.get(kind) if isinstance(kind, str) else None
        if expected and (not isinstance(value, expected) or (isinstance(value, bool) and kind != "boolean")):
            yield f"{key} is not of the type {kind}"
        elif declared.get("enum") and value not in declared["enum"]:
            yield f"{key} is none of the values of its enum"


_SCRIPTS: tuple[tuple[int, str], ...] = (
    (0x0000, ""), (0x0041, "Latin"), (0x0370, "Greek"), (0x0400, "Cyrillic"), (0x0530, "Armenian"), (0x0590, "Hebrew"),
    (0x0600, "Arabic"), (0x0780, "other"), (0x0900, "Devanagari"), (0x0980, "other Indic"), (0x0E00, "Thai"),
    (0x0E80, "other"), (0x10A0, "Georgian"), (0x1100, "Hangul"), (0x1200, "other"), (0x1E00, "Latin"),
    (0x1F00, "Greek"), (0x2000, ""), (0x3040, "Kana"), (0x3100, "other"), (0x3400, "Han"), (0xA000, "other"),
    (0xAC00, "Hangul"), (0xD7B0, "other"), (0xF900, "Han"), (0xFB00, "other"), (0x1F000, ""), (0x20000, "Han"),
)  # fmt: skip
"""The first code point of ranges and the script of their letters; empty for signs that belong to none."""
_STARTS = np.array([start for start, _ in _SCRIPTS])
_NAMES = list(dict.fromkeys(name for _, name in _SCRIPTS))
_NAME_OF_RANGE = np.array([_NAMES.index(name) for _, name in _SCRIPTS])


def _main_script(text: str) -> str:
    """Return the script of most letters of a text.

    >>> _main_script("Hello"), _main_script("Привет, Bob"), _main_script("12")
    ('Latin', 'Cyrillic', 'no letters')
    """
    if text.isascii():
        return "Latin" if text.upper() != text.lower() else "no letters"
    points = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)
    ranges = np.searchsorted(_STARTS, points, side="right") - 1
    counts = np.bincount(_NAME_OF_RANGE[ranges], minlength=len(_NAMES))
    counts[_NAMES.index("")] = 0
    return _NAMES[int(counts.argmax())] if counts.any() else "no letters"


def joined(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the entries of all batches as one array."""
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def joined_signatures(measures: Measures) -> NDArray[np.uint32]:
    """Return the signatures of all rows, (rows, 48)."""
    return np.concatenate(measures.signatures) if measures.signatures else np.empty((0, NUM_VALUES), dtype=np.uint32)
