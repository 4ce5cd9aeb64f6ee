"""Rows of the preference methods: paired answers for DPO, ORPO, CPO and reward models, unpaired ones for KTO."""

# pyarrow and datasets have no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np

from finetuning.data.chat.loss_mask import AssistantMaskBuilder
from finetuning.data.chat.template import TemplateRenderer
from finetuning.data.processors.base import (
    DroppedSample,
    MessageWarnings,
    TokenizedSample,
    explain_split,
    find_unprinted,
    omitted_messages,
    serve_tool_calls,
    too_long,
    unused_arguments,
    unverified_mask,
)
from finetuning.data.samples import Conversation, MaskedText, MaskError, Message, Preference, UnpairedPreference
from finetuning.data.tokenization.labels import LabelBuilder, TokenizedText

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa


@dataclass
class AnswerProcessor:
    """Renders and tokenizes answers to prompts; the base of the processors for preferences.

    A prompt and its answer are rendered and tokenized together, so that the ids are those that the served model sees.
    The answer ends with its end-of-turn token. Answers are truncated where both are longer than `max_length` tokens.
    """

    renderer: TemplateRenderer
    mask_builder: AssistantMaskBuilder
    label_builder: LabelBuilder
    max_length: int | None
    warnings: MessageWarnings = field(init=False)

    def __post_init__(self) -> None:
        self.warnings = MessageWarnings(self.renderer.special_tokens, self.renderer.message_keys)

    def mask(
        self, answers: Sequence[tuple[Preference | UnpairedPreference, list[Message]]]
    ) -> list[MaskedText | MaskError]:
        """The text of each row's prompt and answer, up to the end of the answer, which is its only span."""
        if any(row.is_text for row, _ in answers):
            return [
                self._plain_text(row, answer) if row.is_text else self.mask([(row, answer)])[0]
                for row, answer in answers
            ]
        conversations = [
            Conversation([*row.prompt, *answer], row.location, row.tools, row.template_kwargs)
            for row, answer in answers
        ]
        turns = [range(len(row.prompt), len(row.prompt) + len(answer)) for row, answer in answers]
        return [self._as_one_span(result) for result in self.mask_builder.find_turns(conversations, turns)]

    def _plain_text(self, row: Preference | UnpairedPreference, answer: list[Message]) -> MaskedText:
        """A prompt and an answer without a chat template, and the end-of-sequence token."""
        prompt = row.prompt[0]["content"]
        text = f"{prompt}{answer[0]['content']}{self.renderer.tokenizer.eos_token or ''}"
        return MaskedText(text, ((len(prompt), len(text)),), "text")

    @staticmethod
    def _as_one_span(result: MaskedText | MaskError) -> MaskedText | MaskError:
        if isinstance(result, MaskError):
            return result
        if any(first[1] != second[0] for first, second in pairwise(result.spans)):
            return MaskError("an answer of several messages has headers between them, which would be trained")
        span = (result.spans[0][0], result.spans[-1][1])
        return MaskedText(result.text[: span[1]], (span,), result.method, result.warnings)

    @staticmethod
    def split_prompt(tokens: TokenizedText) -> tuple[np.ndarray, np.ndarray]:
        """Split the token ids into prompt and answer, both int32."""
        first, last = tokens.runs[0]
        return tokens.ids[:first], tokens.ids[first:last]


