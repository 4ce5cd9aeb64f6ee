from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.validation.cross_field import EVALUATION_METRICS

MIX = "{training_data: {type: PRECOMPUTE_WEIGHTED_MIX, datasets: [{path: a, sampling_weight: 0}, {path: b,"
ONE = "{training_data: {type: CONCATENATION, datasets: [{path: a, "
VALIDATION = "{training_data: {type: CONCATENATION, datasets: [{path: a}]}, validation_data: {type: AUTO_SPLIT}}"
LORA = "{peft_type: LORA}"


@pytest.mark.parametrize(
    ("sections", "method", "lines"),
    [
        (
            {"training_args": "{auto_find_batch_size: true}"},
            "sft",
            ["training_args.auto_find_batch_size: would halve the batch and leave the accumulation as it is: the total"
             " batch would no longer be batchsize_conf.total_train_batch_size. Remove it, and set"
             " batchsize_conf.max_per_device_train_batch_size: auto, or to a smaller number."],
        ),
        (
            {"training_args": "{gradient_checkpointing: selective,"
             " gradient_checkpointing_kwargs: {use_reentrant: true}}"},
            "sft",
            ["training_args.gradient_checkpointing_kwargs.use_reentrant: is true, but"
             " training_args.gradient_checkpointing is selective: reentrant checkpointing recomputes all. Remove it, or"
             " set gradient_checkpointing: true."],
        ),
        (
            {"training_args": "{dataloader_num_workers: 1000000}"},
            "sft",
            ["training_args.dataloader_num_workers: is 1,000,000: each is a process, and no machine has use for more"
             " than 1,024. Set at most the number of CPU cores."],
        ),
        (
            {"training_args": "{eval_on_start: true}"},
            "sft",
            ['training_args.eval_on_start: is true, but data_conf.validation_data.type is "NONE".'
             " Give validation data, or set eval_on_start: false."],
        ),
        (
            {"training_args": "{dataloader_persistent_workers: true}"},
            "sft",
            ["training_args.dataloader_persistent_workers: needs training_args.dataloader_num_workers above 0."],
        ),
        (
            {"training_args": "{eval_strategy: steps}"},
            "sft",
            ['training_args.eval_strategy: is "steps", but data_conf.validation_data.type is "NONE".'
             " Give validation data, or set eval_strategy: no."],
        ),
        (
            {"data_conf": MIX + " sampling_weight: 0}]}, validation_data: {type: NONE}}"},
            "sft",
            ['data_conf.training_data.datasets.0.sampling_weight: is 0 for "a", as for every dataset: no row would'
             " be drawn.",
             'data_conf.training_data.datasets.1.sampling_weight: is 0 for "b", as for every dataset: no row would'
             " be drawn."],
        ),
        (
            {"data_conf": MIX + " sampling_weight: -1}]}, validation_data: {type: NONE}}"},
            "sft",
            ["data_conf.training_data.datasets.1.sampling_weight: must be >= 0 (got -1)"],
        ),
        (
            {"sft_args": "{train_on: all, train_on_completions_only: true}"},
            "sft",
            ["sft_args.train_on: is all, but sft_args.train_on_completions_only is true. Leave one of them out."],
        ),
        (
            {"data_conf": ONE + "validation_ratio: 0.5}]}, validation_data: {type: NONE}}"},
            "sft",
            ["data_conf.training_data.datasets.0.validation_ratio: is set, but data_conf.validation_data.type is NONE."
             " Set validation_data.type: FROM_DATASETS."],
        ),
        (
            {"data_conf": ONE + "max_rows: 1}]}, validation_data: {type: FROM_DATASETS}}",
             "training_args": "{eval_strategy: epoch}"},
            "sft",
            ["data_conf.validation_data.type: is FROM_DATASETS, but no dataset has a validation_ratio."],
        ),
        (
            {"data_conf": ONE + "validation_ratio: 0.5, train_ratio: 0.6}]}, validation_data: {type: FROM_DATASETS}}",
             "training_args": "{eval_strategy: epoch}"},
            "sft",
            ["data_conf.training_data.datasets.0.validation_ratio: is 0.5, and train_ratio 0.6: more than all."],
        ),
        (
            {"data_conf": ONE + "instruction_template: a, dataset_text_field: b, data_formatter_template: c,"
             " format: response_template}]}, validation_data: {type: NONE}}"},
            "sft",
            ["data_conf.training_data.datasets.0.instruction_template: requires response_template.",
             "data_conf.training_data.datasets.0.data_formatter_template: is set, and so is dataset_text_field;"
             " set one of them.",
             "data_conf.training_data.datasets.0.format: is response_template, but the dataset has no"
             " response_template."],
        ),
        (
            {"data_conf": ONE + "}]}, validation_data: {type: NONE}, chat_template: a, chat_template_name: poro}"},
            "sft",
            ["data_conf.chat_template: is set, and so is chat_template_name; set one of them."],
        ),
        (
            {"quant_conf": "{quantization_type: bits-and-bytes, load_in_4bit: true}"},
            "sft",
            ["peft_conf.peft_type: is NO_PEFT, but quant_conf quantizes the model: quantized weights cannot be trained."
             " Choose an adapter such as LORA, or quantization_type: no-quantization."],
        ),
        (
            {"peft_conf": LORA,
             "quant_conf": "{quantization_type: bits-and-bytes, load_in_4bit: yes, load_in_8bit: yes}"},
            "sft",
            ["quant_conf: load_in_4bit and load_in_8bit are both true; set one of them."],
        ),
        (
            {"peft_conf": LORA, "quant_conf": "{quantization_type: bits-and-bytes}"},
            "sft",
            ["quant_conf: neither load_in_4bit nor load_in_8bit is true; set one of them."],
        ),
        (
            {"training_args": "{bf16: true, fp16: true}"},
            "sft",
            ["training_args.fp16: is true, and so is training_args.bf16; set one of them."],
        ),
        ({"training_args": "{max_steps: 0}"}, "sft",
         ["training_args.max_steps: must be > 0, or -1 for num_train_epochs to decide (got 0)"]),
        ({"training_args": "{max_steps: -2}"}, "sft", ["training_args.max_steps: must be >= -1 (got -2)"]),
        (
            {"training_args": "{num_train_epochs: -1}"},
            "sft",
            ["training_args.num_train_epochs: must be > 0 unless training_args.max_steps is (got -1, and"
             " max_steps -1)"],
        ),
        (
            {"training_args": "{lr_scheduler_type: reduce_lr_on_plateau}"},
            "sft",
            ['training_args.lr_scheduler_type: "reduce_lr_on_plateau" needs training_args.eval_strategy: steps or'
             " epoch."],
        ),
        (
            {"training_args": "{load_best_model_at_end: true}"},
            "sft",
            ["training_args.load_best_model_at_end: needs evaluations, but training_args.eval_strategy is no."],
        ),
        (
            {"training_args": "{load_best_model_at_end: true, eval_strategy: epoch}", "data_conf": VALIDATION},
            "sft",
            ["training_args.load_best_model_at_end: needs save_strategy and eval_strategy to match, but they are steps"
             " and epoch."],
        ),
        (
            {"training_args": "{load_best_model_at_end: true, eval_strategy: steps, eval_steps: 30, save_steps: 40}",
             "data_conf": VALIDATION},
            "sft",
            ["training_args.load_best_model_at_end: needs save_steps (40) to be a multiple of eval_steps (30), in the"
             " same unit."],
        ),
        (
            {"training_args": "{save_strategy: best}"},
            "sft",
            ["training_args.save_strategy: needs evaluations, but training_args.eval_strategy is no."],
        ),
        (
            {"tracking": "{mlflow_server_uri: 'https://user@host'}"},
            "sft",
            ["tracking.mlflow_server_uri: holds a user name or password."
             " Take it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."],
        ),
        (
            {"training_args": "{loss_type: [sigmoid, sft], loss_weights: [1.0]}"},
            "dpo",
            ["training_args.loss_weights: has 1 weights for 2 losses in training_args.loss_type."],
        ),
        (
            {"training_args": "{deepspeed: {train_batch_size: 8, train_micro_batch_size_per_gpu: 5,"
                              " gradient_accumulation_steps: no}}"},
            "sft",
            ['training_args.deepspeed.train_batch_size: is 8, but batchsize_conf.total_train_batch_size is 16.'
             ' Write "auto", or leave it out.',
             "training_args.deepspeed.train_micro_batch_size_per_gpu: is 5, but batchsize_conf asks for a total of 16"
             ' with at most 4 rows per device. Write "auto", or leave it out.',
             'training_args.deepspeed.gradient_accumulation_steps: must be "auto" or a whole number > 0.'],
        ),
        (
            {"training_args": "{eval_strategy: steps}", "quant_conf": "{quantization_type: bits-and-bytes}",
             "run_conf": "{modl: x}"},
            "sft",
            ['training_args.eval_strategy: is "steps", but data_conf.validation_data.type is "NONE".'
             " Give validation data, or set eval_strategy: no.",
             "peft_conf.peft_type: is NO_PEFT, but quant_conf quantizes the model: quantized weights cannot be trained."
             " Choose an adapter such as LORA, or quantization_type: no-quantization.",
             "quant_conf: neither load_in_4bit nor load_in_8bit is true; set one of them.",
             'run_conf.modl: unknown key. Did you mean "model"?'],
        ),
    ],
)  # fmt: skip
def test_contradictory_sections_are_rejected(
    sections: dict[str, str],
    method: str,
    lines: list[str],
    messages: Callable[..., list[str]],
    changed: Callable[..., str],
) -> None:
    reported = [line.split(": ", 1)[1] for line in messages(changed(**sections), method)]
    assert sorted(reported) == sorted(lines)


