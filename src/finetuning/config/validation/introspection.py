"""Write the table of library fields from the installed transformers, TRL and PEFT.

    python -m finetuning.config.validation.introspection FILE

It imports the libraries, and torch with them. `library_fields.py` reads the table and imports neither.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union, cast, get_args, get_origin

from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.library_fields import LIBRARIES, SHARED_BY_METHODS, FieldTypes, LibraryTable

_PLAIN: dict[type, str] = {
    **{kind: kind.__name__ for kind in (str, int, float, bool)},
    **dict.fromkeys((list, set, tuple), "list[Any]"),
    dict: "dict[str, Any]",
    os.PathLike: "str",
    type(None): "None",
}
_SEQUENCES = (list, set, frozenset, Sequence, Iterable)
_UNION_ORDER = ("dict", "list", "int", "float", "bool", "Literal", "str", "None")
# Arguments of `from_pretrained` that are objects, that make it return something else, or that let a pickle run code.
_NOT_FOR_YAML = frozenset(
    {
        "config", "state_dict", "tqdm_class", "output_loading_info", "device_mesh", "generation_config", "model_args",
        "pretrained_model_name_or_path", "distributed_config", "kernel_config", "kwargs", "cls", "config_dict",
        "name_or_path", "return_unused_kwargs", "torch_dtype", "weights_only",
    }
)  # fmt: skip
# `name (`int` or `float`, *optional*):` in the docstring of GenerationConfig.
_DOCUMENTED = re.compile(r"^ *(\w+) \((`.+?)(?:, \*|, default|\)+:)", re.MULTILINE)
_TAKEN_FROM_KWARGS = re.compile(r'\w*kwargs\.(?:pop|get)\(\s*"(\w+)"')


def library_table() -> LibraryTable:
    """Return what the installed libraries accept: names of fields, types as annotations of plain values."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from transformers import PreTrainedConfig
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK  # pyright: ignore[reportUnknownVariableType]
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    trainer_configs = {method.trainer_config for method in EXPERIMENTS.values()} | {SHARED_BY_METHODS}
    return {
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "choices": {
            "lr_scheduler_type": [item.value for item in SchedulerType],
            "optim": [item.value for item in OptimizerNames],
            "report_to": [*INTEGRATION_TO_CALLBACK, "all", "none"],
            "dpo_loss_type": _dpo_losses(),
            "peft_type": [item.value for item in PeftType],
        },
        "schedulers": _schedulers(),
        "trainer_configs": {reference: _fields(_load(reference)) for reference in sorted(trainer_configs)},
        "peft_configs": {item.value: _fields(config) for item, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()},
        "generation_config": _generation_fields(),
        "from_pretrained": _from_pretrained_arguments(),
        "pretrained_config": _fields(PreTrainedConfig),
        "model_configs": _model_configs(),
    }


def _schedulers() -> dict[str, dict[str, bool]]:
    """Return the arguments of each schedule that `lr_scheduler_kwargs` may set, and whether they are required."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers import optimization
    from transformers.trainer_utils import SchedulerType

    # Their functions pass all arguments on to a class.
    functions = cast("dict[SchedulerType, Callable[..., object]]", vars(optimization)["TYPE_TO_SCHEDULER_FUNCTION"])
    functions = functions | {
        SchedulerType.REDUCE_ON_PLATEAU: ReduceLROnPlateau,
        SchedulerType.GREEDY: cast("Callable[..., object]", optimization.GreedyLR),
    }
    set_by_trainer = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    return {
        kind.value: {
            name: parameter.default is inspect.Parameter.empty
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in set_by_trainer and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }
        for kind, function in functions.items()
    }


def table_text(table: LibraryTable) -> str:
    """Return the table as JSON with one class per line, so that a diff shows which classes changed."""
    sections: list[str] = []
    for section, content in cast("dict[str, dict[str, object] | list[str]]", table).items():
        if isinstance(content, dict) and any(isinstance(value, dict | list) for value in content.values()):
            lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
            sections.append(f"  {json.dumps(section)}: {{\n{lines}\n  }}")
        else:
            sections.append(f"  {json.dumps(section)}: {json.dumps(content)}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _load(reference: str) -> type:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _fields(config: type) -> dict[str, str]:
    """Return the type of each field that a dataclass takes."""
    fields = {field.name: field for field in dataclasses.fields(config) if field.init and field.name[0] != "_"}
    hints = _hints(config, fields.keys())
    texts: dict[str, str] = {}
    for name, field in fields.items():
        hint: Any = hints[name]
        if hint is str and field.metadata.get("choices"):
            hint = Literal[tuple(field.metadata["choices"])]
        texts[name] = _type_text(hint | None if field.default is None else hint)
    return texts


def _hints(config: type, fields: KeysView[str]) -> dict[str, Any]:
    """Return the annotations of some fields, evaluated; `Any` for a name that only type checkers import."""
    hints: dict[str, Any] = {}
    for base in reversed(config.__mro__):
        names = vars(sys.modules[base.__module__])
        annotations = inspect.get_annotations(base)
        for name in fields & annotations.keys():
            holder = types.SimpleNamespace(__annotations__={name: annotations[name]})
            try:
                hints |= typing.get_type_hints(holder, names, include_extras=True)
            except NameError:
                hints[name] = Any
    return hints


def _type_text(hint: Any) -> str:
    """Return an annotation that a YAML value can be checked against.

    Tuples and sets become lists, an enum the values of its members, and what YAML cannot write `Any`.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is not None and not arguments:
        hint = origin  # `typing.Dict` without arguments
    if isinstance(hint, type) and hint in _PLAIN:
        return _PLAIN[hint]
    if _is_text_enum(hint):
        return _literal(item.value for item in hint)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin is Literal:
        # `pissa_niter_[number of iters]` is a pattern that only the library knows.
        return _literal(arguments) + (" | str" if "[" in "".join(map(str, arguments)) else "")
    if origin in (Union, types.UnionType):
        texts = {_type_text(item) for item in arguments}
        # `Enum | str`: the library turns the text into the enum, so only the enum's values are valid.
        if any(map(_is_text_enum, arguments)):
            texts.discard("str")
        return "Any" if "Any" in texts else " | ".join(sorted(texts, key=_rank))
    if origin in (os.PathLike, tuple):
        return _PLAIN[origin]
    if origin in _SEQUENCES:
        return f"list[{_type_text(arguments[0])}]"
    if origin in (dict, Mapping) and arguments[0] in (str, int):
        return f"dict[{_type_text(arguments[0])}, {_type_text(arguments[1])}]"
    return "Any"


