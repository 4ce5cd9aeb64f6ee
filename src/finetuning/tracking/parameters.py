"""A resolved config as parameters of a tracker: flat, short and without secrets."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetuning.config.redaction import is_secret_key, without_secrets, without_user_info

LONGEST_VALUE = 6000
LONGEST_KEY = 250
_PACKAGES = ("finetuning", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def parameters(config: Mapping[str, Any], *, flatten: bool = True) -> dict[str, str]:
    """Text values by dotted keys, at most 6000 characters each; without `flatten`, one JSON text a section.

    Keys that look like secrets are left out, and user and password are taken out of addresses. The whole config goes
    to the tracker as a file; this is what its users sort and filter by.

    >>> parameters({"run_conf": {"model": "m", "token": "hf_x"}, "seeds": [1, 2]})
    {'run_conf.model': 'm', 'seeds': '[1, 2]'}
    """
    pairs = _leaves(config, ()) if flatten else without_secrets(dict(config)).items()
    return {str(key)[:LONGEST_KEY]: _cut(without_user_info(_text(value))) for key, value in pairs}


def version_tags() -> dict[str, str]:
    """The versions that a run depends on, as tags; nothing is imported for it."""
    tags = {"version.python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return tags


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            if not is_secret_key(key):
                yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    else:
        yield ".".join(path), value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, bytes)):
        return json.dumps(without_secrets(value), ensure_ascii=False, default=str)
    return str(value)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"
