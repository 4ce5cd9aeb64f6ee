"""Put an adapter on a model: a new one, a saved one to train further, or none to train all weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from finetuning.config.pretrained_config import NOT_REACHED_BY_TEXT, left_out_of_all_linear
from finetuning.config.sections.model import ModelPart, NewPeft, NoPeft, PretrainedPeft
from finetuning.distributed import announce_wait
from finetuning.errors import Location, ModelError, Problem, reading
from finetuning.model.peft.adapter_files import (
    adapter_digests,
    check_adapter_base,
    check_adapter_tensors,
    is_peft_model,
)
from finetuning.model.resolve import ModelLocation, resolve_model
from finetuning.model.safetensors_io import ADAPTER_WEIGHTS

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftConfig, PeftModel

    from finetuning.model.embeddings import EmbeddingInfo

logger = logging.getLogger(__name__)
_KWARGS, _ADAPTER_KEY = "peft_conf.peft_kwargs", "peft_conf.name_or_path"
NEEDS_TASK_IDS = ("MULTITASK_PROMPT_TUNING", "POLY")
"""PEFT types that need a task id with each row; no row format has one."""
ALL_LINEAR = "all-linear"
# PEFT's check of Mamba layers applies to these types.
_MAMBA_CHECKED = ("ADALORA", "LORA", "RANDLORA", "XLORA")
# Packages of modeling code, as opposed to those of quantized layers.
_MODELING_CODE = ("transformers.models.", "transformers_modules.")
# Names of the head of a sequence classification model, which PEFT leaves out of all-linear.
_SCORE_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class AdaptedModel:
    """The model to train, and how much of it is trainable."""

    model: PreTrainedModel | PeftModel
    peft_config: PeftConfig | None
    """The adapter's config; None if all weights are trained."""
    trainable_parameters: int
    total_parameters: int
    initial_digests: dict[str, str]
    """Digests of a new adapter's tensors, by the names they are saved under: a saved tensor with the same digest was
    not trained. Empty without an adapter."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = f"{peft_type_of(self.peft_config)} adapter" if self.peft_config is not None else "all weights"
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        return (
            f"{what}: {self.trainable_parameters:,} of {self.total_parameters:,} parameters are trained ({share:.3g} %)"
        )


def base_model_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the model under the adapter, or the model itself if it has none."""
    base = model.get_base_model() if is_peft_model(model) else model
    assert isinstance(base, PreTrainedModel)
    return base


def peft_type_of(config: PeftConfig) -> str:
    """Return the adapter type of a config, such as `LORA`."""
    from peft import PeftType

    return PeftType(config.peft_type).value


def apply_peft(
    model: PreTrainedModel,
    conf: NoPeft | PretrainedPeft | NewPeft,
    *,
    embeddings: EmbeddingInfo | None = None,
    total_steps: int | None = None,
    autocast_adapter_dtype: bool = True,
    check_names: bool = True,
    parts: Sequence[ModelPart] = ("language_model",),
) -> AdaptedModel:
    """Return the model to train, with the adapter of `conf` on it.

    Args:
        embeddings: what `resize_embeddings` returned; the rows of new tokens are made trainable.
        total_steps: length of the run, for adapter types with a schedule (AdaLoRA).
        autocast_adapter_dtype: keep adapter weights in float32 on a 16-bit base. Must be off under FSDP, which shards
            weights of one dtype only.
        check_names: warn of module names in `conf` that match nothing. Off if that was done before loading.
        parts: the parts of a vision-language model that a new adapter goes into.

    Raises:
        ModelError: the adapter does not fit the model, or its type, an argument or every target module does not exist.
    """
    if isinstance(conf, NoPeft):
        from finetuning.model.quantization import is_quantized

        if is_quantized(model):
            raise ModelError(
                "quantized weights cannot be trained",
                location=Location(key="peft_conf.peft_type"),
                hint="Use an adapter, such as LORA, or remove quant_conf.",
            )
        return _summarize(model, None, {}, ())
    if isinstance(conf, PretrainedPeft):
        return _load_adapter(model, conf, embeddings, autocast_adapter_dtype)
    from peft import get_peft_model

    config = make_peft_config(
        model, conf, embeddings=embeddings, total_steps=total_steps, check_names=check_names, parts=parts
    )
    targets = target_names(config)
    if peft_type_of(config) == "XLORA":
        # X-LoRA's first pass reads hidden states, and PEFT refuses it with a key-value cache.
        model.config.use_cache = False
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, KeyError, ImportError) as error:
        raise rejected_by_peft(error, conf.peft_type) from error
    notes = [*fused_targets_note(targets, target_names(config)), *_notes(embeddings)]
    return _summarize(adapted, config, adapter_digests(adapted), tuple(notes))


