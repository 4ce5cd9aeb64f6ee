"""Rows with images to token ids and labels: the chat template and the mask are those of text rows.

Contents stay texts with `PLACE` in them until a template renders them, so that all that is known of masks holds. The
template gets a list of content parts, and writes a token for each image; that token is replaced by as many as the
processor of the model makes of an image of this size. Labels never fall on them.
"""

# datasets has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, cast

import numpy as np

from finetuning.data.chat.template import TemplateRenderer, TemplateRenderError
from finetuning.data.images.files import read_references as read_references
from finetuning.data.images.processor import ImageTextProcessor
from finetuning.data.images.rows import PLACE
from finetuning.data.prepared import PreparedData
from finetuning.data.processors.base import (
    DroppedSample,
    TokenizedSample,
    find_unprinted,
    serve_tool_calls,
    too_long,
    truncate,
    unverified_mask,
)
from finetuning.data.processors.sft import SFTProcessor
from finetuning.data.samples import (
    Conversation,
    ImageReference,
    JsonObject,
    JsonValue,
    MaskedText,
    MaskError,
    Message,
    Span,
    Text,
    TokenIds,
)
from finetuning.data.tokenization.labels import TokenizedText

if TYPE_CHECKING:
    import datasets

COLUMNS = ("images", "text")
"""Columns of rows with images, in addition to those of text."""
_PROBE = "zq7"
CUT_IMAGE = "an image would be cut off by sft_args.max_seq_length"
BAD_IMAGES = "an image cannot be placed"


