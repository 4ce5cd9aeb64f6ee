"""Jobs in the shapes of fms-hf-tuning's documents and of its own tests pass `--dry-run`, and train if it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from zoo.harness import save_base

from finetuning.cli.main import main

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
ROWS: dict[str, dict[str, Any]] = {
    "texts": {"output": "### Text: number\n\n### Label: red", "Tweet text": "number", "text_label": "red"},
    "pairs": {"input": "### Input: number ### Output:", "output": "red"},
    "tokens": {"input_ids": [100, 101, 102], "labels": [-100, 101, 102]},
    "ids": {"input_ids": [100, 101, 102]},
    "chats": {"messages": CHAT},
    "talks": {"conversations": CHAT},
}
TEXT = {"response_template": "\n### Label:", "dataset_text_field": "output"}
FORMATTED = {
    "data_formatter_template": "### Text: {{Tweet text}} \n\n### Label: {{text_label}}",
    "response_template": "\n### Label:",
}
TURNS = {"instruction_template": "<|im_start|>user", "response_template": "<|im_start|>assistant"}
LORA = {"peft_method": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
EVALUATED = {"validation_data_path": "ROWS texts", "eval_strategy": "epoch", "load_best_model_at_end": True}


def handler(name: str, **fn_kwargs: Any) -> dict[str, Any]:
    return {"name": name, "arguments": {"remove_columns": "all", "batched": False, "fn_kwargs": fn_kwargs}}


def dataset(rows: str, *handlers: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": rows, "data_paths": [f"ROWS {rows}"], "data_handlers": list(handlers)} | more


PAIRS = handler("tokenize_and_apply_input_masking", input_column_name="input", output_column_name="output")
CHATS = handler("tokenize_and_apply_chat_template_with_masking", conversation_column="messages")
EARLIER = {
    "pairs": handler("tokenize_and_apply_instruction_masking", input_field_name="input", output_field_name="output"),
    "template": handler(
        "apply_custom_data_formatting_template",
        dataset_text_field="formatted",
        template="### Text: {{Tweet text}} \n\n### Label: {{text_label}}",
    ),
    "eos": handler("add_tokenizer_eos_token", dataset_text_field="output"),
    "formatting": handler("apply_dataset_formatting", dataset_text_field="output"),
    "ids": handler("tokenize", dataset_text_field="output"),
    "labels": handler("duplicate_columns", old_column="input_ids", new_column="labels"),
    "short": {"name": "skip_large_text", "arguments": {"fn_kwargs": {"column_name": "input_ids", "max_length": 50}}},
    "short columns": {
        "name": "skip_large_columns",
        "arguments": {"fn_kwargs": {"column_name": "output", "max_length": 500}},
    },
    "talk": handler(
        "apply_tokenizer_chat_template", dataset_text_field="formatted", conversation_column="conversations"
    ),
}
"""Handlers as earlier releases, and documents that still describe them, name them and their arguments."""
JOBS: dict[str, dict[str, Any]] = {
    "text": TEXT,
    "formatter": FORMATTED,
    "pairs": {"ROWS": "pairs"},
    "tokens": {"ROWS": "tokens"},
    "chats": TURNS | {"ROWS": "chats"},
    "conversations": TURNS | {"ROWS": "talks", "dataset_conversation_field": "conversations"},
    "every default, as text": TEXT
    | {"num_train_epochs": "5", "per_device_train_batch_size": "4", "learning_rate": "1e-5", "packing": "False"},
    "LoRA": TEXT | LORA,
    "LoRA of GPT": TEXT | LORA | {"target_modules": ["c_attn", "c_proj"], "MODEL": "gpt2"},
    "LoRA of GPTBigCode": TEXT | LORA | {"target_modules": ["c_attn"], "MODEL": "gpt_bigcode"},
    "LoRA of all layers": TEXT | LORA | {"target_modules": ["all-linear"]},
    "LoRA with lm_head": TEXT | LORA | {"target_modules": ["lm_head", "all-linear"]},
    "LoRA of lm_head alone": TEXT | LORA | {"target_modules": ["lm_head"]},
    "LoRA of PEFT's modules": TEXT | LORA | {"target_modules": None},
    "LoRA of Granite": TEXT | LORA | {"MODEL": "granite"},
    "LoRA of Mixtral's attention": TEXT | LORA | {"MODEL": "mixtral", "target_modules": ["q_proj", "k_proj"]},
    "prompt tuning": TEXT | {"peft_method": "pt", "prompt_tuning_init": "TEXT", "num_virtual_tokens": 10},
    "random prompt tuning": TEXT | {"peft_method": "pt", "prompt_tuning_init": "RANDOM"},
    "aLoRA": TEXT | LORA | {"peft_method": "alora", "alora_invocation_string": "### Label:"},
    "QLoRA": TEXT | LORA | {"bnb_qlora": ["nf4"], "torch_dtype": "bfloat16"},
    "QLoRA, fused": TEXT | LORA | {"bitsandbytes": ["nf4"], "fused_lora": ["bitsandbytes", True], "fp16": False},
    "padding-free": TEXT | {"padding_free": ["huggingface"], "use_flash_attn": True},
    "multipack": TEXT | {"padding_free": ["huggingface"], "multipack": [16]},
    "packing": {"dataset_text_field": "output", "packing": True, "max_seq_length": 64},
    "only the final model": TEXT | {"save_strategy": "no", "save_model_dir": "OUT/model", "logging_strategy": "steps"},
    "validation": TEXT | EVALUATED,
    "from the start": TEXT | {"resume_from_checkpoint": "False"},
    "new tokens": TEXT | LORA | {"add_special_tokens": ["<a>"], "embedding_size_multiple_of": 8},
    "for vLLM": TEXT | LORA | {"lora_post_process_for_vllm": True},
    "trackers": TEXT
    | {"trackers": ["file_logger", "mlflow", "hf_resource_scanner"], "mlflow_tracking_uri": "file:///mlruns"},
    "all reports": TEXT | {"report_to": "all", "exp_metadata": '{"team": "a"}'},
    "controller": TEXT
    | {
        "trainer_controller_config_file": {
            "controllers": [
                {
                    "name": "low",
                    "triggers": ["on_log"],
                    "rule": "loss['loss'] < 0.1",
                    "operations": ["hfcontrols.should_training_stop"],
                }
            ],
            "controller_metrics": [{"name": "loss", "class": "Loss"}],
        }
    },
    "mixed precision": TEXT | {"bf16": True, "gradient_checkpointing": True, "optim": "adamw_torch_fused"},
    "data config": {"DATA": [dataset("pairs", PAIRS)]},
    "data config of chats": {"DATA": [dataset("chats", CHATS)]},
    "mixture": {"DATA": [dataset("pairs", PAIRS, sampling=0.4), dataset("chats", CHATS, sampling=0.6)]},
    "split": {"DATA": [dataset("pairs", PAIRS, split={"train": 0.8, "validation": 0.2})], "eval_strategy": "epoch"},
    "stream": {"DATA": [dataset("pairs", PAIRS)], "dataprocessor": {"streaming": True}, "max_steps": 2},
    "columns when loading": {
        "DATA": [
            dataset(
                "pairs",
                handler("tokenize_and_apply_input_masking", input_field_name="a", output_field_name="b"),
                rename_columns={"input": "a", "output": "b"},
                retain_columns=["a", "b"],
            )
        ]
    },
    # Of fms-hf-tuning's own tests: the job keeps the name of a text column that these rows do not have.
    "tokens by a data config": {"DATA": [dataset("tokens")], "dataset_text_field": "output"},
    "ids by a data config": {
        "DATA": [
            {
                "data_paths": ["ROWS ids"],
                "data_handlers": [
                    {
                        "name": "duplicate_columns",
                        "arguments": {"fn_kwargs": {"existing_column_name": "input_ids", "new_column_name": "labels"}},
                    }
                ],
            }
        ],
        "dataset_text_field": "output",
    },
    "a chat template on one line": TURNS
    | {
        "ROWS": "chats",
        "dataset_text_field": "output",
        "instruction_template": "<|user|>",
        "response_template": "<|assistant|>",
        "chat_template": "{% for message in messages['messages'] %}      {% if message['role'] == 'user' %}"
        "{{ '<|user|>\n' + message['content'] + eos_token }}      {% elif message['role'] == 'assistant' %}"
        "{{ '<|assistant|>\n' + message['content'] + eos_token }}      {% endif %}"
        "      {% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}      {% endif %}      {% endfor %}",
    },
    "a stream by its datasets": {"DATA": [dataset("pairs", PAIRS, streaming=True)], "max_steps": 2},
    "a chat template next to the datasets": {
        "DATA": [dataset("chats", CHATS)],
        "chat_template": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "PLACE": "data",
    },
    "earlier pairs": {"DATA": [dataset("pairs", EARLIER["pairs"])], "datapreprocessor": {"sampling_seed": 66}},
    "earlier template": {"DATA": [dataset("texts", EARLIER["template"])], "response_template": "\n### Label:"},
    "earlier texts in packs": {"DATA": [dataset("texts", EARLIER["eos"])], "packing": True},
    "earliest texts in packs": {"DATA": [dataset("texts", EARLIER["formatting"])], "packing": True},
    "earlier tokens": {
        "DATA": [dataset("texts", EARLIER["short columns"], EARLIER["ids"], EARLIER["labels"], EARLIER["short"])]
    },
    "earlier chats": {"DATA": [dataset("talks", EARLIER["talk"])]} | TURNS,
}
SAMPLE = (
    "earlier tokens",
    pytest.param("earlier texts in packs", marks=pytest.mark.full),
    pytest.param("LoRA with lm_head", marks=pytest.mark.full),
    pytest.param("prompt tuning", marks=pytest.mark.full),
)
"""Jobs that are also trained."""
REFUSED = {
    "fast kernels": (TEXT | {"fast_kernels": [True, True, True]}, "fast_kernels: "),
    "GPTQ": (TEXT | LORA | {"auto_gptq": ["triton_v2"], "torch_dtype": "float16", "fp16": True}, "auto_gptq: "),
    "experts": (TEXT | {"fast_moe": [1]}, "fast_moe: not supported"),
}
"""Jobs that cannot run here: with what the error begins."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path) -> dict[str, Path]:
    tokenizer = AutoTokenizer.from_pretrained(chatml_llama_dir)
    folder = tmp_path_factory.mktemp("families")
    for family in ("llama", "gpt2", "gpt_bigcode", "granite", "mixtral"):
        save_base(family, folder / family, tokenizer)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def run(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function that runs a job, dry or not, and returns the exit code and stderr."""

    def start(job: dict[str, Any], *options: str) -> tuple[int, str]:
        for name, row in ROWS.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
        values = {
            "model_name_or_path": str(models[job.get("MODEL", "llama")]),
            "training_data_path": f"ROWS {job.get('ROWS', 'texts')}",
            "output_dir": "OUT",
            "num_train_epochs": 1,
            "use_cpu": True,
        }
        if "DATA" in job:
            names = ("dataprocessor", "datapreprocessor", *(["chat_template"] if job.get("PLACE") == "data" else []))
            config = {name: job[name] for name in names if name in job}
            (tmp_path / "data.yaml").write_text(_with_paths({"datasets": job["DATA"], **config}, tmp_path))
            del values["training_data_path"]
            values["data_config_path"] = str(tmp_path / "data.yaml")
        local = {"MODEL", "ROWS", "DATA", "PLACE", *(config if "DATA" in job else ())}
        values |= {key: value for key, value in job.items() if key not in local}
        if rules := job.get("trainer_controller_config_file"):
            (tmp_path / "rules.yaml").write_text(json.dumps(rules))
            values["trainer_controller_config_file"] = str(tmp_path / "rules.yaml")
        file = tmp_path / "job.json"
        file.write_text(_with_paths(values, tmp_path))
        code = main(["job", str(file), "--worker", *options])
        return code, capsys.readouterr().err

    return start


def _with_paths(values: dict[str, Any], folder: Path) -> str:
    text = json.dumps(values, indent=1).replace('"OUT', f'"{folder}/out')
    for name in ROWS:
        text = text.replace(f'"ROWS {name}"', f'"{folder}/{name}.jsonl"')
    return text


@pytest.mark.parametrize("label", JOBS)
def test_a_job_passes_the_dry_run(run: Any, label: str, tmp_path: Path) -> None:
    code, err = run(JOBS[label], "--dry-run")
    assert code == 0, err
    assert not (tmp_path / "out").exists()
    # Warnings name only what the job has.
    written = {*json.loads((tmp_path / "job.json").read_text())}
    named = {line.split(": ")[2] for line in err.splitlines() if line.startswith("warning: /")}
    assert named <= written, err


@pytest.mark.parametrize("label", SAMPLE)
def test_the_verdict_is_true_of_the_run(run: Any, label: str, tmp_path: Path) -> None:
    code, err = run(JOBS[label])
    assert code == 0, err
    assert (tmp_path / "out" / "checkpoint-final").is_dir()


@pytest.mark.parametrize("label", REFUSED)
def test_a_job_that_cannot_run_here_is_refused_by_the_dry_run(run: Any, label: str, tmp_path: Path) -> None:
    job, expected = REFUSED[label]
    code, err = run(job, "--dry-run")
    assert code == 1, err
    assert f": {expected}" in err
