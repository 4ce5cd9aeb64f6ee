"""What is generated from: one open prompt, the lines of a text file, or the rows of an evaluation file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from finetuning.config.sections.generation import EvalData, OpenInput
from finetuning.data.formats.row_format import (
    FieldError,
    messages_field,
    meta_fields,
    problem_of,
    template_kwargs_field,
    tools_field,
)
from finetuning.data.samples import Message, Row
from finetuning.data.sources import Shard, find_shards, json_type
from finetuning.data.transforms import TransformChain, make_transforms
from finetuning.errors import ConfigError, DataError, Location, Problem

MOST_PROBLEMS_SHOWN = 10
OPEN_INPUT = "open-input"
_KEY = "prompt_conf.data"
_NOWHERE = Location()
_READ = ("path", "split", "subset", "revision", "columns", "text_unit", "max_rows")
"""What of a dataset counts for prompts; the rest says how rows become training data."""


@dataclass(frozen=True)
class GenerationPrompt:
    """Text to continue, or messages to answer; exactly one of the two is set."""

    id: str | int
    text: str | None = None
    messages: tuple[Message, ...] = ()
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    correct_answers: tuple[str, ...] = ()
    dataset: str | None = None
    data_collection: str | None = None
    carried: dict[str, Any] = field(default_factory=dict)
    """Columns that go into the output as they are."""
    place: Location = field(default_factory=Location)


def read_prompts(conf: OpenInput | EvalData) -> list[GenerationPrompt]:
    """The prompts of `prompt_conf`, in order.

    Raises:
        ConfigError: a setting is for training data.
        DataError: a file is missing or empty, or rows are wrong; names up to ten of them.
    """
    if isinstance(conf, OpenInput):
        return text_prompts([conf.input] * conf.num_samples, Location(key="prompt_conf.input"))
    foreign = sorted(conf.data.model_fields_set - set(_READ))
    if foreign:
        raise ConfigError(
            f"is for training data; of a dataset of prompts are read: {', '.join(_READ)}",
            place=Location(key=f"{_KEY}.{foreign[0]}"),
        )
    recipe = make_transforms(conf.data, _KEY)
    rows = ((shard, row) for shard in find_shards(conf.data, _KEY) for row in shard.rows())
    return _checked(
        _eval_prompt(shard, row, number, recipe) for number, (shard, row) in enumerate(islice(rows, conf.data.max_rows))
    )


def text_prompts(texts: Sequence[str], place: Location = _NOWHERE) -> list[GenerationPrompt]:
    """Each text as a prompt to continue; `place` is where they were given."""
    return [
        GenerationPrompt(id=index, text=text, dataset=OPEN_INPUT, data_collection=OPEN_INPUT, place=place)
        for index, text in enumerate(texts)
    ]


def read_lines(path: str, key: str) -> list[str]:
    """The lines of a text file, stripped; empty ones are left out.

    Raises:
        ConfigError: there is no such file, or nothing in it.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"{path} cannot be read: {reason}", place=Location(key=key)) from None
    lines = [line for line in lines if line]
    if not lines:
        raise ConfigError(f"{path} holds no prompt", place=Location(key=key))
    return lines


def _checked(found: Iterator[GenerationPrompt | Problem]) -> list[GenerationPrompt]:
    prompts: list[GenerationPrompt] = []
    problems: list[Problem] = []
    for item in found:
        if isinstance(item, Problem):
            problems.append(item)
        else:
            prompts.append(item)
    if problems:
        shown = problems[:MOST_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(Problem(f"{len(problems) - len(shown)} more rows are wrong"))
        raise DataError(shown)
    return prompts


def _eval_prompt(shard: Shard, found: Row | Problem, number: int, recipe: TransformChain) -> GenerationPrompt | Problem:
    row = found if isinstance(found, Problem) else recipe(found, {})
    if not isinstance(row, Row):
        return row
    try:
        text, messages, reference = _what_is_asked(row)
        meta = meta_fields(row)
        identity = meta.pop("id", None)
        dataset = meta.pop("dataset", None)
        return GenerationPrompt(
            id=number if identity is None else identity,
            text=text,
            messages=messages,
            tools=tools_field(row),
            template_kwargs=template_kwargs_field(row),
            correct_answers=_correct_answers(row, reference),
            dataset=_stem(shard.name) if dataset is None else str(dataset),
            data_collection=str(row.values.get("data_collection") or shard.name),
            carried=meta,
            place=row.place,
        )
    except FieldError as error:
        return problem_of(row, error)


def _stem(name: str) -> str:
    """A file's name without its endings; of a dataset on the hub its whole name."""
    return os.path.basename(name).partition(".")[0] if os.path.exists(name) else name


def _what_is_asked(row: Row) -> tuple[str | None, tuple[Message, ...], str | None]:
    """The text to continue or the messages to answer, and the answer that the row itself gives."""
    if "prompt_messages" in row.values:
        return None, tuple(messages_field(row, "prompt_messages")), None
    if "messages" in row.values:
        messages = tuple(messages_field(row, "messages"))
        if messages[-1]["role"] != "assistant":
            return None, messages, None
        if len(messages) == 1:
            raise FieldError("messages", "holds an answer and no question")
        return None, messages[:-1], messages[-1].get("content")
    if "prompt" in row.values:
        prompt = row.values["prompt"]
        if not isinstance(prompt, str):
            raise FieldError("prompt", f"expected text, got {json_type(prompt)}")
        return prompt, (), None
    found = ", ".join(sorted(row.values)) or "none"
    raise FieldError(
        "",
        f"expected messages, prompt_messages or prompt; found {found}. A column of another name is named in"
        f" {_KEY}.columns: {{theirs: prompt}}",
    )


def _correct_answers(row: Row, reference: str | None) -> tuple[str, ...]:
    answers = row.values.get("correct_answers")
    if answers is None:
        return () if reference is None else (reference,)
    if isinstance(answers, str):
        return (answers,)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        got = json_type(answers) if not isinstance(answers, list) else "a list that holds other things"
        raise FieldError("correct_answers", f"expected a list of texts, got {got}")
    return tuple(answers)
