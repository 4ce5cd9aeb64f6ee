"""Translate a data config of fms-hf-tuning to `data_conf`."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from finetuning.config.sections.data import Handler
from finetuning.config.validation.suggestions import did_you_mean
from finetuning.config.yaml.document import ConfigDocument, YamlSection, YamlValue
from finetuning.config.yaml.reader import read_document
from finetuning.data.sources.files import file_format
from finetuning.data.text_template import TextTemplate, TextTemplateError
from finetuning.data.transforms import TransformError, handler_arguments
from finetuning.errors import ConfigError, Problem

_PROCESSOR = {
    "type", "seed", "sampling_seed", "streaming", "sampling_stopping_strategy", "chat_template", "chat_template_path",
    "chat_template_base64", "odm",
}  # fmt: skip
_DATASET = {
    "name", "data_paths", "builder", "sampling", "split", "shuffle", "dataset_split_name", "data_handlers",
    "rename_columns", "retain_columns",
}  # fmt: skip
_EARLIER_SECTION, _EARLIER_SEED = "datapreprocessor", "sampling_seed"
"""Names of `dataprocessor` and `seed` in fms-hf-tuning's documents."""
_EARLIER_PLACES = ("chat_template", "streaming")
"""Keys of `dataprocessor` that earlier releases had at the top level or in each dataset."""
_ADD_EOS = ("add_tokenizer_eos_token", "apply_dataset_formatting")
"""Handlers of earlier releases that add the end-of-sequence token to a text, as is done here for every text."""
_EARLIER_HANDLERS = {
    **dict.fromkeys((*_ADD_EOS, "apply_custom_data_formatting_template"), "apply_custom_jinja_template"),
    "tokenize_and_apply_instruction_masking": "tokenize_and_apply_input_masking",
    **dict.fromkeys(("skip_large_text", "skip_large_columns"), "skip_samples_with_large_columns"),
}
"""Names of handlers in earlier releases, and in documents that still have them."""
_EARLIER_ARGUMENTS = {
    "apply_custom_jinja_template": {
        "dataset_text_field": "formatted_text_column_name",
        "text_column_name": "formatted_text_column_name",
    },
    "tokenize_and_apply_input_masking": {
        "input_field_name": "input_column_name",
        "output_field_name": "output_column_name",
    },
    "tokenize": {"dataset_text_field": "text_column_name"},
    "duplicate_columns": {"old_column": "existing_column_name", "new_column": "new_column_name"},
    "skip_samples_with_large_columns": {"max_length": "max_allowed_length"},
    "apply_tokenizer_chat_template": {
        "dataset_text_field": "formatted_text_column_name",
        "conversation_column": "conversation_column_name",
    },
}
"""Arguments of handlers, by the handler's name today, that earlier releases named differently."""
_BUILDERS = {
    "json": (".json", ".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".md"),
}
"""File extensions that each builder of `datasets` reads."""
_TOLERANCE = 1e-6
_SEED = 42


class _Errors:
    """Collects the errors of a document with their places."""

    def __init__(self, document: ConfigDocument):
        self._document = document
        self.problems: list[Problem] = []

    def add(self, path: Sequence[str | int], message: str) -> None:
        self.problems.append(Problem(message, self._document.location_of(tuple(path))))

    def check_keys(self, values: YamlSection, supported: set[str], path: Sequence[str | int]) -> None:
        for key in values:
            if key not in supported:
                hint = did_you_mean(str(key), sorted(supported))
                self.add((*path, key), f"unknown key. {hint}" if hint else "unknown key")


def read_data_config(path: str | Path) -> YamlSection:
    """Return the values of our `data_conf` for a data config file in YAML or JSON.

    Datasets with `sampling` become a weighted mix, others a concatenation. `split` becomes each dataset's
    `train_ratio` and `validation_ratio`. Handlers are kept, with their arguments; so is `streaming`.

    Raises:
        ConfigError: the file has errors, or settings without a counterpart here; all of them are listed.
    """
    document = _with_processor(read_document(path))
    errors = _Errors(document)
    values = document.values
    errors.check_keys(values, {"dataprocessor", "datasets"}, ())
    processor = values.get("dataprocessor") or {}
    listed = values.get("datasets")
    datasets = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    if not isinstance(processor, dict):
        errors.add(("dataprocessor",), "must be a mapping")
        processor = {}
    if not datasets or not isinstance(listed, list) or len(datasets) < len(listed):
        errors.add(("datasets",) if "datasets" in values else (), "at least one dataset is required")
        raise ConfigError(errors.problems)
    template = _chat_template(errors, processor, Path(path).parent)
    seed = processor.get("seed", processor.get(_EARLIER_SEED, _SEED))
    if not isinstance(seed, int):
        errors.add(("dataprocessor", "seed"), "must be an integer")
        seed = _SEED
    sources = [_dataset(errors, dataset, index) for index, dataset in enumerate(datasets)]
    weights = _weights(errors, datasets, sources)
    if errors.problems:
        raise ConfigError(errors.problems)
    mix: YamlSection = {"type": "CONCATENATION"}
    if weights is not None:
        sources = [{**source, "sampling_weight": weight} for source, weight in zip(sources, weights, strict=True)]
        stopping = processor.get("sampling_stopping_strategy", "all_exhausted")
        mix = {"type": "PRECOMPUTE_WEIGHTED_MIX", "seed": seed, "stopping": stopping}
    # fms-hf-tuning reads a stream in the order of its files; a buffer of one row does not shuffle.
    streaming: YamlSection = {"streaming": True, "shuffle_buffer": 1} if processor.get("streaming") else {}
    return {
        **_split_validation(mix, sources, seed, streaming=bool(streaming)),
        "chat_template_name": "keep-original",
        **({"chat_template": template} if template else {}),
        **streaming,
    }


def _with_processor(document: ConfigDocument) -> ConfigDocument:
    """Return the document with the section `dataprocessor`, whatever its name is, and with what belongs to it."""
    moved: dict[tuple[str | int, ...], tuple[str | int, ...]] = {}
    values = dict(document.values)
    if _EARLIER_SECTION in values and "dataprocessor" not in values:
        values = {"dataprocessor" if key == _EARLIER_SECTION else key: value for key, value in values.items()}
        moved[(_EARLIER_SECTION,)] = ("dataprocessor",)
    processor, datasets = values.get("dataprocessor") or {}, values.get("datasets")
    if isinstance(processor, dict) and isinstance(datasets, list):
        processor, datasets = {**processor}, [{**item} if isinstance(item, dict) else item for item in datasets]
        places = [((), values), *((("datasets", index), item) for index, item in enumerate(datasets))]
        for path, place in places:
            for key in _EARLIER_PLACES:
                if isinstance(place, dict) and key in place and processor.setdefault(key, place[key]) == place[key]:
                    del place[key]
                    moved[(*path, key)] = ("dataprocessor", key)
        values |= {"dataprocessor": processor, "datasets": datasets}
    marks = {
        (*new, *path[len(old) :]): span
        for path, span in document.marks.items()
        for old, new in moved.items()
        if path[: len(old)] == old
    }
    return replace(document, values=values).with_marks(marks) if moved else document


def _split_validation(mix: YamlSection, sources: list[YamlSection], seed: int, *, streaming: bool) -> YamlSection:
    """Return `training_data`, with the type and options of the mix, and `validation_data`.

    A stream cannot be split: with streaming, datasets that are used for validation only move to `validation_data`.
    """
    ratios = [_validation_ratio(source) for source in sources]
    training: YamlSection = {"type": mix["type"], "datasets": [*sources], **mix}
    if not any(ratios):
        return {"training_data": training, "validation_data": {"type": "NONE"}}
    if not streaming or set(ratios) - {0.0, 1.0}:
        return {"training_data": training, "validation_data": {"type": "FROM_DATASETS", "seed": seed}}
    held_out = [source for source in sources if "validation_ratio" in source]
    validation: list[YamlValue] = [
        {key: value for key, value in source.items() if key not in ("validation_ratio", "sampling_weight")}
        for source in held_out
    ]
    kept: list[YamlValue] = [source for source in sources if source not in held_out]
    return {
        "training_data": {**training, "datasets": kept},
        "validation_data": {"type": "CONCATENATION", "datasets": validation},
    }


def _validation_ratio(source: YamlSection) -> float:
    ratio = source.get("validation_ratio")
    return ratio if isinstance(ratio, float) else 0.0


def _chat_template(errors: _Errors, processor: YamlSection, folder: Path) -> str | None:
    """Check the section `dataprocessor`, and return its chat template, if any."""
    section = ("dataprocessor",)
    errors.check_keys(processor, _PROCESSOR, section)
    if processor.get("type", "default") != "default":
        errors.add((*section, "type"), f'"{processor["type"]}" is not supported; only "default" is')
    if processor.get("odm") is not None:
        errors.add((*section, "odm"), "online data mixing is not supported; sampling weights stay constant")
    strategy = processor.get("sampling_stopping_strategy", "all_exhausted")
    if strategy not in ("all_exhausted", "first_exhausted"):
        errors.add((*section, "sampling_stopping_strategy"), "must be all_exhausted or first_exhausted")
    names = [key for key in ("chat_template", "chat_template_path", "chat_template_base64") if processor.get(key)]
    if len(names) > 1:
        errors.add((*section, names[1]), f"cannot be combined with {names[0]}")
    if not names:
        return None
    value = str(processor[names[0]])
    try:
        if names[0] == "chat_template_path":
            path = Path(os.path.expandvars(value)).expanduser()
            # fms-hf-tuning looks in the working directory only; here the folder of the data config works, too.
            return (path if path.is_file() else folder / path).read_text("utf-8")
        return base64.b64decode(value, validate=True).decode() if names[0] == "chat_template_base64" else value
    except OSError as error:
        errors.add((*section, names[0]), f"cannot read {value}: {error.strerror}")
    except (binascii.Error, UnicodeDecodeError):
        errors.add((*section, names[0]), "is not base64-encoded UTF-8 text")
    return None


def _dataset(errors: _Errors, values: YamlSection, index: int) -> YamlSection:
    section = ("datasets", index)
    errors.check_keys(values, _DATASET, section)
    listed = values.get("data_paths")
    paths = [path for path in listed if isinstance(path, str) and path] if isinstance(listed, list) else []
    if not paths or not isinstance(listed, list) or len(paths) < len(listed):
        errors.add(
            (*section, "data_paths") if "data_paths" in values else section, "data_paths: a list of paths is required"
        )
        paths = ["missing"]
    source: YamlSection = {"path": paths[0] if len(paths) == 1 else [*paths]}
    if values.get("dataset_split_name"):
        source["split"] = values["dataset_split_name"]
    _check_builder(errors, values.get("builder"), paths, (*section, "builder"))
    split = _split(errors, values.get("split"), (*section, "split"))
    if values.get("shuffle") is False and ("train_ratio" in split or 0 < split.get("validation_ratio", 0) < 1):
        errors.add((*section, "shuffle"), "splits are always random; put the validation rows in a separate file")
    source.update(split)
    first: list[YamlValue] = []
    if values.get("rename_columns"):
        first.append({"name": "rename_columns", "arguments": {"column_mapping": values["rename_columns"]}})
    if values.get("retain_columns"):
        first.append({"name": "select_columns", "arguments": {"column_names": values["retain_columns"]}})
    handlers = values.get("data_handlers") or []
    items = handlers if isinstance(handlers, list) else [None]
    handlers = [
        *first,
        *(_handler(errors, handler, (*section, "data_handlers", at)) for at, handler in enumerate(items)),
    ]
    return {**source, "handlers": handlers} if handlers else source


def _check_builder(errors: _Errors, builder: YamlValue, paths: Sequence[str], path: Sequence[str | int]) -> None:
    """Add an error unless the extension of each file, which selects its reader here, agrees with the builder."""
    if builder is None:
        return
    if not isinstance(builder, str) or builder not in _BUILDERS:
        errors.add(path, f"unknown builder {builder!r}; supported: {', '.join(_BUILDERS)}")
        return
    all_extensions = {extension for extensions in _BUILDERS.values() for extension in extensions}
    for file in paths:
        extension = file_format(file)
        # Files without a known extension are read as JSON.
        agrees = extension in _BUILDERS[builder] or (builder == "json" and extension not in all_extensions)
        if not agrees and not os.path.isdir(file):
            expected = " or ".join(_BUILDERS[builder])
            errors.add(path, f"{builder} cannot read {file}: the extension selects the reader; rename it to {expected}")


def _handler(errors: _Errors, values: YamlValue, path: Sequence[str | int]) -> YamlSection:
    if not isinstance(values, dict) or not isinstance(values.get("name"), str) or not values["name"]:
        errors.add(path, "name is required")
        return {"name": "missing"}
    errors.check_keys(values, {"name", "arguments"}, path)
    values = _with_names_of_today(values)
    arguments = values.get("arguments") or {}
    if not isinstance(arguments, dict):
        errors.add((*path, "arguments"), "must be a mapping")
        return {"name": "missing"}
    inner = arguments.get("fn_kwargs")
    template = inner.get("template") if isinstance(inner, dict) else None
    try:
        handler_arguments(Handler(name=str(values["name"]), arguments={str(k): v for k, v in arguments.items()}))
        if isinstance(template, str):
            TextTemplate(template)
    except TransformError as error:
        errors.add((*path, "name"), str(error))
    except TextTemplateError as error:
        errors.add((*path, "arguments", "fn_kwargs", "template"), str(error))
    return {"name": values["name"], "arguments": arguments}


def _with_names_of_today(handler: YamlSection) -> YamlSection:
    """Return a handler that an earlier release or a document names, under the names of fms-hf-tuning's code today."""
    written = str(handler["name"])
    name = _EARLIER_HANDLERS.get(written, written)
    arguments = handler.get("arguments") or {}
    inner = arguments.get("fn_kwargs") if isinstance(arguments, dict) else None
    names = _EARLIER_ARGUMENTS.get(name, {})
    if not isinstance(arguments, dict):
        return handler
    renamed = {names.get(str(key), key): value for key, value in arguments.items()}
    if isinstance(inner, dict):
        inner = {names.get(str(key), key): value for key, value in inner.items()}
        if written in _ADD_EOS:
            # The column stays, and so do the others, which no format reads.
            inner = {**inner, "template": f"{{{{{inner.get('formatted_text_column_name')}}}}}"}
            renamed.pop("remove_columns", None)
        renamed["fn_kwargs"] = inner
    return {**handler, "name": name, "arguments": renamed}


def _split(errors: _Errors, split: YamlValue, path: Sequence[str | int]) -> dict[str, float]:
    if split is None:
        return {}
    if not isinstance(split, dict):
        errors.add(path, "must be a mapping with train and validation")
        return {}
    errors.check_keys(split, {"train", "validation"}, path)
    written = {name: split.get(name, 0.0) for name in ("train", "validation")}
    fractions = {name: value for name, value in written.items() if _is_fraction(value)}
    if len(fractions) < len(written):
        errors.add(path, "train and validation must be numbers from 0 to 1")
        return {}
    total = sum(fractions.values())
    if not 0 < total <= 1 + _TOLERANCE:
        errors.add(path, f"train plus validation is {total:g}; it must be above 0 and at most 1")
        return {}
    ratios: dict[str, float] = {}
    if fractions["validation"]:
        ratios["validation_ratio"] = float(fractions["validation"])
    if total < 1 - _TOLERANCE:
        ratios["train_ratio"] = float(fractions["train"])
    return ratios


def _is_fraction(value: YamlValue) -> TypeGuard[int | float]:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= 1


def _weights(errors: _Errors, datasets: Sequence[YamlSection], sources: Sequence[YamlSection]) -> list[float] | None:
    """Return the sampling weights, if any: each dataset that is trained on must have one, and no other."""
    trains = [_validation_ratio(source) < 1 and source.get("train_ratio") != 0 for source in sources]
    weights = [dataset.get("sampling") for dataset in datasets]
    if all(weight is None for weight in weights):
        return None
    for index, (weight, is_trained) in enumerate(zip(weights, trains, strict=True)):
        path = ("datasets", index, "sampling")
        if weight is None and is_trained:
            errors.add(path[:2], "sampling is required, because other datasets have it")
        elif weight is not None and not is_trained:
            errors.add(path, "is set, but no row of this dataset is used for training")
        elif weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0):
            errors.add(path, "must be a number above 0, up to 1; remove datasets that are not used")
    if errors.problems:
        return None
    numbers = [weight if isinstance(weight, int | float) else None for weight in weights]
    total = sum(number for number in numbers if number is not None)
    if abs(total - 1) > _TOLERANCE:
        errors.add(("datasets",), f"the sampling weights sum to {total:g}; they must sum to 1")
    # Validation datasets are read whatever their weight is, as long as it is positive.
    return [1.0 if number is None else float(number) for number in numbers]
