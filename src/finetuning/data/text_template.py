"""A template with `{{field}}` and a row, to text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from finetuning.data.samples import json_type

_FIELD = re.compile(r"\{\{([^{}]*)\}\}")


class TextTemplateError(ValueError):
    """A row has not what the template asks for; the message says what."""


@dataclass(frozen=True)
class TextTemplate:
    """Fills in a template: what stands in braces is a column as it is written there, or without its outer spaces, or
    else a Jinja expression over the columns, in a sandbox; the row as a whole is `element`."""

    template: str

    def __call__(self, values: Mapping[str, Any], special_tokens: Mapping[str, str]) -> str:
        """The text.

        Raises:
            CannotFormat: a column is missing or holds no text, number or truth value, or the Jinja is refused.
        """
        if re.search(r"\{%|\{#", self.template):
            return self._render(self.template, values, special_tokens)
        return _FIELD.sub(lambda match: self._field(match.group(1), values, special_tokens), self.template)

    def _field(self, name: str, values: Mapping[str, Any], special_tokens: Mapping[str, str]) -> str:
        for key in (name, name.strip()):
            if key in values:
                return _to_text(key, values[key])
        return self._render("{{" + name + "}}", values, special_tokens)

    def _render(self, source: str, values: Mapping[str, Any], special_tokens: Mapping[str, str]) -> str:
        try:
            if source not in self._compiled:
                self._compiled[source] = self._environment.from_string(source)
            return self._compiled[source].render({**special_tokens, **values, "element": values})
        except (jinja2.TemplateSyntaxError, jinja2.UndefinedError) as error:
            found = ", ".join(values) or "none"
            raise TextTemplateError(
                f"the template asks for {source}, which is no column and no Jinja that can be worked out"
                f" ({error.message}); columns are: {found}"
            ) from None
        except SecurityError as error:
            raise TextTemplateError(f"the template asks for what it may not: {error}") from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise TextTemplateError(f"the template fails on this row: {error}") from None

    @cached_property
    def _environment(self) -> jinja2.Environment:
        return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)

    @cached_property
    def _compiled(self) -> dict[str, jinja2.Template]:
        return {}


def _to_text(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise TextTemplateError(f"{key}: expected text, got {json_type(value)}")
