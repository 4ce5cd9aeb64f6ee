"""Row formats of a prompt and its completion.

- `alpaca`: `instruction` or `query`, optional `input`, `system` and `history`, and `output` or `response`; becomes a
  chat.
- `prompt_completion`: `prompt` and `completion`, two texts or two lists of messages.
- `input_output`: `input` and `output`, two texts that are joined with a space.
"""

from __future__ import annotations

from collections.abc import Mapping

from finetuning.data.formats.messages import chat_field, choose_turns, with_system
from finetuning.data.formats.row_format import (
    DEFAULT_OPTIONS,
    FieldError,
    Options,
    RowFormat,
    is_chat,
    is_chat_of_texts,
    other_fields,
    problem_of,
    refuse_in_text,
    require_columns,
    text_field,
    with_columns,
)
from finetuning.data.samples import Conversation, JsonValue, Message, Row, Text, json_type
from finetuning.errors import Problem

ALPACA_COLUMNS = ("instruction", "output")


_ALPACA_NAMES = {"query": "instruction", "response": "output"}
"""ms-swift's and Dolly's names of the columns."""


def has_alpaca(values: Mapping[str, object]) -> bool:
    """Return whether a row has an instruction and its answer."""
    names = {_ALPACA_NAMES.get(name, name) for name in values}
    return names >= set(ALPACA_COLUMNS)


def _with_alpaca_names(row: Row) -> Row:
    renames = {old: new for old, new in _ALPACA_NAMES.items() if old in row.values and new not in row.values}
    return with_columns(row, renames, {new: row.values[old] for old, new in renames.items()})


def parse_alpaca(row: Row, options: Options = DEFAULT_OPTIONS) -> Conversation | Problem:
    """Return the row as a chat: instruction, an empty line and input are the user's message, output is the answer.

    `options.input_separator` separates the first two instead of an empty line.
    """
    try:
        if any(name in row.values for name in _ALPACA_NAMES):
            row = _with_alpaca_names(row)
        require_columns(row, ALPACA_COLUMNS, "alpaca")
        prompt = with_system(row, history_field(row))
        prompt.append({"role": "user", "content": with_input(row, "instruction", options)})
        messages = [*prompt, {"role": "assistant", "content": text_field(row, "output")}]
        # The answers of the history are turns of the assistant like the last one.
        prompt_length = 0 if options.completions == "assistant" else len(prompt)
        messages, turns = choose_turns(messages, "output", options.completions, prompt_length)
        return Conversation(messages, turns=turns, **other_fields(row))
    except FieldError as error:
        return problem_of(row, error)


def with_input(row: Row, column: str, options: Options) -> str:
    """Return the instruction of a column, and the row's input after it, if it has one."""
    instruction = text_field(row, column)
    if not row.values.get("input"):
        return instruction
    return options.input_separator.join(text for text in (instruction, text_field(row, "input")) if text)


def history_field(row: Row) -> list[Message]:
    """Return the earlier turns of a chat: pairs of question and answer."""
    pairs: JsonValue = row.values.get("history") or []
    if not isinstance(pairs, list):
        raise FieldError("history", f"expected a list of pairs, got {json_type(pairs)}")
    messages: list[Message] = []
    pair: JsonValue
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise FieldError(f"history[{index}]", "expected a pair of texts: a question and its answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


ALPACA = RowFormat("alpaca", ALPACA_COLUMNS, parse_alpaca, has_alpaca)


PROMPT_COMPLETION_COLUMNS = ("prompt", "completion")


def parse_prompt_completion(row: Row, options: Options = DEFAULT_OPTIONS) -> Conversation | Text | Problem:
    """Return two texts joined as they are, or two lists of messages as one chat; with a `system`, texts too."""
    try:
        require_columns(row, PROMPT_COMPLETION_COLUMNS, "prompt_completion")
        if is_chat(row.values["prompt"]):
            return _chat(row, chat_field(row, "prompt"), chat_field(row, "completion"), options)
        prompt, completion = (text_field(row, column) for column in PROMPT_COMPLETION_COLUMNS)
        if is_chat_of_texts(row, options):
            question, answer = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
            return _chat(row, [question], [answer], options)
        refuse_in_text(row)
        return join(row, prompt, completion, options)
    except FieldError as error:
        return problem_of(row, error)


def join(row: Row, prompt: str, completion: str, options: Options) -> Text:
    """Return a prompt and its completion as one text, of which the completion is trained."""
    text = prompt + completion
    spans = None if options.completions == "all" else ((len(prompt), len(text)),)
    return Text(text, row.location, spans, options.add_eos)


def _chat(row: Row, prompt: list[Message], completion: list[Message], options: Options) -> Conversation:
    prompt = with_system(row, prompt)
    if not any(message["role"] == "assistant" for message in completion):
        raise FieldError("completion", "has no assistant message")
    messages, turns = choose_turns([*prompt, *completion], "prompt + completion", options.completions, len(prompt))
    return Conversation(messages, turns=turns, **other_fields(row))


PROMPT_COMPLETION = RowFormat("prompt_completion", PROMPT_COMPLETION_COLUMNS, parse_prompt_completion)


INPUT_OUTPUT_COLUMNS = ("input", "output")
_WHITE_SPACE = (" ", "\n", "\t")


def parse_input_output(row: Row, options: Options = DEFAULT_OPTIONS) -> Text | Problem:
    """Return input and output as one text, with a space between them unless there is white space already.

    Source: fms-hf-tuning, `combine_sequence`.
    """
    try:
        require_columns(row, INPUT_OUTPUT_COLUMNS, "input_output")
        start, end = (text_field(row, column) for column in INPUT_OUTPUT_COLUMNS)
        gap = "" if start.endswith(_WHITE_SPACE) or end.startswith(_WHITE_SPACE) else " "
        # The space is part of the output: tokenizers join a space to the word after it.
        return join(row, start, gap + end, options)
    except FieldError as error:
        return problem_of(row, error)


INPUT_OUTPUT = RowFormat("input_output", INPUT_OUTPUT_COLUMNS, parse_input_output)
