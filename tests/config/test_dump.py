from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.config.redaction import is_secret_key
from finetuning.config.sections.experiment import EXPERIMENTS, DPOExperiment, GenerationConfig, SFTExperiment
from finetuning.config.validation.library_fields import table_fields
from finetuning.config.validation.section_tree import walk
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.dump import dump_yaml, provenance
from finetuning.config.yaml.overrides import apply_overrides
from finetuning.config.yaml.reader import parse_document

FULL = """\
data_conf:
  training_data:
    type: PRECOMPUTE_WEIGHTED_MIX
    datasets: [{path: a.jsonl}, {path: '1e-5', sampling_weight: 0.5}]
  validation_data: {type: AUTO_SPLIT, ratio: 0.1}
  chat_template_name: keep-original
training_args:
  learning_rate: 1e-5
  warmup_ratio: 0.03
  eval_strategy: steps
  save_strategy: no
  report_to: [none]
  run_name: '2024-05-01'
  optim_args: "a: b\\nc\\td"
  gradient_checkpointing_kwargs: {x: '010', y: 'true', z: [1e-7, 3]}
overrides: {lr_multiplier: 2, lr_batch_size_scaling: sqrt}
batchsize_conf: {total_train_batch_size: 16, max_per_device_train_batch_size: 4}
peft_conf: {peft_type: LORA, peft_kwargs: {r: 8, lora_dropout: 1e-1, target_modules: all-linear}}
quant_conf: {quantization_type: bits-and-bytes, load_in_4bit: true}
run_conf:
  model: m
  resume_from_checkpoint: auto
  model_args: {device_map: {'': 0}, max_memory: {0: 20GB, cpu: 1e9}, torch_dtype: bfloat16}
tracking: {mlflow_server_uri: 'sqlite:///x.db'}
"""


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_dump_validates_again_to_an_equal_experiment(method: str) -> None:
    validated = validate(parse_document(FULL, "config.yaml"), EXPERIMENTS[method])
    text = dump_yaml(validated.experiment)
    again = validate(parse_document(text, "resolved.yaml"), EXPERIMENTS[method])
    assert again.experiment == validated.experiment
    assert again.warnings == []
    assert dump_yaml(again.experiment) == text


def test_what_a_dump_holds() -> None:
    validated = validate(parse_document(FULL, "config.yaml"), SFTExperiment)
    values = parse_document(dump_yaml(validated.experiment)).values
    assert values["training_args"]["learning_rate"] == 1e-5
    assert values["training_args"]["weight_decay"] == 0.0
    assert values["training_args"]["save_strategy"] == "no"
    assert values["run_conf"]["model_args"]["max_memory"] == {0: "20GB", "cpu": 1e9}
    assert not {"per_device_train_batch_size", "gradient_accumulation_steps"} & values["training_args"].keys()
    other_readers = yaml.safe_load(dump_yaml(validated.experiment))
    assert other_readers == values


def test_a_dump_holds_no_secret(check: Callable, changed: Callable[..., str]) -> None:
    text = changed(
        training_args="{hub_token: hf_secret, accelerator_config: {password: hf_secret}, report_to: none}",
        run_conf="{model: m, model_args: {token: hf_secret, proxies: {authorization: hf_secret}}}",
    )
    experiment = check(text).experiment
    assert experiment.run_conf.model_args.token.get_secret_value() == "hf_secret"
    assert "hf_secret" not in dump_yaml(experiment)
    assert "hf_secret" not in repr(experiment.run_conf.model_args.token)


def test_a_generation_config_is_dumped() -> None:
    text = "prompt_conf: {type: open-input, input: 'no'}\nmodel_conf: {model: m}\nhf_gen_params: {temperature: 1e-1}\n"
    config = validate(parse_document(text), GenerationConfig).experiment
    assert validate(parse_document(dump_yaml(config)), GenerationConfig).experiment == config


def test_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINTS_PATH", "/from/environment")
    document = apply_overrides(parse_document(FULL, "config.yaml"), ["training_args.seed=3", "run_conf.model=other"])
    validated = validate(document, DPOExperiment)
    origins = provenance(validated.experiment, validated.document)
    expected = {
        "data_conf.training_data.datasets.1.sampling_weight": "config.yaml:4",
        "data_conf.training_data.datasets.0.sampling_weight": "default",
        "training_args.learning_rate": "config.yaml:8",
        "training_args.warmup_steps": "config.yaml:9",
        "training_args.seed": "command line",
        "training_args.beta": "default",
        "training_args.output_dir": "environment variable CHECKPOINTS_PATH",
        "run_conf.model": "command line",
        "run_conf.model_args.dtype": "config.yaml:23",
        "peft_conf.peft_kwargs.r": "config.yaml:18",
        "tracking.mlflow_server_uri": "config.yaml:24",
        "tracking.run_id": "default",
    }
    assert {key: origins[key] for key in expected} == expected
    assert validated.experiment.training_args.output_dir == "/from/environment"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(
        ["1e-5", "010", "no", "1:30", "<<", "0x1", "~", ".5", "5.", "1_0", "=", "- a", "a: b", "#", "\x85", "\u2028"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(value=PLAIN)
def test_any_plain_value_is_written_so_that_it_is_read_again(value: object) -> None:
    config = GenerationConfig.model_validate(
        {"prompt_conf": {"type": "open-input"}, "model_conf": {"model": "m"}, "hf_gen_params": {"x": value}}
    )
    written = parse_document(dump_yaml(config)).values["hf_gen_params"]
    assert written == config.model_dump()["hf_gen_params"] or has_secret(value)


def has_secret(value: object) -> bool:
    if isinstance(value, dict):
        return any(is_secret_key(key) or has_secret(item) for key, item in value.items())
    return isinstance(value, list) and any(has_secret(item) for item in value)


@pytest.mark.parametrize("method", EXPERIMENTS)
def test_the_keys_of_the_yaml_that_look_like_secrets_are_secrets(method: str) -> None:
    fields = [(name, field) for _, name, field in walk(EXPERIMENTS[method])]
    assert {name for name, field in fields if is_secret_key(name) and not field.exclude} == set()
    assert {name for name, field in fields if is_secret_key(name)} == {"token", "headers"}


def test_of_the_keys_of_libraries_only_tokens_of_the_hub_look_like_secrets() -> None:
    libraries = table_fields()
    configs = [libraries.trainer_fields(experiment.trainer_config) or {} for experiment in EXPERIMENTS.values()]
    adapters = [libraries.peft_fields(name) or {} for name in libraries.choices("peft_type")]
    names = {name for fields in (*configs, *adapters, libraries.generation_fields()) for name in fields}
    assert "lora_alpha" in names
    assert {name for name in names if is_secret_key(name)} <= {"hub_token", "push_to_hub_token"}
