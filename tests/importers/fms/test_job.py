"""Each key of an fms-hf-tuning job keeps its meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuning.cli.errors import locate
from finetuning.config.sections.experiment import SFTExperiment
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import parse_document
from finetuning.errors import ConfigError, Location, Problem
from finetuning.importers import to_yaml
from finetuning.importers.fms.job import Readers, converts_for_vllm, to_experiment
from finetuning.importers.translation import Translation

MINIMAL = {
    "model_name_or_path": "/model",
    "training_data_path": "/data/train.jsonl",
    "output_dir": "/out",
    "torch_dtype": "float32",
}
TEXTS = {"dataset_text_field": "output", "response_template": "\n### Label:"}


def translate(job: dict[str, Any], *, processes: int = 1, **readers: Any) -> Translation:
    made = Readers(readers.get("data_config", lambda path: {"training_data": path}))
    return to_experiment(parse_document(json.dumps(MINIMAL | job), "job.json"), made, processes=processes)


def refused(job: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        translate(job)
    return str(caught.value)


@pytest.mark.parametrize(
    "job",
    [
        {},
        TEXTS,
        TEXTS | {"peft_method": "lora", "r": 8, "target_modules": ["c_attn", "c_proj"]},
        TEXTS | {"peft_method": "pt", "prompt_tuning_init": "RANDOM", "num_virtual_tokens": 4},
        TEXTS | {"peft_method": "None", "lora_post_process_for_vllm": True, "accelerate_launch_args": {"quiet": True}},
        {"data_formatter_template": "### Input: {{input}}\n\n## Label: {{output}}", "response_template": "\n## Label:"},
        {"dataset_text_field": "text", "packing": True},
        TEXTS | {"padding_free": ["huggingface"], "multipack": [16], "include_tokens_per_second": True},
        TEXTS | {"peft_method": "lora", "bnb_qlora": ["nf4", "False"], "fused_lora": ["bitsandbytes", True]},
        TEXTS | {"fast_kernels": [True, False, True]},
    ],
)
def test_the_yaml_is_valid_and_keeps_the_values(job: dict[str, Any]) -> None:
    translation = translate(job)
    document = parse_document(to_yaml(translation, "fms-hf-tuning"), "experiment.yaml")
    assert document.values == translation.values
    assert validate(document, SFTExperiment).experiment.run_conf.model == "/model"


def test_defaults_are_those_of_fms_hf_tuning() -> None:
    values = translate({}).values
    assert values["sft_args"] == {"train_on": "completions", "max_seq_length": 4096, "length_handling": "truncate"}
    for key, value in {"save_strategy": "epoch", "logging_strategy": "epoch", "eval_strategy": "no"}.items():
        assert values["training_args"][key] == value
    assert values["run_conf"]["resume_from_checkpoint"] == "auto"
    assert values["peft_conf"] == {"peft_type": "NO_PEFT"}
    assert translate({"torch_dtype": None}).values["run_conf"]["model_args"]["dtype"] == "bfloat16"
    lora = translate({"peft_method": "lora"}).values["peft_conf"]
    assert lora["peft_kwargs"] == {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"}
    prompt = translate({"peft_method": "pt"}).values["peft_conf"]["peft_kwargs"]
    assert (prompt["prompt_tuning_init"], prompt["num_virtual_tokens"]) == ("TEXT", 8)
    assert prompt["tokenizer_name_or_path"] == "/model"


def test_the_batch_of_a_step_is_the_same() -> None:
    job = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    assert translate(job, processes=2).values["batchsize_conf"] == {
        "total_train_batch_size": 24,
        "max_per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
    }


def test_multipack_balances_the_rows_of_a_step_by_tokens() -> None:
    job = TEXTS | {"padding_free": ["huggingface"], "multipack": [16], "per_device_train_batch_size": 4}
    several, single = translate(job, processes=2), translate(job)
    assert several.values["training_args"]["train_sampling_strategy"] == "batch_rebalance"
    assert several.values["sft_args"]["batching"] == "padding-free"
    assert several.values["batchsize_conf"]["total_train_batch_size"] == 8
    assert any(note.startswith("multipack: each step trains on as many rows as without it") for note in several.notes)
    assert "train_sampling_strategy" not in single.values["training_args"]
    assert "multipack: has no effect with one process; fms-hf-tuning requires several" in single.notes


def test_multipack_cannot_be_combined_with_streaming() -> None:
    job = {"padding_free": ["huggingface"], "multipack": [16], "max_steps": 4, "data_config_path": "d.yaml"}
    job |= {"training_data_path": None, "response_template": "x", "dataset_text_field": "output"}
    with pytest.raises(ConfigError, match="multipack: cannot be combined with streaming"):
        translate(job, data_config=lambda _: {"training_data": {"datasets": []}, "streaming": True}, processes=2)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["all-linear"], "all-linear"),
        (["lm_head", "all-linear"], "all-linear"),
        ("all-linear", "all-linear"),
        (["lm_head"], ["lm_head"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("q_proj v_proj", ["q_proj", "v_proj"]),
        (["q_proj v_proj"], ["q_proj", "v_proj"]),
        ("q_proj", "q_proj"),
    ],
)
def test_target_modules(value: Any, expected: Any) -> None:
    values = translate({"peft_method": "lora", "target_modules": value}).values
    assert values["peft_conf"]["peft_kwargs"]["target_modules"] == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "auto"), ("true", "auto"), (True, "auto"), ("False", False), ("/o/checkpoint-3",) * 2],
)
def test_resuming(value: Any, expected: Any) -> None:
    assert translate({"resume_from_checkpoint": value}).values["run_conf"]["resume_from_checkpoint"] == expected


def test_a_longer_run_continues_and_a_fresh_one_keeps_the_earlier() -> None:
    run_conf = translate({"resume_from_checkpoint": "/out/checkpoint-3"}).values["run_conf"]
    assert run_conf["on_existing_run"] == "move"
    assert run_conf["allow_changed"] == ["training_args.num_train_epochs", "training_args.max_steps"]
    more = translate({"allow_changed": ["learning_rate", "max_seq_length", "versions"], "learning_rate": 1e-3})
    assert more.values["run_conf"]["allow_changed"][2:] == [
        "training_args.learning_rate",
        "sft_args.max_seq_length",
        "sft_args.length_handling",
        "versions",
    ]
    notes = translate({"resume_from_checkpoint": "False"}).notes
    assert "resume_from_checkpoint: what an earlier run left in output_dir moves to a folder earlier-N" in notes


def test_a_key_at_its_default_is_no_warning() -> None:
    defaults = {"r": 8, "lora_alpha": 32, "prompt_tuning_init": "TEXT", "num_train_dataset_shards": 1}
    defaults |= {"embedding_size_multiple_of": 1, "dequantize": False, "training_logs_filename": "training_logs.jsonl"}
    off = {"do_dataprocessing_only": False, "quantization_method": "none", "enable_reduce_loss_sum": False}
    removed = {"overwrite_output_dir": False, "save_safetensors": True, "warmup_ratio": 0.0, "no_cuda": False}
    removed |= {"evaluation_strategy": "no", "group_by_length": False, "do_train": False, "past_index": -1}
    document = translate(TEXTS | removed).document()
    assert validate(document, SFTExperiment).warnings == []
    assert translate(defaults | off | {"fast_moe": None}).notes == []
    assert [note.partition(":")[0] for note in translate(defaults | {"r": 4, "use_flash_attn": True}).notes] == [
        "r",
        "use_flash_attn",
    ]


def test_numbers_and_booleans_may_be_texts() -> None:
    texts = {"num_train_epochs": "3", "learning_rate": "1e-4", "seed": "7", "bf16": "True", "max_seq_length": "128"}
    texts |= {"per_device_train_batch_size": "2", "peft_method": "lora", "r": "4", "lora_dropout": "0.1"}
    texts |= {"layers_to_transform": ["0", "1"], "save_total_limit": "2", "gradient_accumulation_steps": "3"}
    numbers = {"num_train_epochs": 3, "learning_rate": 1e-4, "seed": 7, "bf16": True, "max_seq_length": 128}
    numbers |= {"per_device_train_batch_size": 2, "peft_method": "lora", "r": 4, "lora_dropout": 0.1}
    numbers |= {"layers_to_transform": [0, 1], "save_total_limit": 2, "gradient_accumulation_steps": 3}
    assert translate(texts).values == translate(numbers).values
    # A text stays a text.
    kept = translate({"run_name": "2024", "dataset_text_field": "1", "response_template": "2", "trackers": ["wandb"]})
    (dataset,) = kept.values["data_conf"]["training_data"]["datasets"]
    assert (dataset["dataset_text_field"], dataset["response_template"]) == ("1", "2")
    assert kept.values["training_args"]["run_name"] == "2024"


def test_names_of_files_and_sizes_are_kept() -> None:
    values = translate({"training_logs_filename": "mine.jsonl", "embedding_size_multiple_of": "64"}).values
    assert values["tracking"]["training_logs_filename"] == "mine.jsonl"
    assert values["run_conf"]["embedding_size_multiple_of"] == 64


def test_errors_of_the_experiment_name_the_keys_of_the_job() -> None:
    """Each key of the experiment that a job decides is located at the job's key, present or not."""
    job = MINIMAL | {"peft_method": "lora", "r": 4, "learning_rate": 1e-3, "trackers": ["wandb"]}
    translation = to_experiment(parse_document(json.dumps(job, indent=0), "job.json"), Readers(lambda path: {}))
    document = translation.document()
    lines = list(job)
    for path, key in {
        "training_args.learning_rate": "learning_rate",
        "peft_conf.peft_kwargs.r": "r",
        "peft_conf.peft_type": "peft_method",
        "run_conf.model": "model_name_or_path",
        "run_conf.model_args.dtype": "torch_dtype",
        "data_conf.training_data.datasets.0.path": "training_data_path",
        "tracking.trackers.0": "trackers",
    }.items():
        location = document.location_of(tuple(int(part) if part.isdecimal() else part for part in path.split(".")))
        assert (location.file, location.line, location.key) == ("job.json", lines.index(key) + 2, key)
    for path, key in {
        "training_args.max_steps": "max_steps",
        "run_conf.resume_from_checkpoint": "resume_from_checkpoint",
        "data_conf.max_lost_fraction": "max_lost_fraction",
        "batchsize_conf.total_train_batch_size": "per_device_train_batch_size",
    }.items():
        assert document.location_of(tuple(path.split("."))).key == key


