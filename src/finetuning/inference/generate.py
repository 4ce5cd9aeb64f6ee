"""Prompts to answers, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetuning.data.chat.template import TemplateRenderer, TemplateRenderError
from finetuning.data.tokenization.labels import LabelBuilder
from finetuning.errors import DataError, InternalError, ModelError, Problem
from finetuning.inference.generation_params import GenerationParameters
from finetuning.inference.load import LoadedGenerator
from finetuning.inference.prompts import MOST_PROBLEMS_SHOWN, GenerationPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model gets it."""

    text: str
    ids: tuple[int, ...]
    truncated: bool
    """Whether its beginning was cut off."""


@dataclass(frozen=True)
class Generation:
    """What the model wrote."""

    text: str
    """Without special tokens."""
    raw: str
    """Prompt and answer as the model saw and wrote them, special tokens included."""
    tokens: int
    """Tokens of the answer, the one that ends it included."""


def encode_prompts(
    prompts: Sequence[GenerationPrompt], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[EncodedPrompt]:
    """The token ids of each prompt, by the same functions that encode training rows.

    Messages go through the tokenizer's chat template up to where the model begins to write. A prompt that is too long
    loses its beginning: what was said last, and the header of the answer, stay.

    Raises:
        ModelError: there are messages and no chat template.
        DataError: the template refuses messages, or a prompt has no token.
    """
    texts = _texts(prompts, tokenizer)
    problems, encoded = [], []
    for prompt, text, tokens in zip(
        prompts, texts, LabelBuilder(tokenizer).encode(texts, [None] * len(texts)), strict=True
    ):
        ids = tokens.ids.tolist()
        if not ids:
            problems.append(Problem("the prompt is empty, and the tokenizer puts nothing in front of it", prompt.place))
        encoded.append(EncodedPrompt(text, tuple(ids[-max_tokens:]), len(ids) > max_tokens))
    _raise(problems)
    return encoded


def _texts(prompts: Sequence[GenerationPrompt], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    has_messages = any(prompt.text is None for prompt in prompts)
    if has_messages and not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template, and the prompts are messages",
            hint="Name a tokenizer that has one as model_conf.tokenizer, or give rows with `prompt`.",
        )
    renderer = TemplateRenderer(tokenizer) if has_messages else None
    texts: list[str] = []
    problems = []
    for prompt in prompts:
        if renderer is None or prompt.text is not None:
            texts.append(prompt.text or "")
            continue
        try:
            texts.append(renderer.text(prompt.messages, prompt=True, tools=prompt.tools, kwargs=prompt.template_kwargs))
        except TemplateRenderError as error:
            problems.append(Problem(f"the chat template refuses these messages: {error}", prompt.place))
    _raise(problems)
    return texts


def _raise(problems: Sequence[Problem]) -> None:
    if problems:
        raise DataError(problems[:MOST_PROBLEMS_SHOWN])


def generate_batches(
    generator: LoadedGenerator,
    prompts: Sequence[EncodedPrompt],
    batches: Sequence[Sequence[int]],
    parameters: GenerationParameters,
    seed: int,
    on_text: Callable[[str], None] | None = None,
) -> Iterator[dict[int, list[Generation]]]:
    """For each batch of indexes, the answers of its prompts by index.

    Each batch is seeded by its first prompt, so that a batch alone gives what it gives among others. A batch that
    does not fit the memory is halved.

    Args:
        on_text: gets the text of the answer piece by piece as it is written; for a single prompt.

    Raises:
        InternalError: a single prompt does not fit the memory.
    """
    import torch

    waiting = [list(batch) for batch in reversed(batches)]
    while waiting:
        batch = waiting.pop()
        torch.manual_seed(seed + batch[0])
        try:
            yield _generate_batch(generator, prompts, batch, parameters, on_text)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise InternalError(
                    f"out of memory with a single prompt of {len(prompts[batch[0]].ids)} tokens",
                    hint="Lower hf_gen_params.max_new_tokens, or load the model in fewer bits.",
                ) from None
            middle = len(batch) // 2
            waiting += [batch[middle:], batch[:middle]]
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

    width = max(len(prompts[index].ids) for index in batch)
    input_ids = torch.full((len(batch), width), generator.pad_token_id)
    mask = torch.zeros((len(batch), width), dtype=torch.int64)
    for row, index in enumerate(batch):
        ids = prompts[index].ids
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    tokenizer = generator.tokenizer
    extra: dict[str, Any] = {"tokenizer": tokenizer} if parameters.config.stop_strings else {}
    if on_text is not None:
        extra["streamer"] = _streamer(tokenizer, on_text)
    cache = preallocated_cache(generator.model, parameters.config)
    if cache is not None:
        extra["past_key_values"] = cache
    with torch.inference_mode():
        output = generator.model.generate(
            input_ids=input_ids.to(generator.device),
            attention_mask=mask.to(generator.device),
            generation_config=parameters.config,
            **extra,
        )
    written = output[:, width:].tolist()
    count = parameters.answers_per_prompt
    answers: dict[int, list[Generation]] = {}
    for row, index in enumerate(batch):
        rows = written[row * count : (row + 1) * count]
        answers[index] = [_answer(prompts[index], ids, generator, parameters.stop_ids) for ids in rows]
    return answers


def _answer(
    prompt: EncodedPrompt, written: list[int], generator: LoadedGenerator, stop_ids: frozenset[int]
) -> Generation:
    ids = _without_padding(written, stop_ids, generator.pad_token_id)
    decode = generator.tokenizer.decode
    raw = decode([*prompt.ids, *ids], skip_special_tokens=False)
    return Generation(text=decode(ids, skip_special_tokens=True), raw=raw, tokens=len(ids))


def _without_padding(ids: list[int], stop_ids: frozenset[int], pad_token_id: int) -> list[int]:
    """The tokens up to the first that ends the answer, that one included; else without the padding at the end."""
    for position, token_id in enumerate(ids):
        if token_id in stop_ids:
            return ids[: position + 1]
    end = len(ids)
    while end and ids[end - 1] == pad_token_id:
        end -= 1
    return ids[:end]


def _streamer(tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class _Told(TextStreamer):
        """Hands each piece of text on instead of printing it."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return _Told(tokenizer, skip_prompt=True, skip_special_tokens=True)
