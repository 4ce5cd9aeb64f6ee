"""What a row format is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetuning.data.samples import Row
from finetuning.data.text_template import Formatter

TrainOn = Literal["all", "assistant", "last", "completions"]


@dataclass(frozen=True)
class Options:
    """How the rows of one dataset are read, and what of them is trained."""

    chats: TrainOn = "all"
    """What of chats is trained."""
    completions: TrainOn = "completions"
    """What is trained of rows whose prompt stands apart."""
    text_field: str = "text"
    formatter: Formatter | None = None
    """Makes the text of a row, where no column holds it."""
    response_template: str | None = None
    instruction_template: str | None = None
    add_eos: bool = True
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """The tokenizer's, by the names that Jinja templates call them."""


PLAIN = Options()


@dataclass(frozen=True)
class RowFormat:
    """One shape of rows: its name, the columns that it needs, and what makes a typed value of a row, or several.

    `parse` gives a Problem for a row that is not of this shape.
    """

    name: str
    columns: tuple[str, ...]
    parse: Callable[..., Any]
    fits: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a row's values look like this format; by default they do when all columns are there."""

    def is_of(self, row: Row) -> bool:
        if self.fits is not None:
            return self.fits(row.values)
        return all(column in row.values for column in self.columns)


class FieldError(ValueError):
    """A field is wrong; turned into a Problem by each format's `parse`, never seen by users."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key
