"""Prompts to the token ids that the model continues, with what rewards are told about them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from finetuning.data.chat.markers import MaskError
from finetuning.data.chat.template import TemplateRenderer, TemplateRenderError
from finetuning.data.processors.base import DroppedSample, RowWarnings, TokenizedSample, unverified_mask
from finetuning.data.samples import Prompt
from finetuning.data.statistics import TOO_LONG
from finetuning.data.tokenization.labels import LabelBuilder


@dataclass
class PromptProcessor:
    """Prompts to `prompt_ids` and `row`, the prompt's messages and the row's columns as JSON text.

    Other columns may hold anything, and differ from row to row, which no table of typed columns could.
    """

    renderer: TemplateRenderer
    labeller: LabelBuilder
    max_length: int | None
    needed: Mapping[str, str]
    """Columns that a row must have, each with what needs it."""
    notices: RowWarnings = field(init=False)

    def __post_init__(self) -> None:
        self.notices = RowWarnings(self.renderer.special_tokens)

    def __call__(self, rows: Sequence[Prompt]) -> list[TokenizedSample | DroppedSample]:
        rendered = [self._render(row) for row in rows]
        texts = [one for one in rendered if isinstance(one, str)]
        tokenised = iter(self.labeller.encode(texts, [None] * len(texts)))
        return [
            one if isinstance(one, DroppedSample) else self._finish(row, one, next(tokenised).ids)
            for row, one in zip(rows, rendered, strict=True)
        ]

    def _render(self, row: Prompt) -> str | DroppedSample:
        for column, reason in self.needed.items():
            if row.columns.get(column) is None:
                found = ", ".join(row.columns) or "none beside the prompt"
                return DroppedSample(
                    "bad row", f"no {column}, which {reason} needs; its columns are: {found}", is_bad=True
                )
        try:
            return self.renderer.text(row.messages, prompt=True, tools=row.tools, kwargs=row.template_kwargs)
        except TemplateRenderError as error:
            return unverified_mask(MaskError(f"the chat template does not take this conversation: {error}"))

    def _finish(self, row: Prompt, text: str, ids: np.ndarray) -> TokenizedSample | DroppedSample:
        if self.max_length is not None and len(ids) > self.max_length:
            detail = f"{len(ids)} tokens, the limit is {self.max_length}"
            return DroppedSample(TOO_LONG, detail, is_fault=False, tokens=len(ids))
        told = {"prompt": row.messages, "columns": row.columns}
        return TokenizedSample(
            columns={"prompt_ids": ids, "row": json.dumps(told, ensure_ascii=False)},
            tokens=len(ids),
            trained=0,
            text=text,
            notes=frozenset(self.notices(row.messages)),
        )
