"""ORPO and CPO compute, on rows that are tokenized here, the losses of their papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from finetuning.algorithms import ALGORITHMS
from finetuning.errors import ConfigError

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 8, "target_modules": "all-linear"}}
ALL_ROWS = {"batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 4}}


@pytest.fixture
def pair_values(tmp_path: Any, dpo_values: Any, write_jsonl: Any, dpo_rows: Any) -> Any:
    """A config whose only batch is its four rows."""
    path = write_jsonl(tmp_path / "pairs.jsonl", dpo_rows(4))
    rows = {"data_conf.training_data.datasets": [{"path": str(path)}]}
    return lambda changes: dpo_values({**rows, **ALL_ROWS, **changes})


def log_probabilities(folder: Any, dataset: Any) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """For each row the log-probabilities of the answers' tokens, and of all tokens, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    actual = []
    for row in dataset:
        both = {}
        for kind in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{kind}_ids"]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].double()
            tokens = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            both[kind] = (tokens[len(row["prompt_ids"]) - 1 :], tokens)
        actual.append(both)
    return actual


def cpo_by_hand(rows: Any, beta: float, gamma: float, alpha: float, *, mean: bool) -> float:
    losses = []
    for row in rows:
        chosen, rejected = (row[kind][0].mean() if mean else row[kind][0].sum() for kind in ("chosen", "rejected"))
        losses.append(-torch.nn.functional.logsigmoid(beta * (chosen - rejected) - gamma))
    tokens = torch.cat([row["chosen"][0] for row in rows])
    return float(torch.stack(losses).mean() - alpha * tokens.mean())


def orpo_by_hand(rows: Any, beta: float) -> float:
    def log_odds(tokens: torch.Tensor) -> torch.Tensor:
        mean = tokens.mean()
        return mean - torch.log(-torch.expm1(mean))

    ratios = [torch.nn.functional.logsigmoid(log_odds(row["chosen"][0]) - log_odds(row["rejected"][0])) for row in rows]
    tokens = torch.cat([row["chosen"][1] for row in rows])
    return float(-tokens.mean() - beta * torch.stack(ratios).mean())


