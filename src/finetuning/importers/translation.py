"""What an import of another engine's job comes to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetuning.config.validation.suggestions import did_you_mean
from finetuning.config.yaml.document import ConfigDocument
from finetuning.errors import ConfigError, Problem

Values = dict[str, Any]


@dataclass(frozen=True)
class Readers:
    """What other packages know, and a job may ask for."""

    data_config: Callable[[str], Mapping[str, Any]]
    """Path of a data config: the values of `data_conf`."""
    training_fields: Callable[[], Collection[str]] = frozenset
    """Names of the installed trainer's fields."""


@dataclass
class Translation:
    """The values of our YAML as they are gathered, what could not be carried over, and what is wrong."""

    source: ConfigDocument
    values: Values = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """What the job says; the default also where it says null or nothing."""
        value = self.source.values.get(key)
        return default if value is None or value == "" else value

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def put(self, path: str, value: Any) -> None:
        """Sets a key of our YAML; nothing for None."""
        if value is None:
            return
        *sections, name = path.split(".")
        inner = self.values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value

    def note(self, key: str, text: str) -> None:
        """Something that is not carried over, or means something else here."""
        self.notes.append(f"{key}: {text}")

    def wrong(self, key: str, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(message, self.source.location_of((key,)), hint))

    def refuse_unknown(self, known: Collection[str]) -> None:
        for key in self.source.values:
            if key not in known:
                self.wrong(key, "unknown key", did_you_mean(str(key), sorted(known)))

    def truth(self, key: str, default: bool) -> bool:
        """A switch, which jobs also write as text."""
        value = self.get(key, default)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            self.wrong(key, f"must be true or false, not {value!r}")
            return default
        return value

    def items(self, key: str) -> list[Any]:
        """A list; one value counts as a list of it."""
        value = self.get(key, [])
        return list(value) if isinstance(value, list) else [value]

    def number(self, key: str, default: int) -> int:
        """A whole number from 1."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value != int(value):
            self.wrong(key, f"must be a whole number from 1, not {value!r}")
            return default
        return int(value)

    def finished(self) -> Translation:
        """Itself, when nothing is wrong.

        Raises:
            ConfigError: with everything that is.
        """
        if self.problems:
            raise ConfigError(self.problems)
        return self


def written(translation: Translation, engine: str, method: str) -> str:
    """The YAML, with what could not be carried over in comments on its top."""
    import yaml

    lines = [f"# Imported from a job of {engine}. Run it: finetuning {method} THIS_FILE"]
    if translation.notes:
        lines += ["# Not carried over, or different here:", *(f"# - {_one_line(note)}" for note in translation.notes)]
    body = yaml.dump(
        dict(_ordered(translation.values)), Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=110
    )
    return "\n".join(lines) + "\n\n" + body


def _dumper() -> type:
    """A dumper that shows line ends of a text as \\n, as the templates of jobs have them."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Ours, so that the library's own stays as it is."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "\n" in value else None)

    Dumper.add_representer(str, text)
    return Dumper


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _ordered(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    order = (
        "method",
        "data_conf",
        "batchsize_conf",
        "training_args",
        "peft_conf",
        "quant_conf",
        "run_conf",
        "sft_args",
    )
    return sorted(values.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
