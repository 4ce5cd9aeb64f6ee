"""Every key and form of fms-hf-tuning, and what becomes of it here: writes `docs/moving-from/fms-hf-tuning-keys.md`.

    python tests/fms_matrix.py docs/moving-from/fms-hf-tuning-keys.md

Each row is translated and validated. An error makes it *refused*, with the reason; a note or a warning that it adds
makes it *differs*; otherwise it *runs*, and the row names the keys here that it sets.
"""

from __future__ import annotations

import base64
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.config.sections.experiment import SFTExperiment
from finetuning.config.sections.training import SFTTrainingArgs
from finetuning.config.validation.library_fields import table_fields
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.document import ConfigDocument
from finetuning.config.yaml.reader import parse_document
from finetuning.errors import FinetuningError, Problem
from finetuning.importers.fms import keys
from finetuning.importers.fms.data_config import read_data_config
from finetuning.importers.fms.environment import plan_launch
from finetuning.importers.fms.flags import read_flags
from finetuning.importers.fms.job import Readers, to_experiment
from finetuning.importers.translation import Translation

INTRODUCTION = """# fms-hf-tuning, key by key

<!-- Generated from tests/fms_matrix.py by `make docs`; a test fails when it is stale. -->

What becomes of each key of an [fms-hf-tuning job](fms-hf-tuning.md), of its data config and of its
launcher: it *runs*, and sets the keys that are named; it *differs*, as a warning says; or it is *refused* before
anything loads. A flag of `sft_trainer` is a key of the job.
"""
BASE: dict[str, Any] = {
    "model_name_or_path": "/model",
    "training_data_path": "/data/train.jsonl",
    "output_dir": "/out",
    "dataset_text_field": "output",
    "response_template": "### Label:",
}
LORA = {"peft_method": "lora"}
FREE = {"padding_free": ["huggingface"]}
NO_TEXT = {"dataset_text_field": None, "response_template": None}
CONTEXT: dict[str, dict[str, Any]] = {
    **{key: LORA for key in keys.LORA},
    **{key: {"peft_method": "pt"} for key in keys.PROMPT_DEFAULTS},
    **{key: LORA for key in ("bnb_qlora", "bitsandbytes", "lora_post_process_for_vllm")},
    "auto_gptq": LORA | {"torch_dtype": "float16", "fp16": True},
    "fused_lora": LORA | {"bnb_qlora": ["nf4"]},
    "multipack": FREE,
    "alora_invocation_string": {"peft_method": "alora"},
    "peft_method": {"alora_invocation_string": "answer:"},
    "validation_data_path": {"eval_strategy": "epoch"},
    "eval_strategy": {"validation_data_path": "/data/validation.jsonl"},
    "evaluation_strategy": {"validation_data_path": "/data/validation.jsonl"},
    "load_best_model_at_end": {"validation_data_path": "/data/validation.jsonl", "eval_strategy": "epoch"},
    "eval_on_start": {"validation_data_path": "/data/validation.jsonl"},
    "eval_steps": {"validation_data_path": "/data/validation.jsonl", "eval_strategy": "steps"},
    "data_formatter_template": {"dataset_text_field": None},
    "dataset_conversation_field": NO_TEXT,
    "instruction_template": {"dataset_text_field": None},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_restarts"},
    "dataloader_persistent_workers": {"dataloader_num_workers": 2},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 2},
    "aim_repo": {"trackers": ["aim"]},
    "aim_url": {"trackers": ["aim"]},
    "aim_remote_server_ip": {"trackers": ["aim"]},
    "aim_remote_server_port": {"trackers": ["aim"], "aim_remote_server_ip": "host"},
    "aim_experiment": {"trackers": ["aim"], "aim_repo": "/aim"},
    "mlflow_experiment": {"trackers": ["mlflow"], "mlflow_tracking_uri": "http://mlflow"},
    "mlflow_tracking_uri": {"trackers": ["mlflow"]},
    "clearml_project": {"trackers": ["clearml"]},
    "clearml_task": {"trackers": ["clearml"]},
    "scanner_output_filename": {"trackers": ["hf_resource_scanner"]},
    "experiment": {"trackers": ["aim"], "aim_repo": "/aim"},
    "num_train_dataset_shards": {"do_dataprocessing_only": True},
    "num_eval_dataset_shards": {"do_dataprocessing_only": True},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True},
}
"""What a key needs in addition to `BASE`; a null removes a key of it."""
VALUES: dict[str, list[Any]] = {
    "model_name_or_path": ["/model", None],
    "tokenizer_name_or_path": ["/tokenizer"],
    "torch_dtype": ["bfloat16", "float32", "half", "int3"],
    "use_flash_attn": [True, False],
    "flash_attn_implementation": ["sdpa"],
    "embedding_size_multiple_of": [1, 64],
    "cache_dir": ["/cache"],
    "training_data_path": ["/data/train.jsonl", ""],
    "validation_data_path": ["/data/validation.jsonl"],
    "dataset_text_field": ["output"],
    "response_template": ["### Label:", r"\n### Label:"],
    "instruction_template": ["### Text:"],
    "data_formatter_template": ["### {{input}} ### Label: {{output}}", "}} x {{"],
    "dataset_conversation_field": ["messages"],
    "chat_template": ["{{ messages }}", "{% for m in messages['messages'] %}{{ m.content }}{% endfor %}"],
    "add_special_tokens": [["<new>"]],
    "output_dir": ["/out", None],
    "save_model_dir": ["/final"],
    "logging_dir": ["/logs"],
    "max_seq_length": [4096, "128"],
    "packing": [True],
    "per_device_train_batch_size": [8, "4", 0],
    "per_device_eval_batch_size": [8],
    "gradient_accumulation_steps": [1, 0],
    "resume_from_checkpoint": [True, "True", False, "False", "/out/checkpoint-3"],
    "trainer_controller_config_file": ["/rules.yaml"],
    "log_level": ["passive", "debug"],
    "log_level_replica": ["warning"],
    "enable_reduce_loss_sum": [False, True],
    "peft_method": ["lora", "alora", "pt", "None", "p-tuning"],
    "alora_invocation_string": ["answer:"],
    "r": [8, "16"],
    "lora_alpha": [32],
    "lora_dropout": [0.05],
    "bias": ["none", "all"],
    "target_modules": [["q_proj"], ["all-linear"], ["lm_head", "all-linear"], "q_proj v_proj", ".*_proj"],
    "prompt_tuning_init": ["TEXT", "RANDOM", "RANDOMLY"],
    "num_virtual_tokens": [8],
    "prompt_tuning_init_text": ["Classify:"],
    "auto_gptq": [["triton_v2"], ["exllama"]],
    "bnb_qlora": [["nf4"], ["fp4", True], ["int8"]],
    "bitsandbytes": [["nf4"]],
    "fused_lora": [["bitsandbytes", True], ["bitsandbytes", False]],
    "fast_kernels": [[True, True, True], [True]],
    "padding_free": [["huggingface"], ["other"]],
    "multipack": [[16]],
    "fast_moe": [False, [1]],
    "trackers": [["file_logger"], ["mlflow"], ["tracker"]],
    "experiment": ["mine"],
    "training_logs_filename": ["losses.jsonl"],
    "run_uri_export_path": ["/uris"],
    "exp_metadata": ['{"team": "a"}', "{"],
    "aim_remote_server_port": [53800],
    "accelerate_launch_args": [{"quiet": True}],
    "lora_post_process_for_vllm": [True],
    "do_dataprocessing_only": [True],
    "allow_changed": [["learning_rate"]],
    "max_lost_fraction": [0.5, 2],
    "quantization_method": ["none", "mxfp4"],
    "dequantize": [False, True],
    "additional_data_handlers": ["/handlers.py"],
    "gradient_checkpointing": [True],
    "dataset_image_field": ["image"],
    "data_config_path": ["/data.yaml"],
    "num_train_epochs": [3.0, "3", 0],
    "eval_strategy": ["no", "epoch", "yearly"],
    "evaluation_strategy": ["epoch"],
    "report_to": ["none"],
    "deepspeed": ["/deepspeed.json"],
    "hub_model_id": ["me/model"],
    "run_name": ["run"],
    "fsdp": ["full_shard"],
    "fsdp_config": [{"min_num_params": 1}],
    "accelerator_config": [{"split_batches": False}],
    "gradient_checkpointing_kwargs": [{"use_reentrant": False}],
    "lr_scheduler_kwargs": [{"num_cycles": 2}, '{"num_cycles": 2}'],
    "optim": ["adamw_torch", "adamw_hf", "adamw"],
    "modules_to_save": [["lm_head"]],
    "init_lora_weights": ["pissa"],
    "alora_invocation_tokens": [[1, 2]],
    "alpha_pattern": [{"q_proj": 8}],
    "rank_pattern": [{"q_proj": 8}],
    "arrow_config": [{"arrow_top_k": 2}],
    "corda_config": [{"corda_method": "ipm"}],
    "eva_config": [{"rho": 2.0}],
    "loftq_config": [{"loftq_bits": 4}],
    "megatron_config": [{}],
    "megatron_core": ["megatron.core"],
    "runtime_config": [{"ephemeral_gpu_offload": False}],
    "layer_replication": [[[0, 1]]],
    "layers_to_transform": [[0], 0, ["0"]],
    "layers_pattern": ["layers"],
    "exclude_modules": [["lm_head"]],
    "qalora_group_size": [16],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "trainable_token_indices": [[1, 2]],
    "lr_scheduler_type": ["linear", "cosine_with_restarts", "cosin"],
    "ddp_backend": ["nccl"],
    "torch_compile": [True, "layers", "text"],
    "torch_compile_backend": ["inductor"],
    "torch_compile_mode": ["default"],
    "optim_args": ["eps=1e-8"],
    "length_column_name": ["length"],
    "metric_for_best_model": ["eval_loss"],
    "num_train_dataset_shards": [4, "many"],
    "num_eval_dataset_shards": [4],
    "learning_rate": [1e-5, "1e-5", "fast"],
    "max_steps": [100],
    "eval_steps": [100],
    "past_index": [1],
    "seed": [42],
    "save_steps": [100, 0.5],
    "logging_steps": [10],
    "warmup_steps": [10, 0.1],
    "overwrite_output_dir": [False, True],
    "save_safetensors": [True, False],
    "group_by_length": [False, True],
    "warmup_ratio": [0.0, 0.1],
    "fp16_opt_level": ["O1", "O2"],
    "fp16_backend": ["auto", "apex"],
    "half_precision_backend": ["auto", "apex"],
    "ray_scope": ["last", "all"],
    "fsdp_min_num_params": [0, 100],
    "fsdp_transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "per_gpu_train_batch_size": [8],
    "per_gpu_eval_batch_size": [8],
    "tpu_num_cores": [8],
    "dispatch_batches": [True],
    "split_batches": [False],
    **{
        key: [True]
        for key in (
            "ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_rslora", "use_qalora", "do_eval",
            "do_predict", "do_train", "include_tokens_per_second", "jit_mode_eval", "no_cuda", "use_ipex",
            "use_mps_device", "adafactor", "include_inputs_for_metrics", "tpu_metrics_debug",
            "use_legacy_prediction_loop",
        )
    },
}  # fmt: skip
"""The values that are tried; other keys are tried at one that fits their type."""
FITTING: dict[str, Any] = {"bool": True, "int": 1, "float": 0.5, "str": "text", "list[str]": ["text"]}
"""A value for the beginning of each type."""
DATA_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("several `datasets`, concatenated", {"datasets": [{"data_paths": ["a.jsonl"]}, {"data_paths": ["b.jsonl"]}]}),
    ("no `datasets`", {"datasets": []}),
    ("`data_paths` missing", {"datasets": [{"name": "d"}]}),
    ("`sampling` that sums to 1", {"datasets": [{"sampling": 0.6}, {"sampling": 0.4}]}),
    ("`sampling` that sums to 0.9", {"datasets": [{"sampling": 0.5}, {"sampling": 0.4}]}),
    ("`sampling` of one dataset only", {"datasets": [{"sampling": 0.6}, {}]}),
    ("`split: {train: 0.8, validation: 0.2}`", {"datasets": [{"split": {"train": 0.8, "validation": 0.2}}]}),
    (
        "`split: {train: 0.0, validation: 0.3}`",
        {"datasets": [{}, {"split": {"train": 0.0, "validation": 0.3}}]},
    ),
    ("`split` above 1", {"datasets": [{"split": {"train": 0.8, "validation": 0.3}}]}),
    (
        "`split` with `shuffle: false`",
        {"datasets": [{"split": {"train": 0.8, "validation": 0.2}, "shuffle": False}]},
    ),
    ("`dataset_split_name`", {"datasets": [{"dataset_split_name": "train"}]}),
    ("`builder` that fits the file", {"datasets": [{"builder": "json"}]}),
    ("`builder` that does not", {"datasets": [{"builder": "csv"}]}),
    ("an unknown key of a dataset", {"datasets": [{"data_path": "a.jsonl"}]}),
    ("`dataprocessor.type: odm`", {"dataprocessor": {"type": "odm"}}),
    ("`dataprocessor.seed`", {"dataprocessor": {"seed": 7}}),
    ("`datapreprocessor.sampling_seed`, as in its documents", {"datapreprocessor": {"sampling_seed": 7}}),
    ("`rename_columns` of a dataset", {"datasets": [{"rename_columns": {"a": "input"}}]}),
    ("`retain_columns` of a dataset", {"datasets": [{"retain_columns": ["input"]}]}),
    ("`sampling_stopping_strategy`", {"dataprocessor": {"sampling_stopping_strategy": "first_exhausted"}}),
    ("`chat_template`", {"dataprocessor": {"chat_template": "{{ messages }}"}}),
    (
        "`chat_template_base64`",
        {"dataprocessor": {"chat_template_base64": base64.b64encode(b"{{ messages }}").decode()}},
    ),
    (
        "two chat templates",
        {"dataprocessor": {"chat_template": "a", "chat_template_path": "b"}},
    ),
    (
        "a chat template that loops over `messages['messages']`",
        {"dataprocessor": {"chat_template": "{% for m in messages['messages'] %}{{ m.content }}{% endfor %}"}},
    ),
    ("`streaming` with `max_steps`", {"dataprocessor": {"streaming": True}}),
]


