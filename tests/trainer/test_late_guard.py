"""A step that is not finite is skipped on the device, noticed one step later, and never saved or logged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from finetuning.algorithms import ALGORITHMS
from finetuning.errors import GuardStopped
from finetuning.trainer.late_guard import LateGuard


def late(**attributes: Any) -> Any:
    """SFT whose trainer checks a step one step late, as on a GPU."""
    sft = ALGORITHMS["sft"]

    def build(inputs: Any) -> Any:
        trainer = sft.build_trainer(inputs)
        trainer.guards_late = True
        for name, value in attributes.items():
            setattr(trainer, name, value)
        return trainer

    return replace(sft, build_trainer=build)


@pytest.fixture
def infinite_from(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that makes all losses after this many micro-batches infinite."""

    def make(first: int) -> None:
        step, calls = Trainer.training_step, []

        def infinite(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(1)
            loss = step(self, *args, **kwargs)
            if len(calls) <= first:
                return loss
            for weight in self.model.parameters():
                weight.grad = torch.full_like(weight, float("nan"))
            return loss * float("inf")

        monkeypatch.setattr(Trainer, "training_step", infinite)

    return make


def optimizer_of(name: str) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    if name == "fused":
        return weights, torch.optim.AdamW(weights, lr=0.1, fused=True)
    return weights, torch.optim.SGD(weights, lr=0.1)


@pytest.mark.parametrize("name", ["fused", "plain"])
@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_step_that_is_not_finite_leaves_the_weights(name: str, loss: float, norm: float) -> None:
    weights, optimizer = optimizer_of(name)
    guard = LateGuard()
    for finite in (True, False):
        for weight in weights:
            weight.grad = torch.full_like(weight, 1.0 if finite else float("nan"))
        before = [weight.detach().clone() for weight in weights]
        values = (1.0, 1.0) if finite else (loss, norm)
        guard.submit(1, torch.tensor(values[0]), torch.tensor(values[1]), optimizer)
        optimizer.step()
        is_same = all(torch.equal(old, new) for old, new in zip(before, weights, strict=True))
        assert is_same is not finite
        assert guard.read() is not None
        assert guard.read() is None
    assert guard.leaves_weights is (name == "fused")
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    assert all(value.isfinite().all() for value in state)


@pytest.mark.parametrize("saves", [False, True])
def test_the_run_stops_at_the_step_and_nothing_of_it_is_saved(
    train: Any, sft_values: Any, infinite_from: Any, saves: bool, read_tensors: Any
) -> None:
    infinite_from(2)  # micro-batches: the first step
    changes = {
        "training_args.max_steps": 4,
        "training_args.logging_steps": 100,
        "training_args.optim": "adamw_torch_fused",
    }
    if saves:
        changes |= {"training_args.save_strategy": "steps", "training_args.save_steps": 1}
    with pytest.raises(GuardStopped, match=r"step 2: loss inf is not finite\. This step did not change the weights"):
        train(sft_values(changes), late())
    out = sft_values()["training_args"]["output_dir"]
    saved = sorted(path.name for path in Path(out).glob("checkpoint-*"))
    assert saved == (["checkpoint-1"] if saves else [])
    for name in saved:
        assert all(tensor.isfinite().all() for tensor in read_tensors(Path(out) / name).values())


def test_the_last_step_is_checked_before_the_model_is_saved(train: Any, sft_values: Any, infinite_from: Any) -> None:
    infinite_from(4)
    with pytest.raises(GuardStopped, match="step 3: loss inf is not finite"):
        train(sft_values({"training_args.logging_steps": 100}), late())


def test_losses_are_those_of_a_guard_at_each_step(train: Any, sft_values: Any, tmp_path: Any) -> None:
    plain = train(sft_values())
    delayed = train(sft_values({"training_args.output_dir": str(tmp_path / "late")}), late())
    assert delayed.losses == plain.losses
    assert delayed.trainer.step_loss == plain.trainer.step_loss
