"""What goes along with merged weights: config, generation config, tokenizer, chat template, processor, own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetuning.errors import ModelError
from finetuning.export.inputs import BaseModel, read_json

_TOKENIZER_MARKS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
_TOKENIZER_FILES = (
    *_TOKENIZER_MARKS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.txt",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
    "tokenization_*.py",
)
_TEMPLATE_FOLDER = "additional_chat_templates"
_MODEL_FILES = (
    "*processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "*processing_*.py",
    "LICENSE*",
    "NOTICE*",
)
_GENERATION_CONFIG = "generation_config.json"


def select_tokenizer_folder(given: Path | None, adapters: Iterable[Path], base: Path) -> Path | None:
    """Whose tokenizer goes along: the one given, or the last adapter's that has one, or the base's."""
    candidates = [given] if given is not None else [*reversed(list(adapters)), base]
    return next((folder for folder in candidates if any((folder / name).is_file() for name in _TOKENIZER_MARKS)), None)


def write_auxiliary_files(
    out: Path,
    base: BaseModel,
    adapters: Iterable[Path],
    tokenizer: Path | None,
    config_changes: Mapping[str, Any] | None,
    num_rows: int | None,
) -> None:
    """Copies everything but the weights into `out`; config.json with the changes, or not at all where they are None.

    `num_rows`: rows of the input embeddings.

    Raises:
        ModelError: the tokenizer knows more ids than the embeddings have rows.
    """
    _copy(base.folder, out, _MODEL_FILES)
    if config_changes is not None:
        write_config(base, out, config_changes)
    # The generation config beside an adapter was written with its stop tokens; the base's may not know them.
    for folder in (*reversed(list(adapters)), base.folder):
        if (folder / _GENERATION_CONFIG).is_file():
            shutil.copyfile(folder / _GENERATION_CONFIG, out / _GENERATION_CONFIG)
            break
    if tokenizer is not None:
        copy_tokenizer(tokenizer, out)
        largest = max_token_id(tokenizer)
        if num_rows is not None and largest is not None and largest >= num_rows:
            raise ModelError(
                f"the tokenizer in {tokenizer} has ids up to {largest}, and the model only {num_rows} embedding rows.",
                hint="Name the tokenizer that belongs to the model with --tokenizer.",
            )


def write_config(base: BaseModel, out: Path, changes: Mapping[str, Any]) -> None:
    """config.json of the base, with changes where it has the keys, in the language model's part and outside."""
    config = dict(base.config)
    if changes:
        inner = config.get("text_config")
        if isinstance(inner, Mapping):
            config["text_config"] = {**inner, **{k: v for k, v in changes.items() if k in inner}}
            changes = {k: v for k, v in changes.items() if k in config or k == "tie_word_embeddings"}
        config.update(changes)
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies the files of a tokenizer byte by byte."""
    _copy(source, out, _TOKENIZER_FILES)
    if (source / _TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / _TEMPLATE_FOLDER, out / _TEMPLATE_FOLDER, dirs_exist_ok=True)


def max_token_id(tokenizer: Path) -> int | None:
    """The largest token id of a tokenizer.json; None where there is none to look at."""
    file = tokenizer / "tokenizer.json"
    if not file.is_file():
        return None
    content = read_json(file)
    vocabulary = (content.get("model") or {}).get("vocab")
    ids = [token["id"] for token in content.get("added_tokens") or ()]
    if isinstance(vocabulary, Mapping):
        ids += vocabulary.values()
    elif isinstance(vocabulary, list):
        ids.append(len(vocabulary) - 1)
    return max(ids, default=None)


def _copy(source: Path, out: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