def test_hints_name_the_keys_of_the_job() -> None:
    document = translate({"num_train_epochs": 2}).document()
    hint = "Set run_conf.resume_from_checkpoint: auto, or run_conf.allow_changed: [training_args.learning_rate]."
    problem = locate(Problem("differs", Location(key="training_args.num_train_epochs"), hint), document)
    assert problem.location.key == "num_train_epochs"
    assert problem.hint == "Set resume_from_checkpoint: auto, or allow_changed: [learning_rate]."


def test_what_vllm_does_not_serve_is_said_before_training() -> None:
    vllm = {"lora_post_process_for_vllm": True}
    for job in ({}, {"peft_method": "pt"}, {"peft_method": "alora", "alora_invocation_string": "x"}):
        translation = translate(job | vllm)
        method = job.get("peft_method", "none")
        assert not converts_for_vllm(translation)
        assert f"lora_post_process_for_vllm: has no effect with peft_method {method}" in translation.notes
    plain = translate({"peft_method": "lora"} | vllm)
    assert converts_for_vllm(plain) and plain.notes == []
    for option, name in (
        ({"use_dora": True}, "DoRA (use_dora)"),
        ({"modules_to_save": ["lm_head"]}, "whole trained modules (modules_to_save)"),
        ({"init_lora_weights": "loftq"}, "LoftQ initialization"),
    ):
        (note,) = translate({"peft_method": "lora"} | vllm | option).notes
        assert f"vLLM serves no adapter with {name}" in note and "merge_adapter" in note