@pytest.mark.parametrize("peft_conf", [{"peft_type": "NO_PEFT"}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("args", "by_hand"),
    [
        ({}, (0.1, 0.0, 1.0, False)),
        ({"beta": 0.3, "cpo_alpha": 0.5}, (0.3, 0.0, 0.5, False)),
        ({"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}, (2.0, 1.0, 0.0, True)),
    ],
    ids=["cpo", "weighted", "simpo"],
)
def test_cpo_starts_at_the_loss_computed_by_hand(
    train: Any, pair_values: Any, chatml_llama_dir: Any, args: Any, by_hand: Any, peft_conf: Any
) -> None:
    run = train(
        pair_values({"peft_conf": peft_conf, **{f"training_args.{k}": v for k, v in args.items()}}), ALGORITHMS["cpo"]
    )
    rows = log_probabilities(chatml_llama_dir, run.trainer.train_dataset)
    beta, gamma, alpha, mean = by_hand
    assert run.losses[0] == pytest.approx(cpo_by_hand(rows, beta, gamma, alpha, mean=mean), rel=1e-5)


@pytest.mark.parametrize("peft_conf", [{"peft_type": "NO_PEFT"}, LORA], ids=["full", "lora"])
def test_orpo_starts_at_the_loss_computed_by_hand(
    train: Any, pair_values: Any, chatml_llama_dir: Any, peft_conf: Any
) -> None:
    run = train(pair_values({"peft_conf": peft_conf, "training_args.beta": 0.5}), ALGORITHMS["orpo"])
    rows = log_probabilities(chatml_llama_dir, run.trainer.train_dataset)
    assert run.losses[0] == pytest.approx(orpo_by_hand(rows, 0.5), rel=1e-5)


@pytest.mark.parametrize("method", ["orpo", "cpo"])
@pytest.mark.parametrize(("peft_conf", "rate"), [({"peft_type": "NO_PEFT"}, 5e-3), (LORA, 2e-2)], ids=["full", "lora"])
def test_it_learns_and_loads_again(
    train: Any, dpo_values: Any, chatml_llama_dir: Any, method: str, peft_conf: Any, rate: float
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = train(
        dpo_values(
            {
                "peft_conf": peft_conf,
                "training_args.learning_rate": rate,
                "training_args.max_steps": 12,
                "training_args.save_strategy": "epoch",
                "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.25},
                "training_args.eval_strategy": "epoch",
            }
        ),
        ALGORITHMS[method],
    )
    assert run.losses[-1] < run.losses[0] - 0.3
    evaluated = [entry["eval_loss"] for entry in run.trainer.state.log_history if "eval_loss" in entry]
    assert evaluated[-1] < evaluated[0]
    assert run.trainer.tokens_seen > 0
    if peft_conf is LORA:
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chatml_llama_dir), run.final)
    else:
        model = AutoModelForCausalLM.from_pretrained(run.final)
    ids = torch.tensor([run.trainer.train_dataset[0]["prompt_ids"]])
    with torch.no_grad():
        again, here = model.eval()(input_ids=ids).logits, run.trainer.model.eval()(input_ids=ids).logits
    assert torch.allclose(again, here, atol=1e-5)
    assert math.isfinite(run.result.final_loss)


@pytest.mark.parametrize("method", ["cpo", "orpo"])
def test_the_split_into_micro_batches_does_not_show(
    train: Any, pair_values: Any, write_jsonl: Any, dpo_rows: Any, tmp_path: Any, method: str
) -> None:
    """Chosen answers of different lengths: the mean of micro-batches' means over tokens is another number."""
    rows = dpo_rows(11)
    for index, row in enumerate(rows):
        row["chosen"] = [{"role": "assistant", "content": "Yes, it is so. " * (index % 4 + 1)}]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    losses = []
    for size in (1, 2, 4):
        changes = {
            "data_conf.training_data.datasets": [{"path": str(path)}],
            "data_conf.validation_data": {"type": "CONCATENATION", "datasets": [{"path": str(path)}]},
            "training_args.output_dir": str(tmp_path / f"out-{size}"),
            "training_args.eval_strategy": "epoch",
            "training_args.max_steps": None,
            "training_args.num_train_epochs": 1,
            "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": size},
        }
        run = train(pair_values(changes), ALGORITHMS[method])
        evaluated = [log["eval_loss"] for log in run.trainer.state.log_history if "eval_loss" in log]
        losses.append([*run.losses, *evaluated])
    assert len(losses[0]) == 4
    for split in losses[1:]:
        assert split == pytest.approx(losses[0], abs=3e-6)


@pytest.mark.parametrize("method", ["orpo", "cpo"])
def test_it_says_that_it_is_experimental(train: Any, pair_values: Any, method: str, caplog: Any) -> None:
    train(pair_values({"training_args.max_steps": 1}), ALGORITHMS[method])
    assert f"{method} is experimental" in caplog.text
    assert ALGORITHMS[method].is_experimental
    assert "experimental" in ALGORITHMS[method].title


def test_it_says_so_in_our_words_only(run_cli: Any, pair_values: Any, write_config: Any) -> None:
    result = run_cli(["cpo", write_config(pair_values({"training_args.max_steps": 1}))], fresh=True)
    assert result.returncode == 0, result.stderr
    assert "cpo is experimental" in result.stderr + result.stdout
    assert "trl.experimental" not in result.stderr + result.stdout


def test_what_does_not_apply_is_refused(train: Any, pair_values: Any, sft_values: Any) -> None:
    with pytest.raises(ConfigError, match="precompute_ref_log_probs"):
        train(pair_values({"training_args.precompute_ref_log_probs": True}), ALGORITHMS["cpo"])
    with pytest.raises(ConfigError, match="looks like an sft config"):
        train(sft_values(), ALGORITHMS["orpo"])