class ImageTemplateRenderer(TemplateRenderer):
    """Renders messages whose contents hold `PLACE` for images."""

    @cached_property
    def takes_texts(self) -> bool:
        """Whether the template prints a content that is a text. Some print only those that are lists of parts."""
        try:
            return _PROBE in super().text([{"role": "user", "content": _PROBE}])
        except TemplateRenderError:
            return False

    def text(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool = False,
        tools: list[JsonObject] | None = None,
        kwargs: JsonObject | None = None,
    ) -> str:
        return super().text(self.with_parts(messages), prompt=prompt, tools=tools, kwargs=kwargs)

    def plain_texts(self, conversations: Sequence[Conversation]) -> list[str | None]:
        return [text if isinstance(text, str) else None for text in self.texts(conversations)]

    def generation_spans(
        self, messages: Sequence[Message], tools: list[JsonObject] | None, kwargs: JsonObject
    ) -> list[Span]:
        return super().generation_spans(self.with_parts(messages), tools, kwargs)

    def with_parts(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages as the template takes them."""
        return [
            {**message, "content": self._parts(message["content"])}
            if isinstance(message.get("content"), str)
            else message
            for message in messages
        ]

    def _parts(self, content: str) -> JsonValue:
        if PLACE not in content and self.takes_texts:
            return content
        return content_parts(content)


def content_parts(content: str) -> list[JsonObject]:
    """Return a content with `PLACE` for images as parts, as chat templates take them."""
    parts: list[JsonObject] = []
    for index, text in enumerate(content.split(PLACE)):
        if index:
            parts.append({"type": "image"})
        if text or PLACE not in content:
            parts.append({"type": "text", "text": text})
    return parts


@dataclass
class ImageSFTProcessor(SFTProcessor):
    """As `SFTProcessor`, for rows of which some have images.

    Two columns are added: `images`, JSON of the references, and `text`, the rendered text with one token for an image,
    which is what the processor takes; both are empty for rows without images.
    """

    images: ImageTextProcessor | None = None

    def __call__(self, rows: Sequence[Conversation | Text | TokenIds]) -> list[TokenizedSample | DroppedSample]:
        results: dict[int, TokenizedSample | DroppedSample] = {}
        with_images = [index for index, row in enumerate(rows) if getattr(row, "images", ())]
        without = [index for index in range(len(rows)) if index not in set(with_images)]
        samples = super().__call__([rows[index] for index in without])
        results |= {
            index: without_images(sample, self._image_processor, ("input_ids",))
            for index, sample in zip(without, samples, strict=True)
        }
        for index in with_images:
            row = rows[index]
            assert isinstance(row, Conversation | Text)
            results[index] = self._chat(row) if isinstance(row, Conversation) else self._text(row)
        return [results[index] for index in range(len(rows))]

    @property
    def _image_processor(self) -> ImageTextProcessor:
        assert self.images is not None
        return self.images

    def _chat(self, row: Conversation) -> TokenizedSample | DroppedSample:
        chat = self._chat_processor
        serve_tool_calls([row], chat.renderer)
        masked, turns = chat.render_one(row)
        if isinstance(masked, DroppedSample):
            return masked
        if unprinted := find_unprinted(row, chat.renderer, masked.text):
            return unprinted
        spans = None if turns is None else masked.spans
        sample = self._sample(row.images, masked.text, spans, masked)
        if isinstance(sample, TokenizedSample):
            sample.warnings |= masked.warnings | set(chat.warnings([without_places(each) for each in row.messages]))
        return sample

    def _text(self, row: Text) -> TokenizedSample | DroppedSample:
        with_eos = self._with_eos(row)
        if isinstance(with_eos, DroppedSample):
            return with_eos
        mark = self._image_processor.mark
        shift = len(mark) - len(PLACE)

        def moved(position: int) -> int:
            return position + shift * with_eos.text.count(PLACE, 0, position)

        spans = None if with_eos.spans is None else [(moved(start), moved(end)) for start, end in with_eos.spans]
        return self._sample(row.images, with_eos.text.replace(PLACE, mark), spans)

    def _sample(
        self,
        images: Sequence[ImageReference],
        text: str,
        spans: Sequence[Span] | None,
        masked: MaskedText | None = None,
    ) -> TokenizedSample | DroppedSample:
        """Return the sample of a rendered text in which each image has one token."""
        if PLACE in text:
            return DroppedSample(BAD_IMAGES, "the chat template does not print it as an image", is_bad=True)
        try:
            expanded = self._image_processor.expand(text, images)
        except ValueError as error:
            return DroppedSample(BAD_IMAGES, str(error), is_bad=True)
        tokens = self.label_builder.encode([expanded.text], [expanded.spans(spans)])[0]
        if not isinstance(tokens, TokenizedText):
            return unverified_mask(tokens)
        if tokens.warning:
            # The processor tokenizes the text as a whole.
            return unverified_mask(MaskError(tokens.warning))
        last_image = int(np.flatnonzero(np.isin(tokens.ids, list(self._image_processor.token_ids)))[-1])
        if last_image >= self.max_length:
            size = len(tokens.ids)
            if not self.truncate:
                return too_long(size, self.max_length)
            detail = f"{size} tokens, the limit is {self.max_length}"
            return DroppedSample(CUT_IMAGE, detail, is_invalid=False, tokens=size)
        sample = truncate(tokens, self.max_length, self.truncate, expanded.text)
        if isinstance(sample, DroppedSample):
            return sample
        # A beginning-of-sequence token that the tokenizer adds becomes a part of the text.
        text = self.label_builder.added_to(expanded.text) + text
        return with_references(sample, images, text)


def with_references(sample: TokenizedSample, images: Sequence[ImageReference], text: str) -> TokenizedSample:
    """Return a sample with its images and the text that the processor takes, as columns."""
    columns = {"images": json.dumps([asdict(image) for image in images]), "text": text}
    digests = " ".join(image.digest for image in images)
    return replace(sample, columns=sample.columns | columns, text=f"{sample.text} {digests}")


def without_images(
    sample: TokenizedSample | DroppedSample, processor: ImageTextProcessor, ids: Sequence[str]
) -> TokenizedSample | DroppedSample:
    """Return a sample of text with empty columns of images; dropped if its ids hold a token of an image."""
    if isinstance(sample, DroppedSample):
        return sample
    token_ids = list(processor.token_ids)
    if any(np.isin(sample.columns[name], token_ids).any() for name in ids):
        detail = f"the text holds a token of images, such as {processor.image_token}"
        return DroppedSample(BAD_IMAGES, detail, is_bad=True)
    sample.columns |= {"images": "", "text": ""}
    return sample


def image_sft_processor(images: ImageTextProcessor) -> Callable[..., ImageSFTProcessor]:
    """Return the processor of sft rows, with the processor of the model's images; for the rest of its arguments."""
    return partial(ImageSFTProcessor, images=images)


def without_places(message: Mapping[str, object]) -> Message:
    """Return a message without the places of its images."""
    content = message.get("content")
    return {**message, "content": content.replace(PLACE, "")} if isinstance(content, str) else dict(message)


def without_empty_columns(prepared: PreparedData) -> PreparedData:
    """Return the rows without the columns of images if no row has an image: they are rows of text then."""
    if not prepared.has_images:
        return prepared
    splits = [cast("datasets.Dataset | None", split) for split in (prepared.train, prepared.validation)]
    if any(any(split.with_format("arrow")[:]["images"].to_pylist()) for split in splits if split is not None):
        return prepared
    train, validation = (None if split is None else split.remove_columns(list(COLUMNS)) for split in splits)
    assert train is not None
    return replace(prepared, train=train, validation=validation)
