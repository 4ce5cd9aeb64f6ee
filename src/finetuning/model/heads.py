"""What stands on a model's last layer: the vocabulary, or one score."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """A kind of model: the class that loads it, and which weights another kind's checkpoint lacks or has too many."""

    auto_class: str
    """Name of the class of transformers that loads it."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields that its config must have."""
    new: str | None = None
    """Pattern of the names of weights that start at zero when the checkpoint has none."""
    unused: str | None = None
    """Pattern of the names of weights that another head needs and this one does not."""

    @property
    def loader(self) -> Any:
        return getattr(transformers, self.auto_class)

    def missing(self, names: Sequence[str]) -> list[str]:
        """The weights, of those that a checkpoint lacks, that cannot be made here."""
        return [name for name in names if self.new is None or not re.fullmatch(self.new, name)]

    def unexpected(self, names: Sequence[str]) -> list[str]:
        """The weights, of those that have no place, that are worth a word."""
        return [name for name in names if self.unused is None or not re.match(self.unused, name)]

    def is_head(self, name: str) -> bool:
        """Whether a weight is one of the head, be the model bare or within an adapter that trains the head whole."""
        bare = re.sub(r"\.(modules_to_save\.\w+|original_module)(?=\.)", "", name)
        return self.new is not None and re.search(rf"(^|\.){self.new}$", bare) is not None

    def begin(self, model: PreTrainedModel, missing: Sequence[str]) -> bool:
        """Sets the weights that the checkpoint lacks to zero; True when there are any.

        Every score is then 0 at first, whatever the seed, so that the first loss is known.
        """
        made = [name for name in missing if self.new is not None and re.fullmatch(self.new, name)]
        with torch.no_grad():
            for name in made:
                model.get_parameter(name).zero_()
        return bool(made)


LANGUAGE = Head("AutoModelForCausalLM")
SCORE = Head(
    "AutoModelForSequenceClassification",
    fields={"num_labels": 1},
    new=r"(score|classifier)\.(weight|bias)",
    unused=r"(lm_head|output)\.",
)


def head_of(architectures: Sequence[str]) -> Head:
    """The head of a saved model, by the architectures that its config names."""
    return SCORE if any(name.endswith("ForSequenceClassification") for name in architectures) else LANGUAGE
