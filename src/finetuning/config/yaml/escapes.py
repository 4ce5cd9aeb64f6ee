"""Written-out escapes in templates of one line."""

from __future__ import annotations

import re

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def unescape(template: str) -> str:
    r"""A template of one line with written-out escapes as what they stand for, and nothing else touched.

    One of several lines has its line breaks already, and stays as it is.

    >>> unescape("\\n### Réponse:")
    '\n### Réponse:'
    """
    if "\n" in template:
        return template
    return re.sub(r"\\[ntr\\]", lambda match: _ESCAPES[match.group()], template)