def _handler(name: str, **fn_kwargs: Any) -> dict[str, Any]:
    return {"name": name, "arguments": {"remove_columns": "all", "fn_kwargs": fn_kwargs}}


_MASKED = _handler("tokenize_and_apply_input_masking", input_column_name="input", output_column_name="output")
_TEXT = _handler("apply_custom_jinja_template", formatted_text_column_name="text", template="{{input}} {{output}}")
_SKIP = _handler("skip_samples_with_large_columns", column_name="input_ids", max_allowed_length=64)
HANDLERS: list[tuple[str, list[dict[str, Any]]]] = [
    ("`tokenize_and_apply_input_masking`", [_MASKED]),
    ("`tokenize_and_apply_chat_template_with_masking`", [_handler("tokenize_and_apply_chat_template_with_masking")]),
    ("`apply_custom_jinja_template` without `response_template`", [_TEXT]),
    (
        "`apply_custom_jinja_template`, `tokenize`, `duplicate_columns`",
        [
            _TEXT,
            _handler("tokenize", text_column_name="text"),
            _handler("duplicate_columns", existing_column_name="input_ids", new_column_name="labels"),
        ],
    ),
    ("`apply_tokenizer_chat_template` without `response_template`", [_handler("apply_tokenizer_chat_template")]),
    ("`skip_samples_with_large_columns` on `input_ids`", [_MASKED, _SKIP]),
    (
        "`rename_columns`, `select_columns`, `remove_columns`",
        [
            {"name": "rename_columns", "arguments": {"column_mapping": {"a": "input"}}},
            {"name": "select_columns", "arguments": {"column_names": ["input", "output", "b"]}},
            {"name": "remove_columns", "arguments": {"column_names": ["b"]}},
            _MASKED,
        ],
    ),
    (
        "`tokenize_and_apply_instruction_masking` with `input_field_name`, an earlier name",
        [_handler("tokenize_and_apply_instruction_masking", input_field_name="input", output_field_name="output")],
    ),
    (
        "`apply_custom_data_formatting_template` without `response_template`, an earlier name",
        [_handler("apply_custom_data_formatting_template", dataset_text_field="text", template="{{input}}")],
    ),
    ("`skip_large_text` on `input_ids`, an earlier name", [_MASKED, _SKIP | {"name": "skip_large_text"}]),
    ("an unknown handler", [_handler("apply_my_template", template="{{input}}")]),
    (
        "a template with stray braces",
        [_handler("apply_custom_jinja_template", formatted_text_column_name="text", template="}} x {{")],
    ),
]
LAUNCHES: list[tuple[str, int, dict[str, Any]]] = [
    ("nothing, two GPUs", 2, {}),
    ("`num_processes: 1`, two GPUs", 2, {"num_processes": 1}),
    ("`num_processes: 2`, no GPU", 0, {"num_processes": 2}),
    ("`fsdp_sharding_strategy: 2`, two GPUs", 2, {"fsdp_sharding_strategy": 2}),
    ("`fsdp_sharding_strategy: HYBRID_SHARD`, two GPUs", 2, {"fsdp_sharding_strategy": "HYBRID_SHARD"}),
    ("`fsdp_backward_prefetch`, two GPUs", 2, {"fsdp_backward_prefetch": "BACKWARD_PRE"}),
    ("`quiet: true`", 0, {"quiet": True}),
    ("`q: true`", 0, {"q": True}),
    ("`env: [A=1]`", 0, {"env": ["A=1"]}),
]
FLAGS = [
    "--r 8",
    "--r=8",
    "--target_modules c_attn c_proj",
    "--fp16",
    "--no_use_flash_attn",
    "--max-seq-length 128",
    "---learning_rate 1e-4",
    "--max_seq_len 128",
    "--lora_alfa 8",
]


