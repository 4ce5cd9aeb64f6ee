"""Read prompts: a single text, the lines of a text file, or the rows of a dataset."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from finetuning.config.sections.data import ImagesConfig
from finetuning.config.sections.experiment import EvalData, OpenInput
from finetuning.data.formats.row_format import (
    MEDIA,
    FieldError,
    messages_field,
    problem_of,
    template_kwargs_field,
    tools_field,
)
from finetuning.data.samples import ImageReference, JsonObject, Message, Row, SkippedRow
from finetuning.data.sources import Shard, find_shards, json_type
from finetuning.data.transforms import TransformChain, make_transforms
from finetuning.errors import ConfigError, DataError, Location, Problem

logger = logging.getLogger(__name__)
MAX_REPORTED_PROBLEMS = 10
OPEN_INPUT = "open-input"
_OPEN_PROMPTS = "_open_prompt_data_"
"""The dataset of `prompt_conf.type: open-input`, whose ids are texts, as in Silogen's engine."""
_KEY = "prompt_conf.data"
_UNKNOWN = Location()
_DATASET_KEYS = ("path", "split", "subset", "revision", "columns", "text_unit", "max_rows")
"""Dataset options that apply to prompts; the others are about training."""
_CARRIED = ("dataset", "id", "tags", "labels")
"""Columns that describe a row, and are copied to the output."""
_ANSWER_COLUMNS = ("correct_answers", "response")
"""Columns with the expected answers, first come first served; `response` is Silogen's."""
_COLUMNS = {
    "messages", "prompt_messages", "prompt", "tools", "chat_template_kwargs", "data_collection", *_ANSWER_COLUMNS,
}  # fmt: skip


@dataclass(frozen=True)
class GenerationPrompt:
    """Text to continue, or messages to answer; exactly one of the two is set."""

    id: str | int
    text: str | None = None
    messages: tuple[Message, ...] = ()
    tools: list[JsonObject] | None = None
    template_kwargs: JsonObject = field(default_factory=dict)
    correct_answers: tuple[str, ...] = ()
    dataset: str | None = None
    data_collection: str | None = None
    carried: JsonObject = field(default_factory=dict)
    """Columns that are copied to the output."""
    location: Location = field(default_factory=Location)
    images: tuple[ImageReference, ...] = ()
    """Images, in the order of their places in the text or the messages."""


def read_prompts(conf: OpenInput | EvalData, key: str = _KEY) -> list[GenerationPrompt]:
    """Return the prompts of `prompt_conf`, in order.

    Args:
        key: config key of the dataset, for error messages.

    Raises:
        ConfigError: a dataset option only applies to training data.
        DataError: a file is missing or empty, or rows are invalid; up to ten of them are listed.
    """
    if isinstance(conf, OpenInput):
        prompts = text_prompts([conf.input] * conf.num_samples, Location(key="prompt_conf.input"))
        names = {"dataset": _OPEN_PROMPTS, "data_collection": _OPEN_PROMPTS}
        return [replace(prompt, id=str(prompt.id), **names) for prompt in prompts]
    unsupported = sorted(conf.data.model_fields_set - set(_DATASET_KEYS))
    if unsupported:
        raise ConfigError(
            f"only applies to training data; supported for prompts: {', '.join(_DATASET_KEYS)}",
            location=Location(key=f"{key}.{unsupported[0]}"),
        )
    transforms = make_transforms(conf.data, key)
    rows = ((shard, row) for shard in find_shards(conf.data, key) for row in shard.rows())
    unread: dict[str, None] = {}
    prompts = _raise_problems(
        _eval_prompt(shard, row, number, transforms, unread, key, conf.images)
        for number, (shard, row) in enumerate(islice(rows, conf.data.max_rows))
    )
    if unread:
        logger.warning("%s: columns that are not read: %s", key, ", ".join(unread))
    return prompts


def text_prompts(texts: Sequence[str], location: Location = _UNKNOWN) -> list[GenerationPrompt]:
    """Return a prompt for each text; `location` is where the texts come from."""
    return [
        GenerationPrompt(id=index, text=text, dataset=OPEN_INPUT, data_collection=OPEN_INPUT, location=location)
        for index, text in enumerate(texts)
    ]


def chat_prompts(texts: Sequence[str], system: str | None, location: Location = _UNKNOWN) -> list[GenerationPrompt]:
    """Return a prompt for each text: a conversation in which the user says it.

    Args:
        system: text of the system message, if there is one.
        location: where the texts come from.
    """
    begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [
        GenerationPrompt(
            id=index,
            messages=(*begin, {"role": "user", "content": text}),
            dataset=OPEN_INPUT,
            data_collection=OPEN_INPUT,
            location=location,
        )
        for index, text in enumerate(texts)
    ]