def make_peft_config(
    model: PreTrainedModel,
    conf: NewPeft,
    *,
    embeddings: EmbeddingInfo | None = None,
    total_steps: int | None = None,
    check_names: bool = True,
    parts: Sequence[ModelPart] = ("language_model",),
) -> PeftConfig:
    """Return the PEFT config of a new adapter, checked against the model, with the rows of new tokens made trainable.

    Raises:
        ModelError: as `apply_peft`.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    peft_types = {member.value: member for member in PeftType}
    name = conf.peft_type.upper()
    if name not in peft_types:
        near = get_close_matches(name, peft_types, 1)
        raise ModelError(
            f"PEFT has no adapter type {conf.peft_type!r}",
            location=Location(key="peft_conf.peft_type"),
            hint=f"Did you mean {near[0]}?" if near else "See `python -c 'import peft; print(list(peft.PeftType))'`.",
        )
    if name in NEEDS_TASK_IDS:
        raise ModelError(
            f"{name} needs a task id with each row, which training rows here do not have",
            location=Location(key="peft_conf.peft_type"),
            hint="For a single task use LORA or PROMPT_TUNING.",
        )
    config_class: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[peft_types[name]]
    field_names = [field.name for field in fields(config_class)]
    for key in conf.peft_kwargs:
        if key not in field_names:
            near = get_close_matches(key, field_names, 1)
            raise ModelError(
                f"{name} has no argument {key!r}",
                location=Location(key=f"{_KWARGS}.{key}"),
                hint=f"Did you mean {near[0]}?" if near else None,
            )
    kwargs = _resolve_targets(model, conf.peft_kwargs, name, parts, config_class)
    if "total_step" in field_names and kwargs.get("total_step") is None and total_steps:
        kwargs["total_step"] = total_steps
    if name == "XLORA":
        kwargs.setdefault("hidden_size", model.config.get_text_config().hidden_size)
    if embeddings is not None and embeddings.new_ids:
        kwargs = _train_new_tokens(model, name, config_class, kwargs, embeddings)
    try:
        config = config_class(task_type=conf.task_type, **_checked_kwargs(kwargs))
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise rejected_by_peft(error, name) from error
    _drop_dropout_of_parameters(model, config)
    if check_names:
        from finetuning.model.peft.module_names import check_module_names

        for problem in [*check_module_names(model, config), *unused_settings(conf, config)]:
            logger.warning("%s", problem)
    return config


def _checked_kwargs(kwargs: dict[str, object]) -> dict[str, Any]:
    """Return the arguments that PEFT's config class takes: without `runtime_config`, which it cannot read from a dict.

    Raises:
        ModelError: `arrow_config` is set, which combines trained adapters.
        TypeError: `runtime_config` has a key that does not exist.
    """
    if kwargs.get("arrow_config") is not None:
        raise ModelError(
            "Arrow combines adapters that are trained already; it is not for a new one",
            location=Location(key=f"{_KWARGS}.arrow_config"),
            hint="Remove it, and combine the adapters with PEFT's create_arrow_model.",
        )
    if isinstance(runtime := kwargs.get("runtime_config"), Mapping):
        from peft import LoraRuntimeConfig

        LoraRuntimeConfig(**runtime)
    return {key: value for key, value in kwargs.items() if key != "runtime_config"}


def _drop_dropout_of_parameters(model: PreTrainedModel, config: Any) -> None:
    """Set the dropout of LoRA to 0 if it adapts parameters, such as those in which transformers fuses experts."""
    from finetuning.model.peft.module_names import fused_targets

    if peft_type_of(config) != "LORA" or not config.lora_dropout:
        return
    if config.target_parameters or fused_targets(model, config)[1]:
        config.lora_dropout = 0.0


def unused_settings(conf: NewPeft, config: PeftConfig) -> list[Problem]:
    """Return a warning for each setting without which the config is used: dropout that PEFT does not have for what is
    adapted, and where DoRA is initialized."""
    problems: list[Problem] = []
    if conf.peft_kwargs.get("runtime_config"):
        location = Location(key=f"{_KWARGS}.runtime_config")
        problems.append(Problem("is not used: it says on which device DoRA is initialized", location))
    configured = conf.peft_kwargs.get("lora_dropout")
    if not configured or getattr(config, "lora_dropout", configured) == configured:
        return problems
    return [
        *problems,
        Problem(
            f"is {configured}, and 0 is used: PEFT has no dropout for parameters, in which transformers fuses the"
            " experts of this model",
            Location(key=f"{_KWARGS}.lora_dropout"),
            "Set lora_dropout: 0, or adapt other modules only.",
        ),
    ]


def _resolve_targets(
    model: PreTrainedModel,
    kwargs: Mapping[str, object],
    peft_type: str,
    parts: Sequence[ModelPart],
    config_class: type[PeftConfig],
) -> dict[str, Any]:
    """Return the arguments with `target_modules` as PEFT expects it.

    A list that contains `all-linear` means all linear layers except the output layer and those of
    `left_out_of_all_linear`. PEFT expands only the plain string; in a list it would take `all-linear` for a module name
    and silently adapt only the others.
    """
    resolved = dict(kwargs)
    targets = resolved.get("target_modules")
    if isinstance(targets, (list, tuple)) and ALL_LINEAR in targets:
        resolved["target_modules"] = targets = ALL_LINEAR
    names = [field.name for field in fields(config_class)]
    if "exclude_modules" in names and not kwargs.get("exclude_modules") and takes_images(model):
        from finetuning.model.vision import outside_of

        # Vision towers have modules of the same names as language models, such as q_proj.
        resolved["exclude_modules"] = outside_of(model, parts)
    if targets == ALL_LINEAR and not _is_prompt_learning(config_class):
        resolved |= _all_linear(model, peft_type, kwargs, parts)
    return resolved


def takes_images(model: PreTrainedModel) -> bool:
    """Return whether a model has a vision tower."""
    return getattr(model.config, "vision_config", None) is not None


def freeze_other_parts(model: PreTrainedModel, parts: Sequence[ModelPart]) -> list[str]:
    """Freeze all parts of a vision-language model but some; return notes on it, none for a model of text."""
    if not takes_images(model):
        return []
    from finetuning.model.vision import train_only

    return [train_only(model, parts)]


def _all_linear(
    model: PreTrainedModel, peft_type: str, kwargs: Mapping[str, object], parts: Sequence[ModelPart]
) -> dict[str, object]:
    """Return the arguments that select all linear layers that can be adapted: `all-linear` if PEFT selects the same.

    PEFT counts the experts that transformers fuses to parameters as linear layers, and their routers as well.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    is_gptq = getattr(model, "quantization_method", None) == "gptq"
    # PEFT expands all-linear to instances of these, which GPTQ's layers are not.
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) or (is_gptq and hasattr(module, "qweight"))
    }
    has_experts = any("experts" in name.split(".") for name, _ in model.named_modules())
    left_out: dict[str, list[str]] = {}
    part_of: dict[str, ModelPart] = {}
    if takes_images(model):
        from finetuning.model.vision import module_parts

        part_of = module_parts(model)
    for name, module in layers.items():
        reason = left_out_of_all_linear(name, has_experts=has_experts)
        if name in part_of and reason in (None, NOT_REACHED_BY_TEXT):
            reason = None if part_of[name] in parts else f"the {part_of[name].replace('_', ' ')}"
        reason = reason or _why_peft_cannot_adapt(model, name, module, peft_type)
        if reason is not None:
            left_out.setdefault(reason, []).append(name)
    fused = _with_fused_experts(model, peft_type, ALL_LINEAR, kwargs)
    if not left_out and not is_gptq and not fused.target_parameters:
        return {"target_modules": ALL_LINEAR}
    for reason, names in left_out.items():
        logger.info("%s leaves out %s: %s", ALL_LINEAR, reason, ", ".join(names[:3]) + ("…" if names[3:] else ""))
    heads = {id(model.get_output_embeddings()), *(id(getattr(model, name, None)) for name in _SCORE_HEADS)}
    excluded = {name for names in left_out.values() for name in names}
    included = {name for name, module in layers.items() if name not in excluded and id(module) not in heads}
    # The last part of a name selects all layers that share it, so it is used where every one of them is included.
    not_included = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in included}
    short = ((name, name.rpartition(".")[2]) for name in included)
    targets = {name if last in not_included or last.isdigit() else last for name, last in short}
    if not fused.target_parameters:
        return {"target_modules": sorted(targets)}
    # PEFT takes the name of an expert's layer, in other layers too, for the fused parameter.
    layer_names = {str(name).rpartition(".")[2] for name in fused.target_modules or ()}
    experts: dict[str, Any] = {
        "target_modules": sorted(name for name in targets if name.rpartition(".")[2] in layer_names),
        "target_parameters": sorted(name for name in fused.target_parameters if not name.startswith("gate.")),
    }
    for pattern in ("rank_pattern", "alpha_pattern"):
        configured: Any = kwargs.get(pattern) or {}
        experts[pattern] = {**getattr(fused, pattern), **configured}
    return experts


