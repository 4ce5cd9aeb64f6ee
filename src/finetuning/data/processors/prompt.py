"""Prompts for GRPO to `prompt_ids`, with the columns that reward functions read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from finetuning.data.chat.template import TemplateRenderer, TemplateRenderError
from finetuning.data.processors.base import (
    DroppedSample,
    MessageWarnings,
    TokenizedSample,
    find_unprinted,
    omitted_messages,
    serve_tool_calls,
    too_long,
    unused_arguments,
    unverified_mask,
)
from finetuning.data.samples import RENDER_ERROR, MaskError, Prompt
from finetuning.data.tokenization.labels import LabelBuilder, TokenizedText


@dataclass
class PromptProcessor:
    """Prompts to `prompt_ids` and `row`, the prompt's messages and the row's columns as JSON.

    The columns are JSON because they may hold anything and differ from row to row, which a typed table cannot.
    """

    renderer: TemplateRenderer
    label_builder: LabelBuilder
    max_length: int | None
    required_columns: Mapping[str, str]
    """Columns that every row must have, each with what needs it."""
    read_columns: Collection[str] | None = None
    """Columns that the rewards may read; None if they may read any."""
    warnings: MessageWarnings = field(init=False)

    def __post_init__(self) -> None:
        self.warnings = MessageWarnings(self.renderer.special_tokens, self.renderer.message_keys)

    def __call__(self, rows: Sequence[Prompt]) -> list[TokenizedSample | DroppedSample]:
        serve_tool_calls(rows, self.renderer)
        rendered = [self._render(row) for row in rows]
        texts = [text for text in rendered if isinstance(text, str)]
        tokenized = iter(self.label_builder.encode(texts, [None] * len(texts)))
        return [
            result if isinstance(result, DroppedSample) else self._finish(row, result, next(tokenized))
            for row, result in zip(rows, rendered, strict=True)
        ]

    def _render(self, row: Prompt) -> str | DroppedSample:
        for column, reason in self.required_columns.items():
            if row.columns.get(column) is None:
                columns = ", ".join(row.columns) or "none but the prompt"
                return DroppedSample(
                    "bad row", f"no {column}, which {reason} needs; its columns: {columns}", is_bad=True
                )
        try:
            return self.renderer.text(row.messages, prompt=True, tools=row.tools, kwargs=row.template_kwargs)
        except TemplateRenderError as error:
            return unverified_mask(MaskError(f"{RENDER_ERROR}: {error}"))

    def _finish(self, row: Prompt, text: str, tokens: TokenizedText | MaskError) -> TokenizedSample | DroppedSample:
        if isinstance(tokens, MaskError):
            return unverified_mask(tokens)
        if unprinted := find_unprinted(row, self.renderer, text):
            return unprinted
        ids: np.ndarray = tokens.ids
        if self.max_length is not None and len(ids) > self.max_length:
            return too_long(len(ids), self.max_length)
        values = {"prompt": row.messages, "columns": row.columns}
        try:
            as_json = json.dumps(values, ensure_ascii=False)
        except TypeError:
            name = next(name for name, value in row.columns.items() if not _is_json(value))
            detail = f"column {name} is not JSON (a date, for example): write it as text, or ignore_columns: [{name}]"
            return DroppedSample("bad row", detail, is_bad=True)
        return TokenizedSample(
            columns={"prompt_ids": ids, "row": as_json},
            tokens=len(ids),
            trained=0,
            text=text,
            warnings=frozenset(
                self.warnings(row.messages)
                | omitted_messages(row.messages, text)
                | unused_arguments(row, self.renderer)
                | self._unread_columns(row)
            ),
        )

    def _unread_columns(self, row: Prompt) -> set[str]:
        if self.read_columns is None:
            return set()
        # The column `system` is the first message.
        names = {name for name, value in row.columns.items() if value not in (None, "", [], {})} - {"system"}
        return {f"column {name} is not used: no reward reads it" for name in names.difference(self.read_columns)}


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