@dataclass(frozen=True)
class Outcome:
    """What becomes of a key or form: `runs`, `differs` or `refused`, and which keys it sets, how, or why."""

    verdict: str
    text: str


def _refused(error: FinetuningError) -> Outcome:
    return Outcome("refused", "; ".join(_reason(problem) for problem in error.problems))


def _reason(problem: Problem) -> str:
    return Problem(problem.message, hint=problem.hint).__str__()


def judge(make: Callable[[], Translation], before: list[str], sets: Callable[[Translation], str]) -> Outcome:
    """Translate and validate a job, and return its outcome; `before` are the notes of the job without the key."""
    try:
        translation = make()
        validated = validate(translation.document(), SFTExperiment)
    except FinetuningError as error:
        return _refused(error)
    notes = [note.partition(": ")[2] for note in translation.notes]
    notes += [_reason(problem) for problem in validated.warnings]
    new = [note for note in notes if note not in before]
    return Outcome("differs", "; ".join(new)) if new else Outcome("runs", sets(translation))


def translate(job: dict[str, Any], processes: int = 1) -> Translation:
    """Translate a job whose data config is not read."""
    values = {key: value for key, value in job.items() if value is not None}
    document = parse_document(json.dumps(values), "job.json")
    rows = {"training_data": {"type": "CONCATENATION", "datasets": [{"path": "a.jsonl"}]}}
    readers = Readers(lambda _: {**rows, "validation_data": {"type": "NONE"}}, _trainer_fields)
    return to_experiment(document, readers, processes=processes)


