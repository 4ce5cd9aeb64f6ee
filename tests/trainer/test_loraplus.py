"""LoRA+: the rates of the groups, and runs that go on exactly."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "bias": "lora_only"}}


def test_b_matrices_alone_learn_faster(train: Any, sft_values: Any) -> None:
    changes = {"peft_conf": LORA, "overrides.loraplus_lr_ratio": 8, "training_args.lr_scheduler_type": "constant"}
    trainer = train(sft_values({**changes, "training_args.weight_decay": 0.1})).trainer
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    trained = {name: rates[id(p)] for name, p in trainer.model.named_parameters() if p.requires_grad}
    fast = {name for name, rate in trained.items() if rate == pytest.approx(0.08)}
    assert fast == {name for name in trained if "lora_B" in name or "lora_embedding_B" in name}
    assert {trained[name] for name in trained.keys() - fast} == {0.01}
    assert len(fast) == 3


def test_a_ratio_of_one_changes_nothing(train: Any, sft_values: Any, tmp_path: Any) -> None:
    plain = train(sft_values({"peft_conf": LORA, "training_args.output_dir": str(tmp_path / "plain")}))
    same = train(sft_values({"peft_conf": LORA, "overrides.loraplus_lr_ratio": 1}))
    assert same.losses == plain.losses


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_cut_run_goes_on_exactly(
    train: Any, sft_values: Any, dpo_values: Any, read_tensors: Any, method: str
) -> None:
    make = sft_values if method == "sft" else dpo_values
    changes = {
        "peft_conf": LORA,
        "overrides.loraplus_lr_ratio": 16,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 1,
        "training_args.max_steps": 2,
    }
    whole = train(make(changes))
    shutil.rmtree(whole.output_dir / "checkpoint-2")
    again = {"run_conf.final_checkpoint_name": "again", "run_conf.resume_from_checkpoint": "auto"}
    assert train(make(changes | again)).losses == whole.losses
    first, second = read_tensors(whole.final), read_tensors(whole.output_dir / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)
