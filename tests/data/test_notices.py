"""What is noticed in rows that can be trained on: it is counted, with what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetuning.config.sections.data import ChatTemplateName
from finetuning.data.chat.template import get_template
from finetuning.data.pipeline import prepare_dpo, prepare_kto
from finetuning.data.processors.base import SPECIAL_TOKEN_IN_TEXT
from finetuning.errors import DataError

from .conversations import assistant, user
from .test_loss_mask_matrix import source_of
from .test_pipeline import config, sft

SPACE = "the prompt ends in white space, which belongs to the first word of the completion: move it to the beginning of"
IN_TEXT = "the text holds special tokens of the tokenizer, as if a chat template had been applied to it"


@pytest.fixture
def chat_ml(make_tokenizer: Callable[..., Any]) -> Any:
    template = get_template(ChatTemplateName.CHAT_ML)
    assert template is not None
    return make_tokenizer("byte-level", template.source, template.special_tokens)


@pytest.fixture
def noted(write_lines: Callable[..., str]) -> Callable[..., dict[str, int]]:
    """A function: tokenizer and rows -> the warnings of an SFT run."""

    def call(tokenizer: Any, *rows: dict[str, Any], **conf: Any) -> dict[str, int]:
        return sft(config(write_lines("a.jsonl", *rows), **conf), tokenizer).statistics.report()[0]["warnings"]

    return call


TURN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"


@pytest.mark.parametrize(
    ("row", "end"),
    [
        ({"text": f"{TURN}<|im_end|>\n"}, "Hello<|im_end|>\n"),
        ({"text": f"{TURN}</s>\n"}, "Hello</s>\n"),
        ({"prompt": "Hi", "completion": " Hello<|im_end|>"}, "Hello<|im_end|>"),
        ({"text": f"{TURN}<|im_start|>"}, "Hello<|im_start|></s>"),
    ],
)
def test_a_text_that_ends_a_turn_gets_no_second_end(
    row: dict[str, str], end: str, chat_ml: Any, write_lines: Callable[..., str]
) -> None:
    data = sft(config(write_lines("a.jsonl", row)), chat_ml)
    assert chat_ml.decode(data.train[0]["input_ids"]).endswith(end)
    assert data.statistics.report()[0]["warnings"] == {IN_TEXT: 1}


def test_a_text_with_nothing_but_its_end_token_is_not_noted(noted: Callable[..., Any], chat_ml: Any) -> None:
    assert noted(chat_ml, {"text": "Hi</s>"}, {"text": "Hello"}) == {}


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_white_space_at_the_end_of_a_prompt_is_explained(
    kind: str, make_tokenizer: Callable[..., Any], write_lines: Callable[..., str]
) -> None:
    tokenizer = make_tokenizer(kind, source_of("chat-ml"))
    conf = config(write_lines("a.jsonl", {"prompt": "the answer is ", "completion": "the answer"}))
    try:
        report = sft(conf, tokenizer).statistics.report()
    except DataError as error:
        assert kind == "sentencepiece" and SPACE in str(error)
    else:
        assert [warning[: len(SPACE)] for warning in report[0]["warnings"]] == [SPACE]
    moved = config(write_lines("b.jsonl", {"prompt": "the answer is", "completion": " the answer"}))
    assert sft(moved, tokenizer).statistics.report()[0]["warnings"] == {}


def test_white_space_before_the_answers_of_a_pair_is_explained(chat_ml: Any, write_lines: Callable[..., str]) -> None:
    row = {"prompt": "the answer is ", "chosen": "the answer", "rejected": "a weather"}
    data = prepare_dpo(config(write_lines("a.jsonl", row)), None, chat_ml)
    assert [warning[: len(SPACE)] for warning in data.statistics.report()[0]["warnings"]] == [SPACE]


THOUGHT = "<think>\nwhy\n</think>\n\n"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([assistant(f"{THOUGHT}a")], set()),
        ([assistant("a", reasoning_content="why")], set()),
        ([assistant(f"{THOUGHT}a", reasoning_content="why")], {"a turn with two blocks of reasoning"}),
        (
            [assistant(f"{THOUGHT}{THOUGHT}a")],
            {"a turn with two blocks of reasoning", "the template omits a part of a turn"},
        ),
        (
            [assistant(f"{THOUGHT}a"), assistant("b", reasoning_content="more")],
            {
                "some turns hold their reasoning in the content, and others in a key of their own",
                "the template omits a part of a turn",
            },
        ),
        ([assistant("a", reasoning_content="zzz"), assistant("b")], {"the template omits a part of a turn"}),
    ],
)
def test_reasoning_in_two_places_and_reasoning_that_is_omitted_are_noted(
    answers: list[dict[str, Any]], expected: set[str], noted: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    messages = [message for answer in answers for message in (user("Q"), answer)]
    notes = noted(
        make_tokenizer("byte-level", source_of("qwen3")), {"messages": messages}, chat_template_name="keep-original"
    )
    prompts = {"the turn begins differently from the generation prompt", "the turn does not begin with all of"}
    # <think> is a special token of this tokenizer.
    assert {note for note in notes if not note.startswith(tuple(prompts))} - {SPECIAL_TOKEN_IN_TEXT} == expected


def test_a_message_that_the_template_does_not_print_is_noted(
    noted: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer("byte-level", source_of("qwen3"))
    row = {"messages": [user("Weather?"), {"role": "function", "name": "f", "content": "sunny"}, assistant("Sunny.")]}
    note = "the chat template does not print a message of the role function"
    assert noted(tokenizer, row, chat_template_name="keep-original")[note] == 1
    row["messages"][1]["role"] = "tool"
    assert note.replace("function", "tool") not in noted(tokenizer, row, chat_template_name="keep-original")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_that_the_template_never_prints_is_refused(
    key: str, noted: Callable[..., Any], chat_ml: Any, write_lines: Callable[..., str]
) -> None:
    row = {"messages": [user("Q"), assistant("a", **{key: "why"})]}
    with pytest.raises(DataError, match=rf"a\.jsonl:1: the chat template does not print the {key} .*messages\.{key}\]"):
        noted(chat_ml, row)
    assert noted(chat_ml, {"messages": [user("Q"), assistant("a", **{key: ""})]}) == {}
    source = {"path": write_lines("b.jsonl", row), "ignore_columns": [f"messages.{key}"]}
    conf = config(training={"type": "CONCATENATION", "datasets": [source]})
    assert len(sft(conf, chat_ml).train) == 1


@pytest.mark.parametrize(("labels", "expected"), [([True, True], 2), ([False], 1), ([True, False], 0)])
def test_labels_of_one_class_are_noted_with_their_number(
    labels: list[bool], expected: int, chat_ml: Any, write_lines: Callable[..., str]
) -> None:
    rows = [{"prompt": "a", "completion": f" {index}", "label": label} for index, label in enumerate(labels)]
    data = prepare_kto(config(write_lines("a.jsonl", *rows)), None, 0, chat_ml)
    notes = {warning: count for warning, count in data.statistics.report()[0]["warnings"].items() if "label" in warning}
    assert list(notes.values()) == ([expected] if expected else [])
    assert all(warning.startswith(f"the label is {str(labels[0]).lower()}, and no row has") for warning in notes)
