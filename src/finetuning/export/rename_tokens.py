"""Rename tokens of a tokenizer; their ids stay (the command `replace_tokens`)."""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.atomic_io import atomic_directory
from finetuning.errors import ConfigError, ModelError, Problem, read_json_object, reading
from finetuning.export.inputs import read_json, resolve_folder

TOKENIZER = "tokenizer.json"
# Keys whose values are part of the file format, never tokens.
_FORMAT_KEYS = frozenset({"type", "version", "behavior", "direction", "strategy", "padding_side", "tokenizer_class"})
_TEMPLATE_KEYS = frozenset({"chat_template", "template"})
# Weights, and the vocabularies of slow tokenizers, which would bring the old names back.
_SKIPPED_SUFFIXES = (".model", ".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class RenamedTokens:
    """The renamed tokens, and the files that were not copied."""

    ids: Mapping[str, int]
    """Ids by new name."""
    skipped_files: tuple[str, ...]


def replace_tokens(source: str, out: Path, renames: Mapping[str, str], *, keep_template: bool = False) -> RenamedTokens:
    """Copy the tokenizer in `source` to `out`, with tokens renamed from old to new names all at once.

    The JSON files are changed in vocabulary, added and special tokens, post-processor and config. In chat templates the
    old names are replaced as text, unless `keep_template` is set.

    Raises:
        ModelError: an old name is not a token, a new name is a token already, or a new name would not be encoded to the
            old id.
        StorageError: `out` is not empty.
    """
    folder = resolve_folder(source, "tokenizer")
    if not (folder / TOKENIZER).is_file():
        raise ModelError(
            f"{folder} has no {TOKENIZER}.",
            hint="Load it with transformers' AutoTokenizer and save it once; that writes the file.",
        )
    content = read_json(folder / TOKENIZER)
    ids = _token_ids(content)
    _check_names(renames, ids, content)
    skipped_files: list[str] = []
    with atomic_directory(out) as staging:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = staging / file.relative_to(folder)
            if file.suffix in _SKIPPED_SUFFIXES:
                skipped_files.append(file.name)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".json":
                _write(target, _renamed_json(file, renames, ids, keep_template))
            elif file.suffix == ".jinja" and not keep_template:
                target.write_text(_rename_in_text(file.read_text(encoding="utf-8"), renames), encoding="utf-8")
            else:
                shutil.copyfile(file, target)
        _check_encoding(staging / TOKENIZER, renames, ids)
    return RenamedTokens({new: ids[old] for old, new in renames.items()}, tuple(skipped_files))


def pair_token_names(old: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """Return the new names by old name; pairs of equal names are dropped.

    Raises:
        ConfigError: the lists have different lengths, or a name is empty or occurs twice.
    """
    if len(old) != len(new):
        raise ConfigError(f"--from has {len(old)} names, but --to has {len(new)}; each old name needs a new one")
    for option, names in (("--from", old), ("--to", new)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{option} names {', '.join(map(repr, twice))} twice")
        if "" in names:
            raise ConfigError(f"{option} has an empty name")
    return {before: after for before, after in zip(old, new, strict=True) if before != after}


def _token_ids(content: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens") or ()}}


def _check_names(renames: Mapping[str, str], ids: Mapping[str, int], content: Mapping[str, Any]) -> None:
    """Raise ModelError with all invalid names."""
    problems: list[Problem] = []
    merged = _pieces_of_merges(content)
    added = {token["content"] for token in content.get("added_tokens") or ()}
    for old, new in renames.items():
        if old not in ids:
            near = difflib.get_close_matches(old, list(ids), n=1, cutoff=0.5)
            problems.append(Problem(f"there is no token {old!r}", hint=f"Did you mean {near[0]!r}?" if near else None))
        elif old in merged and old not in added:
            problems.append(
                Problem(f"{old!r} is the result of a BPE merge: renaming it would break the encoding of text")
            )
        if new in ids and new not in renames:
            problems.append(Problem(f"{new!r} is already a token (id {ids[new]})", hint="Choose another name."))
    if problems:
        raise ModelError(problems)


def _pieces_of_merges(content: Mapping[str, Any]) -> set[str]:
    pieces: set[str] = set()
    for merge in (content.get("model") or {}).get("merges") or ():
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        pieces |= {left, right, left + right}
    return pieces


def _renamed_json(file: Path, renames: Mapping[str, str], ids: Mapping[str, int], keep_template: bool) -> object:
    with reading(f"{file} cannot be read"):
        content = read_json_object(file)
    if file.name == TOKENIZER:
        content = _renamed_tokenizer(content, renames, ids)
    elif file.name in ("vocab.json", "added_tokens.json"):
        content = {renames.get(key, key): value for key, value in content.items()}
    elif file.name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json"):
        content = _rename_in_json(content, renames, keep_template)
    return content


def _renamed_tokenizer(content: Mapping[str, Any], renames: Mapping[str, str], ids: Mapping[str, int]) -> object:
    model = dict(content.get("model") or {})
    vocabulary = model.pop("vocab", {})
    merges = model.pop("merges", None)
    renamed = _rename_in_json({**content, "model": model}, renames, keep_template=True)
    if isinstance(vocabulary, Mapping):
        renamed["model"]["vocab"] = {renames.get(piece, piece): index for piece, index in vocabulary.items()}
    else:
        renamed["model"]["vocab"] = [[renames.get(piece, piece), score] for piece, score in vocabulary]
    if merges is not None:
        renamed["model"]["merges"] = merges
    added = renamed.setdefault("added_tokens", [])
    existing = {token["content"] for token in added}
    # The model splits text before it looks up its vocabulary. Only an added token is matched as a whole.
    for old, new in renames.items():
        if new not in existing:
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
            added.append({"id": ids[old], "content": new, **flags})
    added.sort(key=lambda token: token["id"])
    return renamed


def _rename_in_json(value: object, renames: Mapping[str, str], keep_template: bool, key: str = "") -> Any:
    """Replace every string and key that equals an old name; in template texts, every occurrence."""
    if isinstance(value, dict):
        return {renames.get(k, k): _rename_in_json(v, renames, keep_template, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_rename_in_json(item, renames, keep_template, key) for item in value]
    if not isinstance(value, str) or key in _FORMAT_KEYS:
        return value
    if key in _TEMPLATE_KEYS:
        return value if keep_template else _rename_in_text(value, renames)
    return renames.get(value, value)


def _rename_in_text(text: str, renames: Mapping[str, str]) -> str:
    """Replace all old names in one pass, so that two names can be swapped."""
    parts = [text]
    for old in sorted(renames, key=len, reverse=True):
        # Parts at even indices are still to be searched, those at odd indices are new names.
        split: list[str] = []
        for index, part in enumerate(parts):
            if index % 2:
                split.append(part)
                continue
            pieces = part.split(old)
            for position, piece in enumerate(pieces):
                split += [piece] if position == len(pieces) - 1 else [piece, renames[old]]
        parts = split
    return "".join(parts)


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_encoding(file: Path, renames: Mapping[str, str], ids: Mapping[str, int]) -> None:
    """Raise ModelError if the new tokenizer does not encode a new name to the old id."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    for old, new in renames.items():
        encoded = tokenizer.encode(new, add_special_tokens=False).ids
        if encoded != [ids[old]]:
            raise ModelError(f"{new!r} would be encoded to {encoded}, not to {[ids[old]]}; choose another name")
