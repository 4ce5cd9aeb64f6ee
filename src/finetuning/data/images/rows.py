"""Rows with images: their images are taken out, and the places of the images are marked in the texts.

Whatever a row looks like, its texts then hold one character for each image, `PLACE`, and its parser needs to know
nothing of images. Places are `<image>` in a text, as LLaVA and LLaMA-Factory write them, and content parts, as the APIs
of models write them. Images without any place come first in the first message of the user, as in TRL.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from finetuning.data.formats.messages import MESSAGE_COLUMN_NAMES
from finetuning.data.formats.row_format import FieldError, ReadValues
from finetuning.data.images.files import ImageFolder
from finetuning.data.samples import ImageReference, JsonObject, JsonValue, Row, json_type

PLACE = "\ue1a6"
"""The place of an image in a text. A character for private use, which no other program writes into data."""
MARK = "<image>"
IMAGE_COLUMNS = ("images", "image")
_PART_TYPES = ("image", "image_url", "input_image")
_TEXT_COLUMNS = ("prompt_messages", "prompt", "instruction", "input", "text", "completion", "output")
"""Columns of text, in the order in which row formats put them together."""
_PROMPTS = ("prompt", "instruction", "question", "query", "text")
_QUESTIONS = ("question", "query")
"""Columns that hold the prompt of a preference."""
_ANSWERS = ("chosen", "rejected")


@dataclass
class _Places:
    """The images of a row, in the order of their places."""

    folder: ImageFolder
    file: str | None
    column: list[tuple[str, JsonValue]]
    """Images of the row's column that have no place yet, with their keys."""
    images: list[ImageReference] = field(default_factory=list[ImageReference])

    def take(self, key: str) -> None:
        """Give the next image of the column the place at `key`."""
        if not self.column:
            raise FieldError(key, "is a place of an image, and the row has no more images")
        name, value = self.column.pop(0)
        self.add(value, name)

    def add(self, value: JsonValue, key: str) -> None:
        self.images.append(self.folder.read(value, key, self.file))


def take_images(row: Row, text_field: str = "text", *, folder: ImageFolder) -> tuple[Row, tuple[ImageReference, ...]]:
    """Return a row with `PLACE` for each image, and the images in the order of their places.

    Args:
        text_field: the column of the text of plain-text rows.

    Raises:
        FieldError: an image cannot be read, or the row has another number of images than of places.
    """
    values = dict(row.values)
    column = list(_images_of_column(values))
    for name in IMAGE_COLUMNS:
        values.pop(name, None)
    places = _Places(folder, row.location.file, list(column))
    names = [name for name in MESSAGE_COLUMN_NAMES if isinstance(values.get(name), list)]
    texts = [*_QUESTIONS, *_TEXT_COLUMNS] if _has_answers(values) else _TEXT_COLUMNS
    names += [name for name in dict.fromkeys([*texts, text_field]) if isinstance(values.get(name), str | list)]
    # Without a prompt of their own, both answers are conversations that begin with it.
    answers = [name for name in _ANSWERS if isinstance(values.get(name), list)] if _has_answers(values) else []
    has_prompt = any(name in names for name in (*MESSAGE_COLUMN_NAMES, "prompt_messages", *_PROMPTS))
    names += answers[:1]
    for name in names:
        _refuse_place(name, values[name])
        values[name] = _with_places(values[name], name, places)
    if column and not places.images:
        _put_first(values, names, places)
    if answers[1:]:
        values[answers[1]] = _second_answer(values[answers[1]], answers[1], places, [] if has_prompt else column)
    if places.column:
        raise FieldError(places.column[0][0], f"has no place: the row has {len(column)} images, and fewer {MARK}")
    if not places.images:
        return row, ()
    return Row(ReadValues(values), row.location), tuple(places.images)


def _has_answers(values: JsonObject) -> bool:
    return all(name in values for name in _ANSWERS)


def _refuse_place(name: str, value: JsonValue) -> None:
    if _holds(PLACE, value):
        raise FieldError(name, "holds the character U+E1A6, which marks the place of an image here")


