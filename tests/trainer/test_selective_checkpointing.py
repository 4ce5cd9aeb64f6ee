"""Selective checkpointing: the losses and gradients of no checkpointing, and memory between none and full."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetuning.trainer.selective_checkpointing import selective_kwargs

FULL = {"use_reentrant": False}


@pytest.fixture(scope="module")
def model() -> Any:
    """Two layers that are wide enough for their products to be kept."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=4, **sizes))


def step(model: Any, kwargs: dict[str, object] | None, autocast: bool) -> tuple[float, torch.Tensor, int]:
    """Return the loss, the gradients and the peak of what torch's allocator has given out."""
    model = copy.deepcopy(model).train()
    if kwargs is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    ids = torch.arange(512).view(4, 128) % 251
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    kineto: Any = profiler.profiler
    current = peak = 0
    for event in sorted(kineto.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return loss.item(), torch.cat([weight.grad.flatten() for weight in model.parameters()]), peak


@pytest.mark.parametrize("autocast", [False, True])
def test_only_memory_changes(model: Any, autocast: bool) -> None:
    kwargs = selective_kwargs({"preserve_rng_state": True})
    loss, gradients, most = step(model, None, autocast)
    selective_loss, selective_gradients, peak = step(model, kwargs, autocast)
    _, _, least = step(model, FULL, autocast)
    assert selective_loss == loss
    torch.testing.assert_close(selective_gradients, gradients)
    assert least < peak < most


def test_the_arguments_can_be_saved_with_a_checkpoint() -> None:
    kwargs = pickle.loads(pickle.dumps(selective_kwargs({"preserve_rng_state": False})))
    assert kwargs["preserve_rng_state"] is False
    assert kwargs["use_reentrant"] is False
