"""Tiny tokenizers of both families, trained in seconds, with the special tokens of any chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The capital of Finland is Helsinki, a city by the sea.",
    "What is the weather like in Paris today? It is sunny and warm.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "user assistant system model tool function content messages name arguments",
    "Älä huoli, kaikki järjestyy. Größe, naïve, façade, Привет, 你好, こんにちは.",
    "I think that the answer is 42. Let me think about it step by step.",
    "<think>\nsome thought\n</think>\n\nHello there, how are you?",
] * 20


def byte_level(special: tuple[str, ...] = (), *, add_bos: bool = False, trim_offsets: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<unk>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if add_bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def sentencepiece(special: tuple[str, ...] = (), *, add_bos: bool = False, scheme: str = "first") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *special],
        show_progress=False,
        max_token_length=12,
    )
    words = [word for text in TEXT for word in re.findall(r"\s?[^\s]+|\s+", text)]
    tokenizer.train_from_iterator(words, trainer)
    # Byte pieces are ordinary tokens of the model, not special ones.
    state = _without_added_bytes(tokenizer.to_str())
    tokenizer = Tokenizer.from_str(state)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _without_added_bytes(state: str) -> str:
    values = json.loads(state)
    values["added_tokens"] = [item for item in values["added_tokens"] if not item["content"].startswith("<0x")]
    return json.dumps(values)


def wrap(tokenizer: Tokenizer, special: tuple[str, ...] = (), template: str | None = None) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=list(special),
    )
    wrapped.chat_template = template
    return wrapped


_KINDS: dict[str, Callable[..., Tokenizer]] = {"byte-level": byte_level, "sentencepiece": sentencepiece}


@cache
def _trained(kind: str, special: tuple[str, ...], add_bos: bool) -> str:
    return _KINDS[kind](special, add_bos=add_bos).to_str()


def special_tokens_of(source: str) -> tuple[str, ...]:
    """What looks like a special token in a template: `<|…|>`, `<｜…｜>`, `<start_of_turn>`, `[INST]`, …"""
    result = re.findall(
        r"<[|｜][^|｜<>'\"\s]{1,40}[|｜]>|<[a-z_]+_of_[a-z_]+>|<\|[a-z_]+>|<[a-z_]+\|>|</?think>", source
    )
    return tuple(sorted(set(result)))


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A function: kind, template source, further special tokens -> a tokenizer that knows them."""

    def make(
        kind: str = "byte-level",
        template: str | None = None,
        special: tuple[str, ...] | None = None,
        add_bos: bool = False,
    ) -> PreTrainedTokenizerFast:
        tokens = special if special is not None else special_tokens_of(template or "")
        return wrap(Tokenizer.from_str(_trained(kind, tokens, add_bos)), tokens, template)

    return make


@pytest.fixture(scope="session")
def trl_templates() -> dict[str, str]:
    """The chat templates that ship with TRL, by name."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.jinja"))}


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., str]:
    """A function: name, rows (objects are written as JSON, bytes and text as they are) -> path of the file."""

    def write(name: str, *rows: object) -> str:
        path = tmp_path / name
        with open(path, "wb") as stream:
            for row in rows:
                data = row if isinstance(row, bytes | str) else json.dumps(row, ensure_ascii=False)
                stream.write((data if isinstance(data, bytes) else data.encode()) + b"\n")
        return str(path)

    return write
