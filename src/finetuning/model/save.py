"""Save a model or an adapter atomically, with all its files, and compare them with what is in memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetuning.atomic_io import atomic_directory
from finetuning.errors import GuardStopped, Location, ModelError, StorageError, first_line, parse_json
from finetuning.model.embeddings import EmbeddingInfo, input_weight
from finetuning.model.fingerprint import (
    ADAPTER_FINGERPRINT_FILE,
    FINGERPRINT_FILE,
    Fingerprint,
    write_adapter_fingerprint,
    write_fingerprint,
)
from finetuning.model.peft.adapter_files import is_peft_model
from finetuning.model.safetensors_io import (
    ADAPTER_WEIGHTS,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    UNTRAINED_TOKENS_FILE,
    read_model_headers,
)
from finetuning.model.saved_weights import compare_with_files
from finetuning.model.stop_tokens import (
    EndOfTurn,
    StopTokens,
    align_stop_tokens,
    compare_tokenizer,
    fix_sampling_config,
    save_tokenizer,
    set_generation_ids,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    stop_tokens: StopTokens | None = None,
    base_fingerprint: Fingerprint | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    embeddings: EmbeddingInfo | None = None,
    untrained_tokens: Sequence[str] = (),
) -> Path:
    """Save the model, or a PEFT model's adapter, to `folder`, and return `folder`.

    The folder gets its name after it was compared with what is in memory, and every file is flushed to disk; a failure
    leaves nothing behind. Only one process may call this.

    Args:
        base_fingerprint: fingerprint of the base model, saved with an adapter.
        state_dict: the gathered weights of a sharded model.
        embeddings: what `resize_embeddings` returned, to record new tokens.
        untrained_tokens: new tokens that the next training run has to train.

    Raises:
        StorageError: the folder exists and is not empty, or cannot be written.
        GuardStopped: what was written differs from what is in memory.
    """
    if state_dict is not None and not is_peft_model(model):
        state_dict = _without_tied_weights(model, state_dict)
    try:
        with atomic_directory(folder) as staging:
            _write_model(model, staging, stop_tokens=stop_tokens, state_dict=state_dict)
            write_companion_files(
                tokenizer,
                staging,
                model=model,
                stop_tokens=stop_tokens,
                base_fingerprint=base_fingerprint,
                embeddings=embeddings,
            )
            if untrained_tokens:
                content = json.dumps({"tokens": list(untrained_tokens)}) + "\n"
                (staging / UNTRAINED_TOKENS_FILE).write_text(content, encoding="utf-8")
            check_saved(
                folder,
                compare_with_saved(
                    model,
                    tokenizer,
                    staging,
                    stop_tokens=stop_tokens,
                    base_fingerprint=base_fingerprint,
                    state_dict=state_dict,
                ),
            )
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def write_companion_files(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    model: nn.Module | None = None,
    stop_tokens: StopTokens | None = None,
    base_fingerprint: Fingerprint | None = None,
    embeddings: EmbeddingInfo | None = None,
) -> None:
    """Write what belongs to the weights of a checkpoint or a final model into their folder.

    That is the tokenizer with its chat template, the stop tokens in every config, for a model that takes images the
    files of its processor, and for an adapter what identifies its base model, its own tensors and its new tokens.
    """
    save_tokenizer(tokenizer, folder, stop_tokens)
    if model is not None and _takes_images(model):
        from finetuning.model.vision import write_processor_files

        write_processor_files(_base_of(model), folder)
    if stop_tokens is not None:
        stop_tokens.write_configs(folder)
    if base_fingerprint is not None:
        write_fingerprint(base_fingerprint, folder)
    if (folder / ADAPTER_WEIGHTS).is_file():
        write_adapter_fingerprint(folder)
    if embeddings is not None:
        embeddings.write_added_tokens_info(folder)


def compare_with_saved(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    stop_tokens: StopTokens | None = None,
    base_fingerprint: Fingerprint | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> list[str]:
    """Return how the files of a model or adapter differ from what is in memory and from what was meant; [] if equal.

    Compared are all tensors, bit by bit, the configs of model, adapters and generation, and the tokenizer.

    Args:
        tokenizer: None when its files are known to be right.
        state_dict: the gathered weights of a sharded model.
    """
    adapters = model.peft_config if is_peft_model(model) else {}
    try:
        differences = compare_with_files(model, folder, state_dict=state_dict, adapters=adapters)
    except ModelError as error:
        differences = [str(error)]
    differences += _stray_weights(folder, adapters)
    if adapters and stop_tokens is not None and not (folder / ADAPTER_FINGERPRINT_FILE).is_file():
        differences.append(f"{ADAPTER_FINGERPRINT_FILE} is missing")
    generation = _generation_config_to_save(model, stop_tokens)
    # transformers does not save how generation is compiled.
    meant = json.loads(generation.to_json_string(keys_to_pop=["compile_config"])) if generation is not None else None
    if meant is not None:
        differences += _compare_json(folder / "generation_config.json", meant)
    for name, adapter in adapters.items():
        # PEFT writes the adapter "default" into the folder itself, and others into folders of their names.
        file = (folder if name == "default" else folder / name) / "adapter_config.json"
        differences += _compare_adapter_config(adapter, file)
    if not adapters and isinstance(model, PreTrainedModel):
        config = json.loads(model.config.to_json_string())
        if stop_tokens is not None and meant is not None:
            set_generation_ids(config, meant)
        differences += _compare_json(folder / "config.json", config)
    if base_fingerprint is not None:
        differences += _compare_json(folder / FINGERPRINT_FILE, asdict(base_fingerprint))
    if _takes_images(model):
        from finetuning.model.vision import processor_differences

        differences += processor_differences(_base_of(model), folder)
    return differences + (compare_tokenizer(tokenizer, folder, stop_tokens) if tokenizer is not None else [])


def _stray_weights(folder: Path, adapters: Collection[str]) -> list[str]:
    """Return the files of weights in a folder that are not the model's: servers load every one that they find."""
    names = {file.name for file in folder.glob("*.safetensors*")}
    if adapters:
        # Some adapters keep state in files of their own.
        expected = {name for name in names if not name.startswith("model")}
    elif SAFE_WEIGHTS_NAME in names:
        expected = {SAFE_WEIGHTS_NAME}
    else:
        expected = {SAFE_WEIGHTS_INDEX_NAME, *(entry.file.name for entry in read_model_headers(folder).values())}
    return [f"{name} is not the model's" for name in sorted(names - expected)]


