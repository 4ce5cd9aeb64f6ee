"""Alpaca: `instruction`, perhaps `input`, and `output`; `system` and `history` where there are any."""

from __future__ import annotations

from finetuning.data.formats.choice import choose_turns
from finetuning.data.formats.fields import besides_messages, problem_of, require_columns, text_field
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.samples import Conversation, Message, Row, json_type
from finetuning.errors import Problem

COLUMNS = ("instruction", "output")


def parse(row: Row, options: Options = PLAIN) -> Conversation | Problem:
    """The row as a chat: the instruction and, after an empty line, the input ask; the output answers."""
    try:
        require_columns(row, COLUMNS, "alpaca")
        prompt = _history(row)
        if row.values.get("system"):
            prompt.insert(0, {"role": "system", "content": text_field(row, "system")})
        question = text_field(row, "instruction")
        if row.values.get("input"):
            question = f"{question}\n\n{text_field(row, 'input')}"
        prompt.append({"role": "user", "content": question})
        messages = [*prompt, {"role": "assistant", "content": text_field(row, "output")}]
        messages, turns = choose_turns(messages, "output", options.completions, prompt=len(prompt))
        return Conversation(messages, turns=turns, **besides_messages(row))
    except FieldError as error:
        return problem_of(row, error)


def _history(row: Row) -> list[Message]:
    pairs = row.values.get("history") or []
    if not isinstance(pairs, list):
        raise FieldError("history", f"expected a list of pairs, got {json_type(pairs)}")
    messages: list[Message] = []
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise FieldError(f"history[{index}]", "expected a question and an answer, both text")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


FORMAT = RowFormat("alpaca", COLUMNS, parse)
