"""Copy the files that accompany the weights: configs, tokenizer, chat template, processor, custom code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from finetuning.errors import ModelError
from finetuning.export.inputs import BaseModel, read_json
from finetuning.model.safetensors_io import GENERATION_CONFIG

_TOKENIZER_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
_TOKENIZER_FILES = (
    *_TOKENIZER_VOCABULARIES,
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
_PROCESSOR_FILES = ("*processor_config.json",)
_MODEL_FILES = (
    *_PROCESSOR_FILES,
    "configuration_*.py",
    "modeling_*.py",
    "*processing_*.py",
    "LICENSE*",
    "NOTICE*",
)


def select_tokenizer_folder(requested: Path | None, adapters: Iterable[Path], base: Path) -> Path | None:
    """Return the folder to copy the tokenizer from: the requested one, the last adapter that has one, or the base."""
    candidates = [requested] if requested is not None else [*reversed(list(adapters)), base]
    return next(
        (folder for folder in candidates if any((folder / name).is_file() for name in _TOKENIZER_VOCABULARIES)), None
    )


def write_auxiliary_files(
    out: Path,
    base: BaseModel,
    adapters: Iterable[Path],
    tokenizer: Path | None,
    config_changes: Mapping[str, object] | None,
    num_rows: int | None,
) -> None:
    """Copy everything but the weights to `out`.

    Args:
        config_changes: fields to change in config.json; None if config.json is in `out` already.
        num_rows: rows of the input embeddings, if they are known.

    Raises:
        ModelError: the tokenizer has ids beyond the rows of the embeddings.
    """
    _copy(base.folder, out, _MODEL_FILES)
    # An adapter's processor has the sizes of images that it was trained with.
    for folder in adapters:
        _copy(folder, out, _PROCESSOR_FILES)
    if config_changes is not None:
        write_config(base, out, config_changes)
    # An adapter's generation config has the stop tokens it was trained with, which the base's may lack.
    for folder in (*reversed(list(adapters)), base.folder):
        if (folder / GENERATION_CONFIG).is_file():
            shutil.copyfile(folder / GENERATION_CONFIG, out / GENERATION_CONFIG)
            break
    if tokenizer is not None:
        copy_tokenizer(tokenizer, out)
        largest = max_token_id(tokenizer)
        if num_rows is not None and largest is not None and largest >= num_rows:
            raise ModelError(
                f"the tokenizer in {tokenizer} has ids up to {largest}, the model only {num_rows} embedding rows.",
                hint="Name the model's own tokenizer with --tokenizer.",
            )


def write_config(base: BaseModel, out: Path, changes: Mapping[str, object]) -> None:
    """Write the base's config.json with changes, in the text config of a multimodal model as well as at the top."""
    config = dict(base.config)
    if changes:
        inner = config.get("text_config")
        if isinstance(inner, Mapping):
            config["text_config"] = {**inner, **{k: v for k, v in changes.items() if k in inner}}
            changes = {k: v for k, v in changes.items() if k in config or k == "tie_word_embeddings"}
        config.update(changes)
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the files of a tokenizer unchanged."""
    _copy(source, out, _TOKENIZER_FILES)
    if (source / _TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / _TEMPLATE_FOLDER, out / _TEMPLATE_FOLDER, dirs_exist_ok=True)


def max_token_id(tokenizer: Path) -> int | None:
    """Return the largest token id in tokenizer.json; None if there is no such file."""
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