def _with_fused_experts(
    model: PreTrainedModel, peft_type: str, targets: Iterable[str] | str, kwargs: Mapping[str, Any]
) -> LoraConfig:
    """Return a LoRA config in which PEFT has replaced an expert's layers by the parameters that transformers fused."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(
        r=kwargs.get("r", 8),
        lora_alpha=kwargs.get("lora_alpha", 8),
        target_modules=targets if isinstance(targets, str) else [*targets],
        target_parameters=kwargs.get("target_parameters"),
    )
    if peft_type == "LORA":
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError as error:
            raise rejected_by_peft(error, peft_type) from error
    return config


def _why_peft_cannot_adapt(model: PreTrainedModel, name: str, module: torch.nn.Module, peft_type: str) -> str | None:
    """Return why PEFT cannot adapt a linear layer; None if it can."""
    import torch
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    from peft.utils.peft_types import PeftType

    if peft_type in _MAMBA_CHECKED:
        config = LoraConfig()
        config.peft_type = PeftType(peft_type)
        try:
            _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
        except ValueError:
            return "state-space output projections"
    kind = type(module)
    if kind.forward is torch.nn.Linear.forward or not kind.__module__.startswith(_MODELING_CODE):
        return None
    # Some subclasses of Linear compute something else: a router returns a tuple, a grouped layer other shapes.
    assert isinstance(module, torch.nn.Linear)
    sample = torch.zeros(1, 2, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            output = module(sample)
    except (RuntimeError, ValueError, TypeError, IndexError):
        output = None
    is_linear = isinstance(output, torch.Tensor) and output.shape == (1, 2, module.out_features)
    return None if is_linear else f"layers that are not plain linear layers ({kind.__name__})"


def _train_new_tokens(
    model: PreTrainedModel, name: str, config_class: type, kwargs: dict[str, Any], embeddings: EmbeddingInfo
) -> dict[str, Any]:
    """Extend the arguments so that the rows of new tokens are trained, in the input and the output embeddings.

    Single rows (`trainable_token_indices`) are preferred to whole embeddings (`modules_to_save`), which for a large
    vocabulary are bigger than the adapter itself.

    Raises:
        ModelError: the adapter type supports neither.
    """
    input_name, output_name = _embedding_names(model)
    names = [input_name] if embeddings.is_tied or output_name is None else [input_name, output_name]
    # A low-rank update of the embeddings trains the rows of new tokens as well, and PEFT takes no second one.
    targets = kwargs.get("target_modules")
    adapted = {str(target).rpartition(".")[2] for target in targets} if isinstance(targets, (list, tuple)) else set()
    names = [module for module in names if module not in adapted]
    if not names:
        return kwargs
    field_names = {field.name for field in fields(config_class)}
    saved = kwargs.get("modules_to_save") or []
    if set(names) <= set(saved):
        return kwargs
    ids = list(embeddings.new_ids)
    if name == "TRAINABLE_TOKENS":
        return kwargs | {"token_indices": sorted({*kwargs.get("token_indices", ()), *ids})}
    if "trainable_token_indices" in field_names:
        indices = kwargs.get("trainable_token_indices") or {}
        # PEFT takes a plain list to be for the input embeddings.
        indices = indices if isinstance(indices, dict) else {input_name: indices}
        rows = {module: sorted({*indices.get(module, ()), *ids}) for module in names if module not in saved}
        return kwargs | {"trainable_token_indices": {**indices, **rows}}
    # With tied embeddings, modules_to_save would train and save two separate copies.
    if "modules_to_save" in field_names and not _is_prompt_learning(config_class) and not embeddings.is_tied:
        return kwargs | {"modules_to_save": list(dict.fromkeys([*saved, *names]))}
    tied = ", whose input and output embeddings are tied" if embeddings.is_tied else ""
    raise ModelError(
        f"{name} cannot train the rows of {len(ids)} new tokens of this model{tied}",
        location=Location(key="peft_conf.peft_type"),
        hint="Use LORA or NO_PEFT, or a chat template whose tokens the tokenizer already has.",
    )


def _embedding_names(model: PreTrainedModel) -> tuple[str, str | None]:
    """Return the last part of the names of the input and output embeddings, which is what PEFT matches."""
    by_module = {id(module): name for name, module in model.named_modules()}
    output = model.get_output_embeddings()
    input_name = by_module[id(model.get_input_embeddings())].rpartition(".")[2]
    return input_name, None if output is None else by_module[id(output)].rpartition(".")[2]


def find_adapter(conf: PretrainedPeft, num_new_tokens: int = 0) -> ModelLocation:
    """Return where the saved adapter is.

    Args:
        num_new_tokens: how many tokens the adapter would have to learn.

    Raises:
        ModelError: it is missing or pickled, or there are new tokens.
    """
    source = resolve_model(conf.name_or_path, "adapter", key=_ADAPTER_KEY)
    if num_new_tokens:
        raise ModelError(
            f"{num_new_tokens} tokens are new to the tokenizer, and the adapter {source} cannot train them",
            location=Location(key=_ADAPTER_KEY),
            hint="Train on the base model and tokenizer that were saved with the adapter (run_conf.model,"
            " run_conf.tokenizer), or keep the tokenizer's own chat template.",
        )
    if source.folder is not None:
        _refuse_pickle(source.folder, Location(key=_ADAPTER_KEY))
    return source


def _load_adapter(
    model: PreTrainedModel, conf: PretrainedPeft, embeddings: EmbeddingInfo | None, autocast_adapter_dtype: bool
) -> AdaptedModel:
    """Load a saved adapter to train it further.

    Raises:
        ModelError: it is missing or damaged, belongs to another base, or has nothing to train.
    """
    from peft import PeftModel

    location = Location(key=_ADAPTER_KEY)
    source = find_adapter(conf, len(embeddings.new_ids) if embeddings is not None else 0)
    if source.folder is not None:
        check_adapter_base(model, source.folder, location)
    problem = f"the adapter {source} cannot be loaded"
    with reading(problem, location=location), announce_wait(f"the adapter {source} to load"):
        adapted = PeftModel.from_pretrained(
            model,
            source.name,
            is_trainable=True,
            autocast_adapter_dtype=autocast_adapter_dtype,
            **source.hub_kwargs,
        )
    if source.folder is not None:
        check_adapter_tensors(adapted, source.folder, location)
    _register_missing_bias(adapted)
    summary = _summarize(adapted, adapted.active_peft_config, adapter_digests(adapted), ())
    if summary.trainable_parameters == 0:
        raise ModelError(f"the adapter {source} has no trainable parameters", location=location)
    return summary


def _register_missing_bias(adapted: PeftModel) -> None:
    """Give an output layer that PEFT has wrapped for trainable token rows a `bias` of None, as torch.nn.Linear has.

    PEFT's wrapper exposes only the weight. TRL's preference losses read `lm_head.weight` and `lm_head.bias`, and would
    fail with an AttributeError.
    """
    head = adapted.get_output_embeddings()
    original = getattr(head, "original_module", None)
    if original is not None and not hasattr(head, "bias") and getattr(original, "bias", None) is None:
        head.register_parameter("bias", None)


def _refuse_pickle(folder: Path, location: Location) -> None:
    if (folder / "adapter_model.bin").is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{folder} has a pickled adapter (adapter_model.bin), which can execute code when it is loaded",
            location=location,
            hint="If you trust it, convert it to safetensors: PeftModel.from_pretrained(…).save_pretrained(…).",
        )


def target_names(config: PeftConfig) -> tuple[set[str], set[str]]:
    """Return the targeted modules and parameters of a config, as far as it lists them."""
    modules, parameters = (getattr(config, key, None) for key in ("target_modules", "target_parameters"))
    return set() if isinstance(modules, str) else set(modules or ()), set(parameters or ())


def fused_targets_note(before: tuple[set[str], set[str]], after: tuple[set[str], set[str]]) -> list[str]:
    """Return a note on the target modules that PEFT replaced by parameters in which the model has fused them.

    Args:
        before, after: names of the targeted modules and parameters before and after PEFT adapted the model.
    """
    modules, parameters = sorted(before[0] - after[0]), sorted(after[1] - before[1])
    if not parameters:
        return []
    fused = f"{', '.join(modules)}: " if modules else ""
    return [f"{fused}trained in the model's fused parameters {', '.join(parameters)} (mixture of experts)"]


def _is_prompt_learning(config_class: type) -> bool:
    from peft.config import PromptLearningConfig

    return issubclass(config_class, PromptLearningConfig)


def rejected_by_peft(error: Exception, name: str) -> ModelError:
    """Return the error for arguments of an adapter type that PEFT does not accept."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(
        f"PEFT rejects the arguments of {name}: {' '.join(line.strip() for line in lines[:3])}",
        location=Location(key=_KWARGS),
    )


def _notes(embeddings: EmbeddingInfo | None) -> tuple[str, ...]:
    if embeddings is None or not embeddings.new_ids:
        return ()
    return (f"the rows of {len(embeddings.new_ids)} new tokens are trained and saved with the adapter",)


def _summarize(
    model: PreTrainedModel | PeftModel,
    config: PeftConfig | None,
    initial_digests: dict[str, str],
    notes: tuple[str, ...],
) -> AdaptedModel:
    def numel(parameter: torch.nn.Parameter) -> int:
        # bitsandbytes packs two 4-bit weights into a byte, and a ZeRO-3 shard is empty: neither shows in numel().
        full_numel: int | None = getattr(parameter, "ds_numel", None)
        if full_numel is not None:
            return full_numel
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        return parameter.numel() if shape is None else shape.numel()

    parameters = list(model.parameters())
    trainable = sum(numel(parameter) for parameter in parameters if parameter.requires_grad)
    return AdaptedModel(model, config, trainable, sum(map(numel, parameters)), initial_digests, notes)
