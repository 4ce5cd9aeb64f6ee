"""KTO starts at its known loss, from the right reference, on unpaired preferences and on pairs split into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from processes import wait_all

from finetuning.algorithms import ALGORITHMS
from finetuning.algorithms.kto import initial_loss
from finetuning.data.formats import FORMATS
from finetuning.data.processors.preference import with_kl_completions
from finetuning.data.samples import Row, UnpairedPreference
from finetuning.errors import ConfigError, DataError, GuardStopped, Location, Problem

KTO = ALGORITHMS["kto"]
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 8, "target_modules": "all-linear"}}
ONE_BATCH = {"batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 4}}


@pytest.fixture
def kto_values(tmp_path: Path, dpo_values: Any, write_jsonl: Any, dpo_rows: Any) -> Callable[..., dict[str, Any]]:
    """Values of a KTO config on unpaired preferences, three of four of which are good."""
    rows = [
        {
            "prompt_messages": pair["prompt_messages"],
            "completion_messages": pair["rejected_messages" if number % 4 == 3 else "chosen_messages"],
            "label": number % 4 != 3,
        }
        for number, pair in enumerate(dpo_rows(16))
    ]
    path = write_jsonl(tmp_path / "kto.jsonl", rows)

    def make(changes: dict[str, Any]) -> dict[str, Any]:
        return dpo_values({"data_conf.training_data.datasets": [{"path": str(path)}], **ONE_BATCH, **changes})

    return make


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("peft_conf", [{"peft_type": "NO_PEFT"}, LORA], ids=["full", "lora"])
def test_the_first_loss_is_known(train: Any, kto_values: Any, peft_conf: Any, loss_type: str) -> None:
    weights = {"training_args.desirable_weight": 1.0, "training_args.undesirable_weight": 3.0}
    run = train(kto_values({**weights, "peft_conf": peft_conf, "training_args.loss_type": loss_type}), KTO)
    good = sum(run.trainer.train_dataset["label"][:4]) if loss_type == "kto" else None
    expected = {initial_loss(item, 4 - item, 1.0, 3.0) for item in ([good] if good is not None else range(5))}
    assert any(run.losses[0] == pytest.approx(item, abs=1e-5) for item in expected)
    assert run.losses[1] != run.losses[0]


def test_without_weights_the_first_loss_is_a_half(train: Any, kto_values: Any) -> None:
    run = train(kto_values({"training_args.max_steps": 1}), KTO)
    assert run.losses == [pytest.approx(0.5, abs=1e-6)]
    assert run.trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_wrong_reference_stops_the_run(train: Any, kto_values: Any, with_wrong_reference: Any) -> None:
    with pytest.raises(GuardStopped, match="the reference is not the model that is trained"):
        train(kto_values({}), with_wrong_reference(KTO))


@pytest.mark.parametrize(("peft_conf", "rate"), [({"peft_type": "NO_PEFT"}, 5e-3), (LORA, 2e-2)], ids=["full", "lora"])
def test_it_learns_what_is_good(
    train: Any, kto_values: Any, read_tensors: Any, peft_conf: Any, rate: float, dpo_rows: Any, write_jsonl: Any
) -> None:
    """From preferences, each of which is two rows here."""
    pairs = {"data_conf.training_data.datasets": kto_values({})["data_conf"]["training_data"]["datasets"]}
    path = Path(pairs["data_conf.training_data.datasets"][0]["path"])
    write_jsonl(path, dpo_rows(12))
    run = train(
        kto_values({"peft_conf": peft_conf, "training_args.learning_rate": rate, "training_args.max_steps": 12}), KTO
    )
    assert len(run.trainer.train_dataset) == 24
    assert run.losses[-1] < 0.42
    margins = [entry["rewards/margins"] for entry in run.trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > 0.5
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(run.final).values())
    assert run.trainer.tokens_seen == run.trainer.state.log_history[-2]["num_tokens"]


def test_validation_and_precomputed_references(train: Any, kto_values: Any) -> None:
    run = train(
        kto_values(
            {
                "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.25},
                "training_args.eval_strategy": "steps",
                "training_args.eval_steps": 3,
                "training_args.precompute_ref_log_probs": True,
            }
        ),
        KTO,
    )
    assert run.losses[0] == pytest.approx(0.5, abs=1e-5)
    assert any("eval_loss" in entry for entry in run.trainer.state.log_history)


def test_machines_that_share_no_files_precompute_the_same_reference(
    train: Any, kto_values: Any, write_config: Any, fork_server: Any, logged_losses: Any, tmp_path: Path
) -> None:
    changes = {"training_args.precompute_ref_log_probs": True, "training_args.max_steps": 2}
    changes["batchsize_conf"] = {"total_train_batch_size": 4, "max_per_device_train_batch_size": 2}
    alone = train(kto_values({**changes, "training_args.output_dir": str(tmp_path / "alone")}), KTO)
    # Two machines with one process each.
    local = "import os; os.environ |= {'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1'}"
    ranks = fork_server.start_all(["kto", write_config(kto_values(changes))], [local] * 2)
    assert wait_all(ranks) == [0, 0], "".join(rank.output for rank in ranks)
    assert logged_losses(tmp_path / "out") == pytest.approx(alone.losses, abs=2e-6)


def test_each_prompt_meets_the_answer_of_its_neighbor() -> None:
    rows = datasets.Dataset.from_dict({"completion_ids": [[1], [2, 2], [3], [4], [5]], "label": [True] * 5})
    assert with_kl_completions(rows, 2)["KL_completion_ids"][:] == [[2, 2], [1], [4], [3], [4]]
    assert with_kl_completions(rows, 5)["KL_completion_ids"][:] == [[5], [1], [2, 2], [3], [4]]
    assert with_kl_completions(rows, 2)["completion_ids"][:] == rows["completion_ids"][:]


def test_a_preference_is_two_rated_answers(dpo_rows: Any) -> None:
    location = Location(file="a.jsonl", line=7)
    good, bad = FORMATS["unpaired"].parse(Row(dpo_rows(1)[0], location))
    assert isinstance(good, UnpairedPreference)
    assert (good.label, bad.label) == (True, False)
    assert good.completion[0]["content"] == "Number 0 is red."
    assert good.prompt == bad.prompt
    assert bad.location == location


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "yes"}, r"label: expected true or false, got .yes."),
        ({"completion_messages": [{"role": "user", "content": "a"}]}, r"completion_messages\[0\].role: expected"),
        ({"completion_messages": None}, r"completion_messages: expected a list of messages"),
    ],
)
def test_a_wrong_row_is_named(change: dict[str, Any], message: str) -> None:
    import re

    row = {
        "prompt_messages": [{"role": "user", "content": "a"}],
        "completion_messages": [{"role": "assistant", "content": "b"}],
        "label": True,
    }
    result = FORMATS["unpaired"].parse(Row({**row, **change}, Location(file="a.jsonl", line=1)))
    assert isinstance(result, Problem)
    assert re.search(message, str(result))


def test_rows_of_another_method_are_recognized(train: Any, kto_values: Any, dpo_values: Any, sft_values: Any) -> None:
    rated = kto_values({})["data_conf"]["training_data"]["datasets"]
    with pytest.raises(DataError, match="run `finetuning kto`"):
        train(dpo_values({"data_conf.training_data.datasets": rated}))
    with pytest.raises(ConfigError, match="looks like an sft config"):
        train(sft_values(), KTO)


def test_one_row_at_a_time_is_refused_before_anything_is_loaded(train: Any, kto_values: Any) -> None:
    alone = {"batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 1}}
    with pytest.raises(ConfigError, match=r"Set 2 or more, or training_args\.loss_type: apo_zero_unpaired"):
        train(kto_values(alone), KTO)
    run = train(kto_values({**alone, "training_args.loss_type": "apo_zero_unpaired"}), KTO)
    assert run.losses[0] == pytest.approx(0.5, abs=1e-5)


def test_what_the_trainer_refuses_is_reported_in_one_line(train: Any, kto_values: Any) -> None:
    head = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["lm_head"]}}
    with pytest.raises(ConfigError, match=r"the KTO trainer rejects this config: .*lm_head"):
        train(kto_values({"peft_conf": head}), KTO)


def test_an_sft_adapter_is_its_own_reference(
    train: Any, sft_values: Any, kto_values: Any, read_tensors: Any, tmp_path: Path
) -> None:
    tuned = train(sft_values({"peft_conf": LORA, "training_args.output_dir": str(tmp_path / "sft")}))
    on_top = {"peft_type": "PRETRAINED_PEFT", "name_or_path": str(tuned.final)}
    run = train(kto_values({"peft_conf": on_top}), KTO)
    assert run.losses[0] == pytest.approx(0.5, abs=1e-5)
    before, after = read_tensors(tuned.final), read_tensors(run.final)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
