"""The table of library fields, compared with the libraries."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import ForkServer
from pydantic import ConfigDict, TypeAdapter

from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.sections.model import BitsAndBytes
from finetuning.config.validation import library_fields
from finetuning.config.validation import validate as validation
from finetuning.config.validation.library_fields import TABLE, LibraryFields, installed_fields, table_fields


@pytest.fixture
def libraries() -> LibraryFields:
    return table_fields()


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory, run_cli: Callable[..., Any]) -> Path:
    """The table of the installed libraries."""
    path = tmp_path_factory.mktemp("generated") / TABLE.name
    result = run_cli([path], program="finetuning.config.validation.introspection")
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.fixture
def of_other_versions(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], LibraryFields]]:
    """Makes the changed `table` the package's, as though it had been made from other versions of the libraries."""

    def put() -> LibraryFields:
        table["versions"]["transformers"] = "5.22.0"
        second = LibraryFields(table)
        monkeypatch.setattr(validation, "table_fields", lambda: second)
        monkeypatch.setattr(library_fields, "table_fields", lambda: second)
        installed_fields.cache_clear()
        return second

    yield put
    installed_fields.cache_clear()


def real_class(reference: str) -> type:
    import importlib

    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def accepts(kind: Any, value: Any) -> bool:
    return kind is Any or TypeAdapter(kind, config=ConfigDict(strict=False)).validate_python(value) == value


def test_the_table_is_that_of_the_installed_libraries(generated: Path) -> None:
    fresh = generated.read_text(encoding="utf-8") == TABLE.read_text(encoding="utf-8")
    assert fresh, f"{TABLE.name} is stale; run: make library-fields"


@pytest.mark.parametrize("method", EXPERIMENTS)
def test_trainer_configs(method: str, libraries: LibraryFields) -> None:
    reference = EXPERIMENTS[method].trainer_config
    fields = libraries.trainer_fields(reference)
    real = {field.name: field for field in dataclasses.fields(real_class(reference)) if field.init}
    assert fields.keys() == real.keys()
    for name, field in real.items():
        if field.default is not dataclasses.MISSING:
            default = getattr(field.default, "value", field.default)
            assert accepts(fields[name], default), name


def test_peft_configs(libraries: LibraryFields) -> None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert libraries.choices("peft_type") == [item.value for item in PeftType]
    for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = libraries.peft_fields(peft_type.value)
        real = {field.name: field for field in dataclasses.fields(config) if field.init}
        assert fields.keys() == real.keys(), peft_type
        for name, field in real.items():
            if field.default is not dataclasses.MISSING and isinstance(field.default, str | int | float | bool | None):
                assert accepts(fields[name], getattr(field.default, "value", field.default)), (peft_type, name)


def test_types_are_those_of_the_annotations(libraries: LibraryFields) -> None:
    from typing import Literal

    lora = libraries.peft_fields("LORA")
    assert lora["r"] is int
    assert lora["target_modules"] == list[str] | str | None
    assert lora["bias"] == Literal["none", "all", "lora_only"]
    assert str in lora["init_lora_weights"].__args__
    arguments = libraries.trainer_fields(EXPERIMENTS["sft"].trainer_config)
    assert arguments["hub_strategy"] == Literal["end", "every_save", "checkpoint", "all_checkpoints"]
    assert arguments["dataloader_num_workers"] is int
    assert arguments["neftune_noise_alpha"] == float | None


def test_dpo_losses(libraries: LibraryFields) -> None:
    import trl

    losses = libraries.choices("dpo_loss_type")
    assert len(losses) == 15
    documented = inspect.getdoc(trl.DPOConfig)
    assert all(f"'{loss}'" in documented for loss in losses)


def test_enums_and_trackers(libraries: LibraryFields) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert libraries.choices("lr_scheduler_type") == [item.value for item in SchedulerType]
    assert libraries.choices("optim") == [item.value for item in OptimizerNames]
    assert libraries.choices("report_to") == [*INTEGRATION_TO_CALLBACK, "all", "none"]


