from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import ValidatedConfig, validate
from finetuning.config.yaml.reader import parse_document
from finetuning.errors import ConfigError

SFT = """\
data_conf:
  training_data:
    type: CONCATENATION
    datasets:
      - path: train.jsonl
  validation_data:
    type: NONE
training_args:
  output_dir: out
batchsize_conf:
  total_train_batch_size: 16
  max_per_device_train_batch_size: 4
peft_conf:
  peft_type: NO_PEFT
"""


@pytest.fixture
def sft_text() -> str:
    """A small SFT config that is right."""
    return SFT


@pytest.fixture
def check() -> Callable[..., ValidatedConfig[Any]]:
    """Validates the text of a config, called `config.yaml`, for a method."""

    def run(text: str, method: str = "sft") -> ValidatedConfig[Any]:
        return validate(parse_document(text, "config.yaml"), EXPERIMENTS[method])

    return run


@pytest.fixture
def messages(check: Callable[..., ValidatedConfig[Any]]) -> Callable[..., list[str]]:
    """The problems of a config that is wrong, as lines."""

    def run(text: str, method: str = "sft") -> list[str]:
        with pytest.raises(ConfigError) as caught:
            check(text, method)
        return [str(problem) for problem in caught.value.problems]

    return run


@pytest.fixture
def changed() -> Callable[..., str]:
    """The small SFT config with sections replaced or added, given as YAML lines."""

    def run(**sections: str) -> str:
        kept, name = [], ""
        for line in SFT.splitlines():
            name = line.split(":")[0] if not line.startswith(" ") else name
            if name not in sections:
                kept.append(line)
        for section, body in sections.items():
            kept.append(f"{section}:{' ' + body if chr(10) not in body else ''}")
            if "\n" in body:
                kept.extend(f"  {line}" for line in body.strip("\n").splitlines())
        return "\n".join(kept) + "\n"

    return run