@dataclass
class PreferenceProcessor(AnswerProcessor):
    """Preferences to `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    max_prompt_length: int | None = None
    """Of a longer prompt, the last tokens are kept."""

    def __call__(self, rows: Sequence[Preference]) -> list[TokenizedSample | DroppedSample]:
        serve_tool_calls(rows, self.renderer)
        results = iter(self.mask([(row, answer) for row in rows for answer in (row.chosen, row.rejected)]))
        masked = [(next(results), next(results)) for _ in rows]
        usable = [result for pair in masked for result in pair if isinstance(result, MaskedText)]
        tokenized = iter(
            self.label_builder.encode([result.text for result in usable], [result.spans for result in usable])
        )
        samples: list[TokenizedSample | DroppedSample] = []
        for row, (chosen, rejected) in zip(rows, masked, strict=True):
            chosen_tokens = next(tokenized) if isinstance(chosen, MaskedText) else chosen
            rejected_tokens = next(tokenized) if isinstance(rejected, MaskedText) else rejected
            samples.append(self._finish(row, (chosen, rejected), (chosen_tokens, rejected_tokens)))
        return samples

    def _finish(
        self,
        row: Preference,
        masked: tuple[MaskedText | MaskError, MaskedText | MaskError],
        tokens: tuple[TokenizedText | MaskError, TokenizedText | MaskError],
    ) -> TokenizedSample | DroppedSample:
        (chosen_text, rejected_text), (chosen_tokens, rejected_tokens) = masked, tokens
        if isinstance(chosen_text, MaskError) or isinstance(chosen_tokens, MaskError):
            error = chosen_text if isinstance(chosen_text, MaskError) else chosen_tokens
            return unverified_mask(MaskError(f"chosen answer: {error}"), self.renderer)
        if isinstance(rejected_text, MaskError) or isinstance(rejected_tokens, MaskError):
            error = rejected_text if isinstance(rejected_text, MaskError) else rejected_tokens
            return unverified_mask(MaskError(f"rejected answer: {error}"), self.renderer)
        if unprinted := None if row.is_text else find_unprinted(row, self.renderer, chosen_text.text):
            return unprinted
        prompt, chosen = self.split_prompt(chosen_tokens)
        other_prompt, rejected = self.split_prompt(rejected_tokens)
        if not np.array_equal(prompt, other_prompt):
            return unverified_mask(MaskError("the prompt is rendered differently before the rejected answer"))
        if np.array_equal(chosen, rejected):
            return DroppedSample("the chosen and the rejected answer are the same")
        excess = 0 if self.max_prompt_length is None else max(len(prompt) - self.max_prompt_length, 0)
        prompt = prompt[excess:]
        size = len(prompt) + max(len(chosen), len(rejected))
        max_answer = size if self.max_length is None else self.max_length - len(prompt)
        if max_answer <= 0:
            return DroppedSample("nothing left to train on", f"the prompt alone is {len(prompt)} tokens", tokens=size)
        warnings = {
            *chosen_text.warnings,
            *rejected_text.warnings,
            *self.warnings([*row.prompt, *row.chosen, *row.rejected]),
            *(() if row.is_text else omitted_messages([*row.prompt, *row.chosen], chosen_text.text)),
            *(() if row.is_text else omitted_messages(row.rejected, rejected_text.text)),
            *unused_arguments(row, self.renderer),
            *_prompt_warnings(row),
            *_split_warnings(chosen_text, chosen_tokens),
            *_split_warnings(rejected_text, rejected_tokens),
        }
        answers_cut = max(len(chosen) - max_answer, 0) + max(len(rejected) - max_answer, 0)
        chosen, rejected = chosen[:max_answer], rejected[:max_answer]
        if np.array_equal(chosen, rejected):
            return DroppedSample("nothing left to train on", "the answers differ only after max_length", tokens=size)
        return TokenizedSample(
            columns={"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected},
            tokens=2 * len(prompt) + len(chosen) + len(rejected),
            trained=len(chosen) + len(rejected),
            text=f"{chosen_text.text}\0{rejected_text.text}",
            tokens_cut=2 * excess + answers_cut,
            answer_cut=answers_cut > 0,
            warnings=frozenset(warnings),
        )


@dataclass
class WholePairProcessor:
    """Preferences for reward models: pairs that are too long are dropped, since a reward is read at the last token."""

    processor: PreferenceProcessor
    """Must not truncate."""
    max_length: int | None

    def __call__(self, rows: Sequence[Preference]) -> list[TokenizedSample | DroppedSample]:
        return [self._unless_too_long(sample) for sample in self.processor(rows)]

    def _unless_too_long(self, sample: TokenizedSample | DroppedSample) -> TokenizedSample | DroppedSample:
        if isinstance(sample, DroppedSample) or self.max_length is None:
            return sample
        ids = sample.columns
        size = len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
        return sample if size <= self.max_length else too_long(size, self.max_length)


@dataclass
class UnpairedProcessor(AnswerProcessor):
    """Unpaired preferences to `prompt_ids`, `completion_ids` and `label`."""

    def __call__(self, rows: Sequence[UnpairedPreference]) -> list[TokenizedSample | DroppedSample]:
        serve_tool_calls(rows, self.renderer)
        masked = [self.mask([(row, row.completion)])[0] for row in rows]
        usable = [result for result in masked if isinstance(result, MaskedText)]
        tokenized = iter(
            self.label_builder.encode([result.text for result in usable], [result.spans for result in usable])
        )
        return [
            self._finish(row, result, next(tokenized))
            if isinstance(result, MaskedText)
            else unverified_mask(result, self.renderer)
            for row, result in zip(rows, masked, strict=True)
        ]

    def _finish(
        self, row: UnpairedPreference, masked: MaskedText, tokens: TokenizedText | MaskError
    ) -> TokenizedSample | DroppedSample:
        if isinstance(tokens, MaskError):
            return unverified_mask(tokens)
        if unprinted := None if row.is_text else find_unprinted(row, self.renderer, masked.text):
            return unprinted
        prompt, completion = self.split_prompt(tokens)
        size = len(prompt) + len(completion)
        max_answer = size if self.max_length is None else self.max_length - len(prompt)
        if max_answer <= 0:
            return DroppedSample("nothing left to train on", f"the prompt alone is {len(prompt)} tokens", tokens=size)
        tokens_cut = max(len(completion) - max_answer, 0)
        warnings = masked.warnings | self.warnings([*row.prompt, *row.completion]) | _split_warnings(masked, tokens)
        warnings |= set() if row.is_text else omitted_messages([*row.prompt, *row.completion], masked.text)
        warnings |= unused_arguments(row, self.renderer) | _prompt_warnings(row)
        return TokenizedSample(
            columns={"prompt_ids": prompt, "completion_ids": completion[:max_answer], "label": row.label},
            tokens=min(size, len(prompt) + max_answer),
            trained=len(completion) - tokens_cut,
            text=masked.text,
            tokens_cut=tokens_cut,
            answer_cut=tokens_cut > 0,
            warnings=frozenset(warnings),
        )


PROMPT_IS_ANSWERED = "the prompt ends with an answer: the one that is trained is a turn of its own after it"


def _prompt_warnings(row: Preference | UnpairedPreference) -> set[str]:
    is_answered = not row.is_text and bool(row.prompt) and row.prompt[-1]["role"] == "assistant"
    return {PROMPT_IS_ANSWERED} if is_answered else set()


def _split_warnings(masked: MaskedText, tokens: TokenizedText) -> set[str]:
    warning = explain_split(tokens.warning, masked.text, masked.spans[0][0])
    return {warning} if warning else set()


def with_kl_completions(dataset: datasets.Dataset, batch_size: int) -> datasets.Dataset:
    """Add `KL_completion_ids`, the completion of the previous row within each step of `batch_size` rows.

    KTO estimates the KL divergence from mismatched prompts and completions. The first row of a step gets the last
    completion, so that a step holds the same completions twice. A step of one row gets the completion of the step
    before. TRL's KTO collator (1.16) reads this column.
    """
    import datasets
    from datasets.table import InMemoryTable

    count = len(dataset)
    starts = np.arange(0, count, batch_size)
    previous = np.arange(count) - 1
    previous[starts] = np.minimum(starts + batch_size, count) - 1
    if count > 1 and starts[-1] == count - 1:
        previous[-1] = count - 2
    ids = cast("pa.Table", dataset.with_format("arrow")[:])["completion_ids"].take(previous)
    features = datasets.Features({"KL_completion_ids": dataset.features["completion_ids"]})
    table = InMemoryTable.from_pydict({"KL_completion_ids": ids})
    column = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
    # The other columns stay in their file, next to which TRL keeps the log-probabilities of the reference.
    return datasets.concatenate_datasets([dataset, column], axis=1)
