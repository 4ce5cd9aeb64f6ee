"""Load a model, its adapter and its tokenizer for generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from finetuning.config.sections.experiment import GenerationModel
from finetuning.config.sections.model import ModelArgs, NoQuantization, Quantized, RunConfig
from finetuning.distributed import announce_wait
from finetuning.errors import ConfigError, Location, ModelError, read_json_object, reading

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )

ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class _HubOptions(TypedDict, total=False):
    """The options that locate files on the hub."""

    revision: str | None
    subfolder: str | None
    cache_dir: str | None
    local_files_only: bool | None
    force_download: bool | None
    token: str | None


@dataclass(frozen=True)
class LoadedGenerator:
    """A model in evaluation mode with its tokenizer."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerFast
    pad_token_id: int
    """Padding on the left of shorter rows; masked in attention."""
    notes: tuple[str, ...] = ()
    """What was repaired."""

    @property
    def device(self) -> torch.device:
        """The device of the input embeddings, to which input ids must be moved."""
        from finetuning.model.embeddings import input_weight

        return input_weight(self.model).device


@dataclass(frozen=True)
class LoadedWithoutWeights:
    """A tokenizer and the configs of a model that another program runs."""

    tokenizer: PreTrainedTokenizerFast
    pad_token_id: int
    config: PreTrainedConfig
    generation_config: GenerationConfig
    notes: tuple[str, ...] = ()
    """What was repaired."""


def model_conf_of(model: str, base: str | None, attn_implementation: str | None = None) -> GenerationModel:
    """Return the `model_conf` for a model, or for an adapter folder and its base model.

    `base` overrides the base model in the adapter's config; nothing on disk is changed.

    Raises:
        ConfigError: `base` is set, but the model is not an adapter.
        ModelError: the adapter's config does not name its base model.
    """
    args = ModelArgs(attn_implementation=attn_implementation)
    config = Path(model).expanduser() / ADAPTER_CONFIG
    if not config.is_file():
        if base is not None:
            raise ConfigError(
                f"{model} is not an adapter; it has no base model", location=Location(key="model_conf.model")
            )
        return GenerationModel(model=model, model_args=args)
    if base is None:
        with reading(f"cannot read {config}", location=Location(key="model_conf.adapter")):
            base = read_json_object(config).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ModelError(
                f"{config} does not name its base model",
                location=Location(key="model_conf.adapter"),
                hint="Set --base_model_name_or_path.",
            )
    return GenerationModel(model=base, model_args=args, adapter=model)


def load_generator(conf: GenerationModel, quant_conf: NoQuantization | Quantized) -> LoadedGenerator:
    """Load the model, its adapter if one is configured, and the tokenizer.

    The saved chat template, end-of-sequence token and generation config are used, as a server would use them; an
    adapter's come before its base model's.

    Raises:
        ModelError: a file is missing or corrupt, or the adapter was trained on another model.
    """
    _check_model_folder(conf)
    from finetuning.model.load import load_model

    tokenizer, pad_token_id = _load_tokenizer(conf)
    base = load_model(RunConfig(model=conf.model, model_args=conf.model_args), quant_conf, key="model_conf.model")
    model = base if conf.adapter is None else _with_adapter(base, conf.adapter, tokenizer)
    notes = _set_generation_config(base, Path(conf.adapter or conf.model).expanduser())
    return LoadedGenerator(model.eval(), tokenizer, pad_token_id, notes)


def load_without_weights(conf: GenerationModel) -> LoadedWithoutWeights:
    """Load what `load_generator` loads, except for the weights.

    Raises:
        ModelError: a file is missing or corrupt.
    """
    _check_model_folder(conf)
    from transformers import GenerationConfig

    from finetuning.model.older_checkpoint import find_stop_token_repair, read_generation_config
    from finetuning.model.resolve import resolve_model

    tokenizer, pad_token_id = _load_tokenizer(conf)
    config = _read_config(conf)
    source = resolve_model(conf.model, "model", key="model_conf.model", **_hub_options(conf))
    folder = Path(conf.adapter or conf.model).expanduser()
    generation_config = read_generation_config(folder)
    if generation_config is None and source.folder is not None:
        generation_config = read_generation_config(source.folder)
    if generation_config is None:
        generation_config = GenerationConfig.from_model_config(config)
    repair = find_stop_token_repair(folder, generation_config)
    if repair is None:
        return LoadedWithoutWeights(tokenizer, pad_token_id, config, generation_config)
    return LoadedWithoutWeights(tokenizer, pad_token_id, config, repair.stop_tokens.generation_config, (repair.note,))


def _read_config(conf: GenerationModel) -> PreTrainedConfig:
    from transformers import AutoConfig

    options = {name: value for name, value in _hub_options(conf).items() if value is not None}
    with reading(f"the config of {conf.model} cannot be read", location=Location(key="model_conf.model")):
        return AutoConfig.from_pretrained(conf.model, trust_remote_code=conf.model_args.trust_remote_code, **options)


