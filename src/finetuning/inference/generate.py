"""Encode prompts, and generate their answers in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from finetuning.data.chat.template import TemplateRenderer, TemplateRenderError
from finetuning.data.samples import MaskError
from finetuning.data.tokenization.labels import LabelBuilder
from finetuning.errors import DataError, InternalError, ModelError, Problem, first_line
from finetuning.inference.generation_params import GenerationParameters
from finetuning.inference.load import LoadedGenerator, LoadedWithoutWeights
from finetuning.inference.prompts import MAX_REPORTED_PROBLEMS, GenerationPrompt

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast, TextStreamer

    from finetuning.data.images.processor import ImageTextProcessor
    from finetuning.inference.images import PromptImages


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as text and token ids."""

    text: str
    ids: tuple[int, ...]
    truncated: bool
    """Whether it was truncated on the left."""
    with_images: PromptImages | None = None
    """Its images, if it has any."""


@dataclass(frozen=True)
class Generation:
    """An answer of the model."""

    text: str
    """Without special tokens."""
    raw: str
    """Prompt and answer, including special tokens."""
    tokens: int
    """Number of tokens of the answer, including the stop token."""


def encode_prompts(
    prompts: Sequence[GenerationPrompt],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int,
    images: ImageTextProcessor | None = None,
) -> list[EncodedPrompt]:
    """Tokenize prompts with the same functions as training rows.

    Messages are rendered with the tokenizer's chat template and its generation prompt. Prompts over `max_tokens` are
    truncated on the left, which keeps the last message and the generation prompt; one with images is not truncated.

    Args:
        images: the processor of the model's images, which prompts with images need.

    Raises:
        ModelError: there are messages but no chat template.
        DataError: the template raises an error for messages, or a prompt has no tokens, or one with images is too long.
    """
    texts = _texts(prompts, tokenizer, images)
    problems: list[Problem] = []
    encoded: list[EncodedPrompt] = []
    for prompt, text, tokens in zip(
        prompts, texts, LabelBuilder(tokenizer).encode(texts, [None] * len(texts)), strict=True
    ):
        if prompt.images:
            encoded.append(_encode_with_images(prompt, text, max_tokens, images, problems))
            continue
        assert not isinstance(tokens, MaskError), "a text without spans has no mask to verify"
        ids = tokens.ids.tolist()
        if not ids:
            problems.append(Problem("the prompt is empty, and the tokenizer adds no token to it", prompt.location))
        encoded.append(EncodedPrompt(text, tuple(ids[-max_tokens:]), len(ids) > max_tokens))
    _raise_if_any(problems)
    return encoded


def _encode_with_images(
    prompt: GenerationPrompt,
    text: str,
    max_tokens: int,
    images: ImageTextProcessor | None,
    problems: list[Problem],
) -> EncodedPrompt:
    from finetuning.inference.images import encode_images

    assert images is not None
    try:
        ids, with_images = encode_images(text, prompt.images, images)
    except ValueError as error:
        problems.append(Problem(str(error), prompt.location))
        return EncodedPrompt(text, (), False)
    if len(ids) > max_tokens:
        problems.append(
            Problem(
                f"the prompt has {len(ids):,} tokens with those of its images; at most {max_tokens:,} fit",
                prompt.location,
            )
        )
    return EncodedPrompt(text, ids, False, with_images)


def _texts(
    prompts: Sequence[GenerationPrompt], tokenizer: PreTrainedTokenizerFast, images: ImageTextProcessor | None
) -> list[str]:
    has_messages = any(prompt.text is None for prompt in prompts)
    if has_messages and not tokenizer.chat_template:
        raise ModelError(
            "the prompts are messages, but the tokenizer has no chat template",
            hint="Set model_conf.tokenizer to a tokenizer with a chat template, or use rows with `prompt`.",
        )
    renderer = TemplateRenderer(tokenizer) if has_messages else None
    texts: list[str] = []
    problems = []
    for prompt in prompts:
        if prompt.images and images is None:
            raise DataError("the prompt has images, which are not read here", location=prompt.location)
        if not prompt.images and (renderer is None or prompt.text is not None):
            texts.append(prompt.text or "")
            continue
        try:
            if images is not None:
                from finetuning.inference.images import render_with_images

                texts.append(render_with_images(prompt, images))
                continue
            assert renderer is not None
            texts.append(renderer.text(prompt.messages, prompt=True, tools=prompt.tools, kwargs=prompt.template_kwargs))
        except TemplateRenderError as error:
            problems.append(Problem(f"the chat template rejects these messages: {error}", prompt.location))
    _raise_if_any(problems)
    return texts


