"""Checkpoints with a vision tower: the parts of the model, which of them are trained, and the processor's files."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

from huggingface_hub import try_to_load_from_cache

from finetuning.config.sections.data import ImagesConfig
from finetuning.config.sections.model import ModelPart
from finetuning.errors import ConfigError, Location, read_json_object

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files that say how images become the model's input. The tokenizer and the chat template have files of their own."""
# The names that transformers gives to what lies between the vision tower and the language model. In Qwen's models it
# is a module of the tower. Layers of towers have such names, too, further down.
_PROJECTOR = re.compile(r"project|connector|merger|embed_vision|perceiver|resampler|aligner|image_newline|view_sep")
_MODEL_DEPTH = 3
_settings: WeakKeyDictionary[nn.Module, Mapping[str, object]] = WeakKeyDictionary()
"""How large the images of models are in training."""
_EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge", "longest_edge": "longest_edge"}
"""Settings of images, and the entries of `size` in a processor's file that mean the same."""
_LANGUAGE_MODELS = ("language_model", "text_model")


def module_parts(model: PreTrainedModel) -> dict[str, ModelPart]:
    """Return the part of the model that each module without children, and each parameter, belongs to, by name."""
    names = [name for name, module in model.named_modules() if next(module.children(), None) is None]
    names += [name for name, _ in model.named_parameters()]
    language = _language_modules(model)
    return {name: _part_of(name, language) for name in names if name}


def _part_of(name: str, language: Collection[str]) -> ModelPart:
    if any(name == module or name.startswith(f"{module}.") for module in language):
        return "language_model"
    return "projector" if any(map(_PROJECTOR.search, name.split(".")[:_MODEL_DEPTH])) else "vision_tower"


def _language_modules(model: PreTrainedModel) -> set[str]:
    """Return the names of the modules that text goes through: the decoder with its embeddings, and the head."""
    text_modules = {id(model.get_output_embeddings()), id(model.get_input_embeddings()), id(model.get_decoder())}
    names: set[str] = set()
    has_decoder = False
    for name, module in model.named_modules():
        parts = name.split(".")
        is_decoder = parts[-1] in _LANGUAGE_MODELS and len(parts) <= 2
        # A class may name the whole model with its vision tower as its decoder.
        is_named = id(module) in text_modules and not any(_has_vision(child) for child, _ in module.named_modules())
        if name and (is_decoder or is_named):
            names.add(name)
            has_decoder |= is_decoder or module is model.get_decoder()
    if not has_decoder:
        # The layers of GIT are next to its image encoder, in one module.
        outer = [name for name, _ in model.named_modules() if name and name.count(".") < _MODEL_DEPTH]
        visual = {prefix for name in outer if _has_vision(name) for prefix in _prefixes(name)}
        names.update(name for name in outer if name not in visual and not _has_vision(name))
    return names


def _has_vision(name: str) -> bool:
    return any(part.startswith(("vision", "visual", "image")) for part in name.split("."))


def train_only(model: PreTrainedModel, parts: Collection[ModelPart]) -> str:
    """Freeze the parameters of all other parts; return which parts are trained, and how much is frozen."""
    part_of = module_parts(model)
    frozen: dict[str, int] = {}
    for name, weight in model.named_parameters():
        part = part_of[name]
        weight.requires_grad_(part in parts)
        if part not in parts:
            frozen[part] = frozen.get(part, 0) + weight.numel()
    kept = ", ".join(f"{part} ({count:,} parameters)" for part, count in frozen.items())
    return f"trained parts: {', '.join(parts)}; frozen: {kept or 'nothing'}"