def dtype_of(conf: GenerationModel) -> str:
    """Return the name of the dtype that `load_generator` loads the weights in; `auto` if its config does not say."""
    dtype = conf.model_args.dtype
    if dtype == "auto":
        dtype = str(_read_config(conf).dtype or "auto")
    return str(dtype).removeprefix("torch.")


def has_chat_template(conf: GenerationModel) -> bool:
    """Return whether the tokenizer that `load_generator` loads has a chat template.

    Raises:
        ModelError: the model or its tokenizer is missing or corrupt.
    """
    _check_model_folder(conf)
    return bool(_load_tokenizer(conf)[0].chat_template)


def _check_model_folder(conf: GenerationModel) -> None:
    """Check a local model. The tokenizer is loaded first; for a missing folder, the error should be about the model."""
    from finetuning.model.resolve import is_local_path, resolve_model

    if is_local_path(conf.model):
        resolve_model(conf.model, "model", key="model_conf.model", **_hub_options(conf))


def _set_generation_config(model: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    """Set an adapter's generation config on the model, and the stop tokens of a checkpoint that lacks its own.

    Returns:
        Notes on what was repaired.
    """
    from finetuning.model.older_checkpoint import find_stop_token_repair, read_generation_config

    repair = find_stop_token_repair(folder, model.generation_config)
    if repair is not None:
        model.generation_config = repair.stop_tokens.generation_config
        return (repair.note,)
    if (folder / ADAPTER_CONFIG).is_file():
        model.generation_config = read_generation_config(folder) or model.generation_config
    return ()


def _load_tokenizer(conf: GenerationModel) -> tuple[PreTrainedTokenizerFast, int]:
    """Return the tokenizer and a padding id: any token will do, because padding is masked."""
    from finetuning.config.sections.data import MissingPadTokenStrategy
    from finetuning.model.tokenizer import load_tokenizer, special_token_id

    source, key = _tokenizer_source(conf)
    options = _hub_options(conf)
    if source != conf.model:
        # Revision and subfolder are those of the model.
        options = _HubOptions(token=options.get("token"))
    loaded = load_tokenizer(
        source,
        template_source=None,
        needs_template=False,
        missing_pad_token_strategy=MissingPadTokenStrategy.EOS_REPURPOSE,
        padding_side="left",
        trust_remote_code=conf.model_args.trust_remote_code,
        key=key,
        **options,
    )
    pad_token_id = special_token_id(loaded.tokenizer, "pad")
    assert pad_token_id is not None, "load_tokenizer sets a padding token"
    return loaded.tokenizer, pad_token_id


def _hub_options(conf: GenerationModel) -> _HubOptions:
    """Return the options that locate the model's files on the hub."""
    args = conf.model_args
    return {
        "revision": args.revision,
        "subfolder": args.subfolder,
        "cache_dir": args.cache_dir,
        "local_files_only": args.local_files_only,
        "force_download": args.force_download,
        "token": args.token.get_secret_value() if args.token else None,
    }


def _tokenizer_source(conf: GenerationModel) -> tuple[str, str]:
    """Return path or hub id of the tokenizer and its key: model_conf.tokenizer, else the adapter, else the model."""
    if conf.tokenizer is not None:
        return conf.tokenizer, "model_conf.tokenizer"
    if conf.adapter is not None and any(
        (Path(conf.adapter).expanduser() / name).is_file() for name in _TOKENIZER_FILES
    ):
        return conf.adapter, "model_conf.adapter"
    return conf.model, "model_conf.model"


def _with_adapter(model: PreTrainedModel, adapter: str, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    from peft import PeftModel

    from finetuning.model.embeddings import resize_embeddings
    from finetuning.model.peft.adapter_files import check_adapter_base, check_adapter_tensors
    from finetuning.model.resolve import resolve_model
    from finetuning.model.safetensors_io import ADAPTER_WEIGHTS

    location = Location(key="model_conf.adapter")
    source = resolve_model(adapter, "adapter", key=location.key)
    if source.folder is not None:
        if not (source.folder / ADAPTER_WEIGHTS).is_file():
            raise ModelError(f"{source.folder} contains no {ADAPTER_WEIGHTS}", location=location)
        check_adapter_base(model, source.folder, location)
    # An adapter with new tokens contains their embeddings; the base model's must have the same size.
    resize_embeddings(model, tokenizer)
    problem = f"cannot load the adapter {source}"
    with reading(problem, location=location), announce_wait(f"the adapter {source} to load"):
        wrapped = PeftModel.from_pretrained(model, source.name, is_trainable=False, **source.hub_kwargs)
    if source.folder is not None:
        check_adapter_tensors(wrapped, source.folder, location)
    return wrapped
