"""AdaLoRA moves rank while it trains, and a run that goes on moves it alike."""

from __future__ import annotations

import json
import shutil
from typing import Any

import torch

from finetuning.trainer.peft_methods import ADALORA_STATE_NAME

ADALORA = {
    "peft_type": "ADALORA",
    "peft_kwargs": {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "target_modules": ["q_proj", "v_proj"]},
}
STEPS = {"training_args.max_steps": 8, "training_args.save_strategy": "steps", "training_args.save_steps": 5}


def test_rank_goes_down_to_its_target(train: Any, sft_values: Any) -> None:
    run = train(sft_values({"peft_conf": ADALORA, **STEPS}))
    weights = {name: p for name, p in run.trainer.model.named_parameters() if "lora_E" in name}
    assert len(weights) == 4
    left = sum(int(weight.ne(0).sum()) for weight in weights.values())
    assert left == 2 * len(weights), "of 6 singular values each, 2 are left on average"
    config = json.loads((run.final / "adapter_config.json").read_text())
    assert sum(sum(kept) for kept in config["rank_pattern"].values()) == left


def test_a_cut_run_moves_rank_alike(train: Any, sft_values: Any, read_tensors: Any) -> None:
    changes = {"peft_conf": ADALORA, **STEPS}
    whole = train(sft_values(changes))
    assert (whole.output_dir / "checkpoint-5" / ADALORA_STATE_NAME).is_file()
    shutil.rmtree(whole.output_dir / "checkpoint-8")
    again = {"run_conf.final_checkpoint_name": "again", "run_conf.resume_from_checkpoint": "auto"}
    assert train(sft_values(changes | again)).losses == whole.losses
    first, second = read_tensors(whole.final), read_tensors(whole.output_dir / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_tuned_adapter_is_trained_on(train: Any, sft_values: Any, tmp_path: Any) -> None:
    run = train(sft_values({"peft_conf": ADALORA, **STEPS}))
    onward = {"peft_type": "PRETRAINED_PEFT", "name_or_path": str(run.final)}
    changes = {"peft_conf": onward, "training_args.output_dir": str(tmp_path / "onward")}
    assert len(train(sft_values(changes)).losses) == 3
