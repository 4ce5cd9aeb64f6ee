"""A change that `allow_changed` permits is applied, or refused in words; it never ends in an internal error."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetuning.errors import EXIT_USER, CheckpointError, FinetuningError

SAVED = {"training_args.max_steps": 4, "training_args.save_strategy": "steps", "training_args.save_steps": 2}
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
SFT_CHANGES: dict[str, dict[str, Any]] = {
    "optim to sgd": {"training_args.optim": "sgd"},
    "optim to adafactor": {"training_args.optim": "adafactor"},
    "constant": {"training_args.lr_scheduler_type": "constant"},
    "plateau": {
        "training_args.lr_scheduler_type": "reduce_lr_on_plateau",
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 1,
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
    },
    "learning rate": {"training_args.learning_rate": 0.001},
    "weight decay": {"training_args.weight_decay": 0.1},
    "seed": {"training_args.seed": 7},
    "fewer steps": {"training_args.max_steps": 1},
    "total batch": {"batchsize_conf.total_train_batch_size": 8},
    "packing": {"sft_args.packing": True},
    "grouping": {"training_args.train_sampling_strategy": "group_by_length"},
    "bf16": {"training_args.bf16": True},
    "dtype": {"run_conf.model_args.dtype": "bfloat16"},
    "neftune": {"training_args.neftune_noise_alpha": 5},
    "loraplus": {"overrides.loraplus_lr_ratio": 4.0},
    "alpha": {"peft_conf.peft_kwargs.lora_alpha": 32},
    "rslora": {"peft_conf.peft_kwargs.use_rslora": True},
    "dropout": {"peft_conf.peft_kwargs.lora_dropout": 0.2},
    "dora": {"peft_conf.peft_kwargs.use_dora": True},
    "bias": {"peft_conf.peft_kwargs.bias": "lora_only"},
    "rank pattern": {"peft_conf.peft_kwargs.rank_pattern": {"q_proj": 8}},
    "fused optimizer": {"training_args.optim": "adamw_torch_fused"},
    "exclusion": {"peft_conf.peft_kwargs.exclude_modules": ["q_proj"]},
    "whole modules": {"peft_conf.peft_kwargs.modules_to_save": ["lm_head"]},
    "token rows": {"peft_conf.peft_kwargs.trainable_token_indices": [3, 4]},
    "pissa": {"peft_conf.peft_kwargs.init_lora_weights": "pissa"},
    "streaming": {"data_conf.streaming": True, "data_conf.cache": "off"},
    "fewer rows": {},
    "another model": {},
}


# What the checkpoint cannot be resumed with, and what the error says.
REFUSED = {
    "optim to sgd": r"checkpoint-2 is incompatible: training_args\.optim was adamw_torch.*, is sgd",
    "optim to adafactor": r"checkpoint-2 is incompatible: training_args\.optim was adamw_torch.*, is adafactor",
    "plateau": r"checkpoint-2 is incompatible: training_args\.lr_scheduler_type was linear, is reduce_lr_on_plateau",
    "fewer steps": r"max_steps: checkpoint-2 is at step 2, and this run ends after step 1\. Raise",
    "loraplus": r"scheduler states of .* cannot be loaded: .*changed since it was saved: overrides\.loraplus_lr_ratio",
    "dora": r"lora_magnitude_vector; changed since it was saved: peft_conf\.peft_kwargs\.use_dora",
    "rank pattern": r"weights of .* cannot be loaded: .*changed since it was saved: .*\.rank_pattern",
    "exclusion": r"tensors are not the model's.*; changed since it was saved: peft_conf\.peft_kwargs\.exclude_modules",
    "whole modules": r"the weights of .* cannot be loaded: .*; changed since it was saved: .*\.modules_to_save",
    "token rows": r"the weights of .* cannot be loaded: .*; changed since it was saved: .*\.trainable_token_indices",
    "streaming": r"does not contain the position in the stream of rows",
    "another model": r"checkpoint-2 is incompatible: model\.parameters was",
}
SECTIONS = (
    "training_args", "sft_args", "peft_conf", "data_conf", "data", "model", "batchsize_conf", "overrides", "run_conf",
    "plan", "versions",
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the output directory of the run that all tests resume; empty until the first of them."""
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize("name", SFT_CHANGES)
def test_an_allowed_change_is_applied_or_refused_in_words(
    train: Any,
    sft_values: Any,
    tmp_path: Path,
    tiny_llama_dir: Path,
    write_jsonl: Any,
    sft_rows: Any,
    saved: Path,
    name: str,
) -> None:
    if not (saved / "checkpoint-2").exists():
        run = train(sft_values({**SAVED, "peft_conf": copy.deepcopy(LORA)}))
        (run.output_dir / "checkpoint-2").rename(saved / "checkpoint-2")
        shutil.rmtree(run.output_dir)
    shutil.copytree(saved, tmp_path / "out")
    changes = copy.deepcopy(SFT_CHANGES[name])
    if name == "fewer rows":
        changes["data_conf.training_data.datasets"] = [{"path": str(write_jsonl(tmp_path / "few.jsonl", sft_rows(5)))}]
    if name == "another model":
        changes = {"run_conf.model": str(tiny_llama_dir), "run_conf.tokenizer": str(tiny_llama_dir)}
    resume = {"run_conf.resume_from_checkpoint": "auto", "run_conf.allow_changed": list(SECTIONS)}
    values = sft_values({**SAVED, "peft_conf": copy.deepcopy(LORA), **changes, **resume})
    if name in REFUSED:
        with pytest.raises(FinetuningError, match=REFUSED[name]) as refused:
            train(values)
        assert refused.value.exit_code == EXIT_USER
        return
    losses = train(values).losses
    logged = json.loads((saved / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert losses[:2] == [entry["loss"] for entry in logged[:2]] and len(losses) > 2


DPO_CHANGES: dict[str, dict[str, Any]] = {
    "loss": {"training_args.loss_type": ["bco_pair"]},
    "beta": {"training_args.beta": 0.3},
    "moving reference": {"training_args.sync_ref_model": True, "training_args.ref_model_sync_steps": 1},
    "stored reference": {"training_args.precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("name", DPO_CHANGES)
def test_an_allowed_change_of_dpo_is_applied_or_refused_in_words(
    train: Any, dpo_values: Any, tmp_path: Path, name: str
) -> None:
    train(dpo_values({**SAVED, "training_args.max_steps": 2}))
    shutil.rmtree(tmp_path / "out" / "checkpoint-final")
    resume = {"run_conf.resume_from_checkpoint": "auto", "run_conf.allow_changed": list(SECTIONS)}
    values = dpo_values({**SAVED, **DPO_CHANGES[name], **resume})
    if name == "moving reference":
        with pytest.raises(CheckpointError, match=r"has no reference/weights\.safetensors: the reference model moves"):
            train(values)
        return
    assert train(values).result.steps == 4
