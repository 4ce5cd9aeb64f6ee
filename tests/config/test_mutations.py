"""Whatever is done to a config, it ends in an experiment or in messages."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.dump import dump_yaml, provenance
from finetuning.config.yaml.overrides import apply_overrides
from finetuning.config.yaml.reader import parse_document
from finetuning.errors import ConfigError

TEXT = """\
method:
data_conf:
  training_data:
    type: PRECOMPUTE_WEIGHTED_MIX
    datasets: [{path: a.jsonl, sampling_weight: 2}, {path: b.jsonl}]
  validation_data: {type: AUTO_SPLIT, ratio: 0.1}
training_args:
  learning_rate: 1e-5
  warmup_ratio: 0.03
  torch_compile: no
  eval_strategy: steps
  report_to: [none]
  deepspeed: {train_batch_size: auto}
  group_by_length: true
batchsize_conf: {total_train_batch_size: 16, max_per_device_train_batch_size: 4}
peft_conf: {peft_type: LORA, peft_kwargs: {r: 8, target_modules: [q_proj]}}
quant_conf: {quantization_type: bits-and-bytes, load_in_4bit: true}
run_conf: {model: m, model_args: {torch_dtype: bfloat16, token: hf_secret, use_kernels: no}}
tracking: {mlflow_server_uri: 'http://me:hf_secret@host'}
"""
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["LORA", "NO_PEFT", "lora", "type", "1e400", "auto", "steps", [], {}, [[]], {"type": []}, -1, 0]),
    st.lists(st.integers() | st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=5) | st.integers(), st.integers() | st.none(), max_size=2),
)
WORDS = [*(word.strip("{}[],:") for word in TEXT.split()), "0", "7", "", "x"]
BOUNDED = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def outcome(document: Any, method: str, secret: str = "hf_secret") -> None:
    try:
        validated = validate(document, EXPERIMENTS[method])
    except ConfigError as error:
        lines = [str(problem) for problem in error.problems]
        assert lines and all(line.strip() for line in lines)
        assert len(set(lines)) == len(lines)
        assert secret not in str(error)
    else:
        assert secret not in dump_yaml(validated.experiment)
        assert provenance(validated.experiment, validated.document)
        assert secret not in "".join(str(warning) for warning in validated.warnings)


def sections(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    result = [value] if isinstance(value, dict | list) and value else []
    return result + [section for item in inner for section in sections(item)]


def mutate(values: dict[str, Any], data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(sections(values)))
    if isinstance(section, list):
        section[data.draw(st.integers(0, len(section) - 1))] = data.draw(ODD)
        return
    key = data.draw(st.sampled_from(sorted(section, key=str)))
    action = data.draw(st.sampled_from(["value", "remove", "rename", "move"]))
    if action == "value":
        section[key] = data.draw(ODD)
    elif action == "remove":
        del section[key]
    elif action == "rename" and isinstance(key, str):
        at = data.draw(st.integers(0, len(key)))
        inserted = data.draw(st.text("abcdefghijklmnopqrstuvwxyz_", max_size=2))
        section[key[:at] + inserted + key[at + 1 :]] = section.pop(key)
    else:
        values[key] = copy.deepcopy(section[key])


@BOUNDED
@given(data=st.data(), method=st.sampled_from(["sft", "dpo"]))
def test_mutated_values(data: st.DataObject, method: str) -> None:
    document = parse_document(TEXT, "config.yaml")
    values = copy.deepcopy(document.values)
    for _ in range(data.draw(st.integers(1, 3))):
        if values:
            mutate(values, data)
    outcome(type(document)(values, document.marks, document.file), method)


@BOUNDED
@given(data=st.data())
def test_mutated_text(data: st.DataObject) -> None:
    text = TEXT
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.text(max_size=3)) + text[at + data.draw(st.integers(0, 3)) :]
    try:
        document = parse_document(text, "config.yaml")
    except ConfigError as error:
        assert all(str(problem).strip() for problem in error.problems)
        return
    # The text itself was changed: what was a secret may be a key by now.
    outcome(document, "sft", secret="no text holds this")


@BOUNDED
@given(path=st.lists(st.sampled_from(WORDS), max_size=4), value=st.text())
def test_any_override(path: list[str], value: str) -> None:
    document = parse_document(TEXT, "config.yaml")
    try:
        document = apply_overrides(document, [f"{'.'.join(path)}={value}"])
    except ConfigError as error:
        assert str(error).startswith("command line")
        return
    outcome(document, "sft", secret="no text holds this")
