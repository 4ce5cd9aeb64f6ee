"""Translation of axolotl, LLaMA-Factory and TRL configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.document import ConfigDocument
from finetuning.config.yaml.overrides import unescape
from finetuning.config.yaml.reader import parse_document
from finetuning.data.text_template import TextTemplate
from finetuning.errors import ConfigError
from finetuning.importers import ENGINES, detect_engine, to_yaml
from finetuning.importers.translation import Translation

AXOLOTL = """
base_model: /m
datasets:
  - {path: rows.jsonl, type: chat_template, field_messages: turns}
val_set_size: 0.05
chat_template: chatml
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
output_dir: ./out
wandb_project: mine
wandb_entity: team
"""
LLAMA_FACTORY = """
model_name_or_path: /m
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
output_dir: saves/m
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
plot_loss: true
"""
TRL = """
model_name_or_path: /m
dataset_name: someone/rows
dataset_train_split: train
use_peft: true
lora_r: 32
lora_target_modules: [q_proj, v_proj]
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 2e-4
max_length: 1024
eval_strategy: steps
eval_steps: 100
output_dir: out
push_to_hub: true
"""
DPO = "model_name_or_path: /m\ndataset_name: a/b\nbeta: 0.2\noutput_dir: out\n"


def imported(text: str) -> tuple[str, Translation]:
    document = parse_document(text, "theirs.yaml")
    engine = detect_engine(document)
    return engine, ENGINES[engine](document, 2)


@pytest.mark.parametrize(
    ("text", "engine", "method"),
    [
        (AXOLOTL, "axolotl", "sft"),
        (LLAMA_FACTORY, "llama-factory", "sft"),
        (TRL, "trl", "sft"),
        (DPO, "trl", "dpo"),
        (AXOLOTL.replace("sample_packing: true", "rl: ipo"), "axolotl", "dpo"),
    ],
)
def test_the_translation_is_a_valid_config(text: str, engine: str, method: str) -> None:
    detected, translation = imported(text)
    assert (detected, translation.values["method"]) == (engine, method)
    document = parse_document(to_yaml(translation, engine), "ours.yaml")
    assert not validate(document, EXPERIMENTS[method]).experiment.run_conf.tokenizer


def test_values_are_carried_over() -> None:
    def values(text: str) -> dict[str, Any]:
        return imported(text)[1].values

    axolotl = values(AXOLOTL)
    assert axolotl["batchsize_conf"]["total_train_batch_size"] == 16
    assert axolotl["sft_args"] == {"max_seq_length": 4096, "packing": True, "train_on": "assistant"}
    assert axolotl["peft_conf"]["peft_kwargs"] == {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    assert axolotl["quant_conf"]["load_in_4bit"] and axolotl["data_conf"]["chat_template_name"] == "chat-ml"
    assert axolotl["data_conf"]["training_data"]["datasets"] == [
        {"path": "rows.jsonl", "format": "messages", "columns": {"turns": "messages"}}
    ]
    llama_factory = values(LLAMA_FACTORY)
    assert llama_factory["data_conf"]["validation_data"] == {"type": "AUTO_SPLIT", "ratio": 0.1}
    assert llama_factory["training_args"]["warmup_ratio"] == 0.1
    trl = values(TRL)
    assert trl["peft_conf"]["peft_kwargs"] == {
        **{"r": 32, "lora_alpha": 32, "lora_dropout": 0.05},
        "target_modules": ["q_proj", "v_proj"],
    }
    assert trl["data_conf"]["validation_data"]["datasets"][0]["split"] == "test"
    assert values(DPO)["training_args"]["beta"] == 0.2


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (AXOLOTL, "wandb_entity: not carried over: team"),
        (LLAMA_FACTORY, "identity is a name of dataset_info.json"),
        (LLAMA_FACTORY, "llama3 is not available"),
        (TRL, "push_to_hub: not carried over"),
    ],
)
def test_what_is_left_out_is_noted(text: str, note: str) -> None:
    assert any(note in line for line in imported(text)[1].notes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1", "cannot detect the engine"),
        ("base_model: /m\nrl: ppo", "rl: ppo cannot be imported"),
        ("base_model: /m\nadapter: llama-adapter", "cannot be imported"),
    ],
)
def test_configs_that_cannot_be_imported(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        imported(text)
    assert expected in str(caught.value)


FILES = sorted((Path(__file__).parent / "examples").glob("*.yaml"))
# Keys that only affect how the other engine ran, or that match what always happens here.
SILENT = {"strict", "pad_to_sequence_len", "dataset_prepared_path", "do_train", "overwrite_cache", "plot_loss"}
SILENT |= {"preprocessing_num_workers", "overwrite_output_dir", "quantization_method", "lora_task_type"}
# Keys with the same value as the other engine's default: a config without them has the same result.
DEFAULTS = {"load_in_4bit", "load_in_8bit", "sample_packing", "chat_template", "bnb_4bit_quant_type", "val_set_size"}
DEFAULTS |= {"adapter", "assistant_only_loss", "gradient_checkpointing", "bf16", "lora_alpha", "max_length", "stage"}
DEFAULTS |= {
    "finetuning_type",
    "lora_target",
    "lora_dropout",
    "lora_rank",
    "micro_batch_size",
    "report_to",
    "learning_rate",
}


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_every_key_is_carried_over_or_noted(file: Path) -> None:
    text = file.read_text()
    engine, translation = imported(text)
    method = translation.values["method"]
    ours = parse_document(to_yaml(translation, engine), "ours.yaml")
    validate(ours, EXPERIMENTS[method])
    lost = []
    document = parse_document(text, "theirs.yaml")
    for key, value in document.values.items():
        rest = ConfigDocument({name: value for name, value in document.values.items() if name != key}, document.file)
        if value is not None and key not in SILENT | DEFAULTS:
            without = ENGINES[engine](rest, 2)
            lost += [key] if (without.values, without.notes) == (translation.values, translation.notes) else []
    assert lost == []


def test_values_of_published_examples() -> None:
    def values(name: str) -> dict[str, Any]:
        return imported((Path(__file__).parent / "examples" / f"{name}.yaml").read_text())[1].values

    dpo = values("axolotl_dpo")
    assert (dpo["training_args"]["beta"], dpo["training_args"]["max_length"]) == (0.1, 4096)
    assert dpo["quant_conf"] == {"quantization_type": "bits-and-bytes", "load_in_8bit": True}
    assert values("axolotl_qlora")["training_args"]["gradient_checkpointing"] is True
    dpo = values("llama_factory_dpo")
    assert (dpo["training_args"]["loss_type"], dpo["training_args"]["max_length"]) == (["sigmoid"], 2048)
    assert dpo["peft_conf"]["peft_kwargs"] == {"r": 8, "target_modules": "all-linear", "lora_alpha": 16}
    lora = values("llama_factory_qlora")
    assert lora["quant_conf"]["bnb_4bit_compute_dtype"] == "float16"
    assert lora["quant_conf"]["bnb_4bit_use_double_quant"] is False
    assert lora["overrides"]["loraplus_lr_ratio"] == 16.0
    assert lora["run_conf"]["model_args"]["attn_implementation"] == "flash_attention_2"
    dpo = values("trl_dpo")
    assert dpo["training_args"]["label_smoothing"] == 0.05 and dpo["training_args"]["bf16"] is True
    assert dpo["peft_conf"]["peft_kwargs"] == {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05}
    mixed = values("trl_qlora")["data_conf"]["training_data"]["datasets"]
    assert mixed == [{"path": "trl-lib/tldr", "split": "train"}, {"path": "data/own.jsonl"}]


def test_trackers_of_axolotl_are_carried_over() -> None:
    axolotl = imported(AXOLOTL)[1].values["tracking"]
    assert axolotl["trackers"] == ["wandb"] and axolotl["experiment_name"] == "mine"
    text = AXOLOTL.replace("wandb_project: mine", "use_tensorboard: true\nuse_wandb: false")
    assert imported(text)[1].values["tracking"]["trackers"] == ["tensorboard"]


@pytest.mark.parametrize("extra", [{}, {"input": "two"}])
def test_alpaca_rows_become_the_text_that_axolotl_makes_of_them(extra: dict[str, str]) -> None:
    text = "base_model: m\nsequence_len: 64\nmicro_batch_size: 1\ndatasets: [{path: a.jsonl, type: alpaca}]\n"
    source = imported(text)[1].values["data_conf"]["training_data"]["datasets"][0]
    template = TextTemplate(unescape(source["data_formatter_template"]))
    rendered = template({"instruction": "Say it.", "output": "it", **extra}, {})
    asked = ", paired with an input that provides further context" if extra else ""
    section = "### Input:\ntwo\n\n" if extra else ""
    assert rendered == (
        f"Below is an instruction that describes a task{asked}. Write a response that appropriately completes the"
        f" request.\n\n### Instruction:\nSay it.\n\n{section}### Response:\nit"
    )
    assert source["response_template"] in source["data_formatter_template"]
