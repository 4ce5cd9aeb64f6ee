"""One text in which a template tells where the response begins."""

from __future__ import annotations

import re

from finetuning.data.formats.fields import problem_of
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.formats.text import COLUMNS, text_of
from finetuning.data.samples import Row, Text
from finetuning.errors import Problem

ABSENT = "the response template is not in the text"
NOTHING_AFTER = "nothing comes after the response template"
SEVERAL = "the response template is in the text more than once: the last counts"


def parse(row: Row, options: Options = PLAIN) -> Text | Problem:
    """The text, of which the response is trained; templates are looked for in the text, not in its tokens."""
    try:
        text = text_of(row, options)
    except FieldError as error:
        return problem_of(row, error)
    template = options.response_template or ""
    if options.instruction_template:
        spans, several = _responses(text, template, options.instruction_template), False
    else:
        found = text.rfind(template)
        spans = ((found + len(template), len(text)),) if found >= 0 else ()
        several = text.count(template) > 1
    fault = None
    if not spans:
        fault = f"{ABSENT}: {template!r}"
    elif not any(text[start:end].strip() for start, end in spans):
        fault = NOTHING_AFTER
    if options.completions == "all" and fault is None:
        return Text(text, row.place, None, options.add_eos)
    if options.completions == "last":
        spans = spans[-1:]
    return Text(text, row.place, spans, options.add_eos, frozenset({SEVERAL} if several else ()), fault)


def _responses(text: str, response: str, instruction: str) -> tuple[tuple[int, int], ...]:
    """From the end of each response template that follows an instruction, or the beginning, to the next instruction.

    Without any instruction, or any response, there is none; a template inside a response is part of it.
    """
    pattern = re.compile(f"(?P<response>{re.escape(response)})|{re.escape(instruction)}")
    if len(instruction) > len(response) and instruction.startswith(response):
        pattern = re.compile(f"{re.escape(instruction)}|(?P<response>{re.escape(response)})")
    spans: list[tuple[int, int]] = []
    start: int | None = None
    instructions = 0
    for match in pattern.finditer(text):
        if match["response"]:
            start = match.end() if start is None else start
            continue
        instructions += 1
        if start is not None:
            spans.append((start, match.start()))
        start = None
    if start is not None and start < len(text):
        spans.append((start, len(text)))
    return tuple(spans) if instructions else ()


FORMAT = RowFormat("response_template", COLUMNS, parse)