def _takes_images(model: nn.Module) -> bool:
    """Return whether a model, or the base of a PEFT model, takes images."""
    return getattr(getattr(_base_of(model), "config", None), "vision_config", None) is not None


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if is_peft_model(model) else model


def check_saved(folder: Path, differences: Sequence[str]) -> None:
    """Raise GuardStopped if there are differences between what was to be saved in a folder and its files."""
    if differences:
        raise GuardStopped(
            f"the saved model failed verification: {'; '.join(differences)}",
            location=Location(file=str(folder)),
            hint="It was not published. Check the disk and its file system; if they are fine, report this as a bug.",
        )


def _generation_config_to_save(model: nn.Module, stop_tokens: StopTokens | None) -> GenerationConfig | None:
    """Return the generation config to save with a model or adapter; None for one that does not generate text."""
    if stop_tokens is not None:
        return stop_tokens.generation_config
    if is_peft_model(model) or not isinstance(model, PreTrainedModel) or not model.can_generate():
        return None
    generation = copy.deepcopy(model.generation_config)
    if generation is not None:
        fix_sampling_config(generation)
    return generation


def _compare_adapter_config(config: PeftConfig, file: Path) -> list[str]:
    meant = config.to_dict()
    sets = {key for key, value in meant.items() if isinstance(value, set)}
    values = json.loads(json.dumps({key: list(value) if key in sets else value for key, value in meant.items()}))
    # The file is for inference, and names the class of a base model that PEFT does not know.
    return _compare_json(file, values, unordered=sets, ignored=("inference_mode", "auto_mapping"))


