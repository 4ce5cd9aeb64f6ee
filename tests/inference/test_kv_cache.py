"""The preallocated cache: same keys and values as the cache of transformers, and not used where it does not apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicLayer

from finetuning.inference.kv_cache import GROWTH, PreallocatedLayer, preallocated_cache


def states(tokens: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4)


def test_keys_and_values_are_those_of_a_layer_that_copies() -> None:
    torch.manual_seed(0)
    ours, theirs = PreallocatedLayer(), DynamicLayer()
    for step, tokens in enumerate([5, *[1] * (2 * GROWTH), 3]):
        new_states = states(tokens)
        for left, right in zip(ours.update(*new_states), theirs.update(*new_states), strict=True):
            assert torch.equal(left, right), step
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
        lambda layer: layer.crop(-2),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 2, 0])),
        lambda layer: layer.reset(),
    ],
)
def test_what_is_done_to_a_layer_from_outside_is_kept(change: Any) -> None:
    torch.manual_seed(0)
    ours, theirs = PreallocatedLayer(), DynamicLayer()
    for layer_states in (states(5), states(1)):
        ours.update(*layer_states)
        theirs.update(*layer_states)
    change(ours)
    change(theirs)
    for _ in range(2):
        new_states = states(1)
        for left, right in zip(ours.update(*new_states), theirs.update(*new_states), strict=True):
            assert torch.equal(left, right)


def test_it_is_used_for_a_plain_model_and_an_adapter_on_it(tiny_llama_dir: Path) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    plain = GenerationConfig(max_new_tokens=4)
    cache = preallocated_cache(model, plain)
    assert cache is not None and len(cache.layers) == model.config.num_hidden_layers
    for left_alone in ({"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert preallocated_cache(model, GenerationConfig(max_new_tokens=4, **left_alone)) is None
    assert preallocated_cache(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")), plain) is not None
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert (
        preallocated_cache(get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), virtual), plain) is None
    )


def test_it_is_not_used_where_attention_slides() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=8, **sizes)
    assert preallocated_cache(MistralForCausalLM(config), GenerationConfig()) is None
    config = MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=None, **sizes)
    assert preallocated_cache(MistralForCausalLM(config), GenerationConfig()) is not None
