"""Cached layouts and alignment by bytes give the same results as finding everything in full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import trl
from tokenizers import decoders

from finetuning.config.sections.data import ChatTemplateName
from finetuning.data.chat.loss_mask import AssistantMaskBuilder
from finetuning.data.chat.template import TemplateRenderer, TemplateRenderError, get_template
from finetuning.data.samples import Conversation, MaskedText, MaskError
from finetuning.data.tokenization.labels import LabelBuilder
from finetuning.errors import Location

FOLDER = Path(trl.__file__).parent / "chat_templates"
SOURCES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
SOURCES |= {name.value: template.source for name in ChatTemplateName if (template := get_template(name))}
CONTENTS = (
    *("Hello", "yes", "a b", "42", "Näin, 你好 🙂", 'say "it"', "a\\b", "{{ x }}", "<|im_end|>", "</s>", "<s>x"),
    *(
        "<think>\nhm",
        "<think>hm",
        "<tool_response>x",
        "<|channel>x",
        "<think>why</think>so",
        "<think>\nwhy\n</think>\n\nso",
        "</think>",
        "[INST] x [/INST]",
        "<end_of_turn>\nx",
    ),
    *(
        "assistant\nx",
        "<tool_response>x</tool_response>",
        "x\n\ny",
        "\U000f0000\U000f0001",
        "'",
        "<b>&amp;</b>",
        "/no_think",
    ),
)
ROLES = (("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", "user", "assistant"))


WITH_PREFIX_SPACE = ("mistral-with-system", "poro")
"""Templates whose texts begin without a special token: a SentencePiece tokenizer puts a space in front."""


def conversations(count: int) -> list[Conversation]:
    draw = Random(count)
    made = []
    for _ in range(count):
        roles = draw.choice(ROLES)
        made.append(
            Conversation([{"role": role, "content": draw.choice(CONTENTS)} for role in roles], Location("x", 1))
        )
    return made


@pytest.mark.parametrize("name", SOURCES)
def test_the_faster_sandbox_renders_the_same_texts(name: str, make_tokenizer: Callable[..., Any]) -> None:
    renderer = TemplateRenderer(make_tokenizer("byte-level", SOURCES[name]))
    rows = conversations(60)
    expected = renderer.texts(rows)
    assert renderer.plain_texts(rows) == [text if isinstance(text, str) else None for text in expected]
    # These templates read the parts of a content that is a list.
    assert any(isinstance(text, str) for text in expected) or name.startswith("llava_next")


@pytest.mark.parametrize(
    "expression",
    [
        "messages[0].__class__.__mro__",
        "messages[0]['content'].__class__.__mro__",
        "messages[0]['content'].format.__self__.__class__.__mro__",
        "messages.append(1)",
        "messages[0].update(role='x')",
        "messages[0].pop('role')",
        "'{0.__class__.__mro__}'.format(messages)",
        "'{m.__class__.__mro__}'.format_map({'m': messages})",
        "namespace(a='{0.__class__.__mro__}').a.format(messages)",
        "namespace.__init__.__globals__",
        "dict.__class__.__mro__",
        "raise_exception.__globals__['json']",
    ],
)
def test_the_faster_sandbox_is_as_strict(expression: str, make_tokenizer: Callable[..., Any]) -> None:
    # The first expression of each type is safe: what is remembered of it must not extend to the second.
    source = "{{ messages[0].get('role') ~ messages[0].content.strip() ~ namespace(a=1).a }}{{ EXPRESSION }}"
    source = source.replace("EXPRESSION", expression)
    renderer = TemplateRenderer(make_tokenizer("byte-level", source))
    rows = [Conversation([{"role": "user", "content": "{0} a"}], Location("x", 1))] * 2
    assert all(isinstance(text, TemplateRenderError) for text in renderer.texts(rows))
    assert renderer.plain_texts(rows) == [None, None]


@pytest.mark.parametrize("name", SOURCES)
def test_cached_layouts_do_not_change_results(name: str, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("byte-level", SOURCES[name])
    label_builder = LabelBuilder(tokenizer)
    cached = AssistantMaskBuilder(TemplateRenderer(tokenizer), label_builder.split)
    rows = conversations(60)
    renderer = TemplateRenderer(tokenizer)  # compiling a template takes up to 0.2 s
    for row, result in zip(rows, cached.find(rows), strict=True):
        (alone,) = AssistantMaskBuilder(renderer, label_builder.split).find([row])
        if isinstance(alone, MaskError):
            assert result == alone
        else:
            assert isinstance(result, MaskedText)
            assert (result.text, result.spans, result.warnings) == (alone.text, alone.spans, alone.warnings)
    texts = zip(cached.texts(rows), TemplateRenderer(tokenizer).texts(rows), strict=True)
    assert all(str(left) == str(right) for left, right in texts)


def test_later_conversations_use_the_cached_layout(make_tokenizer: Callable[..., Any]) -> None:
    for name in ("chat-ml", "llama3", "gemma3", "phi3", "mistral-with-system", "poro", "simplified-llama31", "qwen3"):
        tokenizer = make_tokenizer("byte-level", SOURCES[name])
        mask_builder = AssistantMaskBuilder(TemplateRenderer(tokenizer), LabelBuilder(tokenizer).split)
        rows = [
            Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": text}], Location("x", 1))
            for text in ("Hello", "yes", "42")
        ]
        assert [masked.method for masked in mask_builder.find(rows)] == ["markers", "layout", "layout"], name


@pytest.mark.parametrize(
    "expression",
    [
        "{{ m.content }}{{ '!' if 'x' in m.content }}",
        "{{ m.content }}{{ '!' if m.content | length > 3 }}",
        "{{ m.content }}{{ '!' if 'abc'.startswith(m.content) }}",
        "{{ '!' if m.content == 'a' }}{{ m.content }}",
        "{{ m.content.split('x')[-1].lstrip() }}",
        "{{ m.content }}{{ '!' if messages[0].content == 'x' }}",
        "{{ m.content | upper if 'y' in m.content else m.content }}",
    ],
)
def test_templates_that_depend_on_a_content_are_rendered_for_each_row(
    expression: str, make_tokenizer: Callable[..., Any]
) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + expression + "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer("byte-level", source, special=("<|im_start|>", "<|im_end|>"))
    split = LabelBuilder(tokenizer).split
    contents = ("b", "x", "a", "axb", "long text", "y", "c d", "xx")
    rows = [
        Conversation(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], Location("x", 1)
        )
        for question in contents
        for answer in contents
    ]
    result = AssistantMaskBuilder(TemplateRenderer(tokenizer), split).find(rows)
    assert any(isinstance(marked, MaskedText) for marked in result)
    for row, text, marked in zip(rows, TemplateRenderer(tokenizer).texts(rows), result, strict=True):
        if isinstance(marked, MaskedText):
            assert marked.text == text
            (alone,) = AssistantMaskBuilder(TemplateRenderer(tokenizer), split).find([row])
            assert isinstance(alone, MaskError) or marked.spans == alone.spans


def test_a_changed_template_invalidates_cached_layouts(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("byte-level", SOURCES["chat-ml"])
    mask_builder = AssistantMaskBuilder(TemplateRenderer(tokenizer), LabelBuilder(tokenizer).split)
    rows = conversations(8)
    mask_builder.find(rows)
    tokenizer.chat_template = SOURCES["chat-ml"].replace("message['content']", "message['content'] + ' '")
    texts = [masked.text if isinstance(masked, MaskedText) else None for masked in mask_builder.find(rows)]
    rendered = TemplateRenderer(tokenizer).texts(rows)
    assert all(text in (None, real) for text, real in zip(texts, rendered, strict=True))
    assert any(texts)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("name", ["chat-ml", "mistral-with-system", "poro", "simplified-llama31", "qwen3"])
def test_alignment_by_bytes_equals_alignment_by_offsets(
    name: str, add_bos: bool, kind: str, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer(kind, SOURCES[name], add_bos=add_bos)
    quick, slow = LabelBuilder(tokenizer), LabelBuilder(tokenizer)
    assert quick._token_bytes is not None
    slow.__dict__["_token_bytes"] = None
    result = [
        masked
        for masked in AssistantMaskBuilder(TemplateRenderer(tokenizer), quick.split).find(conversations(60))
        if isinstance(masked, MaskedText)
    ]
    texts = [masked.text for masked in result]
    spans = [masked.spans for masked in result]
    headers = [masked.headers for masked in result]
    assert any(headers)
    by_bytes = quick._align_by_bytes(texts, spans, headers, quick._token_bytes)
    assert bool(by_bytes) == (kind == "byte-level" or name not in WITH_PREFIX_SPACE)
    for left, right in zip(quick.encode(texts, spans, headers), slow.encode(texts, spans), strict=True):
        assert np.array_equal(left.ids, right.ids)
        assert (left.runs, left.warning) == (right.runs, right.warning)
    for left, right in zip(quick.encode(texts, [None] * len(texts)), slow.encode(texts, spans), strict=True):
        assert left.runs == ((0, len(left.ids)),)
        assert right.warning or np.array_equal(left.ids, right.ids)


def test_all_tokens_of_a_byte_level_vocabulary_have_bytes(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("byte-level", special=("<|im_end|>", "é", "a b"))
    token_bytes = LabelBuilder(tokenizer)._token_bytes
    text = "<|im_end|>é a b\x00\x7f\xad Ā 你好 🙂 \n\t"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert token_bytes.matches(ids, text.encode())
    assert not token_bytes.matches(ids[:-1], text.encode())
    assert sum(token_bytes.sizes[ids]) == len(text.encode())


def test_all_pieces_of_a_sentencepiece_vocabulary_have_bytes(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("sentencepiece", special=("<|im_end|>", "a b"))
    token_bytes = LabelBuilder(tokenizer)._token_bytes
    text = "<|im_end|>é a b\x7f\xad Ā 你好 🙂 \n\t"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert token_bytes.matches(ids, text.encode())
    marked = tokenizer("<|im_end|>a▁b", add_special_tokens=False)["input_ids"]
    assert not token_bytes.matches(marked, "<|im_end|>a▁b".encode())


def test_other_decoders_have_no_token_bytes(make_tokenizer: Callable[..., Any]) -> None:
    for decoder in (decoders.Metaspace(), decoders.WordPiece(), decoders.Sequence([decoders.Fuse()])):
        tokenizer = make_tokenizer("sentencepiece")
        tokenizer.backend_tokenizer.decoder = decoder
        assert LabelBuilder(tokenizer)._token_bytes is None
