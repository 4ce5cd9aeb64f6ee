"""Preference optimisation starts at its known loss, from the right reference, or does not start."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from finetuning.algorithms import METHODS
from finetuning.algorithms.dpo import first_loss
from finetuning.config.installed import Installed
from finetuning.errors import GuardStopped

DPO = METHODS["dpo"]
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
TWO_STEPS = {"training_args.max_steps": 2}


def test_every_loss_of_the_installed_trl_is_listed() -> None:
    import inspect
    import re

    import trl

    source = inspect.getsource(trl.DPOTrainer)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(LOSSES)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_each_loss_trains_and_starts_where_it_must(train: Any, dpo_values: Any, loss_type: str) -> None:
    smoothing = 0.1 if loss_type in ("exo_pair", "robust") else 0.0
    changes = {
        **TWO_STEPS,
        "training_args.loss_type": loss_type,
        "training_args.label_smoothing": smoothing,
        "peft_conf": LORA,
    }
    run = train(dpo_values(changes))
    assert run.result.steps == 2
    assert all(math.isfinite(loss) for loss in run.losses)
    expected = first_loss([loss_type], [1.0], 0.1, smoothing)
    assert (expected is None) == (loss_type == "sft")
    if expected is not None:
        assert run.losses[0] == pytest.approx(expected, rel=1e-4)


def test_a_weighted_mix_starts_at_the_weighted_sum(train: Any, dpo_values: Any) -> None:
    names, weights = ["sigmoid", "bco_pair", "hinge"], [0.5, 0.25, 2.0]
    mix = {"training_args.loss_type": names, "training_args.loss_weights": weights, "training_args.beta": 0.3}
    run = train(dpo_values({**TWO_STEPS, **mix}))
    assert run.losses[0] == pytest.approx(0.5 * math.log(2) + 0.25 * 2 * math.log(2) + 2.0, rel=1e-4)


def disturbed(reference: Any) -> Any:
    """Another model than the one that is trained."""
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return reference


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "apo_zero", "discopop"])
def test_a_wrong_reference_stops_the_run(train: Any, dpo_values: Any, loss_type: str) -> None:
    def build(parts: Any) -> Any:
        return DPO.build_trainer(replace(parts, load_reference=lambda: disturbed(parts.load_reference())))

    with pytest.raises(GuardStopped, match="the reference is not the model that is trained") as stopped:
        train(dpo_values({**TWO_STEPS, "training_args.loss_type": loss_type}), replace(DPO, build_trainer=build))
    assert stopped.value.exit_code == 3


def test_full_training_and_an_adapter_start_equal(train: Any, dpo_values: Any, tmp_path: Any) -> None:
    full = train(dpo_values(TWO_STEPS))
    adapter = train(dpo_values({**TWO_STEPS, "peft_conf": LORA, "training_args.output_dir": str(tmp_path / "lora")}))
    assert full.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert adapter.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert full.losses[1] != pytest.approx(full.losses[0], abs=1e-7)


def test_an_sft_adapter_is_its_own_reference(
    train: Any, sft_values: Any, dpo_values: Any, read_tensors: Any, tmp_path: Any
) -> None:
    """The reference is the tuned policy, not the base below it."""
    tuned = train(
        sft_values({"peft_conf": LORA, "training_args.output_dir": str(tmp_path / "sft"), "training_args.max_steps": 4})
    )
    on_top = {"peft_type": "PRETRAINED_PEFT", "name_or_path": str(tuned.final)}
    run = train(dpo_values({"peft_conf": on_top, "training_args.max_steps": 3, "training_args.save_strategy": "epoch"}))
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    first = run.trainer.state.log_history[0]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    before, after = read_tensors(tuned.final), read_tensors(run.final)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in run.final.iterdir() if path.is_dir()) == []
    # The frozen reference is still the adapter that training began from.
    reference = {name: weight for name, weight in run.trainer.model.named_parameters() if ".ref." in name}
    assert not reference, "the reference adapter does not stay on the model that is saved"


@pytest.mark.parametrize("precompute", [True, False])
def test_reference_computed_beforehand_gives_the_same_losses(train: Any, dpo_values: Any, precompute: bool) -> None:
    changes = {"training_args.precompute_ref_log_probs": precompute, "training_args.seed": 7}
    run = train(dpo_values({**TWO_STEPS, **changes}))
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-5)


def test_first_losses_that_are_known() -> None:
    assert first_loss(["sigmoid"], [1.0], 0.1, 0.0) == pytest.approx(0.6931, abs=1e-4)
    assert first_loss(["ipo"], [1.0], 0.1, 0.0) == pytest.approx(25.0)
    assert first_loss(["sppo_hard"], [1.0], 0.5, 0.0) == pytest.approx(2.0)
    assert first_loss(["sigmoid", "sft"], [1.0, 1.0], 0.1, 0.0) is None
    assert first_loss(["a loss of tomorrow"], [1.0], 0.1, 0.0) is None
    assert "loss_type" in Installed().class_fields(DPO.experiment.trainer_config)