def read_lines(path: str, key: str) -> list[str]:
    """Return the stripped, non-empty lines of a text file.

    Raises:
        ConfigError: the file cannot be read, or has no text.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot read {path}: {reason}", location=Location(key=key)) from None
    lines = [line for line in lines if line]
    if not lines:
        raise ConfigError(f"{path} contains no prompt", location=Location(key=key))
    return lines


def _raise_problems(results: Iterator[GenerationPrompt | Problem]) -> list[GenerationPrompt]:
    prompts: list[GenerationPrompt] = []
    problems: list[Problem] = []
    for item in results:
        if isinstance(item, Problem):
            problems.append(item)
        else:
            prompts.append(item)
    if problems:
        reported = problems[:MAX_REPORTED_PROBLEMS]
        if len(problems) > len(reported):
            reported.append(Problem(f"{len(problems) - len(reported)} more rows are invalid"))
        raise DataError(reported)
    return prompts


def _eval_prompt(
    shard: Shard,
    item: Row | Problem,
    number: int,
    transforms: TransformChain,
    unread: dict[str, None],
    key: str,
    images_config: ImagesConfig,
) -> GenerationPrompt | Problem:
    """Return the prompt of a row, and add the names of columns that nothing reads to `unread`."""
    row = item if isinstance(item, Problem) else transforms(item, {})
    assert not isinstance(row, SkippedRow), "the options that filter rows do not apply to prompts"
    if isinstance(row, Problem):
        return row
    images: tuple[ImageReference, ...] = ()
    try:
        if _may_have_images(row):
            row, images = _take_images(row, images_config)
        text, messages, reference = _prompt_and_reference(row, key)
        meta = {name: row.values[name] for name in _CARRIED if name in row.values}
        unread.update(dict.fromkeys(name for name in row.values if name not in _COLUMNS and name not in meta))
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
            data_collection=str(row.values.get("data_collection") or dataset or shard.name),
            carried=meta,
            location=row.location,
            images=images,
        )
    except FieldError as error:
        return problem_of(row, error)


def _take_images(row: Row, config: ImagesConfig) -> tuple[Row, tuple[ImageReference, ...]]:
    """Return a row with a mark for each image, and its images.

    Raises:
        FieldError: an image cannot be read, or the row holds sound or video.
    """
    from finetuning.data.images.files import ImageFolder
    from finetuning.data.images.rows import IMAGE_COLUMNS, take_images

    unread = next(
        (name for name in row.values if name in MEDIA and name not in IMAGE_COLUMNS and row.values[name]), None
    )
    if unread is not None:
        raise FieldError(unread, f"holds {MEDIA[unread]}, which prompts cannot have")
    folder = ImageFolder(Path(config.folder).expanduser() if config.folder else None, config.max_file_pixels)
    return take_images(row, folder=folder)


def _may_have_images(row: Row) -> bool:
    """Return whether a row has a column of images, or of sound or video, or a content that is a list of parts."""
    if any(row.values.get(name) for name in MEDIA):
        return True
    messages = row.values.get("prompt_messages", row.values.get("messages"))
    return isinstance(messages, list) and any(
        isinstance(message, dict) and isinstance(message.get("content"), list) for message in messages
    )


def _stem(name: str) -> str:
    """Return a file name without its extensions; a hub dataset's name is returned unchanged."""
    return os.path.basename(name).partition(".")[0] if os.path.exists(name) else name


def _prompt_and_reference(row: Row, key: str) -> tuple[str | None, tuple[Message, ...], str | None]:
    """Return the text or the messages of the prompt, and the answer that ends the messages, if any."""
    if "prompt_messages" in row.values:
        return None, tuple(messages_field(row, "prompt_messages")), None
    if "messages" in row.values:
        messages = tuple(messages_field(row, "messages"))
        if messages[-1]["role"] != "assistant":
            return None, messages, None
        if len(messages) == 1:
            raise FieldError("messages", "has an assistant message but no user message")
        return None, messages[:-1], messages[-1].get("content")
    if "prompt" in row.values:
        prompt = row.values["prompt"]
        if not isinstance(prompt, str):
            raise FieldError("prompt", f"expected text, got {json_type(prompt)}")
        return prompt, (), None
    columns = ", ".join(sorted(row.values)) or "none"
    raise FieldError(
        "",
        f"expected messages, prompt_messages or prompt; got columns {columns}. To rename a column, set"
        f" {key}.columns: {{name: prompt}}",
    )


def _correct_answers(row: Row, reference: str | None) -> tuple[str, ...]:
    name = next((name for name in _ANSWER_COLUMNS if row.values.get(name) is not None), "correct_answers")
    answers = row.values.get(name)
    if answers is None:
        return () if reference is None else (reference,)
    if isinstance(answers, str):
        return (answers,)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        got = json_type(answers) if not isinstance(answers, list) else "a list with other items"
        raise FieldError(name, f"expected a list of strings, got {got}")
    return tuple(answers)