def test_unsupported_keys_that_are_switched_off_are_accepted() -> None:
    notes = translate({"dequantize": True, "num_train_dataset_shards": 4}).notes
    assert any("num_train_dataset_shards: has no effect without do_dataprocessing_only" in note for note in notes)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"aim_repo": "/a", "aim_url": "aim://u"}, {"aim_repo": "aim://u"}),
        (
            {"aim_repo": "/a", "aim_remote_server_ip": "h", "aim_remote_server_port": 1},
            {"aim_remote_server_ip": "h", "aim_remote_server_port": 1},
        ),
        ({"aim_repo": "/a", "aim_remote_server_ip": "h"}, {"aim_repo": "/a"}),
        ({"aim_repo": "/a", "aim_experiment": "mine"}, {"aim_repo": "/a", "experiment_name": "mine"}),
    ],
)
def test_aim_location(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    tracking = translate({"trackers": ["aim"], "experiment": "e"} | keys).values["tracking"]
    assert tracking == {"trackers": ["aim"], "experiment_name": "e"} | expected


def test_formats() -> None:
    def source(job: dict[str, Any]) -> dict[str, Any]:
        (dataset,) = translate(job).values["data_conf"]["training_data"]["datasets"]
        return dataset

    assert source({}) == {"path": "/data/train.jsonl"}
    assert source(TEXTS)["format"] == "response_template"
    assert source({"dataset_text_field": "text", "packing": True})["format"] == "text"
    chat = source({"dataset_conversation_field": "turns", "response_template": "<|assistant|>"})
    assert chat == {"path": "/data/train.jsonl", "format": "messages", "columns": {"turns": "messages"}}
    data_conf = translate({"data_config_path": "/data.yaml", "training_data_path": None}).values["data_conf"]
    assert data_conf["training_data"] == "/data.yaml"


def test_alora_keeps_its_invocation_string() -> None:
    conf = translate({"peft_method": "alora", "alora_invocation_string": "now answer this"}).values["peft_conf"]
    assert (conf["peft_type"], conf["alora_invocation_string"]) == ("LORA", "now answer this")


def test_qlora_and_gptq() -> None:
    quant = translate({"peft_method": "lora", "bnb_qlora": ["nf4"]}).values["quant_conf"]
    assert (quant["load_in_4bit"], quant["bnb_4bit_quant_type"]) == (True, "nf4")
    gptq = {"peft_method": "lora", "auto_gptq": ["triton_v2"], "torch_dtype": "float16", "fp16": True}
    assert "quant_conf" not in translate(gptq).values


def test_gptq_requires_a_gptq_checkpoint(tmp_path: Path) -> None:
    job = {"peft_method": "lora", "auto_gptq": ["triton_v2"], "torch_dtype": "float16", "fp16": True}
    job["model_name_or_path"] = str(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert translate(job).values["run_conf"]["model"] == str(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"auto_gptq: requires a GPTQ checkpoint; .* is not quantized"):
        translate(job)


def test_mlflow() -> None:
    job = {"trackers": ["file_logger", "mlflow"], "mlflow_tracking_uri": "http://m", "experiment": "mine"}
    assert translate(job).values["tracking"] == {"mlflow_server_uri": "http://m", "experiment_name": "mine"}


def test_options_of_other_trackers() -> None:
    job = {"trackers": ["aim", "hf_resource_scanner"], "aim_remote_server_ip": "h", "aim_remote_server_port": 53800}
    job |= {
        "exp_metadata": '{"team": "search", "tried": [1, 2]}',
        "run_uri_export_path": "uris",
        "scanner_output_filename": "s.json",
    }
    assert translate(job).values["tracking"] == {
        "trackers": ["aim", "hf_resource_scanner"],
        "experiment_name": "fms-hf-tuning",
        "scanner_output_filename": "s.json",
        "run_uri_export_path": "uris",
        "aim_remote_server_ip": "h",
        "aim_remote_server_port": 53800,
        "exp_metadata": {"team": "search", "tried": "[1, 2]"},
    }


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"lora_alfa": 3}, 'lora_alfa: unknown key. Did you mean "lora_alpha"?'),
        ({"training_data_path": ""}, "training_data_path or data_config_path is required"),
        ({"model_name_or_path": None}, "model_name_or_path: is required"),
        ({"output_dir": ""}, "output_dir: is required"),
        ({"response_template": "x"}, "requires dataset_text_field or data_formatter_template"),
        ({"dataset_text_field": "a", "data_formatter_template": "{{a}}"}, "cannot be combined with dataset_text_field"),
        ({"dataset_text_field": "a"}, "requires response_template, packing or padding_free"),
        ({"data_config_path": "c.yaml"}, "cannot be combined with data_config_path"),
        ({"num_train_epochs": 0}, "must be a positive number"),
        ({"gradient_accumulation_steps": 0}, "must be a positive integer"),
        ({"eval_strategy": "epoch"}, "epoch requires validation_data_path"),
        ({"peft_method": "lora2"}, "must be lora, alora, pt or None"),
        ({"peft_method": "alora"}, "is required with peft_method: alora"),
        ({"auto_gptq": ["triton_v2"]}, "requires peft_method: lora"),
        ({"peft_method": "lora", "auto_gptq": ["triton_v2"]}, "requires torch_dtype: float16"),
        ({"fused_lora": ["auto_gptq", True]}, "requires a quantized base model"),
        ({"multipack": [16]}, "multipack: requires padding_free"),
        ({"padding_free": ["huggingface"], "packing": True}, "cannot be combined with packing"),
        ({"fast_moe": [1]}, "not supported"),
        ({"quantization_method": "mxfp4"}, "not supported"),
        ({"trackers": ["aim"]}, "aim requires aim_repo"),
        ({"exp_metadata": "{"}, "must be a JSON object"),
        ({"trackers": ["mlflow"]}, "mlflow requires mlflow_tracking_uri"),
        ({"trackers": ["tensorbored"]}, "unknown tracker 'tensorbored'"),
    ],
)
def test_invalid_jobs_are_rejected(job: dict[str, Any], expected: str) -> None:
    message = refused(job)
    assert expected in message
    assert message.startswith("job.json:")


