"""Short ways to the same result: what is learned of a shape, and tokens found by their bytes, change nothing."""

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
from finetuning.data.chat.markers import MaskedText, MaskError
from finetuning.data.chat.template import TemplateRenderer, get_template
from finetuning.data.opaque import Plain, PlainTemplate, Question
from finetuning.data.samples import Conversation
from finetuning.data.tokenization.labels import LabelBuilder
from finetuning.errors import InternalError, Location

FOLDER = Path(trl.__file__).parent / "chat_templates"
SOURCES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
SOURCES |= {name.value: one.source for name in ChatTemplateName if (one := get_template(name))}
WORDS = (
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


SPACED = ("mistral-with-system", "poro")
"""Templates whose texts begin with no special token: a tokenizer of pieces puts a space in front."""


def conversations(count: int) -> list[Conversation]:
    draw = Random(count)
    made = []
    for _ in range(count):
        roles = draw.choice(ROLES)
        made.append(Conversation([{"role": role, "content": draw.choice(WORDS)} for role in roles], Location("x", 1)))
    return made


@pytest.mark.parametrize("name", SOURCES)
def test_what_was_learned_of_a_shape_changes_nothing(name: str, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("byte-level", SOURCES[name])
    labeller = LabelBuilder(tokenizer)
    learned = AssistantMaskBuilder(TemplateRenderer(tokenizer), labeller.split)
    rows = conversations(60)
    for one, found in zip(rows, learned.find(rows), strict=True):
        (alone,) = AssistantMaskBuilder(TemplateRenderer(tokenizer), labeller.split).find([one])
        if isinstance(alone, MaskError):
            assert found == alone
        else:
            assert isinstance(found, MaskedText)
            assert (found.text, found.spans, found.notes) == (alone.text, alone.spans, alone.notes)
    texts = zip(learned.texts(rows), TemplateRenderer(tokenizer).texts(rows), strict=True)
    assert all(str(left) == str(right) for left, right in texts)


def test_shapes_are_used() -> None:
    plain = [name for name, source in SOURCES.items() if _pieces(source)]
    assert {"llama3", "gemma3", "phi3", "chat-ml", "mistral-with-system", "poro", "simplified-llama31"} <= set(plain)
    asking = {name for name, source in SOURCES.items() if (one := _around(source)) and one.questions}
    assert {"qwen3", "qwen3_6", "deepseekv3", "glm4moe", "gemma4"} <= asking


def _around(source: str) -> Plain | None:
    template = PlainTemplate.of(source)
    return template.around(("user", "assistant"), {"bos_token": "<s>", "eos_token": "</s>"}) if template else None


def _pieces(source: str) -> tuple[str, ...] | None:
    plain = _around(source)
    return plain.pieces if plain and not plain.questions else None


def written(expression: str) -> str:
    return "{% for m in messages %}{{ m.role }}: " + expression + "\n{% endfor %}"


def test_a_template_that_only_writes_contents_is_plain() -> None:
    assert _pieces(written("{{ m.content }}")) == ("user: ", "\nassistant: ", "\n")
    assert _pieces(written("{{ ('<' + m['content'] | trim) ~ '>' }}")) == ("user: <", ">\nassistant: <", ">\n")
    assert _pieces(written("{% if m.content is string and m.content %}{{ m.content.strip() }}{% endif %}"))
    assert _pieces(written("{{ m.content }}{{ '!' if m.content is sequence and m.content | trim | length > 0 }}")) == (
        "user: ", "!\nassistant: ", "!\n",
    )  # fmt: skip
    assert _pieces(
        written("{% macro f(x) %}[{{ x }}{% endmacro %}{% set y %}{{ f(m.content) }}]{% endset %}{{ y | trim }}")
    )


@pytest.mark.parametrize(
    ("expression", "kind", "text"),
    [
        ("{{ m.content if m.content == 'a' else m.content }}", "is", "a"),
        ("{{ m.content }}{{ '!' if m.content in ['a'] }}", "is", "a"),
        ("{{ m.content }}{{ '!' if messages | selectattr('content', 'equalto', 'a') | list }}", "is", "a"),
        ("{{ m.content }}{{ '!' if 'x' in m.content }}", "holds", "x"),
        ("{{ m.content | trim }}{{ '!' if 'x' in m.content | trim }}", "holds", "x"),
        ("{{ m.content.split('x')[-1].lstrip() }}", "holds", "x"),
        ("{{ m.content.replace('x', 'y') }}", "holds", "x"),
        ("{{ m.content }}{{ '!' if m.content.startswith('x') }}", "begins", "x"),
        ("{{ m.content }}{{ '!' if m.content.endswith('x') }}", "ends", "x"),
        ("{{ m.content }}{{ '!' if add_generation_prompt and 'x' in messages[0].content }}", "holds", "x"),
    ],
)
def test_what_a_template_asks_of_a_content_is_known(expression: str, kind: str, text: str) -> None:
    plain = _around(written(expression))
    assert plain is not None
    assert plain.pieces == ("user: ", "\nassistant: ", "\n")
    assert Question(0, kind, text) in plain.questions
    assert plain.holds_for(["b", "c"])
    assert not plain.holds_for([text, "c"])


@pytest.mark.parametrize(
    "expression",
    [
        "{{ m.content }}{% if m.content in 'yes or no' %}!{% endif %}",
        "{{ m.content }}{{ m.content | length }}",
        "{{ m.content | upper }}",
        "{{ m.content | tojson }}",
        "{{ m.content[:5] }}",
        "{{ m.content.strip('x') }}",
        "{{ '%s' % m.content }}",
        "{{ '{}'.format(m.content) }}",
        "{{ m.content }}{{ m.content }}",
        "{{ m.content }}{% if 'abc'.startswith(m.content) %}!{% endif %}",
        "{% set x = 'a' ~ m.content %}{{ m.content }}{% if 'b' in x %}!{% endif %}",
        "{% set x %}{{ m.content }}{% endset %}{{ x }}{{ '!' if 'b' in x }}",
        "{% macro f(x) %}{{ x }}{% endmacro %}{% set y = f(m.content) %}{{ y }}{{ '!' if 'b' in y }}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{{ m.content }}{{ '!' if messages | map(attribute='content') | join('') == 'a' }}",
        "{{ m.content }}{{ '!' if [m.content] | select('upper') | list }}",
        "{{ m.content }}{{ {'a': '!'}.get(m.content, '') }}",
        "{{ m }}{{ m.content }}",
        "{{ m.role }}",
        "{{ m.content }}{{ '!' if (m.content | length) > 3 }}",
        "{{ m.content }}{{ (m.content | length) * 2 }}",
        "{{ m.content }}{{ '!' if m.content < 'b' }}",
        "{{ m.content }}{{ '!' if m.content.startswith(('a', 'b')) }}",
        "{{ m.content }}{{ '!' if messages[0].content == m.content }}",
        "{{ m.content }}{{ '!' if messages[0].content in m.content }}",
        "{{ m.content }}{{ '!' if ('a' ~ m.content).startswith('a') }}",
        "{{ m.content }}{{ '!' if 'x'.join([m.content]) == 'a' }}",
        "{{ m.content }}{{ '!' if 'a'.replace(m.content, '') }}",
        "{{ m.content }}{{ '%s' | format(m.content) }}",
        "{{ m.content }}{{ dict(a=m.content) }}",
        "{{ m.content }}{{ [m.content] | string }}",
        "{{ m.content }}{{ '!' if m.content is upper }}",
        "{{ m.content }}{{ '!' if [m.content] | map('upper') | list == ['A'] }}",
        "{{ m.content }}{{ '!' if m.content is test_of_nobody }}",
        "{{ m.content }}{% set n = namespace(x=m.content) %}{{ '!' if n.x[0] == 'a' }}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
    ],
)
def test_a_template_that_looks_at_a_content_is_not(expression: str) -> None:
    assert _pieces(written(expression)) is None


def test_a_plain_template_that_is_found_out_stops_everything(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("byte-level", SOURCES["chat-ml"])
    masker = AssistantMaskBuilder(TemplateRenderer(tokenizer), LabelBuilder(tokenizer).split)
    rows = conversations(8)
    masker.find(rows)
    tokenizer.chat_template = SOURCES["chat-ml"].replace("message['content']", "message['content'] + ' '")
    with pytest.raises(InternalError, match="x:1: the chat template writes this row in another way"):
        masker.find(rows)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("name", ["chat-ml", "mistral-with-system", "poro", "simplified-llama31", "qwen3"])
def test_tokens_by_their_bytes_are_those_by_offsets(
    name: str, add_bos: bool, kind: str, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer(kind, SOURCES[name], add_bos=add_bos)
    quick, slow = LabelBuilder(tokenizer), LabelBuilder(tokenizer)
    assert quick._spelling is not None
    slow.__dict__["_spelling"] = None
    found = [
        one
        for one in AssistantMaskBuilder(TemplateRenderer(tokenizer), quick.split).find(conversations(60))
        if isinstance(one, MaskedText)
    ]
    texts, spans, heads = [one.text for one in found], [one.spans for one in found], [one.heads for one in found]
    assert any(heads)
    by_bytes = quick._by_bytes(texts, spans, heads)
    assert any(one is not None for one in by_bytes) == (kind == "byte-level" or name not in SPACED)
    for left, right in zip(quick.encode(texts, spans, heads), slow.encode(texts, spans), strict=True):
        assert np.array_equal(left.ids, right.ids)
        assert (left.runs, left.note) == (right.runs, right.note)
    for left, right in zip(quick.encode(texts, [None] * len(texts)), slow.encode(texts, spans), strict=True):
        assert left.runs == ((0, len(left.ids)),)
        assert right.note or np.array_equal(left.ids, right.ids)


def test_every_token_of_a_byte_level_vocabulary_is_spelled(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("byte-level", special=("<|im_end|>", "é", "a b"))
    spelling = LabelBuilder(tokenizer)._spelling
    text = "<|im_end|>é a b\x00\x7f\xad Ā 你好 🙂 \n\t"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert spelling.spells(ids, text.encode())
    assert not spelling.spells(ids[:-1], text.encode())
    assert sum(spelling.sizes[ids]) == len(text.encode())


def test_every_piece_of_a_sentencepiece_vocabulary_is_spelled(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("sentencepiece", special=("<|im_end|>", "a b"))
    spelling = LabelBuilder(tokenizer)._spelling
    text = "<|im_end|>é a b\x7f\xad Ā 你好 🙂 \n\t"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert spelling.spells(ids, text.encode())
    marked = tokenizer("<|im_end|>a▁b", add_special_tokens=False)["input_ids"]
    assert not spelling.spells(marked, "<|im_end|>a▁b".encode())


def test_other_tokenizers_are_not_spelled(make_tokenizer: Callable[..., Any]) -> None:
    for decoder in (decoders.Metaspace(), decoders.WordPiece(), decoders.Sequence([decoders.Fuse()])):
        tokenizer = make_tokenizer("sentencepiece")
        tokenizer.backend_tokenizer.decoder = decoder
        assert LabelBuilder(tokenizer)._spelling is None
