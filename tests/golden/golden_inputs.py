"""Fixed models and rows for the golden losses.

Everything is computed from integers, so that the bytes are the same on every machine: the tokenizer's merges are
written down instead of trained, and the weights are scaled random integers instead of samples of a normal distribution.
Nothing here is shared with the other tests: a change of their fixtures must not move the golden losses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "What",
    " is",
    " number",
    " the",
    " color",
    " of",
    " Answer",
    " with",
    " one",
    " word",
    " red",
    " green",
    " blue",
)
COLORS = ("red", "green", "blue", "yellow", "black", "white")
VOWELS = '''
def vowels(completions, **columns):
    """Return the share of vowels in each completion."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts]
'''


def build_tokenizer(special_tokens: Sequence[str], **names: Any) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: special tokens, all bytes, and the prefixes of a few words."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        word = word.replace(" ", "Ġ")
        merges += [(word[:end], word[end]) for end in range(1, len(word)) if (word[:end], word[end]) not in merges]
    pieces = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def fill_with_integers(tensors: Mapping[str, torch.Tensor], seed: int, largest: float = 0.125) -> None:
    """Set each tensor to random multiples of 2**-10 up to `largest`; norm weights stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    bound = int(largest * 1024)
    with torch.no_grad():
        for name in sorted(tensors):
            if "norm" not in name:
                integers = torch.randint(-bound, bound + 1, tensors[name].shape, generator=generator)
                tensors[name].copy_(integers.float() / 1024)


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, *, tied: bool) -> LlamaForCausalLM:
    """Save and return a two-layer Llama in float32."""
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        **tokens,
    )
    model = LlamaForCausalLM(config)
    fill_with_integers(dict(model.named_parameters()), seed)
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def save_adapter(folder: Path, model: LlamaForCausalLM) -> None:
    """Save a LoRA adapter on `model` whose B matrices are not zero."""
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    adapter = {name: weight for name, weight in adapted.named_parameters() if "lora_" in name}
    fill_with_integers(adapter, seed=3)
    adapted.save_pretrained(folder)


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Return conversations: a system message in every third, a second exchange in every fourth."""
    rows = []
    for number in range(count):
        color = COLORS[number % len(COLORS)]
        messages = [
            {"role": "user", "content": f"What is the color of number {number}?"},
            {"role": "assistant", "content": f"Number {number} is {color}."},
        ]
        if number % 3 == 0:
            messages.insert(0, {"role": "system", "content": "Answer with care."})
        if number % 4 == 0:
            messages += [
                {"role": "user", "content": "Answer with one word."},
                {"role": "assistant", "content": color},
            ]
        rows.append({"messages": messages})
    return rows


def preference_rows(count: int) -> list[dict[str, Any]]:
    """Return prompts, each with a chosen and a rejected answer."""
    return [
        {
            "prompt_messages": [{"role": "user", "content": f"What is number {number}?"}],
            "chosen_messages": [{"role": "assistant", "content": f"It is {COLORS[number % 6]}."}],
            "rejected_messages": [{"role": "assistant", "content": f"{COLORS[(number + 1) % 6]}, or one of {number}"}],
        }
        for number in range(count)
    ]


def rated_rows(count: int) -> list[dict[str, Any]]:
    """Return answers of which every third is undesirable."""
    return [
        {
            "prompt_messages": row["prompt_messages"],
            "completion_messages": row["rejected_messages" if number % 3 == 2 else "chosen_messages"],
            "label": number % 3 != 2,
        }
        for number, row in enumerate(preference_rows(count))
    ]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_inputs(folder: Path) -> None:
    """Write the models, the adapter, the rows and the reward function that the cases name."""
    chat = build_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    model = save_llama(folder / "chat-model", chat, seed=1, tied=True)
    save_adapter(folder / "adapter", model)
    base = build_tokenizer(["<s>", "</s>", "<unk>"], bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    save_llama(folder / "base-model", base, seed=2, tied=False)
    write_rows(folder / "chat.jsonl", chat_rows(48))
    write_rows(folder / "chat-validation.jsonl", chat_rows(7))
    write_rows(folder / "preferences.jsonl", preference_rows(24))
    write_rows(folder / "preferences-validation.jsonl", preference_rows(5))
    write_rows(folder / "rated.jsonl", rated_rows(24))
    write_rows(folder / "rated-validation.jsonl", rated_rows(6))
    write_rows(folder / "prompts.jsonl", ({"prompt_messages": row["prompt_messages"]} for row in preference_rows(24)))
    (folder / "own_rewards.py").write_text(VOWELS, encoding="utf-8")
