"""The image processor of a checkpoint: how many tokens an image becomes, and the pixels that a model takes."""

# transformers' processors have no useful types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import transformers
from PIL import Image
from transformers import AutoImageProcessor, ImageProcessingMixin, PreTrainedTokenizerBase, ProcessorMixin

from finetuning.config.sections.data import ImagesConfig
from finetuning.config.sections.model import RunConfig
from finetuning.data.images.files import ImageFolder
from finetuning.data.images.rows import take_images
from finetuning.data.samples import ImageReference, Span
from finetuning.distributed import announce_wait
from finetuning.errors import ConfigError, DataError, Location, ModelError, first_line, read_json_object, reading

_KEY = "data_conf.images"
_OWN_KEYS = ("folder", "max_file_pixels")
"""Keys of `data_conf.images` that are not the processor's."""
_UNSUPPORTED = {
    "PaliGemmaProcessor": "it adds tokens to the text, and its model reads prompts in both directions",
    "MllamaProcessor": "its model reads images by cross-attention, for which all rows of a batch need images",
}
"""Processors whose models are not trained on images here, and why."""
_CONFIG_FILES = ("processor_config.json", "preprocessor_config.json")


class ImagesOnlyMixin:
    """Makes a processor without the video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> object:
        if argument is None and argument_name != "tokenizer":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class ExpandedText:
    """A rendered text with the tokens of its images, and where these are, in characters."""

    text: str
    images: tuple[Span, ...]
    moved: tuple[tuple[int, int], ...]
    """For each image: where its token ends in the text before, and by how many characters what follows has moved."""

    def spans(self, spans: Sequence[Span] | None) -> list[Span]:
        """Return where spans of the text before are in this one, without its images; None is the whole text."""
        if spans is None:
            kept = [(0, len(self.text))]
        else:
            kept = [(self._move(start), self._move(end)) for start, end in spans]
        for first, last in self.images:
            kept = [
                piece
                for start, end in kept
                for piece in ((start, min(end, first)), (max(start, last), end))
                if piece[0] < piece[1]
            ]
        return kept

    def _move(self, position: int) -> int:
        return position + sum(shift for end, shift in self.moved if end <= position)


class ImageTextProcessor:
    """Calls the processor of a checkpoint, and knows how it writes images into a text."""

    def __init__(self, processor: ProcessorMixin, config: ImagesConfig):
        """Check that the processor takes the keys of the config.

        Raises:
            ConfigError: it does not take one, or does not say how it writes images into a text.
        """
        folder = ImageFolder(Path(config.folder).expanduser() if config.folder else None, config.max_file_pixels)
        self.take_images = partial(take_images, folder=folder)
        self._processor: Any = processor
        self.tokenizer = cast("PreTrainedTokenizerBase", self._processor.tokenizer)
        values = config.model_dump(exclude_none=True, exclude={*_OWN_KEYS})
        self.options: dict[str, object] = _image_options(self._processor.image_processor, values)
        self._replacements: dict[tuple[int, int], str] = {}
        token = getattr(processor, "image_token", None)
        if not isinstance(token, str):
            raise ConfigError(
                f"images are not supported for this model: {type(processor).__name__} names no token for an image",
                location=Location(key="run_conf.model"),
            )
        self.image_token: str = token

    @cached_property
    def token_ids(self) -> frozenset[int]:
        """The ids of the tokens of images in the model's input."""
        token_id = getattr(self._processor, "image_token_id", None)
        return frozenset(each for each in (*self._processor.image_token_ids, token_id) if isinstance(each, int))

    @cached_property
    def feature_token_ids(self) -> frozenset[int]:
        """The ids of tokens in whose place a feature of an image is put: not those around them."""
        token_id = getattr(self._processor, "image_token_id", None)
        return frozenset((token_id,)) if isinstance(token_id, int) else self.token_ids

    @cached_property
    def mark(self) -> str:
        """The text of an image without chat template."""
        start, end = (getattr(self._processor, f"vision_{side}_token", "") for side in ("start", "end"))
        return f"{start}{self.image_token}{end}"

    @property
    def name(self) -> str:
        """The class of the checkpoint's processor."""
        return type(self._processor).__name__

    @property
    def digest(self) -> str:
        """A digest of all settings that the tokens and pixels of an image depend on."""
        settings = json.dumps([self._processor.image_processor.to_dict(), self._processor.to_dict()], default=str)
        return hashlib.sha256(f"{settings} {json.dumps(self.options, sort_keys=True)}".encode()).hexdigest()

    def expand(self, text: str, images: Sequence[ImageReference]) -> ExpandedText:
        """Return a rendered text in which each token for an image is replaced as the processor replaces it.

        Raises:
            ValueError: the text has another number of these tokens than of images; the message says so.
        """
        marks = [match.span() for match in re.finditer(re.escape(self.image_token), text)]
        if len(marks) != len(images):
            raise ValueError(
                f"the rendered text has the token {self.image_token} {len(marks)} times, and the row has"
                f" {len(images)} images"
            )
        pieces: list[str] = []
        spans: list[Span] = []
        moved: list[tuple[int, int]] = []
        position = size = 0
        for (start, end), image in zip(marks, images, strict=True):
            new = self._replacement((image.width, image.height))
            pieces += [text[position:start], new]
            size += start - position
            spans.append((size, size + len(new)))
            size += len(new)
            moved.append((end, len(new) - (end - start)))
            position = end
        return ExpandedText("".join([*pieces, text[position:]]), tuple(spans), tuple(moved))

    def _replacement(self, size: tuple[int, int]) -> str:
        """Return what the processor writes for an image of a width and height. It looks at no pixels for that."""
        if size not in self._replacements:
            blank = Image.new("RGB", size)
            output = self(texts=[self.image_token], images=[[blank]], tensors=None, with_offsets=True)
            offsets = output.get("text_replacement_offsets")
            if not offsets:
                raise ConfigError(
                    f"images are not supported for this model: {type(self._processor).__name__} does not say what it"
                    " writes for an image",
                    location=Location(key="run_conf.model"),
                )
            replacement = str(offsets[0][0]["replacement"])
            if self.token_ids.isdisjoint(self.tokenizer(replacement, add_special_tokens=False)["input_ids"]):
                raise ModelError(
                    f"{type(self._processor).__name__} writes no token for an image of {size[0]} x {size[1]} pixels",
                    location=Location(key="run_conf.model"),
                    hint="Look at its preprocessor_config.json and processor_config.json.",
                )
            self._replacements[size] = replacement
        return self._replacements[size]

    def __call__(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        *,
        tensors: str | None = "pt",
        with_offsets: bool = False,
    ) -> Mapping[str, Any]:
        """Return what the processor makes of texts with their images, each text with one token for an image.

        No token is put in front of a text: a text has its beginning-of-sequence token already.
        """
        offsets = {"return_text_replacement_offsets": True} if with_offsets else {}
        # What its files say is used only now.
        problem = f"{type(self._processor).__name__} cannot process an image with the settings of this model"
        with reading(problem, location=Location(key="run_conf.model")):
            return self._processor(
                text=list(texts),
                images=[list(row) for row in images],
                return_tensors=tensors,
                padding=True,
                add_special_tokens=False,
                **self.options,
                **offsets,
            )


