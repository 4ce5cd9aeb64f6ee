"""Recipes in the shapes of Silogen's charts and tutorials pass `--dry-run` unchanged, and train if it says so.

Each is rendered as its chart does: a recipe of a model over the chart's values, with the user's data. The models are
tiny ones of the recipes' families.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer
from zoo.harness import save_base

from finetuning.cli.main import main

LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
FAMILIES = {
    "llama": LORA,
    "mistral": LORA,
    "qwen2": LORA,
    "qwen3": LORA,
    "cohere": LORA,
    "gemma2": LORA,
    "gemma3_text": LORA,
    "gemma3": LORA,
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "gate", "w2", "w3"],
    "gpt2": ["c_attn"],
}
"""Model types, and the modules that a recipe of each adapts."""
CHART: dict[str, Any] = {
    "method": "sft",
    "data_conf": {
        "training_data": {"type": "CONCATENATION", "datasets": [{"path": "bucket/train.jsonl"}]},
        "validation_data": {"type": "AUTO_SPLIT", "ratio": 0.1},
        "chat_template_name": "keep-original",
        "missing_pad_token_strategy": "bos-repurpose",
    },
    "training_args": {},
    "overrides": {"lr_multiplier": 1.0, "lr_batch_size_scaling": "none"},
    "batchsize_conf": {"max_per_device_train_batch_size": 1},
    "peft_conf": {"peft_type": "NO_PEFT"},
    "quant_conf": {"quantization_type": "no-quantization"},
    "run_conf": {"model_args": {}, "resume_from_checkpoint": "auto"},
    "sft_args": {"max_seq_length": 2048},
}
"""The values of the chart, which a recipe is merged into."""
RECIPE: dict[str, Any] = {
    "training_args": {
        "learning_rate": 0.000005,
        "max_grad_norm": 1.0,
        "weight_decay": 0.000001,
        "optim": "adamw_torch",
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.01,
        "logging_strategy": "steps",
        "logging_steps": 0.01,
        "save_strategy": "no",
        "seed": 42,
        "bf16": True,
        "push_to_hub": False,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "eval_steps": 0.2,
        "eval_strategy": "steps",
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "load_best_model_at_end": False,
    },
    "run_conf": {
        "model_args": {"torch_dtype": "bfloat16", "use_cache": False, "attn_implementation": "flash_attention_2"},
        "resume_from_checkpoint": "auto",
    },
    "sft_args": {"max_seq_length": 8192},
}
"""What the recipes of all models share."""


def lora(modules: list[str], **more: Any) -> dict[str, Any]:
    kwargs = {"r": 64, "lora_alpha": 16.0, "lora_dropout": 0.05, "target_modules": modules, **more}
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_kwargs": kwargs}


def merged(values: Mapping[str, Any], *overlays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values under overlays, as Helm merges them: lists are replaced."""
    result = dict(values)
    for overlay in overlays:
        for key, value in overlay.items():
            inner = result.get(key)
            is_nested = isinstance(value, dict) and isinstance(inner, dict)
            result[key] = merged(inner, value) if is_nested else value
    return result


def rendered(values: Mapping[str, Any], gpus: int = 1) -> dict[str, Any]:
    """Return the config file that the chart makes of its values."""
    batch, data, peft = values["batchsize_conf"], values["data_conf"], values["peft_conf"]
    validation = data["validation_data"]
    if validation["type"] != "AUTO_SPLIT":
        validation = {key: value for key, value in validation.items() if key != "ratio"}
    name = "checkpoint-final" if peft["peft_type"] == "NO_PEFT" else "checkpoint-final-adapter"
    return {
        **{key: value for key, value in values.items() if key != "sft_args" or values["method"] == "sft"},
        "data_conf": {**data, "validation_data": validation},
        "batchsize_conf": {
            "total_train_batch_size": batch.get("total_train_batch_size") or gpus,
            "max_per_device_train_batch_size": batch["max_per_device_train_batch_size"],
            "per_device_eval_batch_size": batch.get("per_device_eval_batch_size"),
        },
        "run_conf": {"model": "MODEL llama", "final_checkpoint_name": name, **values["run_conf"]},
    }