def _raise_if_any(problems: Sequence[Problem]) -> None:
    if problems:
        raise DataError(problems[:MAX_REPORTED_PROBLEMS])


def generate_batches(
    generator: LoadedGenerator,
    prompts: Sequence[EncodedPrompt],
    batches: Sequence[Sequence[int]],
    parameters: GenerationParameters,
    seed: int,
    on_text: Callable[[str], None] | None = None,
) -> Iterator[dict[int, list[Generation]]]:
    """Yield, for each batch of prompt indexes, the answers by index.

    Each batch is seeded from its first prompt, so that its answers do not depend on other batches. A batch that runs
    out of memory is split in half.

    Args:
        on_text: receives the text of the answer as it is generated; only for a single prompt.

    Raises:
        InternalError: a single prompt runs out of memory.
    """
    import torch

    pending = [list(batch) for batch in reversed(batches)]
    while pending:
        batch = pending.pop()
        torch.manual_seed(seed + batch[0])
        try:
            yield _generate_batch(generator, prompts, batch, parameters, on_text)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise InternalError(
                    f"out of memory with a single prompt of {len(prompts[batch[0]].ids)} tokens",
                    hint="Lower hf_gen_params.max_new_tokens, or quantize the model (quant_conf).",
                ) from None
            middle = len(batch) // 2
            pending += [batch[middle:], batch[:middle]]
            torch.cuda.empty_cache()


def _generate_batch(
    generator: LoadedGenerator,
    prompts: Sequence[EncodedPrompt],
    batch: Sequence[int],
    parameters: GenerationParameters,
    on_text: Callable[[str], None] | None,
) -> dict[int, list[Generation]]:
    import torch

    from finetuning.inference.kv_cache import preallocated_cache

    has_images = any(prompts[index].with_images for index in batch)
    inputs, config = (
        _image_inputs(generator, prompts, batch, parameters)
        if has_images
        else (_text_inputs(generator, prompts, batch), parameters.config)
    )
    width = inputs["input_ids"].shape[1]
    tokenizer = generator.tokenizer
    extra: dict[str, object] = {"tokenizer": tokenizer} if parameters.config.stop_strings else {}
    if on_text is not None:
        extra["streamer"] = _streamer(tokenizer, on_text)
    cache = preallocated_cache(generator.model, config)
    if cache is not None:
        extra["past_key_values"] = cache
    generate = cast("Callable[..., torch.Tensor]", generator.model.generate)
    with torch.inference_mode(), _explain_unsupported(generator):
        output = generate(
            **{name: value.to(generator.device) for name, value in inputs.items()},
            generation_config=config,
            **extra,
        )
    generated = output[:, width:].tolist()
    count = parameters.answers_per_prompt
    answers: dict[int, list[Generation]] = {}
    for row, index in enumerate(batch):
        rows = generated[row * count : (row + 1) * count]
        answers[index] = [make_answer(prompts[index], ids, generator, parameters.stop_ids) for ids in rows]
    return answers


def _text_inputs(
    generator: LoadedGenerator, prompts: Sequence[EncodedPrompt], batch: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, int64 of shape (prompts, longest), padded on the left."""
    import torch

    width = max(len(prompts[index].ids) for index in batch)
    input_ids = torch.full((len(batch), width), generator.pad_token_id)
    mask = torch.zeros((len(batch), width), dtype=torch.int64)
    for row, index in enumerate(batch):
        ids = prompts[index].ids
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def _image_inputs(
    generator: LoadedGenerator,
    prompts: Sequence[EncodedPrompt],
    batch: Sequence[int],
    parameters: GenerationParameters,
) -> tuple[dict[str, torch.Tensor], GenerationConfig]:
    """Return the input of a batch with images, each prompt as often as it is answered, and the config for it.

    transformers repeats the input for several answers itself, but the images one by one: those of a prompt with
    several images would no longer follow each other.
    """
    import copy

    from finetuning.inference.images import batch_with_images

    repeated = [prompts[index] for index in batch for _ in range(parameters.answers_per_prompt)]
    ids = [prompt.ids for prompt in repeated]
    inputs = batch_with_images(ids, [prompt.with_images for prompt in repeated], generator.pad_token_id)
    weight = next(generator.model.parameters())
    if weight.is_floating_point():
        inputs = {
            name: value.to(weight.dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
    config = copy.deepcopy(parameters.config)
    config.num_return_sequences = 1
    return inputs, config


@contextmanager
def _explain_unsupported(generator: LoadedGenerator) -> Iterator[None]:
    """Raise ModelError where transformers' own `generate` fails for a class of models.

    Some classes lack what it needs: a field of the config, a kind of cache.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError) as error:
        from finetuning.model.peft.adapters import base_model_of

        name = type(base_model_of(generator.model)).__name__
        raise ModelError(f"transformers cannot generate with {name}: {first_line(error)}") from error