def _image_options(image_processor: ImageProcessingMixin, values: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments for an image processor.

    Raises:
        ConfigError: it does not take one of them.
    """
    supported = set(getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", {})) | set(
        image_processor.to_dict()
    )
    options: dict[str, object] = {}
    for name, value in values.items():
        if name in supported:
            options[name] = value
        elif name == "longest_edge" and "longest_edge" in (getattr(image_processor, "size", None) or {}):
            options["size"] = {"longest_edge": value}
        else:
            raise ConfigError(
                f"the image processor of this model ({type(image_processor).__name__}) has no such setting",
                location=Location(key=f"{_KEY}.{name}"),
                hint=f"It has: {', '.join(sorted({*ImagesConfig.model_fields} & supported)) or 'none of these'}.",
            )
    return options


def processor_for(
    run_conf: RunConfig, config: ImagesConfig, tokenizer: PreTrainedTokenizerBase
) -> ImageTextProcessor | str:
    """Return the processor of the model of a run; for a model without one, why its rows can have no images.

    Raises:
        ModelError: its files cannot be read, or name an unknown class.
        ConfigError: it does not take a setting of `config`, or does not say how it writes images into a text.
    """
    folder, args = Path(run_conf.model).expanduser(), run_conf.model_args
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        problem, location = f"the processor of {run_conf.model} cannot be loaded", Location(key="run_conf.model")
        with reading(problem, location=location), announce_wait(f"the processor of {run_conf.model} to load"):
            token = args.token.get_secret_value() if args.token else None
            snapshot = snapshot_download(
                run_conf.model, revision=args.revision, cache_dir=args.cache_dir, token=token,
                local_files_only=bool(args.local_files_only), allow_patterns=["*.json"],
            )  # fmt: skip
        folder = Path(snapshot)
    return load_processor(folder / (args.subfolder or ""), tokenizer, config)


def load_processor(
    folder: Path, tokenizer: PreTrainedTokenizerBase, config: ImagesConfig, key: str = "run_conf.model"
) -> ImageTextProcessor | str:
    """Return the processor in the folder of a checkpoint, with a tokenizer of the caller; or why there is none.

    Raises:
        ModelError: its files cannot be read, or name an unknown class.
        ConfigError: as `ImageTextProcessor`.
    """
    fields: dict[str, object] = {}
    for name in reversed(_CONFIG_FILES):
        if (folder / name).is_file():
            with reading(f"{folder / name} cannot be read", location=Location(file=str(folder / name))):
                fields |= read_json_object(folder / name)
    if not fields:
        return f"and {folder} lacks the files that say how it takes them ({' or '.join(_CONFIG_FILES)})"
    class_name = fields.get("processor_class")
    processor_class = getattr(transformers, class_name, None) if isinstance(class_name, str) else None
    if not isinstance(class_name, str) or processor_class is None:
        raise ModelError(
            f"the processor of {folder} has the class {class_name}, which transformers does not have",
            location=Location(key=key),
        )
    if not issubclass(processor_class, ProcessorMixin):
        # In place of a class that cannot be imported.
        return f"and {class_name} needs a package that is not installed: pip install torchvision"
    if class_name in _UNSUPPORTED:
        return f"and images of {class_name} are not supported: {_UNSUPPORTED[class_name]}"
    problem = f"the processor of {folder} cannot be loaded"
    with reading(problem, location=Location(key=key)):
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        images_only = type(class_name, (ImagesOnlyMixin, processor_class), {"__init__": processor_class.__init__})
        parts = {"image_processor": image_processor, "tokenizer": tokenizer}
        settings = {}
        if (folder / _CONFIG_FILES[0]).is_file():
            settings = read_json_object(folder / _CONFIG_FILES[0])
        arguments = [parts.get(name) for name in processor_class.get_attributes()]
        try:
            processor = images_only.from_args_and_dict(arguments, settings)
        except ImportError as error:
            return f"and their processor cannot be used: {first_line(error)}"
    return ImageTextProcessor(cast("ProcessorMixin", processor), config)


def check_processed(ids: Sequence[int], processed: Sequence[int], location: Location | None) -> None:
    """Check that the tokens of a prepared row are the first of those that the processor makes of it.

    Raises:
        DataError: they are not.
    """
    if list(processed[: len(ids)]) != list(ids):
        raise DataError(
            "the processor makes other tokens of a row with images than were prepared for it",
            location=location,
            hint="Set data_conf.cache: off to prepare the rows again; if that does not help, report it as a bug.",
        )
