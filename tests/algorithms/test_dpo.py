"""Preference optimization starts at its known loss, from the right reference, or does not start."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from finetuning.algorithms import ALGORITHMS
from finetuning.algorithms.dpo import initial_loss
from finetuning.config.validation.library_fields import table_fields
from finetuning.errors import GuardStopped

DPO = ALGORITHMS["dpo"]
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
LOSSES = tuple(table_fields().choices("dpo_loss_type"))
"""The losses that the config accepts."""
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
    expected = initial_loss([loss_type], [1.0], 0.1, smoothing)
    assert (expected is None) == (loss_type == "sft")
    if expected is not None:
        assert run.losses[0] == pytest.approx(expected, rel=1e-4)


def test_a_weighted_mix_starts_at_the_weighted_sum(train: Any, dpo_values: Any) -> None:
    names, weights = ["sigmoid", "bco_pair", "hinge"], [0.5, 0.25, 2.0]
    mix = {"training_args.loss_type": names, "training_args.loss_weights": weights, "training_args.beta": 0.3}
    run = train(dpo_values({**TWO_STEPS, **mix}))
    assert run.losses[0] == pytest.approx(0.5 * math.log(2) + 0.25 * 2 * math.log(2) + 2.0, rel=1e-4)


def test_all_losses_at_once_train(train: Any, dpo_values: Any) -> None:
    weights = [round(0.1 * (1 + index % 3), 1) for index in range(len(LOSSES))]
    mix = {"training_args.loss_type": list(LOSSES), "training_args.loss_weights": weights}
    run = train(dpo_values({**TWO_STEPS, **mix, "training_args.label_smoothing": 0.1}))
    assert all(math.isfinite(loss) for loss in run.losses)
    without_sft = [pair for pair in zip(LOSSES, weights, strict=True) if pair[0] != "sft"]
    without = initial_loss([name for name, _ in without_sft], [weight for _, weight in without_sft], 0.1, 0.1)
    supervised = (run.losses[0] - without) / weights[LOSSES.index("sft")]
    assert supervised == pytest.approx(6.2, abs=0.2)  # A model that knows nothing of 500 tokens.


@pytest.mark.parametrize(("peft_conf", "rate"), [({"peft_type": "NO_PEFT"}, 5e-3), (LORA, 2e-2)], ids=["full", "lora"])
def test_it_learns_what_is_preferred(train: Any, dpo_values: Any, peft_conf: Any, rate: float) -> None:
    changes = {"peft_conf": peft_conf, "training_args.learning_rate": rate, "training_args.max_steps": 12}
    run = train(dpo_values(changes))
    last = [entry for entry in run.trainer.state.log_history if "rewards/margins" in entry][-1]
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert run.losses[-1] < 0.4
    assert last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] > 0.5


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "apo_zero", "discopop"])
def test_a_wrong_reference_stops_the_run(
    train: Any, dpo_values: Any, with_wrong_reference: Any, loss_type: str
) -> None:
    with pytest.raises(GuardStopped, match="the reference is not the model that is trained") as stopped:
        train(dpo_values({**TWO_STEPS, "training_args.loss_type": loss_type}), with_wrong_reference(DPO))
    assert stopped.value.exit_code == 3


def test_full_training_and_an_adapter_start_equal(train: Any, dpo_values: Any, tmp_path: Any) -> None:
    full = train(dpo_values(TWO_STEPS))
    adapter = train(dpo_values({**TWO_STEPS, "peft_conf": LORA, "training_args.output_dir": str(tmp_path / "lora")}))
    assert full.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert adapter.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert full.losses[1] != pytest.approx(full.losses[0], abs=1e-7)


def logits_of(model: Any, adapter: str | None = None) -> torch.Tensor:
    """What a model computes of a few tokens, wearing the named one of its adapters; the first one is put on again."""
    if adapter is not None:
        model.set_adapter(adapter)
    was_training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[1, 5, 6, 7, 8, 9, 20, 21]]), use_cache=False).logits
    model.train(was_training)
    if adapter is not None:
        model.set_adapter("default")
    return logits


def test_an_sft_adapter_is_its_own_reference(
    train: Any, sft_values: Any, dpo_values: Any, read_tensors: Any, chatml_llama_dir: Any, tmp_path: Any
) -> None:
    """The reference is the tuned policy, not the base below it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned = train(
        sft_values({"peft_conf": LORA, "training_args.output_dir": str(tmp_path / "sft"), "training_args.max_steps": 4})
    )
    on_top = {"peft_type": "PRETRAINED_PEFT", "name_or_path": str(tuned.final)}
    result: dict[str, torch.Tensor] = {}

    def build(parts: Any) -> Any:
        trainer = DPO.build_trainer(parts)
        result["reference"] = logits_of(trainer.model, "ref")
        result["policy"] = logits_of(trainer.model, "default")
        return trainer

    changes = {"peft_conf": on_top, "training_args.max_steps": 3, "training_args.save_strategy": "epoch"}
    run = train(dpo_values(changes), replace(DPO, build_trainer=build))
    base = AutoModelForCausalLM.from_pretrained(chatml_llama_dir)
    plain = logits_of(base)
    supervised = logits_of(PeftModel.from_pretrained(base, tuned.final))
    assert torch.equal(result["reference"], supervised)
    assert torch.equal(result["policy"], supervised)
    assert not torch.allclose(plain, supervised, atol=1e-3)
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
    assert initial_loss(["sigmoid"], [1.0], 0.1, 0.0) == pytest.approx(0.6931, abs=1e-4)
    assert initial_loss(["ipo"], [1.0], 0.1, 0.0) == pytest.approx(25.0)
    assert initial_loss(["sppo_hard"], [1.0], 0.5, 0.0) == pytest.approx(2.0)
    assert initial_loss(["sigmoid", "sft"], [1.0, 1.0], 0.1, 0.0) is None
    assert initial_loss(["a loss of tomorrow"], [1.0], 0.1, 0.0) is None
    assert "loss_type" in table_fields().trainer_fields(DPO.experiment.trainer_config)


def test_the_adapter_of_a_quantized_model_is_trained_in_float32(train: Any, dpo_values: Any) -> None:
    four_bit = {"quantization_type": "bits-and-bytes", "load_in_4bit": True}
    run = train(dpo_values({"training_args.max_steps": 1, "peft_conf": LORA, "quant_conf": four_bit}))
    dtypes = {weight.dtype for weight in run.trainer.model.parameters() if weight.requires_grad}
    assert dtypes == {torch.float32}