def _trainer_fields() -> list[str]:
    return list(table_fields().trainer_fields(SFTExperiment.trainer_config) or ())


def outcome_of_key(key: str, value: Any) -> Outcome:
    """Return what becomes of a key of a job at a value."""
    context = BASE | CONTEXT.get(key, {})
    if key == "data_config_path":
        context |= {"training_data_path": None}
    bare = {name: item for name, item in context.items() if name != key}
    try:
        without = translate(bare)
        before = [note.partition(": ")[2] for note in without.notes]
        before += [_reason(problem) for problem in validate(without.document(), SFTExperiment).warnings]
    except FinetuningError:
        before = []

    def sets(translation: Translation) -> str:
        paths = [path for path, source in translation.sources.items() if source == key]
        held = [path for path in paths if translation.document().has(tuple(path.split(".")))]
        return ", ".join(f"`{path}`" for path in held)

    processes = 2 if key == "multipack" else 1
    return judge(lambda: translate(context | {key: value}, processes), before, sets)


def values_of(key: str) -> list[Any]:
    """Return the values at which a key is tried."""
    if key in VALUES:
        return VALUES[key]
    declared = SFTTrainingArgs.model_fields.get(key)
    library = (table_fields().trainer_fields(SFTExperiment.trainer_config) or {}).get(key, "str")
    kind = re.sub(r"^(typing\.|<class ')", "", str(declared.annotation if declared is not None else library))
    if kind.startswith("Literal["):
        return [kind.removeprefix("Literal[").split(",")[0].strip("]'\"")]
    return [next((value for name, value in FITTING.items() if kind.startswith(name)), "text")]


