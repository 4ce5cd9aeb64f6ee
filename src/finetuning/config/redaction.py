"""What may be shown of a value that the user wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable

from finetuning.config.yaml.document import YamlValue

_SECRET_KEY = re.compile(
    r"(?:^|[_.-])(?:token|tokens|password|passwd|pwd|secret|api_?key|access_?key|private_?key|credentials?|authorization)$",
    re.IGNORECASE,
)
# Tokens of the vocabulary, and counts of them.
_VOCABULARY_KEY = re.compile(
    r"^(?:eos|bos|add_eos|pad|unk|sep|cls|mask|eot|image|audio|video|virtual|extra_special|special|new|max_new|min_new|"
    r"new_special|max|min|num|num_virtual|num_frozen|num_assistant|prompt_lookup_num|suppress|begin_suppress|"
    r"alora_invocation|flops_per)_tokens?$",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"(\w+://)[^/\s@]*@")
_KEY = re.compile(r"([\w.-]+)[\"']?\s*:")
_LONGEST = 60


def is_secret_key(key: object) -> bool:
    """Whether a key of this name is likely to hold a secret.

    >>> is_secret_key("hub_token"), is_secret_key("eos_token"), is_secret_key("max_new_tokens")
    (True, False, False)
    """
    return isinstance(key, str) and bool(_SECRET_KEY.search(key)) and not _VOCABULARY_KEY.match(key)


def is_secret_path(path: Iterable[object]) -> bool:
    """Whether a value at this path must never be shown."""
    return any(is_secret_key(part) for part in path)


def strip_user_info(text: str) -> str:
    """The text with `user:password@` taken out of every address in it.

    >>> strip_user_info("http://me:pw@host/x")
    'http://…@host/x'
    """
    return _USER_INFO.sub(r"\1…@", text)


def redact_line(line: str) -> str:
    """A line of a config with what follows each secret-looking key taken out.

    >>> redact_line("a: {token: hf_x, b: 1")
    'a: {token: …'
    """
    for match in _KEY.finditer(line):
        if is_secret_key(match.group(1)):
            return line[: match.end()] + " …"
    return strip_user_info(line)


def redact(value: object, path: Iterable[object] = ()) -> str | None:
    """A value in a few characters, for a message; None where it must not be shown or is too large to help."""
    if is_secret_path(path):
        return None
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = strip_user_info(value)
        return f'"{text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"}"'
    if isinstance(value, int | float):
        text = str(value)
        return text if len(text) <= _LONGEST else None
    if isinstance(value, list):
        return "a list"
    return "keys and values" if isinstance(value, dict) else None


def drop_secrets(value: YamlValue) -> YamlValue:
    """The same plain values, but without any key that is likely to hold a secret."""
    if isinstance(value, dict):
        return {key: drop_secrets(item) for key, item in value.items() if not is_secret_key(key)}
    if isinstance(value, list):
        return [drop_secrets(item) for item in value]
    return value