def _is_text_enum(hint: object) -> TypeGuard[type[enum.Enum]]:
    return isinstance(hint, type) and issubclass(hint, enum.Enum) and all(isinstance(item.value, str) for item in hint)


def _rank(text: str) -> tuple[int, str]:
    """Order the members of a union: `typing` caches unions, and may return one of another order than is written."""
    return _UNION_ORDER.index(re.split(r"\W", text)[0]), text


def _literal(values: Iterable[object]) -> str:
    return f"Literal[{', '.join(map(repr, values))}]"


def _dpo_losses() -> list[str]:
    """Return the names that TRL's DPO trainer compares `loss_type` with: no annotation lists them."""
    from trl.trainer.dpo_trainer import DPOTrainer

    return list(dict.fromkeys(re.findall(r'\bloss_type == "(\w+)"', inspect.getsource(DPOTrainer))))


def _generation_fields() -> dict[str, str]:
    """Return what GenerationConfig takes out of its `kwargs`, with the types that its docstring names."""
    from transformers import GenerationConfig

    init = cast("Callable[..., object]", GenerationConfig.__init__)  # pyright: ignore[reportUnknownMemberType]
    names = _argument_names(init) - {"kwargs", "transformers_version"}
    fields = dict.fromkeys(sorted(name for name in names if not name.startswith("_")), "Any")
    for name, text in _DOCUMENTED.findall(inspect.getdoc(GenerationConfig) or ""):
        parts = re.findall(r"`([^`]+)`", text)
        if name in fields and len(parts) == text.count(" or ") + 1:
            holder = types.SimpleNamespace(__annotations__={"type": " | ".join(parts)})
            try:
                fields[name] = _type_text(typing.get_type_hints(holder, dict(vars(typing)))["type"] | None)
            except (NameError, SyntaxError, TypeError):
                continue  # the docstring names a class, or no type at all
    return fields


def _from_pretrained_arguments() -> list[str]:
    """Return the names that `AutoModelForCausalLM.from_pretrained` takes for itself."""
    from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

    names: set[str] = set()
    for owner in (PreTrainedModel, AutoModelForCausalLM, PreTrainedConfig):
        for method in ("from_pretrained", "__post_init__", "from_dict"):
            if hasattr(owner, method):
                names |= _argument_names(getattr(owner, method))
    return sorted(name for name in names - _NOT_FOR_YAML if not name.startswith("_"))


def _argument_names(function: Callable[..., object]) -> set[str]:
    """Return the parameters of a function, and the names that it takes out of its `kwargs`."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {name for name, item in inspect.signature(function).parameters.items() if item.kind in named}
    return {*parameters, *_TAKEN_FROM_KWARGS.findall(inspect.getsource(function))} - {"self", "cls"}


def _model_configs() -> dict[str, FieldTypes]:
    """Return for each type of model that can be trained here what its config adds to PreTrainedConfig or retypes."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig
    from transformers.models.auto import modeling_auto

    trainable = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    base = _fields(PreTrainedConfig)
    return {
        name: {field: kind for field, kind in _fields(CONFIG_MAPPING[name]).items() if base.get(field) != kind}
        for name in sorted(trainable)
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table_text(library_table()), encoding="utf-8")
