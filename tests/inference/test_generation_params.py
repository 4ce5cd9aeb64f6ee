"""The user's parameters over ours, and ours over the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuning.errors import ConfigError
from finetuning.inference.generation_params import build_parameters, check_parameters


@pytest.fixture
def parts(tiny_llama_dir: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(tiny_llama_dir), AutoModelForCausalLM.from_pretrained(tiny_llama_dir)


def test_defaults_at_a_long_context_are_silogens(parts: tuple[Any, Any]) -> None:
    tokenizer, model = parts
    model.config.max_position_embeddings = 8192
    parameters = build_parameters({}, tokenizer, model, 0)
    assert (parameters.reported["max_length"], parameters.max_new_tokens, parameters.max_prompt_tokens) == (
        2048,
        512,
        1536,
    )
    assert parameters.stop_ids == {tokenizer.eos_token_id}
    assert parameters.config.bos_token_id == tokenizer.bos_token_id
    assert parameters.config.pad_token_id == 0


def test_defaults_fit_a_short_context(parts: tuple[Any, Any]) -> None:
    tokenizer, model = parts
    parameters = build_parameters({}, tokenizer, model, 0)
    assert model.config.max_position_embeddings == 512
    assert (parameters.max_new_tokens, parameters.max_prompt_tokens) == (128, 384)


def test_an_answer_ends_at_the_tokenizers_and_the_models_tokens(parts: tuple[Any, Any]) -> None:
    tokenizer, model = parts
    model.generation_config.eos_token_id = [7, 8]
    assert build_parameters({}, tokenizer, model, 0).stop_ids == {tokenizer.eos_token_id, 7, 8}
    parameters = build_parameters({"eos_token_id": 9}, tokenizer, model, 0)
    assert parameters.stop_ids == {9}
    assert parameters.config.eos_token_id == 9


def test_model_defaults_are_reported_and_the_user_overrides_them(parts: tuple[Any, Any]) -> None:
    tokenizer, model = parts
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.3
    parameters = build_parameters({"temperature": 0.7, "max_new_tokens": 5}, tokenizer, model, 0)
    assert parameters.reported["do_sample"] is True
    assert parameters.reported["temperature"] == 0.7
    assert parameters.max_new_tokens == parameters.reported["max_new_tokens"] == 5


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"max_new_tokens": 2048}, r"max_new_tokens: 2048 leaves no tokens for the prompt.* is 2048 \(default\)"),
        ({"max_new_tokens": 20, "max_length": 20}, r"max_length, for prompt plus answer, is 20\b"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be a positive integer"),
        ({"max_length": True}, "max_length: must be a positive integer"),
        ({"output_scores": True}, "output_scores: is not supported: it changes the return value"),
    ],
)
def test_lengths_that_cannot_be_are_refused_before_a_model_is_loaded(user: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parameters(user)


def test_a_value_that_transformers_refuses_is_an_error_of_the_section(parts: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^hf_gen_params: .*cache_implementation"):
        build_parameters({"cache_implementation": "none-such"}, *parts, 0)
