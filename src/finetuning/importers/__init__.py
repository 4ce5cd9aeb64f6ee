"""Translate configs of other engines to YAML. A new engine is one file in this package and one line here."""

from __future__ import annotations

from collections.abc import Callable

from finetuning.config.yaml.document import ConfigDocument
from finetuning.errors import ConfigError
from finetuning.importers.axolotl import from_axolotl
from finetuning.importers.fms.job import from_fms
from finetuning.importers.llama_factory import from_llama_factory
from finetuning.importers.translation import Translation
from finetuning.importers.trl import from_trl

ENGINES: dict[str, Callable[[ConfigDocument, int], Translation]] = {
    "fms-hf-tuning": from_fms,
    "axolotl": from_axolotl,
    "llama-factory": from_llama_factory,
    "trl": from_trl,
}
"""For each engine, the function that translates a config that was written for a number of processes."""

SECTION_ORDER = (
    "method",
    "data_conf",
    "batchsize_conf",
    "training_args",
    "peft_conf",
    "quant_conf",
    "run_conf",
    "sft_args",
)


def detect_engine(document: ConfigDocument) -> str:
    """Return the name of the engine that a config was written for, judging by its keys.

    Raises:
        ConfigError: the keys match no engine.
    """
    keys = set(document.values)
    if keys & {"training_data_path", "data_config_path"}:
        return "fms-hf-tuning"
    if "base_model" in keys:
        return "axolotl"
    if keys & {"finetuning_type", "stage", "cutoff_len"}:
        return "llama-factory"
    if keys & {"dataset_name", "datasets", "use_peft"} and "model_name_or_path" in keys:
        return "trl"
    raise ConfigError(
        f"{document.file}: cannot detect the engine from the keys",
        hint=f"Name it: --from {', '.join(ENGINES)}.",
    )


def to_yaml(translation: Translation, engine: str) -> str:
    """Return the YAML file, with a comment at the top that lists the notes."""
    import yaml

    method = translation.values.get("method", "sft")
    lines = [f"# Imported from {engine}. Run it: finetuning {method} THIS_FILE"]
    if translation.notes:
        notes = (" ".join(note.split()) for note in translation.notes)
        lines += ["# Not carried over, or different here:", *(f"# - {note}" for note in notes)]
    values = dict(sorted(translation.values.items(), key=_section_position))
    body = yaml.dump(values, Dumper=_make_dumper(), sort_keys=False, allow_unicode=True, width=110)
    return "\n".join(lines) + "\n\n" + body


def _section_position(item: tuple[str, object]) -> int:
    name, _ = item
    return SECTION_ORDER.index(name) if name in SECTION_ORDER else len(SECTION_ORDER)


def _make_dumper() -> type:
    """Return a dumper that writes newlines in text as \\n, as the templates of jobs contain them."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """A subclass, so that the representer is not added to PyYAML's own dumper."""

    def represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "\n" in value else None)

    Dumper.add_representer(str, represent_text)
    return Dumper
