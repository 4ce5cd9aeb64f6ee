"""Read the config.json of a pretrained model before it is loaded, and find FlashAttention packages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from finetuning.errors import ModelError, read_json_object, reading


def read_pretrained_config(model: str) -> dict[str, object] | None:
    """Return the `config.json` of a model in a local folder; None if there is none or it is not valid JSON."""
    return _read(Path(model))


def find_pretrained_config(model: str, environ: Mapping[str, str] = os.environ) -> dict[str, object] | None:
    """Return a model's `config.json` from a local folder or from the Hub cache; None if neither has it."""
    if Path(model, "config.json").is_file():
        return read_pretrained_config(model)
    snapshot = _cached_snapshot(model, environ)
    return None if snapshot is None else _read(snapshot)


def pretrained_dtype(config: Mapping[str, object] | None) -> str | None:
    """Return the dtype of the weights that a `config.json` names, such as `bfloat16`; None if it names none."""
    for section in (config or {}, (config or {}).get("text_config")):
        if isinstance(section, dict):
            fields = cast("dict[str, object]", section)
            # Releases of transformers before 4.56 wrote `torch_dtype`.
            value = fields.get("dtype") or fields.get("torch_dtype")
            if isinstance(value, str):
                return value.removeprefix("torch.")
    return None


# Largest values, by the last word of a key: about a hundred times those of the largest models.
_MOST = {
    "layer": 10_000,
    "layers": 10_000,
    "blocks": 10_000,
    "experts": 100_000,
    "head": 100_000,
    "heads": 100_000,
    "labels": 1_000_000,
    "codebooks": 10_000,
    "size": 2**31,
    "dim": 2**31,
    "embd": 2**31,
    "model": 2**31,
    "ff": 2**31,
}


def find_excessive_size(config: Mapping[str, object], num_tensors: int | None = None) -> str | None:
    """Return what a `config.json` asks for that no machine could build, such as a billion layers; None if nothing.

    transformers creates a Python object for each layer, expert and label, before it looks at the weights.

    Args:
        num_tensors: how many tensors the weight files have, if known. Each layer has at least one of its own.
    """
    waiting: list[Mapping[str, object]] = [config]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(cast("dict[str, object]", value))
            most = _MOST.get(key.rpartition("_")[2])
            if most is None or not isinstance(value, int) or isinstance(value, bool):
                continue
            is_layers = most == _MOST["layers"] and "codebooks" not in key
            if num_tensors and is_layers and key.startswith(("num_", "n_")) and num_tensors < value <= most:
                return f"{key} is {value:,}, but the weight files hold {num_tensors:,} tensors"
            if value > most:
                return f"{key} is {value:,}, more than {most:,}"
    return None


def quantization_method(model: str) -> str | None:
    """Return the quantization method of a model in a local folder, such as `gptq`; None if it is not quantized."""
    config = read_pretrained_config(model) or {}
    quantization = config.get("quantization_config")
    method = cast("dict[str, object]", quantization).get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) else None


def _read(folder: Path) -> dict[str, object] | None:
    try:
        with reading(f"{folder / 'config.json'} cannot be read"):
            return read_json_object(folder / "config.json")
    except ModelError:
        return None


def _cached_snapshot(model: str, environ: Mapping[str, str]) -> Path | None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        return None
    try:
        home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface").expanduser()
        folder = Path(environ.get("HF_HUB_CACHE") or Path(home, "hub")) / f"models--{model.replace('/', '--')}"
        return folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: the user has no home directory.
        return None


@dataclass(frozen=True)
class FlashAttentionPackage:
    """The module to import, the distribution that contains it, and the command that installs it."""

    module: str
    distribution: str
    install: str

    @property
    def is_installed(self) -> bool:
        """Whether the distribution is installed. Two distributions share a module name, so the module is not
        checked."""
        try:
            return bool(version(self.distribution))
        except PackageNotFoundError:
            return False


FLASH_ATTENTION_PACKAGES = {
    "flash_attention_2": FlashAttentionPackage("flash_attn", "flash-attn", "pip install flash-attn"),
    "flash_attention_3": FlashAttentionPackage("flash_attn_interface", "flash-attn-3", "pip install flash-attn-3"),
    "flash_attention_4": FlashAttentionPackage("flash_attn", "flash-attn-4", "pip install flash-attn-4"),
}
"""By the names that transformers uses for `run_conf.model_args.attn_implementation`."""


def missing_attention_package(implementation: str | None) -> str | None:
    """Return the package that an attention implementation needs and that is not installed; None if none is missing.

    A name with a slash is a kernel on the Hub.
    """
    if implementation is None:
        return None
    if "/" in implementation:
        return "kernels" if find_spec("kernels") is None else None
    package = FLASH_ATTENTION_PACKAGES.get(implementation)
    return package.distribution if package is not None and not package.is_installed else None


NOT_REACHED_BY_TEXT = "modules that text does not reach"
_NOT_IN_ALL_LINEAR = (
    (re.compile(r"router"), "routers"),
    # Sparse attention chooses its tokens by them: no gradient reaches them.
    (re.compile(r"indexer"), "attention indexers"),
    # Decoders of encoder-decoder models have it, and there is no encoder here.
    (re.compile(r"encoder_attn"), "cross-attention"),
    # State-space layers read its weight and call it with no input, so that an adapter on it has no effect.
    (re.compile(r"dt_proj"), "state-space step projections"),
    (re.compile(r"vision|visual|image|audio|speech|multi_?modal"), NOT_REACHED_BY_TEXT),
)
"""Parts of module names, with what they are: linear layers that `target_modules: all-linear` leaves out."""
_EXPERT_ROUTER = re.compile(r"gate|shared_expert_gate")


def left_out_of_all_linear(name: str, *, has_experts: bool) -> str | None:
    """Return why `target_modules: all-linear` leaves out the linear layer of this name; None if it does not."""
    parts = name.split(".")
    if has_experts and any(_EXPERT_ROUTER.fullmatch(part) for part in parts):
        return "routers"
    return next((what for pattern, what in _NOT_IN_ALL_LINEAR if any(map(pattern.search, parts))), None)
