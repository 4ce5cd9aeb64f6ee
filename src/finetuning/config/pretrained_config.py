"""What a model's own config says before the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def model_config(model: str) -> dict[str, Any] | None:
    """The `config.json` of a model in a local folder; None where it lies elsewhere, or cannot be read."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def quantised_by(model: str) -> str | None:
    """How a model in a local folder is quantised, such as `gptq`; None where it is not, or lies elsewhere."""
    quantisation = (model_config(model) or {}).get("quantization_config")
    return quantisation.get("quant_method") if isinstance(quantisation, dict) else None