def _data(**data_conf: Any) -> dict[str, Any]:
    return {"data_conf": data_conf}


def _args(**training_args: Any) -> dict[str, Any]:
    return {"training_args": training_args}


def _sources(kind: str, *weights: float) -> dict[str, Any]:
    files: list[dict[str, Any]] = [{"path": "bucket/train.jsonl"} for _ in weights or (1.0,)]
    if kind == "PRECOMPUTE_WEIGHTED_MIX":
        files = [{**file, "sampling_weight": weight} for file, weight in zip(files, weights, strict=True)]
    return {"type": kind, "datasets": files}


_TUTORIAL = _args(
    learning_rate=0.00005, max_grad_norm=7.0, warmup_ratio=0.05, report_to=["none"], gradient_checkpointing=False,
    gradient_checkpointing_kwargs=None,
)  # fmt: skip
_BEST = {"eval_steps": 0.1, "load_best_model_at_end": True}
_OWN_TESTS = _args(
    use_cpu=True, gradient_checkpointing=False, gradient_checkpointing_kwargs={"use_reentrant": False},
    learning_rate=0.5, logging_steps=1, lr_scheduler_type="constant", optim="sgd", max_steps=15, num_train_epochs=-1,
    overwrite_output_dir=True, report_to=["none"], save_strategy="steps", save_steps=1, eval_strategy="no",
    eval_steps=None, metric_for_best_model=None, greater_is_better=None, warmup_ratio=0.0,
)  # fmt: skip
_CONFIG_TEST = {
    **_data(
        training_data=_sources("PRECOMPUTE_WEIGHTED_MIX", 1.0, 0.5),
        validation_data=_sources("CONCATENATION"),
        chat_template_name="chat-ml",
    ),
    "batchsize_conf": {"total_train_batch_size": 512, "max_per_device_train_batch_size": 4},
    **_args(max_steps=50, num_train_epochs=23, eval_strategy="epoch", save_strategy="steps", save_steps=5),
    "peft_conf": lora(LORA[:4], r=64, lora_dropout=0.1),
}
_BNB = {"quantization_type": "bits-and-bytes", "bnb_4bit_compute_dtype": "bfloat16"}
UTILITIES: dict[str, dict[str, Any]] = {
    "tutorial full": merged(_TUTORIAL, {"batchsize_conf": {"total_train_batch_size": 8}}),
    "tutorial best checkpoint": merged(_TUTORIAL, _args(save_strategy="best", load_best_model_at_end=True)),
    "tutorial six files": merged(
        _TUTORIAL,
        _data(training_data=_sources("CONCATENATION", *[1.0] * 6), chat_template_name="chat-ml"),
        _args(save_steps=0.2, weight_decay=0.001, num_train_epochs=6),
    ),
    # The template adds tokens, and the adapter the embeddings.
    "tiny model, with embeddings": merged(
        _TUTORIAL,
        _data(chat_template_name="simplified-llama31"),
        _args(save_strategy="steps", save_steps=0.1, **_BEST),
        {"peft_conf": lora([*LORA, "lm_head", "embed_tokens"])},
    ),
    "save steps": merged(_args(save_strategy="steps", save_steps=0.2, **_BEST), {"peft_conf": lora(LORA)}),
    "radeon": {
        "run_conf": {"model_args": {"torch_dtype": None, "dtype": "bfloat16", "attn_implementation": "sdpa"}},
        "peft_conf": lora([*LORA, "lm_head", "embed_tokens"]),
    },
    "float16": {"run_conf": {"model_args": {"torch_dtype": "float16"}}},
    "not reentrant": _args(gradient_checkpointing_kwargs={"use_reentrant": False}, report_to=["none"]),
    "mlflow": {
        "tracking": {"mlflow_server_uri": "http://dev-tracking-mlflow-shared", "experiment_name": "my_experiment"},
        **_args(report_to=["mlflow"], logging_first_step=True),
    },
    "mlflow in a folder": {
        "tracking": {"mlflow_server_uri": "file:///mlruns", "experiment_name": "e", "hf_mlflow_log_artifacts": "False"}
    },
    "tensorboard": _args(report_to=["tensorboard"]),
    "both trackers": _args(report_to=["tensorboard", "mlflow"], logging_dir="./logs"),
    "all trackers": _args(report_to="all"),
    "speed and largest batch": {
        **_args(include_num_input_tokens_seen="non_padding", include_tokens_per_second=True),
        "sft_args": {"length_handling": "truncate"},
    },
    "in four bits": {
        "quant_conf": {**_BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "peft_conf": lora(LORA),
    },
    "in eight bits": {"quant_conf": {**_BNB, "load_in_8bit": True}, "peft_conf": lora(LORA)},
    "weighted mix": {
        **_data(training_data=_sources("PRECOMPUTE_WEIGHTED_MIX", 2.0, 1.0), validation_data={"type": "NONE"}),
        **_args(eval_strategy="no"),
    },
    "files for validation": _data(validation_data=_sources("CONCATENATION")),
    "scaled learning rate": {
        "overrides": {"lr_multiplier": 2.0, "lr_batch_size_scaling": "sqrt"},
        "batchsize_conf": {"total_train_batch_size": 512, "max_per_device_train_batch_size": 8},
    },
    "evaluation batch": {"batchsize_conf": {"per_device_eval_batch_size": 8}},
    "older names": _args(
        eval_strategy=None, evaluation_strategy="steps", group_by_length=True, save_safetensors=True, no_cuda=True
    ),
    "completions only": {"sft_args": {"train_on_completions_only": True, "length_handling": "filter"}},
    "determinism": {"run_conf": {"determinism": "full", "use_fast_tokenizer": True, "tokenizer": "MODEL llama"}},
    "as in its test of configs": _CONFIG_TEST,
    "as in its test of training": {
        **_data(chat_template_name="chat-ml", validation_data={"type": "NONE"}),
        **_OWN_TESTS,
        "run_conf": {"model_args": {"attn_implementation": "eager", "revision": "91c0fe31"}, "determinism": "full"},
        "peft_conf": lora(LORA[:4], r=4),
    },
    "dpo full": merged(_TUTORIAL, {"method": "dpo", "batchsize_conf": {"total_train_batch_size": 8}}),
    "dpo LoRA": {
        "method": "dpo",
        "peft_conf": lora(LORA),
        **_args(beta=0.01, loss_type="sigmoid", max_length=2048, max_prompt_length=123, remove_unused_columns=False),
    },
    "dpo as in its test of training": {
        "method": "dpo",
        **_data(chat_template_name="chat-ml", validation_data={"type": "NONE"}),
        **merged(_OWN_TESTS, _args(remove_unused_columns=False, beta=0.01, loss_type="sigmoid")),
    },
}
"""Overlays of the recipes: tutorials, utilities, and the configs of the engine's own tests."""
TEMPLATES = ("mistral-with-system", "chat-ml", "poro", "simplified-llama31", "keep-original")
PAD_STRATEGIES = ("bos-repurpose", "eos-repurpose", "unk-convert-to-eos")


def recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a label and the config of each recipe; `MODEL family` is replaced by the folder of a model."""

    def recipe(*overlays: Mapping[str, Any], gpus: int = 1) -> dict[str, Any]:
        return rendered(merged(CHART, RECIPE, *overlays), gpus)

    for family, modules in FAMILIES.items():
        run = {"run_conf": {"model": f"MODEL {family}"}}
        outer = [] if family == "gpt2" else ["lm_head"]
        kinds = {
            "full": {"peft_conf": {"peft_type": "NO_PEFT"}},
            "LoRA": {"peft_conf": lora(modules)},
            "LoRA with embeddings": {"peft_conf": lora([*modules, *outer, "embed_tokens"])},
            "LoRA with a misspelled module": {"peft_conf": lora([*modules, *outer, "embed_token"])},
        }
        for kind, overlay in kinds.items():
            if family == "gpt2" and kind == "LoRA with embeddings":
                overlay = {"peft_conf": lora([*modules, "wte"], fan_in_fan_out=True)}
            yield f"{family} {kind}", recipe(run, overlay)
    for name, overlay in UTILITIES.items():
        yield name, recipe(overlay)
        if overlay.get("method") != "dpo" and "peft_conf" not in overlay:
            yield (
                f"{name}, LoRA, Qwen",
                recipe(overlay, {"peft_conf": lora(LORA), "run_conf": {"model": "MODEL qwen3"}}),
            )
    for family in ("mistral", "qwen2", "qwen3", "cohere", "gemma3_text"):
        model = {"run_conf": {"model": f"MODEL {family}"}}
        yield f"dpo {family}", recipe(_TUTORIAL, {"method": "dpo", "peft_conf": lora(LORA)}, model, gpus=8)
    for template, strategy in itertools.product(TEMPLATES, PAD_STRATEGIES):
        data = _data(chat_template_name=template, missing_pad_token_strategy=strategy, padding_side="right")
        yield f"{template} {strategy}", recipe(data, {"peft_conf": lora(LORA)})


RECIPES = dict(recipes())
SAMPLE = (
    "cohere LoRA with a misspelled module",
    "mixtral LoRA",
    "float16",
    pytest.param("tiny model, with embeddings", marks=pytest.mark.full),
    pytest.param("tutorial best checkpoint, LoRA, Qwen", marks=pytest.mark.full),
    pytest.param("dpo full", marks=pytest.mark.full),
)
"""Recipes that are also trained: the file as it is, in the chart's working directory."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, chatml_llama_dir: Path) -> dict[str, Path]:
    """A tiny model of each family. Its tokenizer has a token for the beginning, and none for padding, as Llama's."""
    tokenizer = AutoTokenizer.from_pretrained(chatml_llama_dir)
    tokenizer.bos_token, tokenizer.pad_token = "<|endoftext|>", None
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        save_base(family, folder / family, tokenizer)
    return {family: folder / family for family in FAMILIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_jsonl: Any, sft_rows: Any, dpo_rows: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "sft": write_jsonl(folder / "sft.jsonl", sft_rows(12)),
        "dpo": write_jsonl(folder / "dpo.jsonl", dpo_rows(12)),
    }


@pytest.fixture
def run(
    models: dict[str, Path],
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """A function that runs a recipe in a folder of its own, dry or not, and returns the exit code and stderr."""
    monkeypatch.chdir(tmp_path)

    def start(label: str, *options: str) -> tuple[int, str]:
        values = RECIPES[label]
        text = json.dumps(values).replace("bucket/train.jsonl", str(data[values["method"]]))
        for family, folder in models.items():
            text = text.replace(f'"MODEL {family}"', json.dumps(str(folder)))
        config = tmp_path / "finetuning_config.yaml"
        config.write_text(yaml.safe_dump(json.loads(text), sort_keys=False))
        code = main(["--num-preprocess-workers", "1", values["method"], str(config), *options])
        return code, capsys.readouterr().err

    return start


def test_there_are_more_than_a_hundred_recipes() -> None:
    assert len(RECIPES) > 100
    assert len({json.dumps(values) for values in RECIPES.values()}) == len(RECIPES)


@pytest.mark.parametrize("label", RECIPES)
def test_a_recipe_passes_the_dry_run_unchanged(run: Any, label: str, tmp_path: Path) -> None:
    code, err = run(label, "--dry-run")
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finetuning_config.yaml"]


@pytest.mark.parametrize("label", SAMPLE)
def test_the_verdict_is_true_of_the_run(run: Any, label: str, tmp_path: Path) -> None:
    code, err = run(label)
    assert code == 0, err
    name = RECIPES[label]["run_conf"]["final_checkpoint_name"]
    assert (tmp_path / "checkpoints" / name).is_dir()
    assert "Traceback" not in err
