from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import normalizers

from finetuning.data.samples import MaskError
from finetuning.data.tokenization.labels import SPLIT_AT_TURN, LabelBuilder, TokenizedText

from .conftest import byte_level, sentencepiece, wrap


def encode(tokenizer: Any, text: str, *spans: str) -> TokenizedText | MaskError:
    """Tokenize a text with spans that are given by their text."""
    places = [(text.index(item), text.index(item) + len(item)) for item in spans]
    return LabelBuilder(tokenizer).encode([text], [places])[0]


def trained(tokenizer: Any, tokens: TokenizedText | MaskError) -> list[str]:
    assert isinstance(tokens, TokenizedText), tokens
    labels = tokens.labels(-100).tolist()
    assert [item for item in labels if item != -100] == [
        item for first, last in tokens.runs for item in tokens.ids[first:last].tolist()
    ]
    return [tokenizer.decode(tokens.ids[first:last].tolist()) for first, last in tokens.runs]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("answer", ["Hello</s>", "🙂👩‍👩‍👧</s>", "</s>", "你好 é\n\n</s>", "🙂"])
def test_trained_tokens_decode_to_their_span(kind: str, answer: str, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(kind, special=("<|user|>", "<|bot|>"))
    text = f"<s><|user|>What? 🙂<|bot|>{answer}<|user|>And?<|bot|>"
    tokens = encode(tokenizer, text, answer)
    assert trained(tokenizer, tokens) == [answer]


def test_text_is_split_where_a_token_extends_over_a_turn(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("byte-level", special=("<|end|>",))
    header, answer = "assistant: ", "Hello<|end|>"
    whole = tokenizer(header + answer, add_special_tokens=False)["input_ids"]
    served = tokenizer(header, add_special_tokens=False)["input_ids"]
    assert whole[: len(served)] != served
    tokens = encode(tokenizer, header + answer, answer)
    assert isinstance(tokens, TokenizedText)
    assert tokens.warning == SPLIT_AT_TURN
    assert tokens.ids.tolist()[: len(served)] == served
    assert trained(tokenizer, tokens) == [answer]


@pytest.mark.parametrize("trim", [True, False])
def test_the_space_before_a_word_belongs_to_its_span(trim: bool) -> None:
    tokenizer = wrap(byte_level(trim_offsets=trim))
    assert trained(tokenizer, encode(tokenizer, "[/INST] Hello</s>", " Hello</s>")) == [" Hello</s>"]
    assert trained(tokenizer, encode(tokenizer, "[/INST] Hello</s>", "Hello</s>")) == ["Hello</s>"]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_sentencepiece_prefix_spaces_do_not_shift_spans(scheme: str) -> None:
    special = ("<|bot|>",)
    tokenizer = wrap(sentencepiece(special, scheme=scheme), special)
    for answer in ("Hello there</s>", " Hello</s>", "\nHello</s>"):
        tokens = encode(tokenizer, f"<|bot|>{answer}", answer)
        assert isinstance(tokens, TokenizedText), (answer, tokens)
        assert tokens.runs[0][0] == 1
        assert tokens.runs[0][1] == len(tokens.ids)


def test_normalized_text_is_compared_after_normalization() -> None:
    backend = byte_level()
    backend.normalizer = normalizers.NFKC()
    tokenizer = wrap(backend)
    tokens = encode(tokenizer, "a?\nﬁne ① é</s>\nb", "ﬁne ① é</s>")
    assert trained(tokenizer, tokens) == ["fine 1 é</s>"]


def test_text_that_cannot_be_split_is_rejected() -> None:
    backend = byte_level()
    backend.normalizer = normalizers.Replace("ab", "x")
    tokenizer = wrap(backend)
    assert isinstance(encode(tokenizer, "ab</s>", "b</s>"), MaskError)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_there_is_one_bos_token(kind: str, add_bos: bool, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(kind, special=("<|bot|>",), add_bos=add_bos)
    bos = tokenizer.bos_token_id
    for text, expected in (("<s><|bot|>Hi</s>", 1), ("<|bot|>Hi</s>", int(add_bos))):
        tokens = encode(tokenizer, text, "Hi</s>")
        assert isinstance(tokens, TokenizedText)
        assert tokens.ids.tolist().count(bos) == expected
        assert tokens.ids[0] == bos or not expected
        assert trained(tokenizer, tokens) == ["Hi</s>"]
        everything = LabelBuilder(tokenizer).encode([text], [None])[0]
        assert isinstance(everything, TokenizedText)
        assert everything.ids.tolist() == tokens.ids.tolist()
        assert everything.labels(-100).tolist() == tokens.ids.tolist()


def test_saved_truncation_and_padding_are_ignored(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("byte-level")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    text = "What is the weather like in Paris today?</s>"
    assert trained(tokenizer, encode(tokenizer, text, text)) == [text]
