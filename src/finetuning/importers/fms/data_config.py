"""A data config of fms-hf-tuning to `data_conf`."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetuning.config.validation.suggestions import did_you_mean
from finetuning.config.yaml.reader import read_document
from finetuning.data.sources.files import file_format
from finetuning.errors import ConfigError, Problem

_PROCESSOR = {
    "type", "seed", "streaming", "sampling_stopping_strategy", "chat_template", "chat_template_path",
    "chat_template_base64", "odm",
}  # fmt: skip
_DATASET = {
    "name", "data_paths", "builder", "sampling", "split", "shuffle", "dataset_split_name", "data_handlers",
}  # fmt: skip
_BUILDERS = {
    "json": (".json", ".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".md"),
}
"""What a builder reads, and how the names of such files end."""
_TOLERANCE = 1e-6
_SEED = 42


class _Reader:
    """Reads one document, and gathers what is wrong with it."""

    def __init__(self, document: Any):
        self._document = document
        self.problems: list[Problem] = []

    def wrong(self, path: Sequence[str | int], message: str) -> None:
        self.problems.append(Problem(message, self._document.location_of(tuple(path))))

    def check_keys(self, values: Mapping[str, Any], known: set[str], path: Sequence[str | int]) -> None:
        for key in values:
            if key not in known:
                hint = did_you_mean(str(key), sorted(known))
                self.wrong((*path, key), f"unknown key. {hint}" if hint else "unknown key")


def read_data_config(path: str | Path) -> dict[str, Any]:
    """The values of our `data_conf` for a data config file in YAML or JSON.

    Several datasets with `sampling` become a weighted mix, without a concatenation. `split` becomes each dataset's
    `train_ratio` and `validation_ratio`. Handlers are kept, with their arguments; so is `streaming`.

    Raises:
        ConfigError: with everything that is wrong in the file, or has no counterpart here.
    """
    document = read_document(path)
    reader = _Reader(document)
    values = document.values
    reader.check_keys(values, {"dataprocessor", "datasets"}, ())
    processor = values.get("dataprocessor") or {}
    datasets = values.get("datasets")
    if not isinstance(processor, dict):
        reader.wrong(("dataprocessor",), "must be keys and values")
        processor = {}
    if not isinstance(datasets, list) or not datasets or not all(isinstance(one, dict) for one in datasets):
        reader.wrong(("datasets",) if "datasets" in values else (), "datasets: needs at least one dataset")
        raise ConfigError(reader.problems)
    template = _processor(reader, processor, Path(path).parent)
    seed = processor.get("seed", _SEED)
    sources = [_dataset(reader, one, index) for index, one in enumerate(datasets)]
    weights = _weights(reader, datasets, sources)
    if reader.problems:
        raise ConfigError(reader.problems)
    training: dict[str, Any] = {"type": "CONCATENATION", "datasets": sources}
    if weights is not None:
        weighted = [{**source, "sampling_weight": weight} for source, weight in zip(sources, weights, strict=True)]
        stopping = processor.get("sampling_stopping_strategy", "all_exhausted")
        training = {"type": "PRECOMPUTE_WEIGHTED_MIX", "datasets": weighted, "seed": seed, "stopping": stopping}
    streamed = {"streaming": True, "shuffle_buffer": 1} if processor.get("streaming") else {}
    return {
        **_with_validation(training, seed, apart=bool(streamed)),
        "chat_template_name": "keep-original",
        **({"chat_template": template} if template else {}),
        **streamed,
    }


def _with_validation(training: dict[str, Any], seed: int, *, apart: bool) -> dict[str, Any]:
    """`training_data` and `validation_data`; `apart`: datasets that are all validation are no part of the first, as
    nothing can be split off a stream."""
    ratios = [source.get("validation_ratio", 0.0) for source in training["datasets"]]
    if not any(ratios):
        return {"training_data": training, "validation_data": {"type": "NONE"}}
    if not apart or set(ratios) - {0.0, 1.0}:
        return {"training_data": training, "validation_data": {"type": "FROM_DATASETS", "seed": seed}}
    held_out = [source for source in training["datasets"] if "validation_ratio" in source]
    validation = [
        {key: value for key, value in source.items() if key not in ("validation_ratio", "sampling_weight")}
        for source in held_out
    ]
    kept = [source for source in training["datasets"] if source not in held_out]
    return {
        "training_data": {**training, "datasets": kept},
        "validation_data": {"type": "CONCATENATION", "datasets": validation},
    }


def _processor(reader: _Reader, processor: Mapping[str, Any], folder: Path) -> str | None:
    """The chat template of the file, if any."""
    here = ("dataprocessor",)
    reader.check_keys(processor, _PROCESSOR, here)
    if processor.get("type", "default") != "default":
        reader.wrong((*here, "type"), f'"{processor["type"]}" is not supported; only "default" is')
    if processor.get("odm") is not None:
        reader.wrong((*here, "odm"), "online data mixing is not supported: weights stay as they are given")
    if not isinstance(processor.get("seed", _SEED), int):
        reader.wrong((*here, "seed"), "must be a whole number")
    strategy = processor.get("sampling_stopping_strategy", "all_exhausted")
    if strategy not in ("all_exhausted", "first_exhausted"):
        reader.wrong((*here, "sampling_stopping_strategy"), "must be all_exhausted or first_exhausted")
    given = [key for key in ("chat_template", "chat_template_path", "chat_template_base64") if processor.get(key)]
    if len(given) > 1:
        reader.wrong((*here, given[1]), f"is set, and so is {given[0]}; set one of them")
    if not given:
        return None
    value = str(processor[given[0]])
    try:
        if given[0] == "chat_template_path":
            path = Path(os.path.expandvars(value)).expanduser()
            # There it is looked for where the job runs; here beside the data config, too.
            return (path if path.is_file() else folder / path).read_text("utf-8")
        return base64.b64decode(value, validate=True).decode() if given[0] == "chat_template_base64" else value
    except OSError as error:
        reader.wrong((*here, given[0]), f"{value} cannot be read: {error.strerror}")
    except (binascii.Error, UnicodeDecodeError):
        reader.wrong((*here, given[0]), "is no base64 of UTF-8 text")
    return None


def _dataset(reader: _Reader, values: Mapping[str, Any], index: int) -> dict[str, Any]:
    here = ("datasets", index)
    reader.check_keys(values, _DATASET, here)
    paths = values.get("data_paths")
    if not isinstance(paths, list) or not paths or not all(isinstance(one, str) and one for one in paths):
        reader.wrong((*here, "data_paths") if "data_paths" in values else here, "data_paths: needs a list of paths")
        paths = ["missing"]
    source: dict[str, Any] = {"path": paths[0] if len(paths) == 1 else list(paths)}
    if values.get("dataset_split_name"):
        source["split"] = values["dataset_split_name"]
    _check_builder(reader, values.get("builder"), paths, (*here, "builder"))
    split = _split(reader, values.get("split"), (*here, "split"))
    if values.get("shuffle") is False and ("train_ratio" in split or 0 < split.get("validation_ratio", 0) < 1):
        reader.wrong((*here, "shuffle"), "splits are drawn at random; give the validation rows a file of their own")
    source |= split
    handlers = values.get("data_handlers") or []
    if handlers:
        source["handlers"] = [_handler(reader, one, (*here, "data_handlers", at)) for at, one in enumerate(handlers)]
    return source


def _check_builder(reader: _Reader, builder: Any, paths: Sequence[str], path: Sequence[str | int]) -> None:
    """Nothing, when the files are read as what the builder takes them for: here their names tell it."""
    if builder is None:
        return
    if builder not in _BUILDERS:
        reader.wrong(path, f"there is no {builder!r} here; known are {', '.join(_BUILDERS)}")
        return
    every = {ending for endings in _BUILDERS.values() for ending in endings}
    for one in paths:
        ending = file_format(one)
        told = ending in _BUILDERS[builder] or (builder == "json" and ending not in every)
        if not told and not os.path.isdir(one):
            wanted = " or ".join(_BUILDERS[builder])
            reader.wrong(
                path, f"is {builder}, but a file's name tells how it is read: let that of {one} end in {wanted}"
            )


def _handler(reader: _Reader, values: Any, path: Sequence[str | int]) -> dict[str, Any]:
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        reader.wrong(path, "needs a name")
        return {"name": "missing"}
    reader.check_keys(values, {"name", "arguments"}, path)
    return {"name": values["name"], "arguments": values.get("arguments") or {}}


def _split(reader: _Reader, split: Any, path: Sequence[str | int]) -> dict[str, float]:
    if split is None:
        return {}
    if not isinstance(split, dict):
        reader.wrong(path, "needs train and validation, the shares of each")
        return {}
    reader.check_keys(split, {"train", "validation"}, path)
    shares = {name: split.get(name, 0.0) for name in ("train", "validation")}
    if any(isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one <= 1 for one in shares.values()):
        reader.wrong(path, "train and validation must be numbers from 0 to 1")
        return {}
    total = sum(shares.values())
    if not 0 < total <= 1 + _TOLERANCE:
        reader.wrong(path, f"train and validation are {total:g} together; they must be more than 0 and at most 1")
        return {}
    found = {}
    if shares["validation"]:
        found["validation_ratio"] = float(shares["validation"])
    if shares["train"] > 0 and total < 1 - _TOLERANCE:
        found["train_ratio"] = float(shares["train"])
    if not shares["train"] and shares["validation"] < 1 - _TOLERANCE:
        reader.wrong(path, "a dataset that nothing is trained of must be validated on as a whole: validation: 1.0")
    return found


def _weights(
    reader: _Reader, datasets: Sequence[Mapping[str, Any]], sources: Sequence[Mapping[str, Any]]
) -> list[float] | None:
    """The sampling weights, if any: each dataset that is trained on has one, and no other."""
    trains = [source.get("validation_ratio", 0.0) < 1 for source in sources]
    given = [one.get("sampling") for one in datasets]
    if all(one is None for one in given):
        return None
    for index, (weight, is_trained) in enumerate(zip(given, trains, strict=True)):
        path = ("datasets", index, "sampling")
        if weight is None and is_trained:
            reader.wrong(path[:2], "needs sampling, as other datasets have it")
        elif weight is not None and not is_trained:
            reader.wrong(path, "is set, but nothing of this dataset is trained on")
        elif weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0):
            reader.wrong(path, "must be a number above 0, up to 1; leave out a dataset that is not to be read")
    if reader.problems:
        return None
    total = sum(weight for weight in given if weight is not None)
    if abs(total - 1) > _TOLERANCE:
        reader.wrong(("datasets",), f"the sampling of all datasets is {total:g} together; it must be 1")
    # A dataset that is only validated on is read whatever its weight, so long as that is above 0.
    return [1.0 if weight is None else float(weight) for weight in given]
