"""LoRA under autocast: inputs are not cast to float32 and back, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from finetuning.trainer.peft_methods import without_input_casts

IDS = torch.arange(64).view(2, 32) % 61


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).bfloat16()
    return get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    ).train()


class CastCounter(TorchDispatchMode):
    """Counts copies of tensors into float32."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.float32
        return func(*args, **(kwargs or {}))


def step(model: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    model.zero_grad()
    counter = CastCounter()
    with counter, torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return loss.detach(), torch.cat(gradients), counter.count


def test_the_step_is_the_same_bit_for_bit_with_fewer_copies() -> None:
    model = adapted()
    loss, gradients, copies = step(model)
    with without_input_casts(model):
        leaner = step(model)
    assert torch.equal(leaner[0], loss)
    assert torch.equal(leaner[1], gradients)
    # One for each of the seven adapted layers of both decoder layers, and those of the backward pass.
    assert copies - leaner[2] >= 14
    assert step(model)[2] == copies


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "DoRA"])
def test_layers_that_compute_more_with_their_input_keep_the_cast(options: dict[str, Any]) -> None:
    model = adapted(**options)
    with without_input_casts(model):
        layers = [module for module in model.modules() if hasattr(module, "cast_input_dtype_enabled")]
        assert layers
        assert all(layer.cast_input_dtype_enabled for layer in layers)
