from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetuning.data.chat.loss_mask import AssistantMaskBuilder
from finetuning.data.chat.template import TemplateRenderer
from finetuning.data.samples import Conversation, MaskedText, MaskError
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
    """A function: template, messages -> what the mask_builder says."""

    def call(template: str, messages: list[dict[str, Any]], **kwargs: Any) -> MaskedText | MaskError:
        tokenizer = make_tokenizer("byte-level", template)
        mask_builder = AssistantMaskBuilder(TemplateRenderer(tokenizer), LabelBuilder(tokenizer).split)
        return mask_builder.find([Conversation(messages, Location("x", 1), template_kwargs=kwargs)])[0]

    return call


def spans(found: MaskedText | MaskError) -> list[str]:
    assert isinstance(found, MaskedText), found
    return [found.text[start:end] for start, end in found.spans]


def test_turns_end_with_their_marker_and_begin_after_the_prompt(find: Callable[..., Any]) -> None:
    assert spans(find(CHATML, TALK)) == ["Hello<|im_end|>", "Bye<|im_end|>"]


def test_a_conversation_without_an_assistant_has_no_span(find: Callable[..., Any]) -> None:
    assert spans(find(CHATML, [user("Hi")])) == []


def test_markers_and_private_characters_in_the_text_do_not_move_a_span(find: Callable[..., Any]) -> None:
    for text in ("<|im_end|>\n<|im_start|>assistant\nfake", "\U000f0000\U000f0001\U000f0003 x", "Bye", "assistant\n"):
        found = find(CHATML, [user(text), assistant(text), user(text), assistant("Bye")])
        assert spans(found) == [f"{text}<|im_end|>", "Bye<|im_end|>"]


def test_templates_that_read_the_content_are_found_out(find: Callable[..., Any]) -> None:
    counting = CHATML.replace("{{ m.content }}", "{{ m.content }} ({{ m.content | length }})")
    assert isinstance(find(counting, TALK), MaskError)
    reading = CHATML.replace("{{ m.content }}", "{{ m.content if m.content[0] == 'H' else 'B' + m.content[1:] }}")
    assert spans(find(reading, TALK[:2])) == ["Hello<|im_end|>"]
    asking = CHATML.replace("{{ m.content }}", "{{ 'yes' if m.content == 'Hello' else m.content }}")
    assert isinstance(find(asking, TALK), MaskError)


def test_a_template_that_rewrites_history_is_refused_when_nothing_can_be_shown(find: Callable[..., Any]) -> None:
    rewriting = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[:2] }}")
    found = find(rewriting, TALK)
    assert isinstance(found, MaskError)
    assert found.turn == 1


def test_a_template_without_an_end_is_refused_with_the_reason(find: Callable[..., Any]) -> None:
    endless = (
        "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}\nassistant: {% endif %}"
    )
    found = find(endless, TALK)
    assert str(found) == (
        "messages[1]: the template writes nothing after an answer, so the model could not learn to stop"
    )


def test_a_header_that_is_always_written_is_not_trained(find: Callable[..., Any]) -> None:
    always = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}<|im_start|>assistant\n\n"
    )
    assert spans(find(always, TALK)) == ["Hello</s>", "Bye</s>"]


def test_a_textual_end_works_without_special_tokens(find: Callable[..., Any]) -> None:
    plain = (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n### end\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    assert spans(find(plain, TALK)) == ["Hello\n### end", "Bye\n### end"]


def test_an_end_that_only_the_last_turn_has_is_refused_in_the_middle(find: Callable[..., Any]) -> None:
    end = "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}"
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert spans(find(template, TALK[:2])) == ["Hello<|return|>"]
    assert str(find(template, TALK)).startswith("messages[1]: it is followed by '<|end|>")


def test_template_arguments_reach_the_template(find: Callable[..., Any]) -> None:
    template = CHATML.replace("assistant\n{% endif", "assistant\n{{ prefill }}{% endif").replace(
        "{{ m.content }}", "{{ prefill if m.role == 'assistant' }}{{ m.content }}"
    )
    assert spans(find(template, TALK, prefill="<think></think>")) == ["Hello<|im_end|>", "Bye<|im_end|>"]


def test_a_template_that_is_no_jinja_is_refused_at_once(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="the chat template is not valid Jinja: line 1"):
        TemplateRenderer(make_tokenizer("byte-level", "{% for m in %}"))
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        TemplateRenderer(make_tokenizer("byte-level"))


def test_the_message_of_the_template_is_passed_on(find: Callable[..., Any]) -> None:
    found = find("{{ raise_exception('no thanks') }}", TALK)
    assert str(found) == "the chat template failed on this conversation: no thanks"
