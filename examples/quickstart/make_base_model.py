"""A base model made from nothing: a small Llama and its tokenizer, trained for under a minute on text made up here.

It learns words, numbers and days, the ChatML format, to repeat what was said and to answer an order politely, in
words. It never sees the task: no order in its text is answered with JSON.

    python make_base_model.py OUT [--steps 450] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from orders import DAYS, ITEMS, NUMBERS, Order, every_order, small_talk, spoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NAMES = ("anna", "ben", "carla", "david", "emma", "felix", "greta", "hugo")
PLACES = ("shelf", "market", "garden", "kitchen", "cellar", "shop")
WORDS = (*ITEMS, *ITEMS.values(), *DAYS, *(form for forms in NUMBERS.values() for form in forms if " " not in form))
CONTEXT = 256
ROWS_PER_STEP = 32
LEARNING_RATE = 3e-3
IGNORED = -100


def text_of(order: Order, rng: random.Random) -> tuple[str, str]:
    """A text about the things in `order`, in two parts: what is only read, and what is learned.

    What a customer says cannot be predicted, and a loss on it is noise that hides the rest: it is only read.
    """
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    item, many = order.item, ITEMS[order.item]
    words = " ".join(rng.choices(WORDS, k=rng.randint(2, 6)))
    kinds = (
        lambda: turns(spoken(order, rng), small_talk(order, rng)),
        lambda: turns(f"say again: {words}", words),
        lambda: ("", f"{order.when} {name} saw {order.goods(rng)} in the {place}."),
        lambda: ("", f'one {item}, two {many}. a word for it is "{item}", and for more of them "{many}".'),
        lambda: ("", f"{rng.choice(NUMBERS[order.quantity])} is {order.quantity}."),
        lambda: ("", json.dumps({"name": name, "place": place, "day": order.day, "age": rng.randint(1, 12)})),
    )
    return rng.choices(kinds, weights=(8, 8, 1, 1, 1, 1))[0]()


def turns(question: str, answer: str) -> tuple[str, str]:
    """A conversation of two turns in ChatML, split where the assistant's words begin."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>\n"


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the ChatML tokens and template; pads with <|endoftext|>, ends with <|im_end|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 0.7 million weights, not trained."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def batch_of(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `labels`, int64 [row, token], padded on the right; a row is (ids only read, ids learned)."""
    width = max(len(read) + len(learned) for read, learned in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED)
    for index, (read, learned) in enumerate(rows):
        end = len(read) + len(learned)
        ids[index, :end] = torch.tensor(read + learned)
        labels[index, len(read) : end] = torch.tensor(learned)
    return ids, labels


def pretrain(model: LlamaForCausalLM, rows: list[tuple[list[int], list[int]]], steps: int, rng: random.Random) -> None:
    """Trains `model` in place for `steps` steps of next-token prediction on `rows`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)
    )
    model.train()
    started = time.monotonic()
    for step in range(1, steps + 1):
        ids, labels = batch_of(rng.sample(rows, ROWS_PER_STEP))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's base model.")
    parser.add_argument("out", type=Path, help="folder to save the model in")
    parser.add_argument("--steps", type=int, default=450, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text and the weights")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    orders = every_order()
    texts = [text_of(rng.choice(orders), rng) for _ in range(8000)]
    tokenizer = make_tokenizer([read + learned for read, learned in texts])
    rows = [(tokenizer(read).input_ids, tokenizer(learned).input_ids) for read, learned in texts]
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} weights, {len(tokenizer)} tokens, {len(rows):,} texts", flush=True)
    pretrain(model, rows, arguments.steps, rng)
    transformers_logging.disable_progress_bar()
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
