"""What must not change the optimization does not, and what is trained is what a loop written by hand trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetuning.algorithms import ALGORITHMS

SFT = ALGORITHMS["sft"]
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear", "init_lora_weights": True}}
FULL = {"peft_type": "NO_PEFT"}


class Recording:
    """A collator that keeps the rows of each batch."""

    def __init__(self, collator: Callable[..., Any]):
        self.collator = collator
        self.batches: list[list[dict[str, Any]]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        self.batches.append(rows)
        return self.collator(rows)


def recording(into: list[Recording]) -> Any:
    """SFT whose trainer's rows are kept in the order in which it draws them."""

    def build(parts: Any) -> Any:
        trainer = SFT.build_trainer(parts)
        trainer.data_collator = Recording(trainer.data_collator)
        into.append(trainer.data_collator)
        return trainer

    return replace(SFT, build_trainer=build)


def on_plain_logits() -> Any:
    """SFT that computes the logits of every position and takes the model's own loss."""

    def build(parts: Any) -> Any:
        trainer = SFT.build_trainer(parts)
        assert trainer.uses_logits_to_keep
        trainer.uses_logits_to_keep = False
        return trainer

    return replace(SFT, build_trainer=build)


def losses_by_hand(model_dir: Any, rows: list[dict[str, Any]], per_step: int, steps: int, rate: float) -> list[float]:
    """AdamW on one row at a time, without padding, batching, masks or any library's loss."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    for step in range(steps):
        total, count = torch.zeros(()), 0
        for row in rows[step * per_step : (step + 1) * per_step]:
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
            for position, label in enumerate(row["labels"][1:]):
                if label != -100:
                    total = total - torch.log_softmax(logits[position], dim=-1)[label]
                    count += 1
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("completions_only", [True, False])
def test_training_is_a_loop_written_by_hand(
    train: Any, sft_values: Any, chatml_llama_dir: Any, completions_only: bool
) -> None:
    recorded: list[Recording] = []
    run = train(sft_values({"sft_args.train_on_completions_only": completions_only}), recording(recorded))
    rows = [row for batch in recorded[0].batches for row in batch]
    assert run.losses == pytest.approx(losses_by_hand(chatml_llama_dir, rows, 4, 3, 0.01), abs=1e-5)
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("peft", [FULL, LORA], ids=["full", "lora"])
def test_layout_padding_side_and_logits_leave_the_losses_as_they_are(train: Any, sft_values: Any, peft: Any) -> None:
    def losses(method: Any = None, **changes: Any) -> list[float]:
        flattened = {key.replace("__", "."): value for key, value in changes.items()}
        number = len(seen)
        seen.append(number)
        where = {"training_args.output_dir": f"{sft_values()['training_args']['output_dir']}-{number}"}
        return train(sft_values({"peft_conf": peft, **flattened, **where}), method).losses

    seen: list[int] = []
    for completions_only in (True, False):
        kind = {"sft_args__train_on_completions_only": completions_only}
        padded = losses(sft_args__batching="padded", **kind)
        assert losses(sft_args__batching="padding-free", **kind) == pytest.approx(padded, abs=1e-5)
        left = losses(sft_args__batching="padded", data_conf__padding_side="left", **kind)
        assert left == pytest.approx(padded, abs=1e-5)
        plain = losses(on_plain_logits(), sft_args__batching="padded", data_conf__padding_side="left", **kind)
        assert plain == pytest.approx(padded, abs=1e-5)
    assert losses(on_plain_logits(), sft_args__batching="padding-free", **kind) == pytest.approx(padded, abs=1e-5)


def test_any_split_of_the_batch_is_the_same_optimization(train: Any, sft_values: Any) -> None:
    def losses(per_device: int, batching: str) -> list[float]:
        batch = {"total_train_batch_size": 8, "max_per_device_train_batch_size": per_device}
        where = f"{sft_values()['training_args']['output_dir']}-{per_device}-{batching}"
        changes = {"batchsize_conf": batch, "training_args.output_dir": where, "sft_args.batching": batching}
        return train(sft_values(changes)).losses

    whole = losses(8, "auto")
    assert losses(4, "padded") == pytest.approx(whole, abs=1e-5)
    assert losses(1, "auto") == pytest.approx(whole, abs=1e-5)


def test_completions_only_is_another_loss(train: Any, sft_values: Any) -> None:
    answers = train(sft_values({"training_args.max_steps": 1}))
    changes = {"sft_args.train_on_completions_only": False, "training_args.output_dir": f"{answers.output_dir}-all"}
    everything = train(sft_values({"training_args.max_steps": 1, **changes}))
    assert answers.losses[0] != pytest.approx(everything.losses[0], abs=1e-3)


def test_validation_loss_is_the_mean_over_tokens_whatever_the_batch(
    train: Any, sft_values: Any, chatml_llama_dir: Any
) -> None:
    changes = {
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.3},
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 1,
        "training_args.max_steps": 1,
        "training_args.learning_rate": 1e-8,
    }
    result = []
    for size, batching in ((1, "auto"), (3, "padded"), (7, "auto")):
        where = {
            "training_args.output_dir": f"{sft_values()['training_args']['output_dir']}-{size}",
            "batchsize_conf.per_device_eval_batch_size": size,
            "sft_args.batching": batching,
        }
        run = train(sft_values({**changes, **where}))
        result += [entry["eval_loss"] for entry in run.trainer.state.log_history if "eval_loss" in entry]
    rows = list(run.trainer.eval_dataset)
    model = AutoModelForCausalLM.from_pretrained(chatml_llama_dir, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        expected = [(at, label) for at, label in enumerate(row["labels"][1:]) if label != -100]
        total -= sum(float(logits[at, label]) for at, label in expected)
        count += len(expected)
    assert result == pytest.approx([total / count] * 3, abs=1e-5)
