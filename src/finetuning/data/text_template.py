"""Templates that make one text of the columns of a row: `{{column}}`, or any Jinja."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import jinja2
from jinja2 import meta
from jinja2.exceptions import SecurityError

from finetuning.data.samples import json_type
from finetuning.errors import is_input_error
from finetuning.templates import LimitedEnvironment

_FIELD = re.compile(r"\{\{([^{}]*)\}\}")


class TextTemplateError(ValueError):
    """A template cannot be rendered for a row; the message says why."""


@dataclass(frozen=True)
class TextTemplate:
    """Renders a template for rows.

    `{{...}}` is first looked up as the name of a column, which may have spaces, and else evaluated as Jinja in a
    sandbox. Jinja also sees the whole row as `element`, as in fms-hf-tuning. A template with `{%` or `{#`, or with `{{`
    outside of such an expression, is Jinja as a whole.

    Raises:
        TextTemplateError: the template is not valid: a brace is not closed, for example.
    """

    template: str

    def __post_init__(self) -> None:
        if self._is_jinja:
            try:
                self._compile(self.template)
            except (jinja2.TemplateSyntaxError, RecursionError) as error:
                raise TextTemplateError(f"the template is not valid: {error}: {self.template!r}") from None

    @cached_property
    def _is_jinja(self) -> bool:
        return re.search(r"\{%|\{#", self.template) is not None or "{{" in _FIELD.sub("", self.template)

    def __call__(self, values: Mapping[str, object], special_tokens: Mapping[str, str]) -> str:
        """Return the text of a row.

        Raises:
            TextTemplateError: a column is missing or is not text, number or boolean, or the Jinja fails.
        """
        if self._is_jinja:
            return self._render(self.template, values, special_tokens)
        return _FIELD.sub(lambda match: self._field(match.group(1), values, special_tokens), self.template)

    def _field(self, name: str, values: Mapping[str, object], special_tokens: Mapping[str, str]) -> str:
        for key in (name, name.strip()):
            if key in values:
                return _to_text(key, values[key])
        return self._render("{{" + name + "}}", values, special_tokens)

    def _render(self, source: str, values: Mapping[str, object], special_tokens: Mapping[str, str]) -> str:
        try:
            if source not in self._compiled:
                self._compile(source)
            for name in self._names[source]:
                values.get(name)  # as read: see `ReadValues`
            variables = {**special_tokens, **values, "element": values}
            return self._environment.render(self._compiled[source], variables)
        except (jinja2.TemplateSyntaxError, jinja2.UndefinedError) as error:
            columns = ", ".join(values) or "none"
            raise TextTemplateError(
                f"the template has {source}, which is neither a column nor a Jinja expression that can be evaluated"
                f" ({error.message}); columns: {columns}"
            ) from None
        except SecurityError as error:
            raise TextTemplateError(f"the template uses something that the Jinja sandbox forbids: {error}") from None
        except BaseException as error:
            if is_input_error(error):
                raise TextTemplateError(f"the template failed on this row: {error}") from None
            raise

    def _compile(self, source: str) -> None:
        self._names[source] = meta.find_undeclared_variables(self._environment.parse(source))
        self._compiled[source] = self._environment.compiled(source)

    @cached_property
    def _environment(self) -> LimitedEnvironment:
        return LimitedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)

    @cached_property
    def _names(self) -> dict[str, set[str]]:
        """The variables that each template reads."""
        return {}

    @cached_property
    def _compiled(self) -> dict[str, jinja2.Template]:
        return {}


def _to_text(key: str, value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise TextTemplateError(f"{key}: expected text, got {json_type(value)}")
