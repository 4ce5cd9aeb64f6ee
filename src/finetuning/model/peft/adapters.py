"""What is trained of the model: all of it, a new adapter, or an adapter that is there already."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from finetuning.config.sections.model import NewPeft, NoPeft, PretrainedPeft
from finetuning.errors import Location, ModelError
from finetuning.model.embeddings import EmbeddingInfo
from finetuning.model.peft.adapter_files import check_same_base, check_same_tensors, digests
from finetuning.model.peft.target_modules import resolve_targets
from finetuning.model.quantization import is_quantized
from finetuning.model.resolve import resolve_model

if TYPE_CHECKING:
    import peft

_KWARGS = "peft_conf.peft_kwargs"
NEEDS_TASK_IDS = ("MULTITASK_PROMPT_TUNING", "POLY")
"""Types that want a task id with each row, which no row format carries."""


@dataclass(frozen=True)
class AdaptedModel:
    """The model that is trained, and how much of it is."""

    model: Any
    """A PreTrainedModel, or a peft.PeftModel round it."""
    peft_config: peft.PeftConfig | None
    """The adapter's config; None when all weights are trained."""
    trainable: int
    """Number of weights that are trained."""
    total: int
    initial: dict[str, str]
    """A digest of each tensor of a new adapter as it began, by the name that it is saved under: what is equal to it
    after training was not trained. Empty without a new adapter."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = f"{self.peft_config.peft_type.value} adapter" if self.peft_config is not None else "all weights"
        share = 100 * self.trainable / max(self.total, 1)
        return f"{what}: {self.trainable:,} of {self.total:,} weights are trained ({share:.3g} %)"


def build_adapter(
    model: PreTrainedModel,
    conf: NoPeft | PretrainedPeft | NewPeft,
    *,
    vocabulary: EmbeddingInfo | None = None,
    total_steps: int | None = None,
    autocast_adapter_dtype: bool = True,
) -> AdaptedModel:
    """The model to train, with its adapter on.

    `total_steps` is filled in for the types that plan over the whole run (ADALORA). `autocast_adapter_dtype` keeps
    adapter weights in float32 over a 16 bit base; FSDP needs it off, as it shards one type of number.

    Raises:
        ModelError: the adapter does not fit the model, or its type, arguments or target modules do not exist.
    """
    if isinstance(conf, NoPeft):
        if is_quantized(model):
            raise ModelError(
                "quantised weights cannot be trained themselves",
                place=Location(key="peft_conf.peft_type"),
                hint="Choose an adapter, such as LORA, or remove quant_conf.",
            )
        return _adapted(model, None, {}, ())
    if isinstance(conf, PretrainedPeft):
        return _continue(model, conf, vocabulary, autocast_adapter_dtype)
    from peft import get_peft_model

    config = make_peft_config(model, conf, vocabulary=vocabulary, total_steps=total_steps)
    if config.peft_type.value == "XLORA":
        # Its first pass reads hidden states, and PEFT refuses it together with a key-value cache.
        model.config.use_cache = False
    try:
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, KeyError, ImportError) as error:
        raise _friendly(error, conf.peft_type) from error
    notes = _notes(config, vocabulary)
    return _adapted(wrapped, config, digests(wrapped), notes)


def make_peft_config(
    model: PreTrainedModel,
    conf: NewPeft,
    *,
    vocabulary: EmbeddingInfo | None = None,
    total_steps: int | None = None,
) -> peft.PeftConfig:
    """The PEFT config of a new adapter, checked against the model, with the rows of new tokens made trainable.

    Raises:
        ModelError: as `build_adapter`.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {member.value: member for member in PeftType}
    name = conf.peft_type.upper()
    if name not in known:
        near = get_close_matches(name, known, 1)
        raise ModelError(
            f"PEFT has no adapter type {conf.peft_type!r}",
            place=Location(key="peft_conf.peft_type"),
            hint=f"Did you mean {near[0]}?" if near else "See `python -c 'import peft; print(list(peft.PeftType))'`.",
        )
    if name in NEEDS_TASK_IDS:
        raise ModelError(
            f"{name} wants a task id with each row, which training rows here do not carry",
            place=Location(key="peft_conf.peft_type"),
            hint="LORA or PROMPT_TUNING learn one task without it.",
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[known[name]]
    known_fields = [field.name for field in fields(config_class)]
    kwargs = dict(conf.peft_kwargs)
    for key in kwargs:
        if key not in known_fields:
            near = get_close_matches(key, known_fields, 1)
            raise ModelError(
                f"{name} has no argument {key!r}",
                place=Location(key=f"{_KWARGS}.{key}"),
                hint=f"Did you mean {near[0]}?" if near else None,
            )
    kwargs = resolve_targets(model, kwargs, place=_KWARGS, is_prompt=_is_prompt(config_class))
    if "total_step" in known_fields and kwargs.get("total_step") is None and total_steps:
        kwargs["total_step"] = total_steps
    if name == "XLORA":
        kwargs.setdefault("hidden_size", model.config.get_text_config().hidden_size)
    if vocabulary is not None and vocabulary.new_ids:
        kwargs = _train_new_tokens(model, name, config_class, kwargs, vocabulary)
    try:
        return config_class(task_type=conf.task_type, **kwargs)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise _friendly(error, name) from error


def _train_new_tokens(
    model: PreTrainedModel, name: str, config_class: type, kwargs: dict[str, Any], vocabulary: EmbeddingInfo
) -> dict[str, Any]:
    """The arguments with the least added that trains the new tokens' rows, input and output."""
    input_name, output_name = _embedding_names(model)
    names = [input_name] if vocabulary.is_tied or output_name is None else [input_name, output_name]
    known = {field.name for field in fields(config_class)}
    saved = kwargs.get("modules_to_save") or []
    if set(names) <= set(saved):
        return kwargs
    ids = list(vocabulary.new_ids)
    if name == "TRAINABLE_TOKENS":
        return kwargs | {"token_indices": sorted({*kwargs.get("token_indices", ()), *ids})}
    if "trainable_token_indices" in known:
        given = kwargs.get("trainable_token_indices") or {}
        given = given if isinstance(given, dict) else {input_name: given}
        rows = {module: sorted({*given.get(module, ()), *ids}) for module in names if module not in saved}
        return kwargs | {"trainable_token_indices": {**given, **rows}}
    if "modules_to_save" in known and not _is_prompt(config_class) and not vocabulary.is_tied:
        return kwargs | {"modules_to_save": list(dict.fromkeys([*saved, *names]))}
    tied = ", whose input and output embeddings are tied" if vocabulary.is_tied else ""
    raise ModelError(
        f"{name} cannot train the rows of {len(ids)} new tokens of this model{tied}",
        place=Location(key="peft_conf.peft_type"),
        hint="Use LORA or NO_PEFT, or a chat template whose tokens the tokenizer already has.",
    )


def _embedding_names(model: PreTrainedModel) -> tuple[str, str | None]:
    """The last part of the names of the input and the output embeddings, as PEFT matches them."""
    by_module = {id(module): name for name, module in model.named_modules()}
    output = model.get_output_embeddings()
    input_name = by_module[id(model.get_input_embeddings())].rpartition(".")[2]
    return input_name, None if output is None else by_module[id(output)].rpartition(".")[2]


def _continue(
    model: PreTrainedModel, conf: PretrainedPeft, vocabulary: EmbeddingInfo | None, autocast_adapter_dtype: bool
) -> AdaptedModel:
    from peft import PeftModel
    from safetensors import SafetensorError

    place = Location(key="peft_conf.name_or_path")
    location = resolve_model(conf.name_or_path, "adapter", key=place.key)
    if vocabulary is not None and vocabulary.new_ids:
        raise ModelError(
            f"{len(vocabulary.new_ids)} tokens are new to the tokenizer; the adapter {location} cannot train them",
            place=place,
            hint="Train on the base model and tokenizer that were saved with the adapter (run_conf.model,"
            " run_conf.tokenizer), or keep the tokenizer's own chat template.",
        )
    if location.folder is not None:
        _refuse_pickle(location.folder, place)
        check_same_base(model, location.folder, place)
    try:
        wrapped = PeftModel.from_pretrained(
            model,
            location.name,
            is_trainable=True,
            autocast_adapter_dtype=autocast_adapter_dtype,
            **location.hub_arguments,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the adapter {location} cannot be loaded: {' '.join(lines[:2])}", place=place) from error
    if location.folder is not None:
        check_same_tensors(wrapped, location.folder, place)
    _show_bias(wrapped)
    config = wrapped.active_peft_config
    adapted = _adapted(wrapped, config, digests(wrapped), _notes(config, None))
    if adapted.trainable == 0:
        raise ModelError(f"nothing of the adapter {location} can be trained", place=place)
    return adapted


def _show_bias(wrapped: Any) -> None:
    """Gives an output layer with trained rows the bias that it has not, for those who read it beside the weights.

    PEFT's wrapper shows weights alone, with the rows in them; TRL's preference losses take weights and bias.
    """
    head = wrapped.get_output_embeddings()
    original = getattr(head, "original_module", None)
    if original is not None and not hasattr(head, "bias") and getattr(original, "bias", None) is None:
        head.register_parameter("bias", None)


def _refuse_pickle(folder: Path, place: Location) -> None:
    if (folder / "adapter_model.bin").is_file() and not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{folder} holds a pickled adapter (adapter_model.bin), which can run code when it is opened",
            place=place,
            hint="Convert it to safetensors where you trust it: PeftModel.from_pretrained(…).save_pretrained(…).",
        )


def _is_prompt(config_class: type) -> bool:
    from peft.config import PromptLearningConfig

    return issubclass(config_class, PromptLearningConfig)


def _friendly(error: Exception, name: str) -> ModelError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(
        f"{name} refuses this: {' '.join(line.strip() for line in lines[:3])}", place=Location(key=_KWARGS)
    )


def _notes(config: peft.PeftConfig, vocabulary: EmbeddingInfo | None) -> tuple[str, ...]:
    notes = []
    if vocabulary is not None and vocabulary.new_ids:
        notes.append(f"the rows of {len(vocabulary.new_ids)} new tokens are trained and saved with the adapter")
    return tuple(notes)


def _adapted(model: Any, config: Any, initial: dict[str, str], notes: tuple[str, ...]) -> AdaptedModel:
    def count(parameter: Any) -> int:
        # 4 bit weights hold two numbers a byte, ZeRO-3 shards hold none.
        if hasattr(parameter, "ds_numel"):
            return parameter.ds_numel
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        return parameter.numel() if shape is None else shape.numel()

    parameters = list(model.parameters())
    trainable = sum(count(parameter) for parameter in parameters if parameter.requires_grad)
    return AdaptedModel(model, config, trainable, sum(map(count, parameters)), initial, notes)
