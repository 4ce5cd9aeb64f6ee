"""Memory that runs out in the middle of a run costs a step's time, and nothing of the curve."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from finetuning.algorithms import ALGORITHMS
from finetuning.data.collators import FlatteningCollator, PaddingCollator
from finetuning.errors import ConfigError, InternalError
from finetuning.trainer.oom_retry import num_rows, split_batch
from finetuning.training.memory_check import longest_rows

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
FULL = {"peft_type": "NO_PEFT"}
BATCH = {"batchsize_conf": {"total_train_batch_size": 8, "max_per_device_train_batch_size": 4}}


def small_memory(name: str, most_rows: int, *, fails_in: str = "forward", from_step: int = 0) -> Any:
    """A method whose trainer's model runs out of memory, for real callers: torch's own error, out of its own layers."""
    method = ALGORITHMS[name]

    def build(parts: Any) -> Any:
        trainer = method.build_trainer(parts)

        class Small(type(trainer)):
            """The allocator of a device that holds `most_rows` rows."""

            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                full = num_rows(inputs) > most_rows and self.state.global_step >= from_step
                if full and fails_in == "forward":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")
                loss = super().compute_loss(model, inputs, *args, **kwargs)
                if full:

                    def fail(gradient: Any) -> None:
                        raise torch.OutOfMemoryError("CUDA out of memory in the backward pass.")

                    # The weights that come first in the forward pass get their gradients last.
                    layer = next(w for w in model.parameters() if w.requires_grad)
                    handle = layer.register_hook(fail)
                    self.handles.append(handle)
                return loss

            def _halve(self, *args: Any) -> None:
                for handle in self.handles:
                    handle.remove()
                super()._halve(*args)

        small = Small.__new__(Small)
        small.__dict__.update(trainer.__dict__)
        small.handles = []
        return small

    return replace(method, build_trainer=build)


@pytest.mark.parametrize(
    ("kind", "changes", "fails_in"),
    [
        ("sft", {"peft_conf": FULL}, "backward"),
        ("sft", {"peft_conf": LORA, "sft_args.batching": "padded"}, "forward"),
        ("sft", {"peft_conf": LORA, "sft_args.packing": True, "sft_args.max_seq_length": 120}, "forward"),
        ("dpo", {"peft_conf": LORA}, "forward"),
        ("dpo", {"peft_conf": LORA, "training_args.loss_type": ["sigmoid", "sft"]}, "forward"),
        ("kto", {"peft_conf": LORA}, "forward"),
    ],
    ids=["full, end to end, backward", "lora, padded", "packed", "dpo", "dpo with sft", "kto"],
)
def test_the_curve_is_that_of_enough_memory(
    train: Any, sft_values: Any, dpo_values: Any, kind: str, changes: Any, fails_in: str
) -> None:
    make = sft_values if kind == "sft" else dpo_values
    changes = {**BATCH, **changes, "training_args.max_steps": 4}
    enough = train(make(changes), ALGORITHMS[kind])
    small = train(
        make({**changes, "training_args.output_dir": f"{enough.output_dir}-small"}),
        small_memory(kind, 1, fails_in=fails_in, from_step=1),
    )
    assert small.losses == pytest.approx(enough.losses, abs=2e-5)
    assert small.trainer.num_splits >= 2
    record = json.loads((small.output_dir / "run.json").read_text())["memory"]
    retry = r"step 2: out of memory at micro-batch \d+; retrying with \d+, same effective batch"
    assert re.fullmatch(retry, record["oom_retries"][0])
    assert record["peak_bytes"] > record["estimated_bytes"] > 0


def test_one_row_that_does_not_fit_ends_the_run(train: Any, sft_values: Any) -> None:
    with pytest.raises(InternalError, match="step 1: out of memory at micro-batch 1: CUDA out of memory") as end:
        train(sft_values(BATCH), small_memory("sft", 0))
    assert end.value.exit_code == 203


def test_the_longest_rows_are_tried_first_and_leave_no_trace(train: Any, sft_values: Any) -> None:
    changes = {
        **BATCH,
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.25},
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 1,
        "peft_conf": {**LORA, "peft_kwargs": {**LORA["peft_kwargs"], "lora_dropout": 0.1}},
    }
    plain = train(sft_values(changes))
    checked = {**changes, "run_conf.memory_check": True, "training_args.output_dir": f"{plain.output_dir}-checked"}
    same = train(sft_values(checked))
    assert same.losses == plain.losses
    assert same.trainer.num_splits == 1
    small = {**checked, "peft_conf": LORA, "training_args.output_dir": f"{plain.output_dir}-small"}
    small["batchsize_conf"] = {"total_train_batch_size": 8, "max_per_device_train_batch_size": "auto"}
    run = train(sft_values(small), small_memory("sft", 2))
    assert run.trainer.num_splits == 4
    assert run.trainer.args.per_device_train_batch_size == 8
    assert run.trainer.args.per_device_eval_batch_size in (1, 2)
    assert [text.partition(":")[0] for text in run.trainer.oom_retries[:2]] == ["longest training rows"] * 2
    assert "longest validation rows" in run.trainer.oom_retries[-1]


def test_a_batch_that_cannot_be_divided_is_not_found_out(train: Any, dpo_values: Any) -> None:
    changes = {
        "batchsize_conf": {"total_train_batch_size": 8, "max_per_device_train_batch_size": "auto"},
        "training_args.loss_type": "aot",
    }
    with pytest.raises(ConfigError, match=r"train_batch_size: auto is not supported for this loss.*Set a number"):
        train(dpo_values(changes))


@pytest.mark.parametrize("collate", [PaddingCollator(0), FlatteningCollator()], ids=["padded", "end to end"])
@pytest.mark.parametrize("pieces", [2, 3, 4, 9])
def test_pieces_hold_the_batch(collate: Callable[..., Any], pieces: int) -> None:
    rows = [{"input_ids": list(range(10 * n, 10 * n + n)), "labels": list(range(n))} for n in (3, 1, 4, 2, 5)]
    batch = collate(rows)
    parts = [part for part, _ in split_batch(batch, pieces)]
    assert sum(share for _, share in split_batch(batch, pieces)) == pytest.approx(1)
    assert len(parts) == min(pieces, 5)
    assert sum(num_rows(part) for part in parts) == 5
    for name in ("input_ids", "shift_labels"):
        flattened = torch.cat([part[name].flatten() for part in parts])
        assert torch.equal(flattened, batch[name].flatten())
    if "cu_seq_lens_q" in batch:
        for part in parts:
            assert part["cu_seq_lens_q"][0] == 0
            assert part["cu_seq_lens_q"][-1] == part["input_ids"].numel()
            assert part["max_length_q"] == int(part["cu_seq_lens_q"].diff().max())


def test_the_longest_rows_are_found_behind_a_selection() -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"input_ids": [[0] * n for n in (3, 9, 1, 7)]}).select([3, 2, 0])
    assert [len(row["input_ids"]) for row in longest_rows(rows, 2)] == [7, 3]
