"""A YAML-configured, multi-algorithm LLM fine-tuning engine in which every run proves itself."""

from __future__ import annotations

__version__ = "0.1.0"
_FUNCTIONS = ("generate", "merge", "prepare", "run")


def __getattr__(name: str) -> object:
    """Return a function of `finetuning.api`, which is imported when it is first used: console scripts do without."""
    if name in _FUNCTIONS:
        import importlib

        return getattr(importlib.import_module("finetuning.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FUNCTIONS])
