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