def describe_batch_error(generator: LoadedGenerator, lengths: tuple[int, int]) -> str | None:
    """Return how a batch of two rows changes what is generated for the second one; None if it does not.

    Some classes count positions from the start of the padding, or mask only some of their layers. RWKV's cache mixes
    the rows of a batch. The logits of three generated tokens are compared with those of the row alone.

    Args:
        lengths: number of tokens of the two rows, the longer one first.
    """
    import torch

    vocabulary = generator.model.config.get_text_config().vocab_size
    rows = [(torch.arange(length) * 7919 + offset) % vocabulary for length, offset in zip(lengths, (3, 5), strict=True)]
    width = lengths[0]
    padded = torch.full((2, width), generator.pad_token_id)
    mask = torch.zeros_like(padded)
    for index, row in enumerate(rows):
        padded[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
    batch, batch_ids = _probe(generator, padded, mask)
    alone, alone_ids = _probe(generator, rows[1][None], torch.ones_like(rows[1][None]))
    # After the first different token the rows have different histories.
    same = [bool(torch.equal(alone_ids[0, -3:][:step], batch_ids[1, -3:][:step])) for step in range(3)]
    differences = [
        (single[0] - both[1]).abs().max() for single, both, is_same in zip(alone, batch, same, strict=True) if is_same
    ]
    # A tensor: `max` of Python would drop a NaN.
    difference = float(torch.stack(differences).max())
    weight = next(generator.model.parameters())
    epsilon = torch.finfo(weight.dtype).eps if weight.is_floating_point() else 1e-2
    tolerance = max(epsilon * 16, 1e-4) * max(float(alone[0].abs().max()), 1.0)
    if difference <= tolerance:
        return None
    what = "padding" if len(set(lengths)) > 1 else "another row in the batch"
    return f"{what} changes the logits of this model by {difference:.1e} (tolerance {tolerance:.1e})"


def _probe(
    generator: LoadedGenerator, input_ids: torch.Tensor, mask: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the logits of three generated tokens, each (rows, vocabulary) in float32, and all ids."""
    import torch
    from transformers import GenerationConfig

    generate = cast("Callable[..., Any]", generator.model.generate)
    with torch.inference_mode(), _explain_unsupported(generator):
        output = generate(
            input_ids=input_ids.to(generator.device),
            attention_mask=mask.to(generator.device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=3,
                min_new_tokens=3,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=generator.pad_token_id,
            ),
        )
    return [logits.float().cpu() for logits in output.logits], output.sequences.cpu()


def make_answer(
    prompt: EncodedPrompt,
    generated: list[int],
    generator: LoadedGenerator | LoadedWithoutWeights,
    stop_ids: frozenset[int],
) -> Generation:
    """Return the answer that the generated token ids are; what follows the first stop token is left out."""
    ids = _strip_padding(generated, stop_ids, generator.pad_token_id)
    text = generator.tokenizer.decode(ids, skip_special_tokens=True)
    raw = generator.tokenizer.decode([*prompt.ids, *ids], skip_special_tokens=False)
    assert isinstance(text, str) and isinstance(raw, str), "decode returns a list only for a batch"
    return Generation(text=text, raw=raw, tokens=len(ids))


def _strip_padding(ids: list[int], stop_ids: frozenset[int], pad_token_id: int) -> list[int]:
    """Return the tokens up to and including the first stop token; without one, strip the padding at the end."""
    for position, token_id in enumerate(ids):
        if token_id in stop_ids:
            return ids[: position + 1]
    end = len(ids)
    while end and ids[end - 1] == pad_token_id:
        end -= 1
    return ids[:end]


def _streamer(tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], None]) -> TextStreamer:
    from transformers import TextStreamer

    class CallbackStreamer(TextStreamer):
        """Passes text to the callback instead of printing it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return CallbackStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
