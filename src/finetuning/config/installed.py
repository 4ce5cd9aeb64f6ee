"""What the installed transformers, TRL and PEFT accept, read from their source: none of them is imported.

Each question has one answer here. A library that is not installed answers None: nothing can be checked then.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from finetuning.config.annotations import AnnotationReader, enum_values
from finetuning.config.source import Module, Sources

Fields = dict[str, Any]
"""For each name that a class accepts, the type of its value; `Any` where the source does not tell."""

# Arguments of `from_pretrained` that are objects, that make it return something else, or let a pickle run code.
_NOT_FOR_YAML = frozenset(
    {
        "config", "state_dict", "tqdm_class", "output_loading_info", "device_mesh", "generation_config", "model_args",
        "pretrained_model_name_or_path", "distributed_config", "kernel_config", "kwargs", "cls", "config_dict",
        "name_or_path", "return_unused_kwargs", "torch_dtype", "weights_only",
    }
)  # fmt: skip
_DOCUMENTED = re.compile(r"^ *(\w+) \((`.+?)(?:, \*|, default|\)+:)", re.MULTILINE)


class Installed:
    """The installed libraries. Answers are worked out when asked for, and sources are parsed once per object."""

    def __init__(self) -> None:
        self._sources = Sources()
        self._annotations = AnnotationReader(self._sources)

    def has(self, package: str) -> bool:
        return self._sources.folder(package) is not None

    def class_fields(self, reference: str) -> Fields | None:
        """The fields of a config class, its bases' with them, given as `module:class`."""
        module_name, _, class_name = reference.partition(":")
        found = self._sources.find_class(module_name, class_name)
        if found is None:
            return None
        fields: Fields = {}
        for base in self._sources.with_bases(found):
            for node in base.node.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    self._take_field(fields, node, base.module)
        return fields

    def _take_field(self, fields: Fields, node: ast.AnnAssign, module: Module) -> None:
        name = node.target.id  # type: ignore[union-attr]
        if "ClassVar" in ast.dump(node.annotation) or name.startswith("_"):
            return
        if _keyword(node.value, "init", True) is False:
            fields.pop(name, None)
            return
        kind = self._annotations.read(node.annotation, module)
        choices = _choices(node.value)
        if choices and kind is str:
            kind = Literal[tuple(choices)]
        default = _keyword(node.value, "default", ...)
        if kind is not Any and default is None:
            kind = kind | None if kind is not None else Any
        fields[name] = kind

    def peft_types(self) -> list[str] | None:
        """The names of PEFT's adapter types."""
        found = self._sources.find_class("peft.utils.peft_types", "PeftType")
        return enum_values(found) if found else None

    def peft_fields(self, peft_type: str) -> Fields | None:
        """The arguments of the PEFT config of an adapter type; None when there is no such config."""
        for name in self._tuners(peft_type):
            module = self._sources.module(f"peft.tuners.{name}")
            class_name = _registered_config(module, peft_type) if module else None
            if class_name:
                return self.class_fields(f"peft.tuners.{name}:{class_name}")
        return None

    def _tuners(self, peft_type: str) -> Iterator[str]:
        """The folders of PEFT's tuners; the one named like the type, which is nearly always right, first."""
        folder = self._sources.folder("peft")
        if folder is None or not (folder / "tuners").is_dir():
            return
        names = sorted(path.parent.name for path in (folder / "tuners").glob("*/__init__.py"))
        yield from sorted(names, key=lambda name: name != peft_type.lower())

    def from_pretrained_arguments(self) -> list[str] | None:
        """The names that `AutoModelForCausalLM.from_pretrained` takes for itself."""
        places = (
            ("transformers.modeling_utils", "PreTrainedModel"),
            ("transformers.models.auto.auto_factory", "_BaseAutoModelClass"),
            ("transformers.configuration_utils", "PreTrainedConfig"),
        )
        names: set[str] = set()
        for module_name, class_name in places:
            found = self._sources.find_class(module_name, class_name)
            if found is None:
                return None
            for method in ("from_pretrained", "__post_init__", "from_dict"):
                names |= _argument_names(found.method(method))
        return sorted(name for name in names if not name.startswith("_") and name not in _NOT_FOR_YAML)

    def model_fields(self, model: str, environ: Mapping[str, str] = os.environ) -> Fields | None:
        """The keys of a model's own config: those of its config.json and the fields of its configuration class.

        None when the config is not on this machine, neither as a folder nor in the hub's cache.
        """
        config = _model_config(model, environ)
        if config is None:
            return None
        fields: Fields = dict.fromkeys((key for key in config if isinstance(key, str)), Any)
        base = self.class_fields("transformers.configuration_utils:PreTrainedConfig") or {}
        own = self._configuration_fields(str(config.get("model_type", "")))
        return {**base, **fields, **own}

    def _configuration_fields(self, model_type: str) -> Fields:
        mappings = self._sources.module("transformers.models.auto.auto_mappings") or self._sources.module(
            "transformers.models.auto.configuration_auto"
        )
        class_name = _pairs(mappings, "CONFIG_MAPPING_NAMES").get(model_type)
        if class_name is None:
            return {}
        special = _pairs(mappings, "SPECIAL_MODEL_TYPE_TO_MODULE_NAME")
        package = special.get(model_type, model_type.replace("-", "_"))
        name = f"transformers.models.{package}.configuration_{package}"
        return self.class_fields(f"{name}:{class_name}") or {}

    def generation_fields(self) -> Fields | None:
        """What `transformers.GenerationConfig` takes, with the types that its documentation names."""
        found = self._sources.find_class("transformers.generation.configuration_utils", "GenerationConfig")
        if found is None:
            return None
        fields: Fields = dict.fromkeys(
            sorted(name for name in _argument_names(found.method("__init__")) if not name.startswith("_")), Any
        )
        for name, text in _DOCUMENTED.findall(found.docstring):
            parts = re.findall(r"`([^`]+)`", text)
            if name in fields and len(parts) == text.count(" or ") + 1:
                kind = self._annotations.read(ast.Constant(" | ".join(parts)), found.module)
                fields[name] = Any if kind is Any else kind | None
        for name in ("transformers_version", "kwargs"):
            fields.pop(name, None)
        return fields

    def bitsandbytes_arguments(self) -> list[str] | None:
        """The arguments of `transformers.BitsAndBytesConfig`."""
        found = self._sources.find_class("transformers.utils.quantization_config", "BitsAndBytesConfig")
        method = found.method("__init__") if found else None
        return None if method is None else [item.arg for item in method.args.args if item.arg != "self"]

    def dpo_losses(self) -> list[str] | None:
        """The names that TRL's DPO trainer compares `loss_type` with."""
        found = self._sources.find_class("trl.trainer.dpo_trainer", "DPOTrainer")
        if found is None:
            return None
        names = [
            node.comparators[0].value
            for node in ast.walk(found.node)
            if isinstance(node, ast.Compare)
            and isinstance(node.left, ast.Name)
            and node.left.id == "loss_type"
            and isinstance(node.ops[0], ast.Eq)
            and isinstance(node.comparators[0], ast.Constant)
        ]
        return list(dict.fromkeys(names)) or None

    def trackers(self) -> list[str] | None:
        """The names that `report_to` takes."""
        module = self._sources.module("transformers.integrations.integration_utils")
        table = module.value_of("INTEGRATION_TO_CALLBACK") if module else None
        if not isinstance(table, ast.Dict):
            return None
        return [*(key.value for key in table.keys if isinstance(key, ast.Constant)), "all", "none"]

    def choices(self, reference: str) -> list[str] | None:
        """The values of an enum, given as `module:class`."""
        module_name, _, class_name = reference.partition(":")
        found = self._sources.find_class(module_name, class_name)
        return (enum_values(found) or None) if found else None