def test_bitsandbytes_section_has_the_librarys_arguments() -> None:
    from transformers import BitsAndBytesConfig

    signature = inspect.signature(BitsAndBytesConfig).parameters
    real = [name for name in signature if name != "kwargs"]
    assert [name for name in BitsAndBytes.model_fields if name != "quantization_type"] == real
    defaults = BitsAndBytes(quantization_type="bits-and-bytes").model_dump(exclude={"quantization_type"})
    # QLoRA's own choice; the plan says that it is not the library's default.
    assert defaults == {name: signature[name].default for name in real} | {"bnb_4bit_quant_type": "nf4"}


def test_generation_config(libraries: LibraryFields) -> None:
    from transformers import GenerationConfig

    fields = libraries.generation_fields()
    real = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {"transformers_version"}
    assert real <= fields.keys()
    GenerationConfig(**dict.fromkeys(fields))
    assert fields["max_new_tokens"] == int | None
    assert fields["do_sample"] == bool | None


def test_from_pretrained_arguments(libraries: LibraryFields) -> None:
    names = libraries.from_pretrained_arguments()
    assert {"dtype", "device_map", "attn_implementation", "revision", "use_kernels", "gguf_file"} <= set(names)
    assert not {"self", "config", "state_dict", "torch_dtype", "pretrained_model_name_or_path"} & set(names)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "mistral", "gemma3_text", "deepseek_v3"])
def test_model_configs(model_type: str, libraries: LibraryFields, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "my_own_key": 1}))
    fields = libraries.model_fields(str(tmp_path))
    real = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type]) if field.init}
    assert fields.keys() == real | {"model_type", "my_own_key"}


def test_names_that_the_table_lacks(libraries: LibraryFields, tmp_path: Path) -> None:
    assert libraries.trainer_fields("transformers.training_args:NoSuchClass") is None
    assert libraries.peft_fields("NO_SUCH_TYPE") is None
    assert libraries.model_fields(str(tmp_path / "nowhere")) is None


def test_the_table_counts_where_its_versions_are_installed(libraries: LibraryFields) -> None:
    assert libraries.is_current()
    assert installed_fields() is libraries


def test_the_table_counts_where_no_library_is_installed(table: dict[str, Any]) -> None:
    table["versions"] = {"a_package_that_nobody_wrote": "1.0"}
    assert LibraryFields(table).is_current()


def test_a_field_of_other_versions_is_accepted(
    table: dict[str, Any],
    of_other_versions: Callable,
    check: Callable,
    messages: Callable,
    changed: Callable,
    fork_server: ForkServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", fork_server.popen)
    del table["trainer_configs"][EXPERIMENTS["sft"].trainer_config]["dataloader_num_workers"]
    table["choices"]["optim"].remove("adafactor")
    assert not of_other_versions().is_current()
    text = changed(training_args="{dataloader_num_workers: '2', optim: adafactor}")
    assert check(text).experiment.training_args.model_extra == {"dataloader_num_workers": 2}
    lines = messages(changed(training_args="{dataloader_num_worker: 2}"))
    assert len(lines) == 1 and 'unknown key. Did you mean "dataloader_num_workers"?' in lines[0]


def test_a_config_that_the_table_accepts_imports_no_library(
    of_other_versions: Callable, check: Callable, changed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_other_versions()
    monkeypatch.setattr(library_fields.subprocess, "run", lambda *args, **kwargs: pytest.fail("started a process"))
    check(changed(training_args="{dataloader_num_workers: 2, optim: adafactor}"))


def test_the_table_counts_where_the_libraries_cannot_be_imported(
    of_other_versions: Callable, messages: Callable, changed: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_other_versions()
    monkeypatch.setattr(library_fields.sys, "executable", "/bin/false")
    assert "unknown key" in messages(changed(training_args="{dataloader_num_worker: 2}"))[0]


def test_what_the_checks_accept_the_libraries_accept(check: Callable, changed: Callable[..., str]) -> None:
    from peft import get_peft_config

    kwargs = "{r: 8, lora_alpha: 16, lora_dropout: 1e-1, target_modules: [q_proj], bias: none, use_rslora: yes}"
    conf = check(changed(peft_conf=f"{{peft_type: LORA, peft_kwargs: {kwargs}}}")).experiment.peft_conf
    made = get_peft_config({"peft_type": conf.peft_type, "task_type": conf.task_type, **conf.peft_kwargs})
    assert (made.r, made.lora_dropout, made.use_rslora) == (8, 0.1, True)
