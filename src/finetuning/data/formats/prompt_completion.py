"""`prompt` and `completion`: two texts, or two lists of messages."""

from __future__ import annotations

from finetuning.data.formats.choice import choose_turns
from finetuning.data.formats.fields import besides_messages, messages_field, problem_of, require_columns, text_field
from finetuning.data.formats.messages import chat_field
from finetuning.data.formats.row_format import PLAIN, FieldError, Options, RowFormat
from finetuning.data.samples import Conversation, Row, Text
from finetuning.errors import Problem

COLUMNS = ("prompt", "completion")


def parse(row: Row, options: Options = PLAIN) -> Conversation | Text | Problem:
    """Texts are joined as they are, and end with the end-of-sequence token; messages become one chat."""
    try:
        require_columns(row, COLUMNS, "prompt_completion")
        if isinstance(row.values["prompt"], list):
            return _chat(row, options)
        prompt, completion = (text_field(row, column) for column in COLUMNS)
        return joined(row, prompt, completion, options)
    except FieldError as error:
        return problem_of(row, error)


def joined(row: Row, prompt: str, completion: str, options: Options) -> Text:
    """A prompt and its completion as one text, of which the completion is trained."""
    text = prompt + completion
    spans = None if options.completions == "all" else ((len(prompt), len(text)),)
    return Text(text, row.place, spans, options.add_eos)


def _chat(row: Row, options: Options) -> Conversation:
    prompt = chat_field(row, "prompt")
    if not isinstance(row.values["completion"], list):
        messages_field(row, "completion")
    completion = chat_field(row, "completion")
    if not any(message["role"] == "assistant" for message in completion):
        raise FieldError("completion", "holds no message of the assistant")
    messages, turns = choose_turns([*prompt, *completion], "prompt + completion", options.completions, len(prompt))
    return Conversation(messages, turns=turns, **besides_messages(row))


FORMAT = RowFormat("prompt_completion", COLUMNS, parse)
