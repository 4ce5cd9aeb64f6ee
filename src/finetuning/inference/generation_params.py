"""Parameters of generation: the user's override ours, which override the model's generation config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetuning.errors import ConfigError, Location

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from finetuning.inference.load import LoadedWithoutWeights

DEFAULT_MAX_LENGTH = 2048
DEFAULT_MAX_NEW_TOKENS = 512
# Parameters of the model's generation config that affect the answers; they are written to the output.
_REPORTED = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams")
# They change the return value of `generate`.
_RESERVED = (
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
)


@dataclass(frozen=True)
class GenerationParameters:
    """The arguments of `generate`, and their values for the output."""

    config: GenerationConfig
    max_prompt_tokens: int
    """Longer prompts are truncated on the left."""
    max_new_tokens: int
    stop_ids: frozenset[int]
    """Ids of the tokens that end an answer."""
    answers_per_prompt: int
    reported: dict[str, object]
    """JSON values for `gen_params` in the output."""


def check_parameters(user: Mapping[str, object]) -> None:
    """Check `hf_gen_params` as far as possible before the model is loaded.

    Raises:
        ConfigError: a length is not a positive integer or leaves no tokens for the prompt, or a key is reserved.
    """
    for key in _RESERVED:
        if user.get(key):
            raise ConfigError("is not supported: it changes the return value of generate", location=_location(key))
    for key in ("max_length", "max_new_tokens", "num_return_sequences"):
        value = user.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"must be a positive integer, not {value!r}", location=_location(key))
    _lengths(user, None)


def build_parameters(
    user: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | PeftModel | LoadedWithoutWeights,
    pad_token_id: int,
) -> GenerationParameters:
    """Return the parameters of a run.

    Unless the user sets it, an answer ends at the end-of-sequence token of the tokenizer or of the model's generation
    config. Parameters that nobody sets come from the model's generation config.

    Raises:
        ConfigError: `transformers.GenerationConfig` rejects a value, or the lengths contradict each other.
    """
    from transformers import GenerationConfig

    from finetuning.model.tokenizer import special_token_id

    defaults = model.generation_config
    max_length, max_new_tokens = _lengths(
        user, getattr(model.config.get_text_config(), "max_position_embeddings", None)
    )
    values: dict[str, Any] = {
        "eos_token_id": _ids(special_token_id(tokenizer, "eos"), defaults.eos_token_id) or None,
        "pad_token_id": pad_token_id,
        "bos_token_id": special_token_id(tokenizer, "bos"),
        **{key: value for key, value in user.items() if value is not None},
        "max_new_tokens": max_new_tokens,
    }
    values.pop("max_length", None)
    try:
        config = GenerationConfig(**values)
        config.validate()
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error).strip().splitlines()[0], location=Location(key="hf_gen_params")) from None
    inherited = {key: getattr(defaults, key, None) for key in _REPORTED}
    return GenerationParameters(
        config=config,
        max_prompt_tokens=max_length - max_new_tokens,
        max_new_tokens=max_new_tokens,
        stop_ids=frozenset(_ids(values["eos_token_id"])),
        answers_per_prompt=values.get("num_return_sequences") or 1,
        reported={
            **{key: value for key, value in inherited.items() if value is not None},
            **values,
            "max_length": max_length,
        },
    )


def _lengths(user: Mapping[str, Any], context: int | None) -> tuple[int, int]:
    """Return the maximum number of tokens of prompt plus answer, and of the answer.

    Defaults fit into the model's context length; for 2048 tokens and more they are 2048 and 512.
    """
    max_length = user.get("max_length") or min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    max_new_tokens = user.get("max_new_tokens") or min(DEFAULT_MAX_NEW_TOKENS, max(1, max_length // 4))
    if max_new_tokens >= max_length:
        origin = "" if user.get("max_length") else " (default)"
        raise ConfigError(
            f"{max_new_tokens} leaves no tokens for the prompt: max_length, for prompt plus answer, is"
            f" {max_length}{origin}",
            location=_location("max_new_tokens"),
            hint="Raise max_length or lower max_new_tokens.",
        )
    return max_length, max_new_tokens


def _ids(*values: int | list[int] | None) -> list[int]:
    """Return all ids without duplicates, in order."""
    ids: dict[int, None] = {}
    for value in values:
        for token_id in [] if value is None else [value] if isinstance(value, int) else value:
            ids[int(token_id)] = None
    return list(ids)


def _location(key: str) -> Location:
    return Location(key=f"hf_gen_params.{key}")
