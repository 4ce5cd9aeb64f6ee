"""What is read from the source of the installed libraries, compared with the imported classes themselves."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ConfigDict, TypeAdapter

from finetuning.config.installed import Installed
from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.sections.model import BitsAndBytes


@pytest.fixture(scope="module")
def installed() -> Installed:
    return Installed()


def real_class(reference: str) -> type:
    import importlib

    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def accepts(kind: Any, value: Any) -> bool:
    return kind is Any or TypeAdapter(kind, config=ConfigDict(strict=False)).validate_python(value) == value


@pytest.mark.parametrize("method", EXPERIMENTS)
def test_trainer_configs(method: str, installed: Installed) -> None:
    reference = EXPERIMENTS[method].trainer_config
    fields = installed.class_fields(reference)
    real = {field.name: field for field in dataclasses.fields(real_class(reference)) if field.init}
    assert fields.keys() == real.keys()
    for name, field in real.items():
        if field.default is not dataclasses.MISSING:
            default = getattr(field.default, "value", field.default)
            assert accepts(fields[name], default), name


def test_peft_configs(installed: Installed) -> None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert installed.peft_types() == [item.value for item in PeftType]
    for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = installed.peft_fields(peft_type.value)
        real = {field.name: field for field in dataclasses.fields(config) if field.init}
        assert fields.keys() == real.keys(), peft_type
        for name, field in real.items():
            if field.default is not dataclasses.MISSING and isinstance(field.default, str | int | float | bool | None):
                assert accepts(fields[name], getattr(field.default, "value", field.default)), (peft_type, name)


def test_dpo_losses(installed: Installed) -> None:
    import trl

    losses = installed.dpo_losses()
    assert len(losses) == 15
    documented = inspect.getdoc(trl.DPOConfig)
    assert all(f"'{loss}'" in documented for loss in losses)


def test_enums_and_trackers(installed: Installed) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert installed.choices("transformers.trainer_utils:SchedulerType") == [item.value for item in SchedulerType]
    assert installed.choices("transformers.training_args:OptimizerNames") == [item.value for item in OptimizerNames]
    assert installed.trackers() == [*INTEGRATION_TO_CALLBACK, "all", "none"]


def test_bitsandbytes_section_has_the_librarys_arguments(installed: Installed) -> None:
    from transformers import BitsAndBytesConfig

    real = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    assert installed.bitsandbytes_arguments() == real
    assert [name for name in BitsAndBytes.model_fields if name != "quantization_type"] == real
    defaults = BitsAndBytes(quantization_type="bits-and-bytes").model_dump(exclude={"quantization_type"})
    signature = inspect.signature(BitsAndBytesConfig).parameters
    assert defaults == {name: signature[name].default for name in real}


def test_generation_config(installed: Installed) -> None:
    from transformers import GenerationConfig

    fields = installed.generation_fields()
    real = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {"transformers_version"}
    assert real <= fields.keys()
    GenerationConfig(**dict.fromkeys(fields))
    assert fields["max_new_tokens"] == int | None
    assert fields["do_sample"] == bool | None


def test_from_pretrained_arguments(installed: Installed) -> None:
    names = installed.from_pretrained_arguments()
    assert {"dtype", "device_map", "attn_implementation", "revision", "use_kernels", "gguf_file"} <= set(names)
    assert not {"self", "config", "state_dict", "torch_dtype", "pretrained_model_name_or_path"} & set(names)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "mistral", "gemma3_text", "deepseek_v3"])
def test_model_configs(model_type: str, installed: Installed) -> None:
    from transformers import CONFIG_MAPPING

    fields = installed._configuration_fields(model_type)
    real = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type]) if field.init}
    assert fields.keys() == real


def test_a_library_that_is_not_there(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not installed.has("a_package_that_nobody_wrote")
    assert installed.class_fields("a_package_that_nobody_wrote.config:Config") is None
    assert installed.class_fields("transformers.training_args:NoSuchClass") is None
    assert installed.peft_fields("NO_SUCH_TYPE") is None


def test_what_the_checks_accept_the_libraries_accept(
    check: Callable, changed: Callable[..., str], installed: Installed
) -> None:
    from peft import get_peft_config

    kwargs = "{r: 8, lora_alpha: 16, lora_dropout: 1e-1, target_modules: [q_proj], bias: none, use_rslora: yes}"
    conf = check(changed(peft_conf=f"{{peft_type: LORA, peft_kwargs: {kwargs}}}")).experiment.peft_conf
    made = get_peft_config({"peft_type": conf.peft_type, "task_type": conf.task_type, **conf.peft_kwargs})
    assert (made.r, made.lora_dropout, made.use_rslora) == (8, 0.1, True)
