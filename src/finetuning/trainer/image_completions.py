"""GRPO on prompts with images: what the processor makes of them goes with each completion.

TRL 1.16 renders and processes prompts with images itself, for each batch of completions, and knows the tensors of some
families. Here the prompts are prepared, and each row carries the inputs of its images: through the shuffle of the
completions, their split into micro-batches, and checkpoints of completions that later steps train on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from torch.nn.functional import pad

from finetuning.errors import ConfigError, Location
from finetuning.trainer import TrainerBase
from finetuning.trainer.oom_retry import Split as Inputs

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig

    class Base(TrainerBase):
        """What the mixin needs of the trainer for prepared prompts."""

        generation_config: GenerationConfig
        generation_kwargs: Inputs

        def _tokenize_prompts(self, prompts: list[object]) -> tuple[list[list[int]], None, dict[str, object]]: ...
        def _generate_and_score_completions(self, inputs: list[Inputs]) -> Inputs: ...
        def _compute_loss(self, model: nn.Module, inputs: Mapping[str, object]) -> torch.Tensor: ...
        def _get_per_token_logps_and_entropies(
            self, *args: object, **kwargs: object
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
else:
    Base = object

IMAGE_INPUTS = "image_inputs"
"""The key of a row, and of a batch, for the inputs of its images."""
_TAKEN = {
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes", "image_position_ids", "spatial_shapes"),
    *("token_type_ids", "mm_token_type_ids"),
}
"""Inputs that TRL 1.16 passes on to the model."""


class RowImages(TypedDict):
    """What the processor makes of the images of a prompt."""

    tensors: dict[str, torch.Tensor]
    per_token: dict[str, torch.Tensor]
    """By name: values of the tokens of the prompt, (tokens,)."""
    num_images: int


class ImageCompletionsMixin(Base):
    """Compute completions and their log-probabilities with the images of their prompts. Left of `TokenizedPrompts`."""

    _images: Sequence[RowImages | None] = ()
    """Of each row of the batch that is computed."""

    def suppress_image_tokens(self, token_ids: Sequence[int]) -> None:
        """Keep completions from holding tokens of images: there would be no image for them."""
        self.generation_config.suppress_tokens = list(token_ids)
        self.generation_kwargs["suppress_tokens"] = list(token_ids)

    def _tokenize_prompts(self, prompts: list[object]) -> tuple[list[list[int]], None, dict[str, object]]:
        ids, images, fields = super()._tokenize_prompts(prompts)
        inputs = self._model_inputs(self._images, max(map(len, ids)), max(map(len, ids)))
        # TRL pads what is a list of lists on the left, as it pads the prompts.
        names = {name for row in self._images if row is not None for name in row["per_token"]}
        lists = {
            name: [
                [0] * len(prompt) if row is None else row["per_token"][name].tolist()
                for prompt, row in zip(ids, self._images, strict=True)
            ]
            for name in names
        }
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return ids, images, {**fields, **tensors, **lists}

    def _generate_and_score_completions(self, inputs: list[Inputs]) -> Inputs:
        self._images = images = [row[IMAGE_INPUTS] for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        output[IMAGE_INPUTS] = images
        return output

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, object]) -> torch.Tensor:
        self._images = cast("Sequence[RowImages | None]", inputs[IMAGE_INPUTS])
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Compute some rows at a time, each with its images."""
        rows, size = len(input_ids), batch_size or len(input_ids)
        parts = [
            super(ImageCompletionsMixin, self)._get_per_token_logps_and_entropies(
                model,
                input_ids[start : start + size],
                attention_mask[start : start + size],
                logits_to_keep,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **self._model_inputs(
                    self._images[start : start + size], input_ids.shape[1] - logits_to_keep, input_ids.shape[1]
                ),
            )
            for start in range(0, rows, size)
        ]
        log_probs, entropies, losses = zip(*parts, strict=True)
        return (
            torch.cat(log_probs),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(losses).mean() if compute_aux_loss else None,
        )

    def _model_inputs(self, images: Sequence[RowImages | None], prompt_length: int, length: int) -> Inputs:
        """Return what the model takes for the images of some rows, with how much of it belongs to which row.

        Args:
            prompt_length: of the prompts, which are padded on the left.
            length: of prompts and completions.
        """
        with_images = [row for row in images if row is not None]
        if not with_images:
            return {}
        device = self.args.device
        inputs: Inputs = {}
        for name in with_images[0]["tensors"]:
            inputs[name] = _concatenate([row["tensors"][name] for row in with_images]).to(device)
        for name, first in with_images[0]["per_token"].items():
            values = torch.zeros((len(images), length), dtype=first.dtype)
            for index, row in enumerate(images):
                if row is not None:
                    ids = row["per_token"][name]
                    values[index, prompt_length - len(ids) : prompt_length] = ids
            inputs[name] = values.to(device)
        inputs["num_images"] = [0 if row is None else row["num_images"] for row in images]
        if "image_grid_thw" not in inputs and "image_position_ids" not in inputs:
            inputs["num_tiles"] = [0 if row is None else len(row["tensors"]["pixel_values"]) for row in images]
        return inputs


def _concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate tensors of images; other sizes than the first are filled up with 0, as the processors do it."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = [
        pad(
            tensor,
            [side for size, most in zip(tensor.shape[:0:-1], largest[::-1], strict=True) for side in (0, most - size)],
        )
        for tensor in tensors
    ]
    return torch.cat(filled)


def check_inputs(inputs: RowImages, processor_name: str) -> None:
    """Check that TRL passes on all that the processor makes of images.

    Raises:
        ConfigError: it does not.
    """
    unknown = {*inputs["tensors"], *inputs["per_token"]} - _TAKEN
    if unknown:
        raise ConfigError(
            f"grpo does not train this model on images: its processor ({processor_name}) makes"
            f" {', '.join(sorted(unknown))}, which TRL's trainer does not pass on",
            location=Location(key="run_conf.model"),
        )
