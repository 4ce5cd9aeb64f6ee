"""LLaMA-Factory's `dataset_info.json`: where a dataset is, and how its columns, messages and roles are called."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from finetuning.config.validation.suggestions import did_you_mean
from finetuning.errors import DataError, Location, Problem, parse_json
from finetuning.importers.translation import Translation, Values

FILE_NAME = "dataset_info.json"
_ONLINE = "ONLINE"
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
"""The columns that LLaMA-Factory reads where the entry names none."""
_CHATS = {"messages": "conversations"}
_OUR_NAMES = {
    **_ALPACA, "history": "history", "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected",
    "kto_tag": "kto_tag",
}  # fmt: skip
_MESSAGE_COLUMNS = ("messages", "conversations")
_MEDIA = ("images", "videos", "audios")
_ROLES = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
"""Per tag, LLaMA-Factory's default and our role of that meaning."""
_ENTRY_KEYS = {
    "file_name", "hf_hub_url", "formatting", "ranking", "columns", "tags", "subset", "split", "num_samples",
}  # fmt: skip


@dataclass(frozen=True)
class DatasetInfo:
    """The entries of a `dataset_info.json`."""

    path: Path
    entries: Values


def find_dataset_info(out: Translation) -> DatasetInfo | None:
    """Return the file that a config means: below `dataset_dir`, seen from here, the config's folder or one above it.

    LLaMA-Factory looks below its working directory only, which is usually one of these.
    """
    name = str(out.get("dataset_dir", "data"))
    config = Path(out.source.file or "").resolve().parent
    folders = [Path(name), *(Path(os.path.relpath(folder)) / name for folder in (config, *config.parents))]
    for folder in folders:
        path = folder / FILE_NAME
        if not path.is_file():
            continue
        try:
            entries: object = parse_json(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            out.problems.append(Problem(f"cannot be read: {error}", Location(file=str(path))))
            return None
        if isinstance(entries, dict):
            return DatasetInfo(path, cast("Values", entries))
        out.problems.append(Problem("expected an object with an entry per dataset", Location(file=str(path))))
        return None
    return None


def source_of(out: Translation, key: str, name: str, info: DatasetInfo | None, method: str) -> Values:
    """Return the dataset of our YAML for a name in a LLaMA-Factory config.

    Args:
        key: the key of the config that names the dataset.
        info: the file of the entries; without one the name stays, with a note.
        method: ours, which decides between the formats of an entry with columns for several.
    """
    if out.get("dataset_dir") == _ONLINE:
        return {"path": name}
    if info is None:
        out.add_note(key, f"{name} is a name of {FILE_NAME}, which was not found; replace it with the path of its file")
        return {"path": name}
    if not isinstance(entry := info.entries.get(name), dict):
        out.add_error(key, f"{name} is not in {info.path}", did_you_mean(name, sorted(info.entries)))
        return {"path": name}
    entry = cast("Values", entry)
    location = entry.get("hf_hub_url") or (info.path.parent / str(entry["file_name"]) if "file_name" in entry else None)
    if location is None:
        present = ", ".join(entry) or "nothing"
        out.add_error(key, f"{name} has neither file_name nor hf_hub_url in {info.path}, but {present}")
        return {"path": name}
    source: Values = {"path": str(location)}
    names = {"subset": "subset", "split": "split", "num_samples": "max_rows"}
    source |= {ours: entry[theirs] for theirs, ours in names.items() if entry.get(theirs)}
    for unknown in sorted(entry.keys() - _ENTRY_KEYS):
        out.add_note(key, f"{unknown} of {name} is not carried over: {entry[unknown]}")
    is_chat = entry.get("formatting", "alpaca") != "alpaca"
    source |= _columns(out, key, name, entry, source["path"], is_chat, method)
    return source | (_roles(entry) if is_chat else {})


def _columns(out: Translation, key: str, name: str, entry: Values, path: str, is_chat: bool, method: str) -> Values:
    """Return `format`, `columns` and `ignore_columns` of a dataset."""
    theirs: dict[str, str] = {k: v for k, v in (entry.get("columns") or {}).items() if v}
    if not theirs:
        theirs = dict(_CHATS if is_chat else _ALPACA)
        theirs |= {"chosen": "chosen", "rejected": "rejected"} if entry.get("ranking") else {}
    columns: dict[str, str] = {}
    used: set[str] = set()
    for column, theirs_name in theirs.items():
        if column == "images" and method == "sft":
            used.add(theirs_name)
            columns |= {theirs_name: column} if theirs_name != column else {}
            out.add_note(key, f"{name} has images: its rows are refused unless the model takes images")
        elif column in _MEDIA:
            out.add_note(key, f"{name} has {column}: its rows are refused unless ignore_columns names {theirs_name}")
        elif column == "messages":
            used.add(theirs_name)
            if theirs_name not in _MESSAGE_COLUMNS:
                columns[theirs_name] = "messages"
        elif column in _OUR_NAMES:
            used.add(theirs_name)
            if theirs_name != _OUR_NAMES[column]:
                columns[theirs_name] = _OUR_NAMES[column]
        else:
            out.add_note(key, f"the column {column} of {name} is not carried over")
    source: Values = {}
    if entry.get("ranking"):
        source["format"] = "chosen_rejected"
    elif "kto_tag" in theirs and method == "kto":
        source["format"] = "completion_label"
    elif method == "sft":
        source["format"] = "messages" if is_chat else "alpaca"
    if not is_chat and "query" in theirs:
        source["input_separator"] = "\n"
    if is_chat:
        message_column = theirs.get("messages", "conversations")
        columns |= _message_keys(message_column, entry)
    # What the entry does not name is not read there, and would be here.
    readable = {"system", "tools", *(_MESSAGE_COLUMNS if is_chat else (*_ALPACA.values(), "history"))}
    unnamed = (_first_columns(path) & readable) - used
    if unnamed:
        source["ignore_columns"] = sorted(unnamed)
    return ({"columns": columns} if columns else {}) | source


def _message_keys(column: str, entry: Values) -> dict[str, str]:
    """Return the keys of messages to rename, for tags that the format `messages` does not know."""
    tags: Mapping[str, str] = entry.get("tags") or {}
    keys = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    if keys in (("from", "value"), ("role", "content")):
        return {}
    return {f"{column}.{key}": ours for key, ours in zip(keys, ("role", "content"), strict=True) if key != ours}


def _roles(entry: Values) -> Values:
    """Return `roles` for the tags that differ from LLaMA-Factory's defaults and from ours."""
    tags: Mapping[str, str] = entry.get("tags") or {}
    roles = {
        tags[tag]: ours for tag, (default, ours) in _ROLES.items() if tags.get(tag) not in (None, "", default, ours)
    }
    return {"roles": roles} if roles else {}


def _first_columns(path: str) -> set[str]:
    """Return the columns of a file's first row; none if it cannot be read, which the run will say."""
    from finetuning.data.samples import Row
    from finetuning.data.sources import read_rows

    if not os.path.isfile(path):
        return set()
    try:
        first = next(read_rows(path), None)
    except DataError:
        return set()
    return set(first.values) if isinstance(first, Row) else set()