def test_all_errors_are_reported_together() -> None:
    assert len(refused({"a1": 1, "b2": 2, "fast_moe": [1]}).splitlines()) == 3


def test_notes_are_at_the_top_of_the_yaml() -> None:
    job = TEXTS | {"r": 4, "enable_reduce_loss_sum": True, "exp_metadata": '{"a": 1}'}
    text = to_yaml(translate(job), "fms-hf-tuning")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert any("r: has no effect with peft_method none" in line for line in head)
    assert any("enable_reduce_loss_sum: has no effect" in line for line in head)
    assert yaml.safe_load(text)["method"] == "sft"


def test_every_documented_key_is_supported(tmp_path: Path) -> None:
    keys = """
    model_name_or_path tokenizer_name_or_path training_data_path output_dir num_train_epochs learning_rate
    per_device_train_batch_size gradient_accumulation_steps response_template dataset_text_field torch_dtype
    data_formatter_template save_strategy save_steps save_total_limit load_best_model_at_end save_model_dir
    resume_from_checkpoint peft_method r lora_alpha lora_dropout bias target_modules auto_gptq fp16 bnb_qlora
    bitsandbytes prompt_tuning_init num_virtual_tokens prompt_tuning_init_text fused_lora fast_kernels padding_free
    multipack trainer_controller_config_file trackers lora_post_process_for_vllm accelerate_launch_args logging_dir
    """
    from finetuning.importers.fms.keys import SUPPORTED

    assert not set(keys.split()) - SUPPORTED
