"""Prompts with images: their text as the model's processor takes it, and the input of a batch with the pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.config.sections.data import ImagesConfig
from finetuning.config.sections.experiment import GenerationModel
from finetuning.config.sections.model import RunConfig
from finetuning.data.chat.template import TemplateRenderError
from finetuning.data.collators import PaddingCollator
from finetuning.data.images.collator import ImageCollator
from finetuning.data.images.processor import ImageTextProcessor, load_processor, processor_for
from finetuning.data.images.rendering import ImageTemplateRenderer
from finetuning.data.images.rows import PLACE
from finetuning.data.samples import ImageReference, MaskError
from finetuning.data.tokenization.labels import LabelBuilder
from finetuning.errors import ConfigError, Location, ModelError
from finetuning.inference.prompts import GenerationPrompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class PromptImages:
    """The images of an encoded prompt, and its text with one token for each of them."""

    images: tuple[ImageReference, ...]
    text: str
    processor: ImageTextProcessor


def image_processor_of(
    model: GenerationModel, config: ImagesConfig, tokenizer: PreTrainedTokenizerFast
) -> ImageTextProcessor:
    """Return the processor of a model's images. The files of an adapter come before those of its base model.

    Raises:
        ModelError: the model takes text only, or its processor cannot be loaded.
        ConfigError: the processor does not take a setting of `config`.
    """
    adapter = Path(model.adapter).expanduser() if model.adapter else None
    if adapter is not None and any((adapter / name).is_file() for name in _PROCESSOR_FILES):
        processor = load_processor(adapter, tokenizer, config, key="model_conf.adapter")
    else:
        processor = processor_for(RunConfig(model=model.model, model_args=model.model_args), config, tokenizer)
    if isinstance(processor, str):
        raise ModelError(
            f"the prompts hold images, {processor}",
            location=Location(key="model_conf.model"),
            hint="Use a model that takes images, or prompts without them.",
        )
    return processor


def render_with_images(prompt: GenerationPrompt, processor: ImageTextProcessor) -> str:
    """Return the text of a prompt, with one token for each of its images.

    Raises:
        TemplateRenderError: the chat template rejects the messages, or does not print an image.
    """
    if prompt.text is not None:
        return prompt.text.replace(PLACE, processor.mark)
    renderer = ImageTemplateRenderer(processor.tokenizer)  # pyright: ignore[reportArgumentType]
    text = renderer.text(prompt.messages, prompt=True, tools=prompt.tools, kwargs=prompt.template_kwargs)
    if PLACE in text:
        raise TemplateRenderError("it does not print an image")
    return text


def encode_images(
    text: str, images: tuple[ImageReference, ...], processor: ImageTextProcessor
) -> tuple[tuple[int, ...], PromptImages]:
    """Return the token ids of a rendered prompt, and what its batch needs of its images.

    Raises:
        ValueError: the text has another number of places than of images; the message says so.
    """
    label_builder = LabelBuilder(processor.tokenizer)  # pyright: ignore[reportArgumentType]
    expanded = processor.expand(text, images)
    tokens = label_builder.encode([expanded.text], [None])[0]
    assert not isinstance(tokens, MaskError), "a text without spans has no mask to verify"
    # A beginning-of-sequence token that the tokenizer adds becomes a part of the text.
    return tuple(tokens.ids.tolist()), PromptImages(images, label_builder.added_to(expanded.text) + text, processor)


def batch_with_images(
    ids: Sequence[tuple[int, ...]], images: Sequence[PromptImages | None], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """Return the input of a batch: tokens, padded on the left, and what the processor makes of the images."""
    import torch

    processor = next(each.processor for each in images if each is not None)
    rows = [
        {
            "input_ids": list(row),
            "labels": list(row),
            "images": json.dumps([asdict(image) for image in each.images]) if each is not None else "",
            "text": each.text if each is not None else "",
        }
        for row, each in zip(ids, images, strict=True)
    ]
    batch = ImageCollator(PaddingCollator(pad_token_id, "left"), processor)(rows)
    unused = ("labels", "shift_labels", "label_positions", "num_labels")
    return {name: value for name, value in batch.items() if name not in unused and isinstance(value, torch.Tensor)}


def check_beams(num_beams: int | None) -> None:
    """Refuse beam search: transformers repeats the images of a prompt in another order than its texts.

    Raises:
        ConfigError: there are beams.
    """
    if (num_beams or 1) > 1:
        raise ConfigError(
            "does not work for prompts with images",
            location=Location(key="hf_gen_params.num_beams"),
            hint="Set it to 1.",
        )
