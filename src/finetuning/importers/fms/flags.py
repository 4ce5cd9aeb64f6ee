"""Read the flags of fms-hf-tuning's `tuning/sft_trainer.py` as a job: every key of a JSON job is a flag.

The grammar is that of transformers' HfArgumentParser: `--key value`, `--key=value`, several values for a list, a flag
alone for true, `--no_key` for false, hyphens for underscores, and the beginning of a key that no other key begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from finetuning.config.yaml.document import ConfigDocument, KeyPath, SourceSpan, YamlSection, YamlValue
from finetuning.errors import ConfigError, Location, Problem, parse_json
from finetuning.importers.fms.keys import ACCELERATION, SUPPORTED

LISTS = ACCELERATION | {
    "target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern", "trackers",
    "add_special_tokens", "report_to", "label_names", "trainable_token_indices", "target_parameters", "allow_changed",
}  # fmt: skip
"""Keys whose flags take several values."""


@dataclass
class _Flag:
    """A flag as it was written, and its values."""

    written: str
    key: str
    values: list[str] = field(default_factory=list[str])


def read_flags(arguments: Sequence[str]) -> tuple[ConfigDocument, list[str]]:
    """Return the flags as a job whose errors name the flags, and notes on flags that were misspelled.

    Values stay texts; the translation of a job reads numbers and booleans from them.

    Raises:
        ConfigError: an argument belongs to no flag, or a flag has several values that takes one.
    """
    flags, problems = _split(arguments)
    # Jobs without a flag name it as well: it is required, or its default does not fit the others.
    marks: dict[KeyPath, SourceSpan] = {(key,): _mark(f"--{key}") for key in SUPPORTED}
    values: YamlSection = {}
    notes: list[str] = []
    for flag in flags:
        marks[(flag.key,)] = _mark(flag.written)
        try:
            values[flag.key] = _value(flag)
        except ValueError as error:
            problems.append(Problem(str(error), Location(key=flag.written)))
        if flag.written.replace("-", "_") not in (f"__{flag.key}", f"__no_{flag.key}"):
            notes.append(f"{flag.written}: read as --{flag.key}")
    if problems:
        raise ConfigError(problems)
    return ConfigDocument(values, marks), notes


def _mark(flag: str) -> SourceSpan:
    return SourceSpan(source=Location(key=flag))


def _split(arguments: Sequence[str]) -> tuple[list[_Flag], list[Problem]]:
    flags: list[_Flag] = []
    problems: list[Problem] = []
    for argument in arguments:
        if argument.startswith("--"):
            written, has_value, value = argument.partition("=")
            # fms-hf-tuning's own examples have `---learning_rate` and `--data_formatter_template:`.
            key = written.strip("-").rstrip(":").replace("-", "_")
            flags.append(_Flag(written, key, [value] if has_value else []))
        elif flags:
            flags[-1].values.append(argument)
        else:
            problems.append(Problem(f'"{argument}" belongs to no flag', hint="Flags begin with --."))
    for flag in flags:
        if flag.key in SUPPORTED:
            continue
        if flag.key.startswith("no_") and not flag.values:
            flag.key, flag.values = flag.key.removeprefix("no_"), ["false"]
        else:
            flag.key = _completed(flag.key)
    return flags, problems


def _completed(key: str) -> str:
    """Return the one key that begins like this, as argparse does; the key itself if there is none, or several."""
    candidates = [name for name in SUPPORTED if name.startswith(key)]
    return candidates[0] if key and len(candidates) == 1 else key


def _value(flag: _Flag) -> YamlValue:
    if flag.key in LISTS:
        return [*flag.values]
    if not flag.values:
        return True
    if len(flag.values) > 1:
        raise ValueError(f"takes one value, not {len(flag.values)}; put it in quotes")
    [text] = flag.values
    if not text.startswith("{") or flag.key == "exp_metadata" or flag.key.endswith("template"):
        return text
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from None
