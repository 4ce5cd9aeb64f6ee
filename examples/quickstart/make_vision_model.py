"""A vision-language model made from nothing, for the quickstart with images: a small LLaVA that knows nothing yet.

Its vision tower looks at 16 patches of a picture, a projector makes tokens of them, and a Llama reads these and text.

    python make_vision_model.py OUT [--seed 0]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from shapes import COLORS, QUESTION, SHAPES, SIZE, answer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PATCH = 8
HIDDEN = 96


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the words of the task, with a chat template that has places for images."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    answers = [answer(shape, color) for shape in SHAPES for color in COLORS]
    tokenizer.train_from_iterator([QUESTION, "user\n", "assistant\n", *answers], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
        chat_template=TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A LLaVA of about 0.5 million weights, not trained."""
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=PATCH)
    image: dict[str, Any] = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    config = LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=-1, **image)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the model of the quickstart with images.")
    parser.add_argument("out", type=Path, help="folder to save the model in")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    transformers_logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    images.save_pretrained(arguments.out)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    (arguments.out / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    print(f"{model.num_parameters():,} weights, {len(tokenizer)} tokens in {arguments.out}")


if __name__ == "__main__":
    main()
