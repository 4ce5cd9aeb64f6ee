"""Suggest the right key or value for a misspelled or misplaced one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

# Keys of other engines and libraries, with the equivalent key.
_KEYS_OF_OTHER_ENGINES = {
    "lr": "training_args.learning_rate",
    "epochs": "training_args.num_train_epochs",
    "num_epochs": "training_args.num_train_epochs",
    "n_epochs": "training_args.num_train_epochs",
    "batch_size": "batchsize_conf.total_train_batch_size",
    "train_batch_size": "batchsize_conf.total_train_batch_size",
    "micro_batch_size": "batchsize_conf.max_per_device_train_batch_size",
    "model_name_or_path": "run_conf.model",
    "base_model": "run_conf.model",
    "model_name": "run_conf.model",
    "tokenizer_name_or_path": "run_conf.tokenizer",
    "sequence_len": "sft_args.max_seq_length",
    "cutoff_len": "sft_args.max_seq_length",
    "max_length": "sft_args.max_seq_length",
    "assistant_only_loss": "sft_args.train_on_completions_only",
    "completion_only_loss": "sft_args.train_on_completions_only",
    "chat_template": "data_conf.chat_template_name",
    "lora_r": "peft_conf.peft_kwargs.r",
    "lora_rank": "peft_conf.peft_kwargs.r",
    "rank": "peft_conf.peft_kwargs.r",
    "lora_alpha": "peft_conf.peft_kwargs.lora_alpha",
    "lora_dropout": "peft_conf.peft_kwargs.lora_dropout",
    "lora_target_modules": "peft_conf.peft_kwargs.target_modules",
    "trainer_controller_config_file": "trainer_controller",
    "tracking_uri": "tracking.mlflow_server_uri",
}
# Habits of other trainers that are no single key here.
_HABITS = {
    "early_stopping_patience": (
        "Early stopping is a trainer controller here: copy trainer_controller from"
        " `finetuning recipes show controllers/stop-on-plateau`, and set its patience."
    ),
    "compute_metrics": "Validation reports the loss; score answers with `generate --score` after the run.",
    "callbacks": "A trainer controller acts on events of the run: see trainer_controller.",
    "use_peft": "peft_conf.peft_type chooses the adapter: LORA, or NO_PEFT for all weights.",
    "adapter": "peft_conf.peft_type chooses the adapter: LORA, or NO_PEFT for all weights.",
    "dataset_name": "Datasets are listed in data_conf.training_data.datasets, each with its path.",
    "train_dataset": "Datasets are listed in data_conf.training_data.datasets, each with its path.",
    "eval_dataset": "Validation rows are set by data_conf.validation_data.",
    "gradient_accumulation_steps": (
        "It follows from batchsize_conf: total_train_batch_size / processes / max_per_device_train_batch_size."
    ),
    "per_device_train_batch_size": "Use batchsize_conf.max_per_device_train_batch_size and total_train_batch_size.",
}
_SAME_HABITS = {
    **dict.fromkeys(("early_stopping", "early_stopping_threshold", "patience"), "early_stopping_patience"),
    **dict.fromkeys(("dataset", "datasets", "train_file", "data_path", "dataset_path"), "dataset_name"),
}

_MANY = 8


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar candidate, or None if none is similar enough.

    >>> nearest("modl", ["model", "tokenizer"])
    'model'
    >>> nearest("lora", ["LORA", "LOHA"])
    'LORA'
    """
    plain: dict[str, str] = {}
    for candidate in candidates:
        plain.setdefault(_plain(candidate), candidate)
    plain_name = _plain(name[:100])
    if plain_name in plain:
        return plain[plain_name]
    matches = difflib.get_close_matches(plain_name, plain, n=1, cutoff=cutoff)
    return plain[matches[0]] if matches else None


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return `Did you mean "…"?`, or None if no candidate is similar."""
    match = nearest(name, candidates, cutoff)
    return f'Did you mean "{match}"?' if match is not None else None


def near_file(path: str | Path, *, folders_only: bool = False) -> str | None:
    """Return `Did you mean "…"?` with the file or folder of a similar name next to a missing one, or None."""
    folder, name = os.path.split(os.fspath(path).rstrip("/"))
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry in islice(entries, 1000) if entry.is_dir() or not folders_only]
    except OSError:
        return None
    # Without their extensions, which are alike for most files of a folder.
    stems = {Path(entry).stem: entry for entry in names if not entry.startswith(".")}
    match = nearest(Path(name).stem, stems)
    return None if match is None else f'Did you mean "{os.path.join(folder, stems[match])}"?'


def key_hint(name: str, siblings: Iterable[str], elsewhere: dict[str, list[str]]) -> str | None:
    """Return a hint for an unknown key: the nearest key of its section, or the section that has the key.

    Args:
        siblings: the keys of its section.
        elsewhere: the sections that have each key of the schema, as dotted paths; "" is the top level.
    """
    siblings = list(siblings)
    close = nearest(name, siblings, cutoff=0.85)
    if close is not None:
        return f'Did you mean "{close}"?'
    if name in elsewhere:
        return belongs_to(elsewhere[name])
    habit = _SAME_HABITS.get(name.lower(), name.lower())
    if habit in _HABITS:
        return _HABITS[habit]
    if name.lower() in _KEYS_OF_OTHER_ENGINES:
        full = _KEYS_OF_OTHER_ENGINES[name.lower()]
        section, _, key = full.rpartition(".")
        if key in siblings:
            return f'Did you mean "{key}"?'
        if section in elsewhere.get(key, ()):
            return f'Did you mean "{full}"?'
    hint = did_you_mean(name, siblings)
    if hint is None:
        match = nearest(name, elsewhere, cutoff=0.85)
        hint = None if match is None else f'Did you mean "{match}"? It {belongs_to(elsewhere[match])[3:]}'
    return hint


def belongs_to(sections: Sequence[str]) -> str:
    """Return `It belongs under …`.

    >>> belongs_to(["sft_args"])
    'It belongs under sft_args.'
    """
    named = [section or "the top level" for section in sections]
    if named == ["the top level"]:
        return "It belongs at the top level."
    return f"It belongs under {' or '.join(named)}."


def unknown_value(what: str, displayed: str | None, allowed: Sequence[str], hint: str | None) -> str:
    """Return `unknown …` with the allowed values, which are left out if there are many and the hint names the
    nearest."""
    named = f"unknown {what} {displayed}" if displayed else f"unknown {what}"
    return f"{named}." if hint and len(allowed) > _MANY else f"{named}; one of: {', '.join(allowed)}."


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
