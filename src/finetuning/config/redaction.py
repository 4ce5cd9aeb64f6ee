"""Redaction: what may be written or shown of a value that may hold a secret.

Everything that a run writes or prints goes through `redact_text` or `redact_values`. They remove

- what has a key that looks like one of a secret, at any depth;
- the values of environment variables that hold secrets, and of secret keys of the config, wherever they occur;
- user names and passwords in addresses, secrets in their queries, authorization headers, and well-known token formats.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TypeVar, cast
from urllib.parse import quote, quote_plus, unquote

PLACEHOLDER = "…"

_SECRET_KEY = re.compile(
    r"(?:^|[_.\s])(?:tokens?|passwords?|passwd|passphrase|pwd|pw|secrets?|credentials?|authorization|bearer|cookies?|pat|"
    r"headers|connection_?string|api_?keys?|(?:access|account|auth|client|encryption|license|master|private|secret|"
    r"service|session|shared|signing|ssh|storage|wandb)_?key(?:_?id)?)(?:_?\d{1,2})?$"
)
# Tokens of the vocabulary, and counts of them.
_VOCABULARY_KEY = re.compile(
    r"^(?:eos|bos|add_eos|pad|unk|sep|cls|mask|eot|eom|sos|boi|eoi|stop|start|end|image|audio|video|virtual|tool|think|"
    r"thinking|assistant|system|lang|language|decoder_start|forced_[be]os|extra_special|special|new|max|max_new|min_new|"
    r"new_special|min|num|num_virtual|num_frozen|num_assistant|prompt_lookup_num|suppress|begin_suppress|trained|seen|"
    r"alora_invocation|flops_per)_tokens?$"
)
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_ENVIRONMENT_NAME = re.compile(
    r"(?:^|_)(?:APIKEY|AUTH|CREDENTIALS?|KEY|PAT|SECRET|TOKEN)$|PASSWORD|PASSWD|PASSPHRASE|_KEY_ID$", re.IGNORECASE
)
_MIN_LENGTH, _MIN_DIGITS = 6, 8
"""Shorter values are not looked for in texts: they occur there by chance."""
_MIN_LINE_LENGTH = 16
"""Shorter secrets are looked for as whole words only, and shorter lines of a secret not at all."""
_NOT_SECRET = frozenset({"default", "disabled", "enabled", "optional", "required"})

# The second alternative is a password with characters that should have been quoted; it is no port.
_USER_INFO = re.compile(r"(\w://)(?:[^/\s?#\"'<>]*@|[^/\s:@\"'<>]+:(?!\d*(?:[/?#]|$))[^\s@\"'<>]*@)")
_PASSWORD = re.compile(r"\w://[^/\s?#\"'<>:@]*:([^/\s?#\"'<>]+)@")
_ASSIGNMENT = re.compile(r"(?<![\w.-])([\w.-]{1,80})=(\\?[\"']?)([^\s&#\"'<>;,)\]}\\]+)")
_QUERY = re.compile(
    r"([?&](?:auth|code|key|sig|signature|x-amz-(?:credential|signature))=)[^\s&#\"'<>;]+", re.IGNORECASE
)
_ENTRY = re.compile(r"(\\?[\"'])([\w.-]{1,80})\1\s*:\s*(\\?[\"'])(.+?)\3")
# After a blank alone, a scheme has to follow: "an authorization header" is text.
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|x-api-key)\b(\s*[^\w\s]\W{0,5}|\s{1,6}(?=(?:basic|bearer|digest|token)\s))"
    r"(?:(?:basic|bearer|digest|token)\s+)?[\w.~+/=-]{6,}",
    re.IGNORECASE,
)
# By a text that each contains: to look for that is much faster.
_FORMATS = {
    "earer ": r"\b[Bb]earer\s+[\w.~+/=-]{16,}",
    "hf_": r"\bhf_[A-Za-z0-9]{16,}",
    "github_pat_": r"\bgithub_pat_\w{20,}",
    "gh": r"\bgh[opsur]_[A-Za-z0-9]{20,}",
    "glpat-": r"\bglpat-[\w-]{16,}",
    "sk-": r"\bsk-[\w-]{20,}",
    "xox": r"\bxox[abprs]-[\w-]{10,}",
    "AKIA": r"\bAKIA[A-Z0-9]{16}\b",
    "ASIA": r"\bASIA[A-Z0-9]{16}\b",
    "eyJ": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+",
    " PRIVATE KEY-": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*-----|\Z)",
}
_KEY = re.compile(r"([\w.-]+)[\"']?\s*:")
_LONGEST = 60

_known_secrets: set[str] = set()
"""Secrets of this process's config. Kept here, like the environment's, because every writer has to know them."""


def is_secret_key(key: object) -> bool:
    """Whether a key of this name is likely to hold a secret.

    >>> is_secret_key("hub_token"), is_secret_key("apiKey"), is_secret_key("eos_token"), is_secret_key("max_new_tokens")
    (True, True, False, False)
    """
    if not isinstance(key, str):
        return False
    name = _CAMEL_CASE.sub("_", key).lower().replace("-", "_")
    return bool(_SECRET_KEY.search(name)) and not _VOCABULARY_KEY.match(name.rpartition(".")[2])


def is_secret_path(path: Iterable[object]) -> bool:
    """Whether a value at this path must never be shown."""
    return any(is_secret_key(part) for part in path)


def remember_secrets(values: object) -> None:
    """Redact the values of secret keys, and the passwords in addresses, in everything that this process writes."""
    _known_secrets.update(_secrets_in(values, is_secret=False))


def _secrets_in(value: object, *, is_secret: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[object, object]", value).items():
            yield from _secrets_in(item, is_secret=is_secret or is_secret_key(key))
    elif isinstance(value, list):
        for item in cast("list[object]", value):
            yield from _secrets_in(item, is_secret=is_secret)
    elif isinstance(value, str):
        passwords = [unquote(password) for password in _PASSWORD.findall(value)]
        yield from filter(_can_be_found, [*passwords, *([value] if is_secret else [])])
    elif is_secret and isinstance(value, int) and _can_be_found(str(value)):
        yield str(value)


def _can_be_found(text: str) -> bool:
    """Whether a secret is long enough to be looked for in texts."""
    return len(text) >= (_MIN_DIGITS if text.isdecimal() else _MIN_LENGTH) and text.lower() not in _NOT_SECRET


def _environment_secrets(environ: Mapping[str, str]) -> Iterator[str]:
    for name, value in environ.items():
        if _is_environment_secret(name):
            # A path is where a secret is kept. A secret may begin with a slash as well.
            if _can_be_found(value) and not (value.startswith("/") and os.path.exists(value)):
                yield value
        elif "://" in value:
            yield from filter(_can_be_found, (unquote(password) for password in _PASSWORD.findall(value)))


def _known_pattern(environ: Mapping[str, str]) -> re.Pattern[str] | None:
    secrets = frozenset([*_known_secrets, *_environment_secrets(environ)])
    return _pattern_of(secrets) if secrets else None


@lru_cache(maxsize=1024)
def _is_environment_secret(name: str) -> bool:
    return bool(_ENVIRONMENT_NAME.search(name)) and not _VOCABULARY_KEY.match(name.lower())


@lru_cache(maxsize=8)
def _pattern_of(secrets: frozenset[str]) -> re.Pattern[str]:
    """Return a pattern of the secrets as they are, and as JSON, HTML, Python and addresses spell them.

    A short secret is not looked for inside a longer word.
    """
    spellings: set[str] = set()
    for secret in secrets:
        lines = [line.strip() for line in secret.splitlines() if len(line.strip()) >= _MIN_LINE_LENGTH]
        for text in {secret, secret.strip(), *lines} - {""}:
            spellings |= {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1]}
            spellings |= {
                html.escape(text),
                html.escape(text, quote=False),
                quote(text),
                quote(text, ""),
                quote_plus(text),
            }
    long, short = (
        "|".join(
            re.escape(text)
            for text in sorted(spellings, key=len, reverse=True)
            if (len(text) < _MIN_LINE_LENGTH) is is_short
        )
        for is_short in (False, True)
    )
    return re.compile("|".join(filter(None, [long, short and f"(?<![A-Za-z0-9])(?:{short})(?![A-Za-z0-9])"])))


def redact_text(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the text with every secret in it replaced.

    >>> redact_text("http://me:pw@host/x?token=abc&lang=de", {})
    'http://…@host/x?token=…&lang=de'
    >>> redact_text("MY_TOKEN is s3cr3t-value", {"MY_TOKEN": "s3cr3t-value"})
    'MY_TOKEN is …'
    """
    return redact_texts([text], environ)[0]


