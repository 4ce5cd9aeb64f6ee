"""The result of translating another engine's config, while it is collected."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from finetuning.config.validation.suggestions import did_you_mean
from finetuning.config.yaml.document import ConfigDocument, KeyPath, SourceSpan, YamlSection
from finetuning.errors import ConfigError, Problem

Values = dict[str, Any]
"""Part of a YAML file."""


@dataclass
class Translation:
    """The values of our YAML collected so far, with notes on what is lost and the errors of the source."""

    source: ConfigDocument
    values: Values = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Settings that are not carried over, or have a different meaning here."""
    problems: list[Problem] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    """For dotted keys of our YAML, the keys of the source that decide them."""

    def get(self, key: str | int, default: Any = None) -> Any:
        """Return the source's value, or the default if it is missing, null or an empty string."""
        value = self.source.values.get(key)
        return default if value is None or value == "" else value

    def has(self, key: str | int) -> bool:
        return self.get(key) is not None

    def put(self, path: str, value: Any, source: str | None = None) -> None:
        """Set a dotted key of our YAML; None leaves it unset.

        Args:
            source: the key of the source that decides it, if it has another name.
        """
        *sections, name = path.split(".")
        self.sources[path] = source or name
        if value is None:
            return
        inner = self.values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value

    def add_note(self, key: str, text: str) -> None:
        """Note that a key of the source is not carried over, or has a different meaning here."""
        self.notes.append(f"{key}: {text}")

    def add_error(self, key: str | int, message: str, hint: str | None = None) -> None:
        """Add an error about a key of the source; `finish` raises it."""
        self.problems.append(Problem(message, self.source.location_of((key,)), hint))

    def reject_unknown_keys(self, supported: Collection[str]) -> None:
        for key in self.source.values:
            if key not in supported:
                self.add_error(key, "unknown key", did_you_mean(str(key), sorted(supported)))

    def boolean(self, key: str, default: bool) -> bool:
        """Return a boolean, which jobs also write as text."""
        value = self.get(key, default)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            self.add_error(key, f"must be true or false, not {value!r}")
            return default
        return value

    def as_list(self, key: str) -> list[Any]:
        """Return a list; a single value is a list of one."""
        value = self.get(key, [])
        return list(value) if isinstance(value, list) else [value]

    def positive_int(self, key: str, default: int) -> int:
        """Return an integer of at least 1; 2.0 counts as 2."""
        value = self.get(key, default)
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value != int(value):
            self.add_error(key, f"must be a positive integer, not {value!r}")
            return default
        return int(value)

    def document(self) -> ConfigDocument:
        """Return our YAML as a document whose errors name the keys of the source, with their lines."""
        marks: dict[KeyPath, SourceSpan] = {
            tuple(path.split(".")): SourceSpan(source=self.source.location_of((key,)))
            for path, key in self.sources.items()
        }
        defaults = {tuple(path.split(".")) for path, key in self.sources.items() if not self.source.has((key,))}
        return ConfigDocument({**self.values}, marks, self.source.file, frozenset(defaults))

    def finish(self) -> Translation:
        """Return the translation itself.

        Raises:
            ConfigError: the source has errors; all of them are listed.
        """
        if self.problems:
            raise ConfigError(self.problems)
        return self


@dataclass(frozen=True)
class Readers:
    """What the translation of a job reads outside of the job itself."""

    data_config: Callable[[str], YamlSection]
    """Translates the data config at a path to the values of `data_conf`."""
    training_fields: Callable[[], Collection[str]] = frozenset
    """Returns the field names of the installed trainer's config class."""