def _second_answer(value: JsonValue, name: str, first: _Places, column: list[tuple[str, JsonValue]]) -> JsonValue:
    """Return the rejected conversation, which begins with the prompt, and so with the images, of the chosen one."""
    _refuse_place(name, value)
    places = _Places(first.folder, first.file, list(column))
    values: JsonObject = {name: _with_places(value, name, places)}
    if column and not places.images:
        _put_first(values, [name], places)
    if column and places.images != first.images:
        raise FieldError(name, "has other images than chosen: images belong to the prompt, which is the same for both")
    if not column and places.images:
        raise FieldError(name, "holds an image: images belong to the prompt")
    return values[name]


def _images_of_column(values: JsonObject) -> Iterator[tuple[str, JsonValue]]:
    """Yield the images of the row's column, with their keys."""
    for name in IMAGE_COLUMNS:
        value: JsonValue = values.get(name)
        if isinstance(value, list):
            yield from ((f"{name}[{index}]", image) for index, image in enumerate(cast("list[JsonValue]", value)))
        elif value is not None and value != "":
            yield name, value


def _holds(text: str, value: JsonValue) -> bool:
    if isinstance(value, dict):
        return any(_holds(text, item) for item in value.values())
    if isinstance(value, list):
        return any(_holds(text, item) for item in value)
    return isinstance(value, str) and text in value


def _with_places(value: JsonValue, key: str, places: _Places) -> JsonValue:
    """Return a text, or a list of messages, with `PLACE` for each image."""
    if isinstance(value, str):
        return _mark_text(value, key, places)
    if not isinstance(value, list):
        return value
    return [_mark_message(message, f"{key}[{index}]", places) for index, message in enumerate(value)]


def _mark_message(message: JsonValue, key: str, places: _Places) -> JsonValue:
    if not isinstance(message, dict):
        return message
    marked: JsonObject = dict(message)
    for name in ("content", "value"):
        content: JsonValue = marked.get(name)
        if isinstance(content, str):
            marked[name] = _mark_text(content, f"{key}.{name}", places)
        elif isinstance(content, list) and any(map(_is_image, content)):
            marked[name] = _join_parts(cast("list[JsonValue]", content), f"{key}.{name}", places)
    return marked


def _is_image(part: object) -> bool:
    return isinstance(part, dict) and cast("JsonObject", part).get("type") in _PART_TYPES


def _mark_text(text: str, key: str, places: _Places) -> str:
    """Replace the marks in a text. A line break between a mark and the text belongs to the mark."""
    if MARK not in text or not places.column:
        return text
    for _ in range(text.count(MARK)):
        places.take(key)
    text = text.replace(f"{MARK}\n", PLACE).replace(MARK, PLACE)
    return text.removesuffix(f"\n{PLACE}") + PLACE if text.endswith(f"\n{PLACE}") else text


def _join_parts(parts: list[JsonValue], key: str, places: _Places) -> str:
    """Return the texts of content parts, with `PLACE` for each image between them."""
    joined = ""
    for index, part in enumerate(parts):
        where = f"{key}[{index}]"
        if not isinstance(part, dict):
            raise FieldError(where, f"expected a part of a content, got {json_type(part)}")
        if _is_image(part):
            has_content = any(value is not None for name, value in part.items() if name not in ("type", "detail"))
            places.add(part, where) if has_content else places.take(where)
            joined += PLACE
            continue
        text: JsonValue = part.get("text")
        if not isinstance(text, str):
            raise FieldError(where, f"expected a text or an image, got a part of type {part.get('type')}")
        if joined and not joined.endswith(PLACE):
            raise FieldError(where, "is a text after a text: join them into one")
        joined += text
    return joined


def _put_first(values: JsonObject, names: list[str], places: _Places) -> None:
    """Put all images of the column, which have no place, in front of the first text of the user."""
    marks = PLACE * len(places.column)
    for name in names:
        value: JsonValue = values[name]
        if isinstance(value, str) and name in _PROMPTS:
            values[name] = marks + value
        elif isinstance(value, list):
            user = next((index for index, message in enumerate(value) if _is_users(message)), None)
            if user is None:
                continue
            key = "content" if "content" in value[user] else "value"
            value[user] = {**value[user], key: marks + value[user][key]}
        else:
            continue
        while places.column:
            places.take(name)
        return
    raise FieldError(places.column[0][0], "has no place: the row has no message of the user")


def _is_users(message: JsonValue) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role", message.get("from")) in ("user", "human")
        and isinstance(message.get("content", message.get("value")), str)
    )