def redact_texts(texts: Iterable[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the texts with every secret in them replaced; the environment is read once for all of them."""
    secrets = _known_pattern(environ)
    return [_redact_text(text, secrets) for text in texts]


def _redact_text(text: str, secrets: re.Pattern[str] | None) -> str:
    if secrets is not None:
        text = secrets.sub(PLACEHOLDER, text)
    if "://" in text:
        text = _QUERY.sub(rf"\1{PLACEHOLDER}", _USER_INFO.sub(rf"\1{PLACEHOLDER}@", text))
    if "=" in text:
        text = _ASSIGNMENT.sub(_without_value, text)
    if ":" in text:
        text = _HEADER.sub(rf"\1\2{PLACEHOLDER}", _ENTRY.sub(_without_entry, text))
    for part, pattern in _FORMATS.items():
        if part in text:
            text = re.sub(pattern, PLACEHOLDER, text)
    return text


def _without_value(match: re.Match[str]) -> str:
    key, quote_mark, _ = match.groups()
    return f"{key}={quote_mark}{PLACEHOLDER}" if _is_secret_name(key) else match.group()


def _without_entry(match: re.Match[str]) -> str:
    is_secret = _is_secret_name(match.group(2))
    return (
        match.group()[: match.start(4) - match.start()] + PLACEHOLDER + match.group(3) if is_secret else match.group()
    )


def _is_secret_name(key: str) -> bool:
    # In a text, `tokens` is a count.
    return is_secret_key(key) and not key.endswith("tokens")


_Value = TypeVar("_Value")


def redact_values(value: _Value) -> _Value:
    """Return the plain values without keys that are likely to hold a secret, and with every text redacted.

    >>> redact_values({"hub_token": "hf_x", "tokens": 12, "urls": ["http://me:pw@host"]})
    {'tokens': 12, 'urls': ['http://…@host']}
    """
    return cast("_Value", _redacted(value, _known_pattern(os.environ)))


def _redacted(value: object, secrets: re.Pattern[str] | None) -> object:
    if isinstance(value, str):
        return _redact_text(value, secrets)
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {key: _redacted(item, secrets) for key, item in items if not is_secret_key(key) or _is_count(key, item)}
    if isinstance(value, list):
        return [_redacted(item, secrets) for item in cast("list[object]", value)]
    if isinstance(value, tuple):
        return tuple(_redacted(item, secrets) for item in cast("tuple[object, ...]", value))
    return value


def _is_count(key: object, value: object) -> bool:
    """Whether a value is a number of tokens, or token ids."""
    numbers = cast("list[object]", value) if isinstance(value, list) else [value]
    return str(key).lower().endswith(("token", "tokens")) and all(isinstance(item, int | float) for item in numbers)


def redacted_json(value: object, **options: object) -> str:
    """Return redacted values as JSON; what JSON cannot represent becomes text. `options` are those of `json.dumps`."""
    arguments: dict[str, object] = {"default": lambda item: redact_text(str(item)), **options}  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    return json.dumps(redact_values(value), **arguments)  # pyright: ignore[reportArgumentType]


def redact_line(line: str) -> str:
    """A line of a config with what follows each secret-looking key taken out.

    >>> redact_line("a: {token: hf_x, b: 1")
    'a: {token: …'
    """
    for match in _KEY.finditer(line):
        if is_secret_key(match.group(1)):
            return line[: match.end()] + f" {PLACEHOLDER}"
    return redact_text(line)


def redact(value: object, path: Iterable[object] = ()) -> str | None:
    """A value in a few characters, for a message; None where it must not be shown or is too large to help."""
    if is_secret_path(path):
        return None
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = redact_text(value)
        return f'"{text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"}"'
    if isinstance(value, int | float):
        text = str(value)
        return text if len(text) <= _LONGEST else None
    if isinstance(value, list):
        return "a list"
    return "keys and values" if isinstance(value, dict) else None
