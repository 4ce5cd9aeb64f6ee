from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetuning.data.chat.loss_mask import AssistantMaskBuilder
from finetuning.data.chat.template import TemplateRenderer
from finetuning.data.samples import DIFFERENT_PROMPT, Conversation, MaskedText, MaskError
from finetuning.data.tokenization.labels import LabelBuilder
from finetuning.errors import DataError, Location

from .conversations import assistant, user

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [user("Hi"), assistant("Hello"), user("Again"), assistant("Bye")]


@pytest.fixture
def find(make_tokenizer: Callable[..., Any]) -> Callable[..., MaskedText | MaskError]:
    """A function: template, messages -> the mask or the error."""

    def call(template: str, messages: list[dict[str, Any]], **kwargs: Any) -> MaskedText | MaskError:
        tokenizer = make_tokenizer("byte-level", template)
        mask_builder = AssistantMaskBuilder(TemplateRenderer(tokenizer), LabelBuilder(tokenizer).split)
        return mask_builder.find([Conversation(messages, Location("x", 1), template_kwargs=kwargs)])[0]

    return call


def spans(result: MaskedText | MaskError) -> list[str]:
    assert isinstance(result, MaskedText), result
    return [result.text[start:end] for start, end in result.spans]


def test_spans_start_after_the_prompt_and_end_with_end_of_turn(find: Callable[..., Any]) -> None:
    assert spans(find(CHATML, TALK)) == ["Hello<|im_end|>", "Bye<|im_end|>"]


def test_conversation_without_assistant_has_no_spans(find: Callable[..., Any]) -> None:
    assert spans(find(CHATML, [user("Hi")])) == []


def test_special_and_private_use_characters_do_not_move_spans(find: Callable[..., Any]) -> None:
    for text in ("<|im_end|>\n<|im_start|>assistant\nfake", "\U000f0000\U000f0001\U000f0003 x", "Bye", "assistant\n"):
        result = find(CHATML, [user(text), assistant(text), user(text), assistant("Bye")])
        assert spans(result) == [f"{text}<|im_end|>", "Bye<|im_end|>"]


def test_templates_that_read_contents_are_rejected_or_correct(find: Callable[..., Any]) -> None:
    counting = CHATML.replace("{{ m.content }}", "{{ m.content }} ({{ m.content | length }})")
    assert isinstance(find(counting, TALK), MaskError)
    reading = CHATML.replace("{{ m.content }}", "{{ m.content if m.content[0] == 'H' else 'B' + m.content[1:] }}")
    assert spans(find(reading, TALK[:2])) == ["Hello<|im_end|>"]
    asking = CHATML.replace("{{ m.content }}", "{{ 'yes' if m.content == 'Hello' else m.content }}")
    assert isinstance(find(asking, TALK), MaskError)


def test_template_that_rewrites_history_is_rejected(find: Callable[..., Any]) -> None:
    rewriting = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:2] }}")
    result = find(rewriting, TALK)
    assert isinstance(result, MaskError)
    assert result.turn == 1


def test_template_without_end_of_turn_is_rejected_with_the_reason(find: Callable[..., Any]) -> None:
    endless = (
        "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}\nassistant: {% endif %}"
    )
    result = find(endless, TALK)
    assert str(result) == (
        "messages[1]: the template writes nothing after an answer, so the model could not learn to stop"
    )


def test_unconditional_header_is_not_trained(find: Callable[..., Any]) -> None:
    always = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}<|im_start|>assistant\n\n"
    )
    assert spans(find(always, TALK)) == ["Hello</s>", "Bye</s>"]


def test_a_prompt_with_other_whitespace_than_the_turns_is_a_warning(find: Callable[..., Any]) -> None:
    """A template on one line writes the spaces around its conditions, and a prompt has others than a whole chat."""
    on_one_line = (
        "{% for m in messages %}   {% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '</s>' }}   {% else %}"
        "{{ '<|assistant|>\n' + m.content + '</s>' }}   {% endif %}   {% if loop.last and add_generation_prompt %}"
        "{{ '<|assistant|>' }}   {% endif %}   {% endfor %}"
    )
    result = find(on_one_line, TALK)
    assert spans(result) == ["Hello</s>", "Bye</s>"]
    assert isinstance(result, MaskedText) and DIFFERENT_PROMPT in result.warnings
    other_words = on_one_line.replace("{{ '<|assistant|>' }}", "{{ '<|model|>' }}")
    assert str(find(other_words, TALK)).endswith("the text before it is not the template's generation prompt")


def test_end_of_turn_can_be_plain_text(find: Callable[..., Any]) -> None:
    plain = (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n### end\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    assert spans(find(plain, TALK)) == ["Hello\n### end", "Bye\n### end"]


def test_another_end_of_earlier_turns_is_trained_if_generation_stops_at_it(find: Callable[..., Any]) -> None:
    end = "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}"
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert spans(find(template, TALK[:2])) == ["Hello<|return|>"]
    assert spans(find(template, TALK)) == ["Hello", "Bye<|return|>"]


def test_template_kwargs_reach_the_template(find: Callable[..., Any]) -> None:
    template = CHATML.replace("assistant\n{% endif", "assistant\n{{ prefill }}{% endif").replace(
        "{{ m.content }}", "{{ prefill if m.role == 'assistant' }}{{ m.content }}"
    )
    assert spans(find(template, TALK, prefill="<think></think>")) == ["Hello<|im_end|>", "Bye<|im_end|>"]


def test_invalid_jinja_is_rejected_at_construction(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="the chat template is not valid Jinja: line 1"):
        TemplateRenderer(make_tokenizer("byte-level", "{% for m in %}"))
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        TemplateRenderer(make_tokenizer("byte-level"))


def test_template_error_message_is_reported(find: Callable[..., Any]) -> None:
    result = find("{{ raise_exception('no thanks') }}", TALK)
    assert str(result) == "the chat template failed on this conversation: no thanks"
