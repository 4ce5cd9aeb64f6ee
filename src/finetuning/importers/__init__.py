"""Translate configs of other engines. A new engine is one file in this package and one line here."""

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
