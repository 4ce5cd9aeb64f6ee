"""What a model's own config says before the model is loaded.

The attention implementations that a package of their own computes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def read_pretrained_config(model: str) -> dict[str, Any] | None:
    """The `config.json` of a model in a local folder; None where it lies elsewhere, or cannot be read."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def quantization_method(model: str) -> str | None:
    """How a model in a local folder is quantised, such as `gptq`; None where it is not, or lies elsewhere."""
    quantisation = (read_pretrained_config(model) or {}).get("quantization_config")
    return quantisation.get("quant_method") if isinstance(quantisation, dict) else None


@dataclass(frozen=True)
class FlashPackage:
    """What is imported, the distribution that holds it, and the line that installs it."""

    module: str
    distribution: str
    install: str

    @property
    def is_installed(self) -> bool:
        """By its distribution: two of them hold a module of one name."""
        try:
            return bool(version(self.distribution))
        except PackageNotFoundError:
            return False


FLASH = {
    "flash_attention_2": FlashPackage("flash_attn", "flash-attn", "pip install 'finetuning[flash-attention]'"),
    "flash_attention_3": FlashPackage("flash_attn_interface", "flash-attn-3", "pip install flash-attn-3"),
    "flash_attention_4": FlashPackage("flash_attn", "flash-attn-4", "pip install flash-attn-4"),
}
"""By transformers' names for `run_conf.model_args.attn_implementation`."""
