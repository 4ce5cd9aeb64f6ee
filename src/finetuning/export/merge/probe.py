"""Sample prompts, and what a model says to each of their tokens: what two models are compared by."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# B prompts, T tokens, V vocabulary, L labels of a model that scores

_TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Write one sentence about the sea.",
    "def add(a, b):\n    return a +",
    '{"name": "Ada", "born": 1815, "field": "',
    "1, 1, 2, 3, 5, 8, 13,",
    "Translate to German: Good morning, how are you?",
)
_MAX_TOKENS = 64


def sample_prompts(folder: Path, rows: int) -> list[list[int]]:
    """Texts as the tokenizer in `folder` encodes them, in ids below `rows`, and ids at random, which reach rows that
    no text of ours does."""
    draw = random.Random(0)
    prompts: list[list[int]] = []
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer(text)["input_ids"][:_MAX_TOKENS] for text in _TEXTS]
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": _TEXTS[1]}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"][:_MAX_TOKENS])
        prompts = [[token for token in ids if token < rows] for ids in prompts]
    prompts += [[draw.randrange(rows) for _ in range(_MAX_TOKENS)] for _ in range(2)]
    return [ids for ids in prompts if len(ids) > 1]


def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits_TV in float32 of each prompt, in order."""
    import torch

    device = model.get_input_embeddings().weight.device
    found: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        for batch in _of_like_length(prompts):
            width = max(len(prompts[index]) for index in batch)
            # Padding stands on the right, where no token before it looks.
            ids = torch.tensor([[*prompts[index], *[0] * (width - len(prompts[index]))] for index in batch])
            mask = torch.tensor([[int(at < len(prompts[index])) for at in range(width)] for index in batch])
            logits_BTV = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            for row, index in enumerate(batch):
                found[index] = logits_BTV[row, : len(prompts[index])].float().cpu()
    return [found[index] for index in range(len(prompts))]


def scores_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """One tensor scores_LB in float32: the prompts take the place of the vocabulary, as a score ranks them."""
    import torch

    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts]
    return [torch.stack(rows, dim=1)]


def _of_like_length(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indexes of prompts that go through the model together: none is more than twice as long as another."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        if batch and len(prompts[index]) > 2 * len(prompts[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
