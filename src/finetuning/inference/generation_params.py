"""How answers are generated: the user's parameters over ours, and ours over the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetuning.errors import ConfigError, Location

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 2048
DEFAULT_MAX_NEW_TOKENS = 512
# Of the model's own generation config these are told in the output, as they decide over the answers.
_TOLD = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams")
# They change what `generate` gives back, which is read here.
_NOT_OURS = (
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
)


@dataclass(frozen=True)
class GenerationParameters:
    """What goes into `generate`, and what is told about it."""

    config: GenerationConfig
    max_prompt_tokens: int
    """Longer prompts are cut at their beginning."""
    max_new_tokens: int
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    answers_per_prompt: int
    told: dict[str, Any]
    """Plain values for the output's `gen_params`."""


def check_parameters(user: Mapping[str, Any]) -> None:
    """Nothing, when the lengths in `hf_gen_params` agree; looked at before a model is loaded.

    Raises:
        ConfigError: a length is no positive number, leaves no room for the prompt, or a key is not the user's to set.
    """
    for key in _NOT_OURS:
        if user.get(key):
            raise ConfigError("changes what generate returns, and is not for this file", place=_place(key))
    for key in ("max_length", "max_new_tokens", "num_return_sequences"):
        value = user.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"must be a whole number above 0, not {value!r}", place=_place(key))
    _lengths(user, None)


def build_parameters(
    user: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, model: Any, pad_token_id: int
) -> GenerationParameters:
    """The parameters of a run.

    An answer ends at the tokenizer's end-of-sequence token and at those of the model's generation config, unless the
    user says otherwise. What nobody says, the model's generation config says.

    Raises:
        ConfigError: a value is refused by `transformers.GenerationConfig`, or the lengths do not agree.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    max_length, max_new_tokens = _lengths(
        user, getattr(model.config.get_text_config(), "max_position_embeddings", None)
    )
    values: dict[str, Any] = {
        "eos_token_id": _ids(tokenizer.eos_token_id, own.eos_token_id) or None,
        "pad_token_id": pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        **{key: value for key, value in user.items() if value is not None},
        "max_new_tokens": max_new_tokens,
    }
    values.pop("max_length", None)
    try:
        config = GenerationConfig(**values)
        config.validate()
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error).strip().splitlines()[0], place=Location(key="hf_gen_params")) from None
    inherited = {key: getattr(own, key, None) for key in _TOLD}
    told = {key: value for key, value in inherited.items() if value is not None}
    return GenerationParameters(
        config=config,
        max_prompt_tokens=max_length - max_new_tokens,
        max_new_tokens=max_new_tokens,
        stop_ids=frozenset(_ids(values["eos_token_id"])),
        answers_per_prompt=values.get("num_return_sequences") or 1,
        told=told | values | {"max_length": max_length},
    )


def _lengths(user: Mapping[str, Any], context: int | None) -> tuple[int, int]:
    """The most tokens of prompt and answer together, and of the answer.

    What the user leaves out fits into the model's context; at a context of 2048 tokens and more the defaults are
    2048 and 512.
    """
    max_length = user.get("max_length") or min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    max_new_tokens = user.get("max_new_tokens") or min(DEFAULT_MAX_NEW_TOKENS, max(1, max_length // 4))
    if max_new_tokens >= max_length:
        written = "" if user.get("max_length") else " by default"
        raise ConfigError(
            f"{max_new_tokens} leaves no room for a prompt: max_length, prompt and answer together, is"
            f" {max_length}{written}",
            place=_place("max_new_tokens"),
            hint="Raise max_length or lower max_new_tokens.",
        )
    return max_length, max_new_tokens


def _ids(*values: int | list[int] | None) -> list[int]:
    """All ids that are given, each once."""
    found: dict[int, None] = {}
    for value in values:
        for token_id in [] if value is None else [value] if isinstance(value, int) else value:
            found[int(token_id)] = None
    return list(found)


def _place(key: str) -> Location:
    return Location(key=f"hf_gen_params.{key}")
