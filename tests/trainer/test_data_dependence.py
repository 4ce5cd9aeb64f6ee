"""A training step asks for no value of the device, so that a GPU never waits, but for one read of the step before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from finetuning.algorithms import ALGORITHMS
from finetuning.data.collators import FlatteningCollator
from finetuning.model.gpu_attention import accepts_constant_mask, use_causal_sdpa
from finetuning.trainer.data_dependence import DataDependenceRecorder, find_data_dependent_operations

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
STEPS = {
    "training_args.max_steps": 3,
    "training_args.logging_steps": 100,
    "training_args.logging_first_step": False,
    "batchsize_conf": {"total_train_batch_size": 8, "max_per_device_train_batch_size": 4},
    "peft_conf": LORA,
}
PACKED = {"sft_args.packing": True, "sft_args.max_seq_length": 128}
CASES = {
    "sft, padded": ("sft", {"sft_args.batching": "padded"}),
    "sft, padding-free": ("sft", {"sft_args.batching": "padding-free"}),
    "sft, packed": ("sft", PACKED),
    "dpo": ("dpo", {}),
    "dpo with sft": ("dpo", {"training_args.loss_type": ["sigmoid", "sft"]}),
    "kto": ("kto", {}),
    "orpo": ("orpo", {}),
}


class SecondStep(TrainerCallback):
    """Records from the end of the first step to the end of the second: loading, passes, update."""

    def __init__(self) -> None:
        self.recorder = DataDependenceRecorder()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.recorder.start()
        else:
            self.recorder.stop()


def as_on_a_gpu(name: str, watch: SecondStep) -> Any:
    """An algorithm whose trainer reads nothing early, as on a GPU, and whose padded batches need no mask."""
    algorithm = ALGORITHMS[name]

    def build(inputs: Any) -> Any:
        if inputs.layout.padded:
            use_causal_sdpa(inputs.model)
        trainer = algorithm.build_trainer(replace(inputs, callbacks=[*inputs.callbacks, watch]))
        trainer.guards_late = trainer.defers_metrics = True
        if not inputs.layout.padded:
            assert accepts_constant_mask(inputs.model)
            trainer.data_collator = FlatteningCollator(with_constant_mask=True)
        return trainer

    return replace(algorithm, build_trainer=build)


@pytest.fixture
def values_of(tmp_path: Path, sft_values: Any, dpo_values: Any, write_jsonl: Any, dpo_rows: Any) -> Callable[..., Any]:
    rows = [
        {
            "prompt_messages": pair["prompt_messages"],
            "completion_messages": pair["rejected_messages" if number % 2 else "chosen_messages"],
            "label": number % 2 == 0,
        }
        for number, pair in enumerate(dpo_rows(32))
    ]
    # More rows than two steps take: an epoch begins with a permutation on the host.
    files = {"kto": rows, "dpo": dpo_rows(32), "orpo": dpo_rows(32)}
    paths = {name: write_jsonl(tmp_path / f"{name}-rows.jsonl", content) for name, content in files.items()}

    def make(name: str, changes: dict[str, Any]) -> Any:
        if name == "sft":
            return sft_values({**STEPS, **changes})
        return dpo_values({**STEPS, "data_conf.training_data.datasets": [{"path": str(paths[name])}], **changes})

    return make


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_nothing_but_the_step_before(train: Any, values_of: Any, case: str) -> None:
    name, changes = CASES[case]
    watch = SecondStep()
    run = train(values_of(name, changes), as_on_a_gpu(name, watch))
    assert run.trainer.state.global_step == 3
    late = [op for op in watch.recorder.operations if "late_guard.py" in op.location]
    # Collators work on the host.
    in_collator = [op for op in watch.recorder.operations if "(count_on_host)" in op.location]
    unexpected = [str(op) for op in watch.recorder.operations if op not in (*late, *in_collator)]
    assert unexpected == []
    assert [op.name for op in late] == ["tolist"]


DEPENDENT: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda values: values.sum().item(),
    "bool": lambda values: bool(values.sum() > 0),
    "tolist": lambda values: values.tolist(),
    "nonzero": lambda values: values.nonzero(),
    "mask": lambda values: values[values > 1],
    "assignment by a mask": lambda values: values.__setitem__(values > 1, torch.zeros(2)),
    "equal": lambda values: torch.equal(values, values),
    "unique": lambda values: values.unique(),
    "repeat_interleave": lambda values: torch.arange(4).repeat_interleave(values.long()),
    "gradient of a mask": lambda values: (values.requires_grad_()[torch.tensor([True, False, True, True])]).sum(),
}


@pytest.mark.parametrize("operation", DEPENDENT)
def test_an_operation_whose_result_the_host_needs_is_found_with_its_line(operation: str) -> None:
    with find_data_dependent_operations() as operations:
        DEPENDENT[operation](torch.arange(4.0))
    assert operations
    assert all(item.location.startswith("test_data_dependence.py:") for item in operations)


def test_operations_of_known_shape_are_not_found() -> None:
    values = torch.arange(4.0, requires_grad=True)
    optimizer = torch.optim.AdamW([values])
    with find_data_dependent_operations() as operations:
        chosen = values.index_select(0, torch.tensor([1, 2]))
        (torch.where(chosen > 1, chosen, 0.0).sum() + values[torch.tensor([0, 3])].cumsum(0).sum()).backward()
        torch.nn.utils.clip_grad_norm_([values], 1.0)
        optimizer.step()
        torch.nonzero_static(values > 0, size=3)
    assert operations == []