def key_rows() -> Iterator[tuple[str, Outcome]]:
    """Yield every key at every value, and its outcome."""
    groups = [keys.MODEL, keys.DATA, keys.RUN, keys.LORA, keys.PROMPT_DEFAULTS, keys.ACCELERATION, keys.TRACKING]
    groups += [keys.LAUNCHER, keys.OWN, keys.UNSUPPORTED, keys.DEPENDENT, keys.TRAINING]
    names = dict.fromkeys(key for group in groups for key in sorted(group))
    assert set(names) == keys.SUPPORTED
    for key in names:
        for value in values_of(key):
            text = json.dumps(value, ensure_ascii=False)
            yield f"`{key}: {text}`", outcome_of_key(key, value)


def _with_data_config(config: dict[str, Any], job: dict[str, Any]) -> Translation:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.json"
        file.write_text(json.dumps(config))
        values = {key: BASE[key] for key in ("model_name_or_path", "output_dir")} | {"data_config_path": str(file)}
        return to_experiment(parse_document(json.dumps(values | job), "job.json"), Readers(read_data_config))


def data_config_rows() -> Iterator[tuple[str, Outcome]]:
    """Yield every form of a data config, and its outcome."""
    for label, config in DATA_CONFIGS:
        changed = {"datasets": [{}]} | config
        for dataset in changed["datasets"]:
            if not {"data_paths", "name"} & set(dataset):
                dataset["data_paths"] = ["a.jsonl"]
        job = {"max_steps": 10} if "streaming" in label else {}
        yield label, judge(lambda c=changed, j=job: _with_data_config(c, j), [], lambda _: "")
    for label, handlers in HANDLERS:
        config = {"datasets": [{"data_paths": ["a.jsonl"], "data_handlers": handlers}]}
        yield label, judge(lambda c=config: _with_data_config(c, {}), [], lambda _: "")


