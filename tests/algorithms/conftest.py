"""What the algorithms that hold a policy against a reference have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest


@pytest.fixture
def with_wrong_reference() -> Callable[[Any], Any]:
    """A function that gives a method back with another model in the place of its reference."""
    import torch

    def disturbed(reference: Any) -> Any:
        with torch.no_grad():
            for weight in reference.parameters():
                weight.add_(torch.randn_like(weight) * 0.3)
        return reference

    def make(method: Any) -> Any:
        def build(parts: Any) -> Any:
            return method.build_trainer(replace(parts, load_reference=lambda: disturbed(parts.load_reference())))

        return replace(method, build_trainer=build)

    return make


@pytest.fixture
def move_base_into_adapter() -> Callable[[Any], None]:
    """A function that initializes the LoRA of a trainer as PiSSA does: what it adds is subtracted from the base."""
    import torch

    @torch.no_grad()
    def move(trainer: Any) -> None:
        for module in trainer.model.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight.normal_(std=0.1)
                module.get_base_layer().weight -= module.get_delta_weight("default")

    return move
