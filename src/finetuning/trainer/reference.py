"""The frozen copy of an adapter, which a preference loss refers to where the run goes on with that adapter."""

from __future__ import annotations

from typing import Any

_TRAINED, _FROZEN = "default", "ref"


class WholeReference:
    """Stands next to the trainer, on its left: the copy holds all that the adapter holds.

    TRL copies what lies in layers of the adapter's name, and passes over tensors that bear the name themselves: the
    rows of trained tokens, or the vectors of IA3.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        complete_reference(self.model)


def complete_reference(model: Any) -> None:
    """Copies every tensor that is named after the adapter to the frozen copy, where there is one."""
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parent, _, last = name.rpartition(".")
        frozen = tensors.get(f"{parent}.{_FROZEN}") if last == _TRAINED else None
        if frozen is not None:
            frozen.data.copy_(tensor.data)
