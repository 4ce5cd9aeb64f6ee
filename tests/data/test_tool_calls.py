"""Tool calls are rendered as a server renders them, whatever form the rows have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from finetuning.config.sections.training import SFTArgs
from finetuning.data.chat.end_of_turn import EndOfTurnFinder
from finetuning.data.chat.template import TemplateRenderer
from finetuning.data.pipeline import prepare_dpo, prepare_sft
from finetuning.errors import DataError

from .conversations import TOOLS, assistant, user
from .test_loss_mask_matrix import source_of
from .test_pipeline import config

ARGUMENTS = {"city": "Paris"}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "abc123456", "content": "sunny"}


def chat(arguments: Any, *, is_short: bool = False) -> list[dict[str, Any]]:
    function = {"name": "get_weather", "arguments": arguments}
    call = function if is_short else {"type": "function", "id": "abc123456", "function": function}
    calling = assistant(None, tool_calls=[call])
    return [user("Weather in Paris?"), calling, RESULT, assistant("Sunny.")]


@pytest.fixture
def prepared(make_tokenizer: Callable[..., Any], write_lines: Callable[..., str]) -> Callable[..., tuple[str, Any]]:
    """A function: template and messages -> the text of the row, with ⟦ ⟧ around what is trained, and the data."""

    def call(template: str, messages: Any, tools: Any = TOOLS, stops: tuple[str, ...] = ()) -> tuple[str, Any]:
        tokenizer = make_tokenizer("byte-level", source_of(template))
        conf = config(
            write_lines("a.jsonl", {"messages": messages, "tools": tools}), chat_template_name="keep-original"
        )
        args = SFTArgs(train_on_completions_only=True)
        data = prepare_sft(conf, args, tokenizer, stop_tokens=stops)
        (row,) = data.preview
        return "".join(f"⟦{text}⟧" if trained else text for text, trained in row.segments), data

    return call


@pytest.mark.parametrize("template", ["qwen3", "llama3_1", "gptoss", "glm4moe", "gemma4"])
def test_arguments_as_json_text_are_rendered_like_objects(template: str, prepared: Callable[..., Any]) -> None:
    stops = ("<|tool_response>", "<|call|>")
    expected, _ = prepared(template, chat(ARGUMENTS), stops=stops)
    assert prepared(template, chat(json.dumps(ARGUMENTS)), stops=stops)[0] == expected
    assert '\\"city' not in expected and "Paris" in expected
    assert prepared(template, chat(ARGUMENTS, is_short=True), [TOOLS[0]["function"]], stops)[0] == expected


def test_a_template_that_prints_texts_gets_texts(prepared: Callable[..., Any]) -> None:
    text, _ = prepared("deepseekv3", chat(ARGUMENTS), None)
    assert '{"city": "Paris"}' in text
    assert prepared("deepseekv3", chat(json.dumps(ARGUMENTS)), None)[0] == text


def test_arguments_that_are_no_object_are_noted(prepared: Callable[..., Any]) -> None:
    _, data = prepared("qwen3", chat("city: Paris"))
    assert data.statistics.report()[0]["warnings"]["a tool call whose arguments are not a JSON object"] == 1


def test_the_tool_calls_of_preferences_are_rendered_like_those_of_chats(
    make_tokenizer: Callable[..., Any], write_lines: Callable[..., str]
) -> None:
    tokenizer = make_tokenizer("byte-level", source_of("llama3_1"))
    prompt, call, *_ = chat(json.dumps(ARGUMENTS))
    row = {"prompt": [prompt], "chosen": [call], "rejected": [assistant("No.")], "tools": TOOLS}
    conf = config(write_lines("a.jsonl", row), chat_template_name="keep-original")
    chosen = tokenizer.decode(prepare_dpo(conf, None, tokenizer).train[0]["chosen_ids"])
    assert '"parameters": {"city": "Paris"}' in chosen


STOPS = {
    "gptoss": ("<|return|>", "<|call|>"),
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "qwen3": ("<|im_end|>",),
    "llama3_1": ("<|eot_id|>",),
}


@pytest.mark.parametrize("template", STOPS)
def test_the_ends_of_answers_and_calls_are_found(template: str, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("byte-level", source_of(template))
    assert EndOfTurnFinder(TemplateRenderer(tokenizer)).stops == STOPS[template]


MULTI = [user("Hi"), assistant("Hello"), user("Bye"), assistant("See you")]


def test_an_earlier_answer_of_gpt_oss_is_trained_without_a_token_that_ends_nothing(
    prepared: Callable[..., Any],
) -> None:
    text, data = prepared("gptoss", MULTI, None)
    assert "<|start|>assistant⟦<|channel|>final<|message|>Hello⟧<|end|>" in text
    assert text.endswith("<|start|>assistant⟦<|channel|>final<|message|>See you<|return|>⟧")
    assert list(data.statistics.report()[0]["warnings"]) == [
        "an earlier answer ends with a token at which generation does not stop: that token is not trained"
    ]


def test_an_earlier_end_at_which_generation_stops_is_trained(prepared: Callable[..., Any]) -> None:
    text, _ = prepared("gptoss", MULTI, None, ("<|end|>",))
    assert "<|start|>assistant⟦<|channel|>final<|message|>Hello<|end|>⟧" in text


def test_an_answer_of_glm_ends_with_the_next_role(prepared: Callable[..., Any]) -> None:
    text, _ = prepared("glm4moe", MULTI, None)
    assert "<|assistant|>⟦\n<think></think>\nHello<|user|>⟧" in text
    assert text.endswith("<|assistant|>⟦\n<think></think>\nSee you<|user|>⟧")
    text, _ = prepared("glm4moe", chat(ARGUMENTS))
    assert "</tool_call><|observation|>⟧" in text and text.endswith("Sunny.<|user|>⟧")
    text, _ = prepared("glm4moe", chat(ARGUMENTS)[:2])
    assert text.endswith("</tool_call><|observation|>⟧")


def test_words_that_gemma_4_writes_after_the_answer_of_a_tool_are_not_trained(prepared: Callable[..., Any]) -> None:
    rows = chat(ARGUMENTS)
    rows[1]["content"] = "One moment."
    text, data = prepared("gemma4", [*rows, user("And Rome?")], stops=("<|tool_response>",))
    call = 'call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
    assert f"<|turn>model\n⟦<|tool_call>{call}<|tool_response>⟧response:" in text
    # The server writes them there, too, and the model goes on with the next turn.
    assert "<tool_response|>One moment.<turn|>\n⟦Sunny.<turn|>⟧" in text
    (note,) = data.statistics.report()[0]["warnings"]
    assert note == "the template writes the words of a tool call after the tool's answer: they are not trained"
    # Where no answer of a tool follows, they come before the end of the turn and are trained.
    text, data = prepared("gemma4", rows[:2], stops=("<|tool_response>",))
    assert f"⟦<|tool_call>{call}One moment.<|tool_response>⟧" in text and not data.statistics.report()[0]["warnings"]


def test_the_links_of_answers_to_calls_are_checked(prepared: Callable[..., Any]) -> None:
    rows = chat(ARGUMENTS)
    assert prepared("qwen3", rows)[1].statistics.report()[0]["warnings"] == {}
    rows[2] = {**RESULT, "tool_call_id": "xyz"}
    assert prepared("qwen3", rows)[1].statistics.report()[0]["warnings"] == {
        "a tool's answer whose tool_call_id is the id of no call before it": 1
    }
    rows[2] = {**RESULT, "name": "get_rain"}
    assert prepared("qwen3", rows)[1].statistics.report()[0]["warnings"] == {
        "a tool's answer with the name of a function that is not called before it": 1
    }


def test_a_template_of_trl_is_offered_where_the_models_own_cannot_be_verified(prepared: Callable[..., Any]) -> None:
    odd = [user("Hi"), assistant("Hello"), {"role": "system", "content": "Be kind."}, assistant("See you")]
    with pytest.raises(DataError, match=r"set data_conf\.chat_template: trl/glm4moe_training"):
        prepared("glm4moe", odd, None)
