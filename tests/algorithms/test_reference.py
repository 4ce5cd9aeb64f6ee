"""Before the first update the reference gives every sequence the log-probabilities of the policy, or the run stops."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetuning.algorithms import ALGORITHMS
from finetuning.config.validation.library_fields import table_fields
from finetuning.errors import GuardStopped
from finetuning.trainer.reference import largest_difference, tolerance_of
from finetuning.training.preflight import describe_router_loss

DPO, KTO = ALGORITHMS["dpo"], ALGORITHMS["kto"]
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
STEP = {"training_args.max_steps": 1}
WRONG = "the reference is not the model that is trained"


def changed(
    method: Any, reference: Callable[[Any], Any] | None = None, trainer: Callable[[Any], None] | None = None
) -> Any:
    """The method with a change of the reference when it is loaded, or of the trainer when it is built."""

    def build(inputs: Any) -> Any:
        load = inputs.load_reference
        built = method.build_trainer(
            replace(inputs, load_reference=lambda: reference(load())) if reference is not None else inputs
        )
        if trainer is not None:
            trainer(built)
        return built

    return replace(method, build_trainer=build)


@torch.no_grad()
def add_noise(model: Any, std: float) -> Any:
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight) * std)
    return model


@torch.no_grad()
def swap_layers(model: Any) -> Any:
    first, second = (layer.mlp.down_proj.weight for layer in model.model.layers[:2])
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)
    return model


@torch.no_grad()
def change_a_single_row(model: Any) -> Any:
    model.model.layers[1].self_attn.o_proj.weight[3] *= 1.5
    return model


@torch.no_grad()
def round_to_bfloat16(model: Any) -> Any:
    return model.to(torch.bfloat16).to(torch.float32)


def other_labels(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    """A change of the trainer: its reference scores other tokens than the policy."""

    def apply(trainer: Any) -> None:
        forward = trainer.ref_model.forward
        trainer.ref_model.forward = lambda input_ids, labels, **kwargs: forward(
            input_ids=input_ids, labels=change(labels, input_ids), **kwargs
        )

    return apply


def add_to_column(name: str, change: Callable[[list[float]], list[float]]) -> Callable[[Any], None]:
    def apply(trainer: Any) -> None:
        values = change(trainer.train_dataset[name][:])
        trainer.train_dataset = trainer.train_dataset.remove_columns(name).add_column(name, values)

    return apply


WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "other weights": lambda model: add_noise(model, 1.0),
    "the base with noise": lambda model: add_noise(model, 1e-3),
    "exchanged layers": swap_layers,
    "a changed row of one weight": change_a_single_row,
    "weights rounded to bfloat16": round_to_bfloat16,
}
TOKENS: dict[str, Callable[[Any], None]] = {
    "labels shifted by a token": other_labels(lambda labels, ids: labels.roll(1, dims=1)),
    "the prompt included": other_labels(lambda labels, ids: ids),
    "the last token left out": other_labels(lambda labels, ids: labels.masked_fill(ids == 2, -100)),
}


@pytest.mark.parametrize("method", [DPO, KTO], ids=["dpo", "kto"])
@pytest.mark.parametrize("fault", [*WEIGHTS, *TOKENS])
def test_a_wrong_reference_is_caught_at_a_beta_that_hides_it_from_the_loss(
    train: Any, dpo_values: Any, method: Any, fault: str
) -> None:
    values = dpo_values({**STEP, "training_args.beta": 1e-6})
    with pytest.raises(GuardStopped, match=WRONG) as stopped:
        train(values, changed(method, WEIGHTS.get(fault), TOKENS.get(fault)))
    assert stopped.value.exit_code == 3
    assert "before the first update the log-probabilities of policy and reference differ by" in str(stopped.value)


@pytest.mark.parametrize(
    ("method", "column"), [(DPO, "ref_chosen_logps"), (DPO, "ref_rejected_logps"), (KTO, "ref_logps")]
)
@pytest.mark.parametrize(
    "change",
    [lambda values: values[1:] + values[:1], lambda values: [value - 4.0 for value in values]],
    ids=["shifted by a row", "a token more"],
)
def test_wrong_precomputed_log_probabilities_are_caught(
    train: Any, dpo_values: Any, method: Any, column: str, change: Any
) -> None:
    values = dpo_values({**STEP, "training_args.beta": 1e-6, "training_args.precompute_ref_log_probs": True})
    with pytest.raises(GuardStopped, match=WRONG):
        train(values, changed(method, trainer=add_to_column(column, change)))


@pytest.mark.parametrize("fault", ["base without the adapter", "noise"])
def test_the_wrong_adapter_as_reference_is_caught(
    train: Any, sft_values: Any, dpo_values: Any, tmp_path: Path, fault: str
) -> None:
    tuned = train(sft_values({"peft_conf": LORA, "training_args.output_dir": str(tmp_path / "sft")}))
    continued = {"peft_type": "PRETRAINED_PEFT", "name_or_path": str(tuned.final)}

    def spoil(trainer: Any) -> None:
        for name, weight in trainer.model.named_parameters():
            if ".ref." in name:
                weight.data *= 0.0 if fault != "noise" else 1.01

    values = dpo_values({**STEP, "peft_conf": continued, "training_args.beta": 1e-6})
    with pytest.raises(GuardStopped, match=WRONG):
        train(values, changed(DPO, trainer=spoil))


def make_it_the_policy(trainer: Any) -> None:
    trainer.ref_model = trainer.model


def share_a_layer(trainer: Any) -> None:
    trainer.ref_model.model.layers[1].mlp.up_proj.weight = trainer.model.model.layers[1].mlp.up_proj.weight


def keep_the_adapter_on(trainer: Any) -> None:
    trainer.model.disable_adapter = contextlib.nullcontext


@pytest.mark.parametrize("method", [DPO, KTO, ALGORITHMS["grpo"]], ids=["dpo", "kto", "grpo"])
@pytest.mark.parametrize(
    ("fault", "peft_conf", "how"),
    [
        (make_it_the_policy, {"peft_type": "NO_PEFT"}, "is shared by both"),
        (share_a_layer, {"peft_type": "NO_PEFT"}, "up_proj.weight is shared by both"),
        (keep_the_adapter_on, LORA, "a changed policy moves it by"),
    ],
)
def test_a_reference_that_follows_the_policy_is_caught(
    train: Any, dpo_values: Any, grpo_values: Any, method: Any, fault: Any, peft_conf: Any, how: str
) -> None:
    """It equals the policy before the first update, and after every other."""
    make = grpo_values if method.name == "grpo" else dpo_values
    with pytest.raises(GuardStopped, match=f"the reference depends on the weights that are trained .*{how}"):
        train(make({**STEP, "peft_conf": peft_conf, "training_args.beta": 1e-3}), changed(method, trainer=fault))


def test_an_adapter_that_changes_the_base_is_caught_with_what_to_do(
    train: Any, dpo_values: Any, move_base_into_adapter: Any
) -> None:
    with pytest.raises(GuardStopped, match=rf"{WRONG}\. It differs from the model in its files by .*PiSSA"):
        train(
            dpo_values({**STEP, "peft_conf": LORA, "training_args.beta": 1e-6}),
            changed(DPO, trainer=move_base_into_adapter),
        )


def test_an_adapter_that_changes_outputs_before_training_is_reported_once(
    train: Any, dpo_values: Any, caplog: Any
) -> None:
    prompt = {"peft_type": "PROMPT_TUNING", "peft_kwargs": {"num_virtual_tokens": 4}}
    values = dpo_values({**STEP, "peft_conf": prompt})
    with caplog.at_level(logging.WARNING, logger="finetuning"):
        run = train(values)
    texts = [text for text in caplog.messages if "The reference equals the model in its files" in text]
    assert len(texts) == 1
    assert "equals the model in its files" in run.trainer.reference_summary


def test_a_wrong_reference_below_prompt_tuning_is_caught(train: Any, dpo_values: Any) -> None:
    prompt = {"peft_type": "PROMPT_TUNING", "peft_kwargs": {"num_virtual_tokens": 4}}

    def spoil(trainer: Any) -> None:
        change_a_single_row(trainer.model.get_base_model())

    with pytest.raises(GuardStopped, match="It differs from the model in its files"):
        train(dpo_values({**STEP, "peft_conf": prompt}), changed(DPO, trainer=spoil))


@pytest.mark.parametrize("peft_conf", [{"peft_type": "NO_PEFT"}, LORA], ids=["full", "lora"])
def test_every_loss_at_a_small_beta_passes(train: Any, dpo_values: Any, peft_conf: Any) -> None:
    for loss_type in table_fields().choices("dpo_loss_type"):
        run = train(
            dpo_values(
                {
                    **STEP,
                    "peft_conf": peft_conf,
                    "training_args.loss_type": loss_type,
                    "training_args.beta": 1e-4,
                    "training_args.label_smoothing": 0.1 if loss_type in ("exo_pair", "robust") else 0.0,
                    "run_conf.final_checkpoint_name": f"final-{loss_type}",
                }
            )
        )
        # All micro-batches before the first update: four pairs.
        assert run.trainer.reference_summary.startswith("equals the policy before the first update: 8 sequences")


@pytest.mark.parametrize(
    "changes",
    [
        {"training_args.precompute_ref_log_probs": True, "training_args.precompute_ref_batch_size": 12},
        {"training_args.precompute_ref_log_probs": True, "training_args.ld_alpha": 0.5},
        {"training_args.ld_alpha": 0.5},
        {"training_args.gradient_checkpointing": True, "peft_conf": LORA},
        {"training_args.bf16": True},
        {"training_args.use_weighting": True},
        {"training_args.f_divergence_type": "js_divergence"},
        {"training_args.sync_ref_model": True, "training_args.ref_model_sync_steps": 1},
    ],
    ids=lambda changes: "-".join(key.rpartition(".")[2] for key in changes),
)
def test_right_references_pass(train: Any, dpo_values: Any, changes: Any) -> None:
    run = train(dpo_values({**STEP, **changes}))
    assert run.result.steps == 1
    assert "8 sequences" in run.trainer.reference_summary


@pytest.mark.parametrize("weights", [None, add_noise], ids=["right", "wrong"])
@pytest.mark.parametrize("method", [DPO, KTO], ids=["dpo", "kto"])
def test_a_router_loss_hides_nothing(train: Any, dpo_values: Any, mixtral_dir: Path, method: Any, weights: Any) -> None:
    values = dpo_values(
        {
            **STEP,
            "run_conf.model": str(mixtral_dir),
            "training_args.router_aux_loss_coef": 0.5,
            "training_args.beta": 1e-6,
        }
    )
    if weights is None:
        run = train(values, method)
        assert "equals the policy" in json.loads((run.output_dir / "run.json").read_text())["reference"]
        return
    with pytest.raises(GuardStopped, match=WRONG):
        train(values, changed(method, lambda model: add_noise(model, 1e-3)))


@pytest.mark.parametrize("is_wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("method", [DPO, KTO], ids=["dpo", "kto"])
def test_the_first_loss_of_a_mixture_of_experts_is_checked_without_the_routers_loss(
    train: Any, dpo_values: Any, mixtral_dir: Path, method: Any, is_wrong: bool
) -> None:
    values = dpo_values({**STEP, "run_conf.model": str(mixtral_dir), "training_args.router_aux_loss_coef": 0.5})
    if not is_wrong:
        run = train(values, method)
        without = 0.6931 if method is DPO else 0.5
        assert run.losses[0] > without + 0.1, "the router's loss is part of what is trained on"
        assert "the first loss was checked without the router's load balancing loss" in run.trainer.reference_summary
        summary = json.loads((run.output_dir / "run.json").read_text())["summary"]
        assert ["router loss", "part of the loss, times 0.5", ""] in summary
        return

    def scaled(trainer: Any) -> None:
        # A wrong formula, which policy and reference do not show.
        compute = trainer._compute_loss
        trainer._compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * 1.1

    with pytest.raises(GuardStopped, match=r"without the router's load balancing loss .* must start at"):
        train(values, changed(method, trainer=scaled))


@pytest.mark.parametrize(
    ("method", "in_config", "coefficient", "described"),
    [
        ("sft", False, None, ("not part of the loss", "run_conf.model_args.output_router_logits: true adds it")),
        ("sft", True, None, ("part of the loss, times 0.001", "")),
        ("dpo", False, None, ("part of the loss, times 0.001", "")),
        ("kto", False, 0.0, ("not part of the loss", "training_args.router_aux_loss_coef adds it")),
        ("orpo", False, None, ("not part of the loss", "run_conf.model_args.output_router_logits: true adds it")),
        ("reward", True, None, None),
    ],
)
def test_a_run_says_whether_the_routers_loss_is_part_of_its_loss(
    method: str, in_config: bool, coefficient: float | None, described: tuple[str, str] | None
) -> None:
    from transformers import LlamaConfig, MixtralConfig

    extra = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    experiment: Any = SimpleNamespace(method_name=method, training_args=SimpleNamespace(model_extra=extra))
    model: Any = SimpleNamespace(config=MixtralConfig(output_router_logits=in_config))
    assert describe_router_loss(experiment, model) == described
    model.config = LlamaConfig()
    assert describe_router_loss(experiment, model) is None


@pytest.fixture
def mixtral_dir(tmp_path: Path, chatml_llama_dir: Path) -> Path:
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=504,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        eos_token_id=2,
    )
    torch.manual_seed(4)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    AutoTokenizer.from_pretrained(chatml_llama_dir).save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_dropout_is_not_taken_for_a_wrong_reference_and_hides_none(
    train: Any, sft_values: Any, dpo_values: Any, tmp_path: Path, caplog: Any, wrong: bool
) -> None:
    dropout = {"peft_type": "LORA", "peft_kwargs": {**LORA["peft_kwargs"], "lora_dropout": 0.4}}
    tuned = train(
        sft_values(
            {
                "peft_conf": dropout,
                "training_args.output_dir": str(tmp_path / "sft"),
                "training_args.max_steps": 6,
                "training_args.learning_rate": 0.05,
            }
        )
    )
    continued = {"peft_type": "PRETRAINED_PEFT", "name_or_path": str(tuned.final)}
    values = dpo_values({**STEP, "peft_conf": continued, "training_args.disable_dropout": False})

    def spoil(trainer: Any) -> None:
        for name, weight in trainer.model.named_parameters():
            if ".ref." in name:
                weight.data *= 1.01

    if wrong:
        with pytest.raises(GuardStopped, match=WRONG):
            train(values, changed(DPO, trainer=spoil))
        return
    with caplog.at_level(logging.WARNING, logger="finetuning"):
        run = train(values)
    assert run.losses[0] != pytest.approx(0.6931, abs=1e-3), "dropout is active in training"
    assert sum("dropout is active" in text for text in caplog.messages) == 1


def test_differences_are_measured_per_row_and_token() -> None:
    policy = torch.tensor([[0.0, -1.0, -2.0], [0.0, -40.0, 0.0]])
    reference = torch.tensor([[0.0, -1.0, -2.5], [0.0, -20.0, 0.0]])
    difference = largest_difference([policy], [reference])
    assert (difference.row, difference.num_rows) == (1, 2)
    assert difference.per_token == pytest.approx(1.0)
    assert largest_difference([policy[:1]], [reference[:1]]).per_token == pytest.approx(0.2)
    sums = largest_difference([policy], [torch.tensor([-3.0, -40.5])])
    assert sums.per_token == pytest.approx(0.5 / 40.5)
    assert largest_difference([policy], [policy * torch.nan]).exceeds(1e9)


def test_the_tolerance_is_that_of_the_coarsest_dtype() -> None:
    model = torch.nn.Linear(2, 2)
    assert tolerance_of([model]) == 1e-4
    assert tolerance_of([model], "bf16") == tolerance_of([model, torch.nn.Linear(2, 2).bfloat16()]) == 0.125
    assert tolerance_of([model], "fp16") == pytest.approx(0.0156, abs=1e-4)
