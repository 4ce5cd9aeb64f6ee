"""The flags of `sft_trainer` stand for the keys of a JSON job."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from finetuning.config.yaml.reader import parse_document
from finetuning.errors import ConfigError
from finetuning.importers.fms.flags import read_flags
from finetuning.importers.fms.job import Readers, to_experiment

READERS = Readers(lambda path: {"training_data": path})
# The examples of fms-hf-tuning's README, with its spelling.
EXAMPLES = [
    (
        r"""--model_name_or_path /m --tokenizer_name_or_path /m --training_data_path t.json --output_dir out
        --num_train_epochs 5 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 1e-5
        --response_template "\n### Response:" --dataset_text_field "output" """,
        {
            "model_name_or_path": "/m",
            "tokenizer_name_or_path": "/m",
            "training_data_path": "t.json",
            "output_dir": "out",
            "num_train_epochs": 5,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-5,
            "response_template": r"\n### Response:",
            "dataset_text_field": "output",
        },
        [],
    ),
    (
        r"""--model_name_or_path /m --training_data_path t.json --output_dir out ---learning_rate 1e-4
        --response_template "\n## Label:" --data_formatter_template: "### Input: {{input}} \n\n##Label: {{output}}" """,
        {
            "model_name_or_path": "/m",
            "training_data_path": "t.json",
            "output_dir": "out",
            "learning_rate": 1e-4,
            "response_template": r"\n## Label:",
            "data_formatter_template": r"### Input: {{input}} \n\n##Label: {{output}}",
        },
        [
            "---learning_rate: read as --learning_rate",
            "--data_formatter_template:: read as --data_formatter_template",
        ],
    ),
    (
        r"""--model_name_or_path /m --training_data_path t.json --output_dir out --dataset_text_field output
        --response_template "\n### Label:" --peft_method "lora" --r 8 --lora_dropout 0.05 --lora_alpha 16
        --target_modules c_attn c_proj --auto_gptq triton_v2 --torch_dtype float16 --fp16
        --fast_kernels True True False --fused_lora auto_gptq True --padding-free huggingface --multipack 16""",
        {
            "model_name_or_path": "/m",
            "training_data_path": "t.json",
            "output_dir": "out",
            "dataset_text_field": "output",
            "response_template": r"\n### Label:",
            "peft_method": "lora",
            "r": 8,
            "lora_dropout": 0.05,
            "lora_alpha": 16,
            "target_modules": ["c_attn", "c_proj"],
            "auto_gptq": ["triton_v2"],
            "torch_dtype": "float16",
            "fp16": True,
            "fast_kernels": [True, True, False],
            "fused_lora": ["auto_gptq", True],
            "padding_free": ["huggingface"],
            "multipack": [16],
        },
        [],
    ),
    (
        r"""--model_name_or_path=/m --training_data_path t.json --output_dir out --dataset_text_field output
        --response_template "\n### Label:" --peft_method pt --prompt_tuning_init "RANDOM"
        --prompt_tuning_init_text "From the following input, identify" --no_dataloader_pin_memory
        --lr_scheduler_kwargs '{"num_cycles": 2}' --save-strategy no --seed -1""",
        {
            "model_name_or_path": "/m",
            "training_data_path": "t.json",
            "output_dir": "out",
            "dataset_text_field": "output",
            "response_template": r"\n### Label:",
            "peft_method": "pt",
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": "From the following input, identify",
            "dataloader_pin_memory": False,
            "lr_scheduler_kwargs": {"num_cycles": 2},
            "save_strategy": "no",
            "seed": -1,
        },
        [],
    ),
]


@pytest.mark.parametrize(("line", "job", "notes"), EXAMPLES)
def test_flags_translate_as_the_json_job_does(line: str, job: dict[str, Any], notes: list[str]) -> None:
    flags, flag_notes = read_flags(shlex.split(line))
    translated = to_experiment(flags, READERS, processes=2)
    expected = to_experiment(parse_document(json.dumps(job), "job.json"), READERS, processes=2)
    assert translated.values == expected.values
    assert translated.notes == expected.notes
    assert flag_notes == notes


def test_a_flag_may_be_shortened_as_argparse_takes_it() -> None:
    job, notes = read_flags(shlex.split("--data_config d.yaml --max_seq_len 8192 --packing=True --lora 3 --no_bf1"))
    assert job.values == {
        "data_config_path": "d.yaml", "max_seq_length": "8192", "packing": "True", "lora": "3", "bf1": "false",
    }  # fmt: skip
    assert notes == ["--data_config: read as --data_config_path", "--max_seq_len: read as --max_seq_length"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--lora_alfa 3", '--lora_alfa: unknown key. Did you mean "lora_alpha"?'),
        ("--r 8 9", "--r: takes one value, not 2; put it in quotes"),
        ("job.json --r 8", '"job.json" belongs to no flag. Flags begin with --.'),
        ("--lr_scheduler_kwargs {a", "--lr_scheduler_kwargs: is not valid JSON"),
        ("--training-data-path t.json", "--output_dir: is required"),
        ("--num-train-epochs none", "--num-train-epochs: must be a positive number, not 'none'"),
    ],
)
def test_errors_name_the_flag(line: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_experiment(read_flags(shlex.split(line))[0], READERS)
    assert expected in str(caught.value)
