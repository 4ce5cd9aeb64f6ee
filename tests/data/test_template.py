from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetuning.config.sections.data import ChatTemplateName
from finetuning.data.chat.template import get_template

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": " A"},
]
EXPECTED = {
    ChatTemplateName.MISTRAL_WITH_SYSTEM: ("<<SYS>>\nS\n<</SYS>>\n[INST] U [/INST] A</s> ", ""),
    ChatTemplateName.CHAT_ML: (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n A<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    ChatTemplateName.PORO: ("<|system|>\nS</s><|user|>\nU</s><|assistant|>\n A</s>", "<|assistant|>\n"),
    ChatTemplateName.SIMPLIFIED_LLAMA31: (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_named_templates_render_as_documented(name: ChatTemplateName, make_tokenizer: Callable[..., Any]) -> None:
    template = get_template(name)
    assert template is not None
    tokenizer = make_tokenizer("byte-level", template.source, template.special_tokens)
    text, prompt = EXPECTED[name]
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == text
    assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == text + prompt
    assert template.end_of_turn is None or template.end_of_turn in template.special_tokens


def test_keep_original_has_no_template() -> None:
    assert get_template(ChatTemplateName.KEEP_ORIGINAL) is None
