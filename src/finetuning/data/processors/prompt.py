"""Prompts to the token ids that the model continues, with what rewards are told about them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from finetuning.data.chat.loss_mask import Refused
from finetuning.data.chat.template import CannotRender, Renderer
from finetuning.data.processors.base import Example, Lost, Notices, unproven
from finetuning.data.samples import Prompt
from finetuning.data.statistics import TOO_LONG
from finetuning.data.tokenization.labels import Labeller


@dataclass
class PromptMaker:
    """Prompts to `prompt_ids` and `row`, the prompt's messages and the row's columns as JSON text.

    Other columns may hold anything, and differ from row to row, which no table of typed columns could.
    """

    renderer: Renderer
    labeller: Labeller
    max_length: int | None
    needed: Mapping[str, str]
    """Columns that a row must have, each with what needs it."""
    notices: Notices = field(init=False)

    def __post_init__(self) -> None:
        self.notices = Notices(self.renderer.special_tokens)

    def __call__(self, rows: Sequence[Prompt]) -> list[Example | Lost]:
        rendered = [self._render(row) for row in rows]
        texts = [one for one in rendered if isinstance(one, str)]
        tokenised = iter(self.labeller.encode(texts, [None] * len(texts)))
        return [
            one if isinstance(one, Lost) else self._finish(row, one, next(tokenised).ids)
            for row, one in zip(rows, rendered, strict=True)
        ]

    def _render(self, row: Prompt) -> str | Lost:
        for column, reason in self.needed.items():
            if row.columns.get(column) is None:
                found = ", ".join(row.columns) or "none beside the prompt"
                return Lost("bad row", f"no {column}, which {reason} needs; its columns are: {found}", is_bad=True)
        try:
            return self.renderer.text(row.messages, prompt=True, tools=row.tools, kwargs=row.template_kwargs)
        except CannotRender as error:
            return unproven(Refused(f"the chat template does not take this conversation: {error}"))

    def _finish(self, row: Prompt, text: str, ids: np.ndarray) -> Example | Lost:
        if self.max_length is not None and len(ids) > self.max_length:
            detail = f"{len(ids)} tokens, the limit is {self.max_length}"
            return Lost(TOO_LONG, detail, is_fault=False, tokens=len(ids))
        told = {"prompt": row.messages, "columns": row.columns}
        return Example(
            columns={"prompt_ids": ids, "row": json.dumps(told, ensure_ascii=False)},
            tokens=len(ids),
            trained=0,
            text=text,
            notes=frozenset(self.notices(row.messages)),
        )