def set_part_rates(optimizer: Optimizer, model: nn.Module, rates: Mapping[ModelPart, float]) -> None:
    """Give the trained weights of some parts a learning rate of their own.

    Raises:
        ConfigError: no weight of one of these parts is trained.
    """
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportAssignmentType, reportCallIssue]
    part_of = module_parts(base)
    parts = {id(weight): part_of[name] for name, weight in base.named_parameters()}
    missing = set(rates)
    for group in list(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        weights = group["params"]
        group["params"] = [weight for weight in weights if parts.get(id(weight)) not in rates]
        for part, rate in rates.items():
            moved = [weight for weight in weights if parts.get(id(weight)) == part]
            if moved:
                missing.discard(part)
                optimizer.add_param_group({**settings, "params": moved, "lr": rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for part in rates:
        if part in missing:
            raise ConfigError(
                f"no weight of the part {part} is trained",
                location=Location(key=f"overrides.part_learning_rates.{part}"),
                hint="The parts are those of models that take images; an adapter has to go into them.",
            )


def outside_of(model: PreTrainedModel, parts: Collection[ModelPart]) -> str | None:
    """Return a pattern of the names of all modules outside of some parts, for PEFT's `exclude_modules`.

    None if there are none. The names are shortened to the first module that has none of these parts below it.
    """
    part_of = module_parts(model)
    inside = {prefix for name, part in part_of.items() if part in parts for prefix in _prefixes(name)}
    outside = {
        next(prefix for prefix in _prefixes(name) if prefix not in inside)
        for name, part in part_of.items()
        if part not in parts
    }
    return rf"({'|'.join(sorted(map(re.escape, outside)))})(\..*)?" if outside else None


def _prefixes(name: str) -> Iterator[str]:
    """Yield the names of the modules that a module is in, outermost first, and its own."""
    parts = name.split(".")
    yield from (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def remember_image_settings(model: nn.Module, config: ImagesConfig) -> None:
    """Note on a model how large its images are in training: its saved processor files say so, too."""
    base = cast("nn.Module", getattr(model, "get_base_model", lambda: model)())
    _settings[base] = config.model_dump(exclude_none=True, exclude={"folder", "max_file_pixels"})


def write_processor_files(model: nn.Module, folder: Path) -> None:
    """Write the files of the processor of a model's checkpoint, as far as it has any, with the settings of the run.

    Without such settings they are copied byte by byte.
    """
    for file in _processor_files(model):
        (folder / file.name).write_bytes(_to_save(file, model))


def processor_differences(model: nn.Module, folder: Path) -> list[str]:
    """Return which files of the processor in a folder are not what `write_processor_files` writes; [] if all are."""
    return [
        f"{file.name} is not the base model's"
        for file in _processor_files(model)
        if not (folder / file.name).is_file() or (folder / file.name).read_bytes() != _to_save(file, model)
    ]


def _to_save(file: Path, model: nn.Module) -> bytes:
    """Return the content of a processor's file with the settings of the run."""
    content = file.read_bytes()
    settings: Mapping[str, object] = _settings.get(model, {})
    if not settings or file.name.startswith("video"):
        return content
    fields = read_json_object(file)
    # Newer checkpoints have the image processor's fields inside of the processor's.
    inner = fields.get("image_processor")
    target = inner if isinstance(inner, dict) else fields
    if target is fields and file.name == "processor_config.json":
        return content
    _set_fields(cast("dict[str, object]", target), settings)
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _set_fields(target: dict[str, object], settings: Mapping[str, object]) -> None:
    size = target.get("size")
    edges = cast("dict[str, object]", dict(size)) if isinstance(size, dict) else {}
    for name, value in settings.items():
        edge = _EDGES.get(name)
        if edge in edges:
            edges[edge] = value
            target["size"] = edges
        if name != "longest_edge":
            target[name] = value


def _processor_files(model: nn.Module) -> list[Path]:
    source = str(getattr(model, "name_or_path", ""))
    files = [Path(source, name) for name in PROCESSOR_FILES]
    if not Path(source).is_dir():
        files = [Path(cached) for name in PROCESSOR_FILES if (cached := _cached(source, name)) is not None]
    return [file for file in files if file.is_file()]


def _cached(repository: str, name: str) -> str | None:
    """Return where the Hub's cache holds a file; None if it does not."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        return None
    path = try_to_load_from_cache(repository, name)
    return path if isinstance(path, str) else None
