"""A conversation with a model: its history, its system prompt, and its adapter switched on or off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from finetuning.data.samples import Message
from finetuning.errors import ConfigError, ModelError
from finetuning.inference.generate import EncodedPrompt, encode_prompts, generate_batches
from finetuning.inference.generation_params import build_parameters
from finetuning.inference.load import LoadedGenerator
from finetuning.inference.prompts import GenerationPrompt
from finetuning.model.peft.adapter_files import is_peft_model


@dataclass(frozen=True)
class Turn:
    """An answer of the model."""

    text: str
    tokens: int
    """Number of tokens, including the stop token."""
    dropped: int
    """Exchanges at the beginning of the conversation that the model was not shown, because they do not fit."""
    was_interrupted: bool = False


class Chat:
    """A conversation. The model is shown all of it with each question, except for what does not fit."""

    def __init__(
        self,
        generator: LoadedGenerator,
        gen_params: Mapping[str, object],
        *,
        system: str | None = None,
        seed: int = 42,
    ):
        """Begin a conversation.

        Raises:
            ModelError: the tokenizer has no chat template.
            ConfigError: a generation parameter is invalid.
        """
        if not generator.tokenizer.chat_template:
            raise ModelError(
                "the model has no chat template, which a conversation needs",
                hint="generate --raw --text TEXT continues a text.",
            )
        self._generator = generator
        self._parameters = build_parameters(gen_params, generator.tokenizer, generator.model, generator.pad_token_id)
        self._seed = seed
        self._exchanges: list[tuple[str, str]] = []
        """Questions with their answers."""
        self.system = system
        self.uses_adapter = self.has_adapter

    @property
    def has_adapter(self) -> bool:
        return is_peft_model(self._generator.model)

    def set_adapter(self, enabled: bool) -> None:
        """Switch the adapter on or off for the answers that follow.

        Raises:
            ConfigError: the model has none.
        """
        if not self.has_adapter:
            raise ConfigError("the model has no adapter")
        self.uses_adapter = enabled

    def reset(self) -> None:
        """Forget all questions and answers; the system prompt stays."""
        self._exchanges.clear()

    def ask(self, question: str, on_text: Callable[[str], None] = lambda text: None) -> Turn:
        """Return the answer to a question, and add both to the conversation.

        Ctrl-C ends the answer, and keeps what was generated.

        Args:
            on_text: receives the text of the answer as it is generated.

        Raises:
            DataError: the chat template raises an error for the conversation.
        """
        prompt, dropped = self._fitting_prompt(question)
        pieces: list[str] = []

        def collect(text: str) -> None:
            pieces.append(text)
            on_text(text)

        # Another seed for each answer, as a batch of prompts has.
        seed = self._seed + len(self._exchanges)
        was_interrupted = False
        try:
            with self._adapter():
                (answers,) = generate_batches(self._generator, [prompt], [[0]], self._parameters, seed, on_text=collect)
            text, tokens = answers[0][0].text, answers[0][0].tokens
        except KeyboardInterrupt:
            text, tokens, was_interrupted = "".join(pieces), 0, True
        self._exchanges.append((question, text))
        return Turn(text, tokens, dropped, was_interrupted)

    def ask_again(self, on_text: Callable[[str], None] = lambda text: None) -> Turn:
        """Answer the last question again, in place of its answer, for example with the adapter switched off.

        Raises:
            ConfigError: there is no question yet.
        """
        if not self._exchanges:
            raise ConfigError("there is no question to answer again")
        question, answer = self._exchanges.pop()
        try:
            return self.ask(question, on_text)
        except BaseException:
            self._exchanges.append((question, answer))
            raise

    def _fitting_prompt(self, question: str) -> tuple[EncodedPrompt, int]:
        """Return the prompt, and how many exchanges were left out of it."""
        dropped = 0
        prompt = self._encode(question, dropped)
        while prompt.truncated and dropped < len(self._exchanges):
            dropped += 1
            prompt = self._encode(question, dropped)
        return prompt, dropped

    def _encode(self, question: str, dropped: int) -> EncodedPrompt:
        messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, answered in self._exchanges[dropped:]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": question})
        prompt = GenerationPrompt(id=0, messages=tuple(messages))
        (encoded,) = encode_prompts([prompt], self._generator.tokenizer, self._parameters.max_prompt_tokens)
        return encoded

    @contextmanager
    def _adapter(self) -> Iterator[None]:
        """Switch the adapter off in the block, if it is to be."""
        model = self._generator.model
        if is_peft_model(model) and not self.uses_adapter:
            with model.disable_adapter():
                yield
        else:
            yield