@pytest.mark.parametrize(
    "sections",
    [
        {"training_args": "{num_train_epochs: -1, max_steps: 3}"},
        {"training_args": "{deepspeed: {train_batch_size: auto, train_micro_batch_size_per_gpu: 4}}"},
        {"training_args": "{deepspeed: zero3.json}"},
        {"training_args": "{load_best_model_at_end: yes, eval_strategy: steps, eval_steps: 0.1, save_steps: 0.3}",
         "data_conf": VALIDATION},
        {"training_args": "{load_best_model_at_end: yes, eval_strategy: epoch, save_strategy: best}",
         "data_conf": VALIDATION},
        {"tracking": "{mlflow_server_uri: 'file:///tmp/a@b'}"},
        {"tracking": "{mlflow_server_uri: 'sqlite:///x.db'}"},
        {"peft_conf": LORA, "quant_conf": "{quantization_type: bits-and-bytes, load_in_8bit: true}"},
    ],
)  # fmt: skip
def test_sections_that_agree(sections: dict[str, str], check: Callable, changed: Callable[..., str]) -> None:
    assert check(changed(**sections)).warnings == []


def test_validation_data_that_nothing_looks_at(check: Callable, changed: Callable[..., str]) -> None:
    (warning,) = check(changed(data_conf=VALIDATION)).warnings
    assert "data_conf.validation_data: is loaded but never used: training_args.eval_strategy is no." in str(warning)
    assert check(changed(data_conf=VALIDATION, training_args="{eval_on_start: true}")).warnings == []