def _compare_json(
    file: Path, meant: Mapping[str, Any], *, unordered: Collection[str] = (), ignored: Collection[str] = ()
) -> list[str]:
    """Return how the values of a JSON file differ from what was meant; [] if they are equal.

    Args:
        unordered: keys of lists whose order is arbitrary.
    """
    try:
        values = parse_json(file.read_text(encoding="utf-8"))
        for key in unordered:
            values[key] = sorted(values[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{file.name} cannot be read: {first_line(error)}"]
    meant = {key: sorted(value) if key in unordered else value for key, value in meant.items()}
    differing = [key for key in sorted(values.keys() | meant.keys()) if values.get(key) != meant.get(key)]
    return [
        f"{file.name}: {key} is {json.dumps(values.get(key))} instead of {json.dumps(meant.get(key))}"
        for key in differing
        if key not in ignored
    ]


def find_stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, end_of_turn: EndOfTurn) -> StopTokens | None:
    """Return the stop tokens to save with a model or adapter; None for a model that does not generate text.

    Args:
        end_of_turn: as in `align_stop_tokens`.
    """
    base = _base_of(model)
    if not isinstance(base, PreTrainedModel) or not base.can_generate():
        return None
    return align_stop_tokens(tokenizer, base.generation_config, end_of_turn)


def _write_model(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    *,
    stop_tokens: StopTokens | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the weights and config of a model or adapter into an existing folder."""
    if is_peft_model(model):
        # By default PEFT would save the whole embeddings of a resized vocabulary with every adapter. They are in the
        # extended base model, and the rows of new tokens are part of the adapter's own tensors.
        gathered = None if state_dict is None else dict(state_dict)
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=gathered)
        return
    weights = None if state_dict is None else dict(state_dict)
    if not model.can_generate():
        model.save_pretrained(folder, state_dict=weights)
        return
    original = model.generation_config
    # `save_pretrained` writes the generation config that the model has, so it is swapped while saving.
    saved = _generation_config_to_save(model, stop_tokens)
    assert saved is not None
    model.generation_config = saved
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.generation_config = original


def _without_tied_weights(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop weights that are tied to others, such as a tied output head.

    Gathering makes a copy of each weight, so `save_pretrained` cannot see by their memory that they are shared.
    """
    ties = getattr(model, "all_tied_weights_keys", {})
    return {name: tensor for name, tensor in state_dict.items() if ties.get(name) not in state_dict}


def save_extended_base(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, new_tokens: Sequence[str] = ()
) -> Path:
    """Save a base model whose vocabulary was extended by `new_tokens`, with its tokenizer, and return `folder`.

    Call this before the adapter is added, so that the adapter's config names the extended base: the model's
    `name_or_path` is set to the folder. The adapter loads onto this base, but not onto the original one.
    """
    saved = save_model(model, tokenizer, folder, untrained_tokens=new_tokens)
    model.config.name_or_path = str(saved)
    model.name_or_path = str(saved)
    return saved


def has_extended_base(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a folder has this extended model already: the same vocabulary and the same input embeddings.

    An interrupted run leaves such a folder behind, and the resumed run uses it.
    """
    if not (folder / "config.json").is_file():
        return False
    vocabulary = AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    weight = input_weight(model)
    name = next((name for name, parameter in model.named_parameters() if parameter is weight), "")
    entry = read_model_headers(folder).get(name)
    if vocabulary != tokenizer.get_vocab() or entry is None:
        return False
    with safe_open(entry.file, framework="pt") as tensors:
        saved = tensors.get_tensor(name)
    return torch.equal(saved, weight.detach().to("cpu", saved.dtype))