def launch_rows() -> Iterator[tuple[str, Outcome]]:
    """Yield forms of `accelerate_launch_args`, and their outcome."""
    for label, gpus, args in LAUNCHES:
        job = parse_document(json.dumps({"accelerate_launch_args": args}), "job.json")
        try:
            planned = plan_launch(job, gpus, {})
        except FinetuningError as error:
            yield label, _refused(error)
            continue
        launch = planned.launch
        text = f"{launch.processes} processes" + (f", preset `{launch.config_file.stem}`" if launch.config_file else "")
        text += f", `{' '.join(launch.flags)}`" if launch.flags else ""
        yield label, Outcome("differs", "; ".join(planned.notes)) if planned.notes else Outcome("runs", text)


def flag_rows() -> Iterator[tuple[str, Outcome]]:
    """Yield spellings of flags, and their outcome."""
    for line in FLAGS:
        try:
            flags, notes = read_flags(line.split())
            translation = to_experiment(
                ConfigDocument(BASE | LORA | flags.values, flags.marks), Readers(lambda _: {}, _trainer_fields)
            )
        except FinetuningError as error:
            yield f"`{line}`", _refused(error)
            continue
        [(key, value)] = flags.values.items()
        text = "; ".join(notes) or f"`{key}: {json.dumps(value)}`"
        assert translation.values
        yield f"`{line}`", Outcome("differs" if notes else "runs", text)


SECTIONS: dict[str, Callable[[], Iterator[tuple[str, Outcome]]]] = {
    "Keys of a job": key_rows,
    "Forms of a data config": data_config_rows,
    "`accelerate_launch_args`": launch_rows,
    "Flags of `sft_trainer`": flag_rows,
}


def page() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for title, rows in SECTIONS.items():
        lines = [f"## {title}\n", "| fms-hf-tuning | here | |", "|---|---|---|"]
        for form, outcome in rows():
            cells = (form, outcome.verdict, outcome.text)
            lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