def _keyword(node: ast.expr | None, name: str, default: Any) -> Any:
    """A constant keyword of a `field(…)` call; for `default`, a plain constant default too."""
    if isinstance(node, ast.Constant) and name == "default":
        return node.value
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg == name and isinstance(keyword.value, ast.Constant):
                return keyword.value.value
    return default


def _choices(node: ast.expr | None) -> list[Any]:
    """The `choices` in a dataclass field's metadata."""
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                        return [item.value for item in value.elts if isinstance(item, ast.Constant)]
    return []


def _registered_config(module: Module, peft_type: str) -> str | None:
    """The class that a tuner's `register_peft_method(name=…, config_cls=…)` names for an adapter type."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "register_peft_method":
            arguments = {keyword.arg: keyword.value for keyword in node.keywords}
            name, config = arguments.get("name"), arguments.get("config_cls")
            is_named = isinstance(name, ast.Constant) and str(name.value).upper() == peft_type
            if is_named and isinstance(config, ast.Name):
                return config.id
    return None


def _argument_names(method: ast.FunctionDef | None) -> set[str]:
    """The parameters of a method, and the names that it takes out of its `kwargs`."""
    if method is None:
        return set()
    names = {item.arg for item in (*method.args.args, *method.args.kwonlyargs) if item.arg not in ("self", "cls")}
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("pop", "get")
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id.endswith("kwargs")
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            names.add(node.args[0].value)
    return names


def _pairs(module: Module | None, name: str) -> dict[str, str]:
    """A table of (text, text) pairs that a module assigns to a name."""
    table = module.value_of(name) if module else None
    found: dict[str, str] = {}
    for node in ast.walk(table) if table is not None else ():
        if isinstance(node, ast.Tuple) and len(node.elts) == 2:
            key, value = node.elts
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                found[str(key.value)] = str(value.value)
    return found


def _model_config(model: str, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """A model's config.json, from its folder or from the hub's cache."""
    for folder in (Path(model), _cached_snapshot(model, environ)):
        path = folder / "config.json" if folder else None
        if path is not None and path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return None
            return content if isinstance(content, dict) else None
    return None


def _cached_snapshot(model: str, environ: Mapping[str, str]) -> Path | None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        return None
    home = environ.get("HF_HOME") or str(Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface").expanduser())
    cache = Path(environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    folder = cache / f"models--{model.replace('/', '--')}"
    try:
        return folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
