"""What the trainer has just done, as metrics and operations see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Event:
    """One event of the trainer. `extra` is what came with it: `metrics`, `logs`, `path`, `is_final`."""

    name: str
    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    extra: Mapping[str, Any] = field(default_factory=dict)
