"""Rows of dpo and grpo whose prompts have images: token ids, with the tokens of the images, and their references.

As for sft, the chat template and the mask are those of text rows, and each image becomes as many tokens as the model's
processor makes of it. Only prompts have images: a model does not write any.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from finetuning.data.images.processor import ImageTextProcessor
from finetuning.data.images.rendering import (
    BAD_IMAGES,
    content_parts,
    with_references,
    without_images,
    without_places,
)
from finetuning.data.images.rows import PLACE
from finetuning.data.processors.base import DroppedSample, TokenizedSample, unverified_mask
from finetuning.data.processors.preference import PreferenceProcessor
from finetuning.data.processors.prompt import PromptProcessor
from finetuning.data.samples import (
    JsonObject,
    MaskedText,
    MaskError,
    Message,
    Preference,
    Prompt,
    UnpairedPreference,
)
from finetuning.data.tokenization.labels import TokenizedText

_PREFERENCE_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
LONG_PROMPT = "a prompt with images is longer than max_prompt_length"


@dataclass
class ImagePreferenceProcessor(PreferenceProcessor):
    """As `PreferenceProcessor`, for rows of which some have images.

    Two columns are added: `images`, JSON of the references, and `text`, the rendered text of the prompt and the chosen
    answer with one token for an image; both are empty for rows without images.
    """

    images: ImageTextProcessor | None = None

    def __call__(self, rows: Sequence[Preference]) -> list[TokenizedSample | DroppedSample]:
        texts = iter(super().__call__([row for row in rows if not row.images]))
        return [
            self._with_images(row) if row.images else without_images(next(texts), self._processor, _PREFERENCE_IDS)
            for row in rows
        ]

    @property
    def _processor(self) -> ImageTextProcessor:
        assert self.images is not None
        return self.images

    def _plain_text(self, row: Preference | UnpairedPreference, answer: list[Message]) -> MaskedText:
        prompt = [
            {**message, "content": message["content"].replace(PLACE, self._processor.mark)} for message in row.prompt
        ]
        return super()._plain_text(replace(row, prompt=prompt), answer)

    def _with_images(self, row: Preference) -> TokenizedSample | DroppedSample:
        for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
            if any(PLACE in str(message.get("content")) for message in answer):
                return DroppedSample(
                    BAD_IMAGES, f"the {name} answer holds one: images belong to the prompt", is_bad=True
                )
        masked = self.mask([(row, row.chosen), (row, row.rejected)])
        expanded: list[MaskedText | MaskError] = []
        tokens: list[TokenizedText | MaskError] = []
        for result in masked:
            if isinstance(result, MaskError):
                expanded.append(result)
                tokens.append(result)
                continue
            if PLACE in result.text:
                return DroppedSample(BAD_IMAGES, "the chat template does not print it as an image", is_bad=True)
            try:
                text = self._processor.expand(result.text, row.images)
            except ValueError as error:
                return DroppedSample(BAD_IMAGES, str(error), is_bad=True)
            spans = text.spans(result.spans)
            if len(spans) != 1:
                return DroppedSample(BAD_IMAGES, "an answer holds the token of an image", is_bad=True)
            expanded.append(replace(result, text=text.text, spans=tuple(spans)))
            tokens += self.label_builder.encode([text.text], [spans])
        for each in tokens:
            if isinstance(each, TokenizedText) and each.warning:
                # The processor tokenizes the text as a whole.
                return unverified_mask(MaskError(each.warning))
        prompt = tokens[0].runs[0][0] if isinstance(tokens[0], TokenizedText) else 0
        if self.max_prompt_length is not None and prompt > self.max_prompt_length:
            detail = f"{prompt} tokens, the limit is {self.max_prompt_length}"
            return DroppedSample(LONG_PROMPT, detail, is_invalid=False, tokens=prompt)
        texts = replace(row, prompt=[without_places(message) for message in row.prompt])
        sample = self._finish(texts, (expanded[0], expanded[1]), (tokens[0], tokens[1]))
        if isinstance(sample, DroppedSample):
            return sample
        assert isinstance(masked[0], MaskedText)
        assert isinstance(expanded[0], MaskedText)
        # A beginning-of-sequence token that the tokenizer adds becomes a part of the text.
        text = self.label_builder.added_to(expanded[0].text) + masked[0].text
        return with_references(sample, row.images, text)


@dataclass
class ImagePromptProcessor(PromptProcessor):
    """As `PromptProcessor`, for rows of which some have images; adds the columns of `ImagePreferenceProcessor`."""

    images: ImageTextProcessor | None = None

    def __call__(self, rows: Sequence[Prompt]) -> list[TokenizedSample | DroppedSample]:
        assert self.images is not None
        texts = iter(super().__call__([row for row in rows if not row.images]))
        return [
            self._with_images(row, self.images)
            if row.images
            else without_images(next(texts), self.images, ("prompt_ids",))
            for row in rows
        ]

    def _with_images(self, row: Prompt, processor: ImageTextProcessor) -> TokenizedSample | DroppedSample:
        rendered = self._render(row)
        if isinstance(rendered, DroppedSample):
            return rendered
        if PLACE in rendered:
            return DroppedSample(BAD_IMAGES, "the chat template does not print it as an image", is_bad=True)
        try:
            text = processor.expand(rendered, row.images).text
        except ValueError as error:
            return DroppedSample(BAD_IMAGES, str(error), is_bad=True)
        tokens = self.label_builder.encode([text], [None])[0]
        texts = replace(row, messages=[without_places(message) for message in row.messages])
        sample = self._finish(texts, text, tokens)
        if isinstance(sample, DroppedSample):
            return sample
        # The trainer and reward functions get the prompt with the places of its images.
        values: JsonObject = json.loads(sample.columns["row"])
        prompt = [_with_parts(message) for message in row.messages]
        sample.columns["row"] = json.dumps({**values, "prompt": prompt}, ensure_ascii=False)
        return with_references(sample, row.images, self.label_builder.added_to(text) + rendered)


def image_preference_processor(images: ImageTextProcessor) -> Callable[..., ImagePreferenceProcessor]:
    """Return the processor of preferences, with the processor of the model's images; for the rest of its arguments."""
    return partial(ImagePreferenceProcessor, images=images)


def image_prompt_processor(images: ImageTextProcessor) -> Callable[..., ImagePromptProcessor]:
    """Return the processor of prompts for generation, as `image_preference_processor`."""
    return partial(ImagePromptProcessor, images=images)


def _with_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": content_parts(content)} if isinstance(content, str) and PLACE in content else message