def test_remote_code_is_said_aloud_and_wants_a_commit(sft_values: Any) -> None:
    from finetuning.config.sections.experiment import SFTExperiment
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.document import ConfigDocument

    def warnings(**args: object) -> str:
        values = sft_values({"run_conf.model_args": {"trust_remote_code": True, **args}})
        return " ".join(map(str, validate(ConfigDocument(values), SFTExperiment).warnings))

    assert "runs with your rights, and no commit pins it. Set run_conf.model_args.revision" in warnings()
    assert "runs with your rights." in warnings(revision="0" * 40)


TRL_TRAINERS = {
    "dpo": "trainer/dpo_trainer.py",
    "kto": "trainer/kto_trainer.py",
    "reward": "trainer/reward_trainer.py",
    "grpo": "trainer/grpo_trainer.py",
    "orpo": "experimental/orpo/orpo_trainer.py",
    "cpo": "experimental/cpo/cpo_trainer.py",
}
REPORTED = re.compile(r'metrics\[mode\]\["([^"]+)"\]|\bmetrics\[f"\{prefix\}([^"]+)"\]')


@pytest.mark.parametrize("method", TRL_TRAINERS)
def test_the_metrics_of_an_evaluation_are_those_of_trls_source(method: str) -> None:
    spec = find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], TRL_TRAINERS[method]).read_text("utf-8")
    in_source = {name or prefixed for name, prefixed in REPORTED.findall(source)}
    assert in_source == set(EVALUATION_METRICS[method])
