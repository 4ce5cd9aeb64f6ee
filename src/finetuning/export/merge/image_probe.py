"""The prompt with an image that a merge of a vision-language model is compared on: texts never run its vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.errors import FinetuningError, first_line, read_json_object

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from PIL.Image import Image
    from transformers import PreTrainedModel

_SIZE = (96, 64)
"""Width and height of the image, in pixels."""


@dataclass(frozen=True)
class ImageProbe:
    """A prompt with an image as the model's processor makes it, or why there is none."""

    inputs: Mapping[str, torch.Tensor]
    """What `forward` takes, for one row; empty without a prompt."""
    note: str
    """What the image was, or why there is none."""

    def logits(self, model: PreTrainedModel | PeftModel) -> list[torch.Tensor]:
        """Return logits_TV of the prompt, in float32 on the CPU; an empty list without a prompt."""
        import torch

        from finetuning.model.embeddings import input_weight

        if not self.inputs:
            return []
        weight = input_weight(model)
        inputs = {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in self.inputs.items()
        }
        with torch.inference_mode():
            return [model(**inputs).logits[0].float().cpu()]


def image_probe(folder: Path) -> ImageProbe | None:
    """Return the prompt for the model in a folder; None if the model takes text only."""
    if not isinstance(read_json_object(folder / "config.json").get("vision_config"), dict):
        return None
    from transformers import AutoTokenizer

    from finetuning.config.sections.data import ImagesConfig
    from finetuning.data.images.processor import load_processor

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        processor = load_processor(folder, tokenizer, ImagesConfig())
        if isinstance(processor, str):
            return ImageProbe({}, f"no image: the model takes them, {processor}")
        made = processor([f"{processor.mark} What is this?"], [[_picture()]])
    except (FinetuningError, OSError, ValueError) as error:
        return ImageProbe({}, f"no image: {first_line(error)}")
    inputs = {name: value for name, value in made.items() if name != "labels"}
    tokens = sum(int((inputs["input_ids"] == token).sum()) for token in processor.feature_token_ids)
    width, height = _SIZE
    return ImageProbe(inputs, f"an image of {width} x {height} pixels, {tokens} tokens")


def _picture() -> Image:
    """Return an image in which each pixel differs from its neighbors."""
    import numpy as np
    from PIL.Image import fromarray

    pixels = np.random.default_rng(0).integers(0, 256, (_SIZE[1], _SIZE[0], 3), dtype=np.uint8)
    return fromarray(pixels)
