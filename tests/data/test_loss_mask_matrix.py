"""Every chat template that ships with TRL, and ours, against many conversations and both families of tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl

from finetuning.config.sections.data import ChatTemplateName
from finetuning.data.chat.loss_mask import LATE_WORDS, AssistantMaskBuilder
from finetuning.data.chat.template import TemplateRenderer, get_template
from finetuning.data.samples import UNTRAINED_END, MaskedText, MaskError
from finetuning.data.tokenization.labels import LabelBuilder, TokenizedText

from .conversations import CONVERSATIONS, conversation, speakers, words

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
OURS = [name.value for name in ChatTemplateName if get_template(name)]
REJECTED: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("rejected.json").read_text("utf-8"))
"""By template and conversation, the reason for rejecting it; all others must be masked."""
LATE = {"Aone"}
"""The words of `tools and words` before the call, which Gemma 4 writes after the answer of the tool."""
STOPS = ("<|call|>", "<|eom_id|>", "<|tool_response>")


def source_of(name: str) -> str:
    ours = get_template(ChatTemplateName(name)) if name in OURS else None
    return ours.source if ours else (FOLDER / f"{name}.jinja").read_text("utf-8")


@cache
def mask_all(name: str, kind: str, make_tokenizer: Callable[..., Any]) -> dict[str, tuple[Any, Any, Any]]:
    tokenizer = make_tokenizer(kind, source_of(name))
    label_builder = LabelBuilder(tokenizer)
    mask_builder = AssistantMaskBuilder(TemplateRenderer(tokenizer), label_builder.split, STOPS)
    results = {}
    for item in CONVERSATIONS:
        result = mask_builder.find([conversation(item)])[0]
        tokens = label_builder.encode([result.text], [result.spans])[0] if isinstance(result, MaskedText) else result
        results[item] = (tokenizer, result, tokens)
    return results


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("name", [*NAMES, *OURS])
def test_each_conversation_is_masked_or_rejected_with_the_reason(
    name: str, kind: str, make_tokenizer: Callable[..., Any]
) -> None:
    rejected = {}
    for item, (tokenizer, result, tokens) in mask_all(name, kind, make_tokenizer).items():
        if isinstance(tokens, MaskError):
            rejected[item] = str(tokens)
            continue
        assert isinstance(result, MaskedText)
        assert isinstance(tokens, TokenizedText)
        check_trained_words(item, tokenizer, result, tokens)
    assert rejected == REJECTED.get(name, {})


def words_of(text: str) -> set[str]:
    """The words in a text that the assistant says, but no names of places."""
    return set(re.findall(r"\bA(?:one|two|three|four)\b", text))


def check_trained_words(item: str, tokenizer: Any, result: MaskedText, tokens: TokenizedText) -> None:
    """Check that the trained tokens decode to all words of the assistant, and to none of another role."""
    mask = np.zeros(len(tokens.ids), dtype=bool)
    for first, last in tokens.runs:
        mask[first:last] = True
    trained = " | ".join(tokenizer.decode(tokens.ids[first:last].tolist()) for first, last in tokens.runs)
    assert speakers(trained) <= {"A"}
    position, rest = 0, ""
    for start, end in result.spans:
        rest += result.text[position:start] + "|"
        position = end
    late = LATE if LATE_WORDS in result.warnings else set()
    assert "A" not in speakers(rest + result.text[position:]) if not late else late == words_of(rest)
    said = [word for word in words(item) if word in result.text]
    assert [word for word in said if word not in trained] == sorted(late)
    turns = [message for message in CONVERSATIONS[item] if message["role"] == "assistant"]
    assert len(result.spans) == len(turns)
    # Blocks of the template itself contain whatever it ends an answer with.
    if UNTRAINED_END not in result.warnings and result.method != "generation blocks":
        ends = {result.text[start:end].rstrip()[-4:] for start, end in result.spans}
        assert len(ends) == 1 or "tools" in item
    whole = tokenizer.decode(tokens.ids.tolist())
    assert re.sub("[ ▁]", "", whole) == re.sub("[ ▁]", "", result.text)


WITH_BLOCKS = [name for name in NAMES if re.search(r"{%-?\s*generation", source_of(name))]
EXTRA_IN_BLOCKS: dict[str, list[str]] = json.loads(Path(__file__).with_name("extra_in_blocks.json").read_text("utf-8"))
"""What generation blocks contain in addition to our spans: headers that are in the generation prompt, text ends."""


def extra_in_blocks(name: str, make_tokenizer: Callable[..., Any]) -> set[str]:
    """Return the text that is in generation blocks but in none of our spans, without white space."""
    more: set[str] = set()
    for item, (tokenizer, result, _) in mask_all(name, "byte-level", make_tokenizer).items():
        if isinstance(result, MaskedText):
            row = conversation(item)
            theirs = char_mask(result.text, TemplateRenderer(tokenizer).generation_spans(row.messages, row.tools, {}))
            ours = char_mask(result.text, result.spans)
            # DiffusionGemma stops at a token that is outside of its blocks, and writes a header that no prompt gives.
            assert pieces(result.text, ours & ~theirs) <= {"<|tool_response>", "<|turn>model"}, item
            more |= pieces(result.text, theirs & ~ours)
    return more


def pieces(text: str, mask: np.ndarray) -> set[str]:
    """Return the parts of a text under a mask, without outer white space."""
    displayed = "".join(item if masked else "\0" for item, masked in zip(text, mask, strict=True))
    return {piece.strip() for piece in displayed.split("\0")} - {""}


def char_mask(text: str, spans: Iterable[tuple[int, int]]) -> np.ndarray:
    mask = np.zeros(len(text), dtype=bool)
    for start, end in spans:
        mask[start:end] = True
    return mask


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_spans_are_within_generation_blocks(name: str, make_tokenizer: Callable[..., Any]) -> None:
    assert sorted(extra_in_blocks(name, make_tokenizer)) == EXTRA_IN_BLOCKS.get(name, [])
