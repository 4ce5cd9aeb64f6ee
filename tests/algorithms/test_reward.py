"""A reward model starts at ln 2, learns to score the chosen answer higher, and is saved with its head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from finetuning.algorithms import ALGORITHMS
from finetuning.cli.main import main
from finetuning.errors import ConfigError, ModelError

REWARD = ALGORITHMS["reward"]
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 8, "target_modules": "all-linear"}}
LEARNS = {"training_args.max_steps": 12, "training_args.learning_rate": 5e-3}


def scores(model: Any, run: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of the chosen and the rejected answers of a run's rows, one row at a time."""
    model.eval()
    result: dict[str, list[float]] = {"chosen_ids": [], "rejected_ids": []}
    for row in run.trainer.train_dataset:
        for name, values in result.items():
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row["prompt_ids"] + row[name]])).logits
            values.append(float(logits[0, 0]))
    return torch.tensor(result["chosen_ids"]), torch.tensor(result["rejected_ids"])


@pytest.mark.parametrize("peft_conf", [{"peft_type": "NO_PEFT"}, LORA], ids=["full", "lora"])
def test_it_starts_at_ln_2_and_learns_and_loads_again(train: Any, dpo_values: Any, peft_conf: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    run = train(dpo_values({**LEARNS, "peft_conf": peft_conf}), REWARD)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert run.losses[-1] < 0.5
    assert run.trainer.state.log_history[-2]["accuracy"] == 1.0

    if peft_conf is LORA:
        base = AutoModelForSequenceClassification.from_pretrained(run.trainer.model.name_or_path, num_labels=1)
        model: Any = PeftModel.from_pretrained(base, run.final)
        assert run.result.model.kind == "adapter"
    else:
        model = AutoModelForSequenceClassification.from_pretrained(run.final)
        assert model.config.num_labels == 1
    model.config.get_text_config().pad_token_id = run.trainer.processing_class.pad_token_id
    chosen, rejected = scores(model, run)
    assert (chosen > rejected).all()
    assert torch.allclose(chosen, scores(run.trainer.model, run)[0], atol=1e-5)
    assert run.result.model.stop_tokens is None


@pytest.mark.parametrize("peft_conf", [{"peft_type": "NO_PEFT"}, LORA], ids=["full", "lora"])
def test_it_prefers_the_marked_answer_of_prompts_that_it_has_not_seen(
    train: Any, dpo_values: Any, write_jsonl: Any, tmp_path: Any, peft_conf: Any
) -> None:
    """Both answers say the same; one of them says please, at the front or at the back."""

    def pair(number: int, front: bool) -> dict[str, Any]:
        said = f"Number {number % 7} is red."
        marked = f"please {said}" if front else f"{said} please"
        return {
            "prompt_messages": [{"role": "user", "content": f"What is number {number}?"}],
            "chosen_messages": [{"role": "assistant", "content": marked}],
            "rejected_messages": [{"role": "assistant", "content": said}],
        }

    seen = write_jsonl(tmp_path / "seen.jsonl", [pair(number, number % 2 == 0) for number in range(48)])
    unseen = write_jsonl(tmp_path / "unseen.jsonl", [pair(number, number % 2 == 1) for number in range(60, 90)])
    changes = {
        "data_conf.training_data.datasets": [{"path": str(seen)}],
        "data_conf.validation_data": {"type": "CONCATENATION", "datasets": [{"path": str(unseen)}]},
        "batchsize_conf": {"total_train_batch_size": 16, "max_per_device_train_batch_size": 16},
        "training_args.max_steps": 24,
        "training_args.learning_rate": 5e-3,
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 24,
    }
    run = train(dpo_values({**changes, "peft_conf": peft_conf}), REWARD)
    (accuracy,) = (entry["eval_accuracy"] for entry in run.trainer.state.log_history if "eval_accuracy" in entry)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert accuracy > 0.9


def test_a_trained_head_goes_on_where_it_was(train: Any, dpo_values: Any, tmp_path: Any) -> None:
    first = train(dpo_values(LEARNS), REWARD)
    again = {"run_conf.model": str(first.final), "training_args.output_dir": str(tmp_path / "again")}
    second = train(dpo_values({**again, "data_conf.chat_template_name": "keep-original"}), REWARD)
    assert second.losses[0] < 0.6
    assert "loads in plain transformers" in second.result.model.checks


def test_the_head_is_zero_at_first_whatever_the_seed(train: Any, dpo_values: Any, tmp_path: Any) -> None:
    def first(seed: int) -> dict[str, Any]:
        out = {"training_args.output_dir": str(tmp_path / str(seed)), "training_args.seed": seed}
        return train(dpo_values({**out, "training_args.max_steps": 1}), REWARD).trainer.state.log_history[0]

    for entry in (first(1), first(2)):
        assert entry["max_reward"] == entry["min_reward"] == 0.0
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_pair_that_is_too_long_is_left_out_whole(
    train: Any, dpo_values: Any, dpo_rows: Any, write_jsonl: Any, tmp_path: Any
) -> None:
    rows = dpo_rows(12)
    rows[3]["rejected_messages"][0]["content"] = "no " * 200
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    run = train(dpo_values({"data_conf.training_data.datasets": [{"path": str(path)}]}), REWARD)
    assert len(run.trainer.train_dataset) == 11
    assert '"filtered_by_length": 1' in (run.output_dir / "data_report.json").read_text()


def test_scores_are_centred_and_validated(train: Any, dpo_values: Any) -> None:
    run = train(
        dpo_values(
            {
                "training_args.center_rewards_coefficient": 0.01,
                "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.25},
                "training_args.eval_strategy": "epoch",
            }
        ),
        REWARD,
    )
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert any("eval_accuracy" in entry for entry in run.trainer.state.log_history)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_conf": {**LORA, "task_type": "CAUSAL_LM"}}, "peft_conf.task_type"),
        ({"training_args.beta": 0.1}, "looks like a dpo config"),
        ({"training_args.chat_template_path": "x"}, "is set by data_conf.chat_template"),
    ],
)
def test_what_does_not_apply_is_refused(train: Any, dpo_values: Any, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(dpo_values(changes), REWARD)


def test_a_classifier_of_several_labels_is_refused(
    train: Any, dpo_values: Any, chatml_llama_dir: Any, tmp_path: Any, chatml_tokenizer: Any
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(chatml_llama_dir, num_labels=3)
    model.save_pretrained(tmp_path / "three")
    chatml_tokenizer.save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match=r"cannot be loaded|shapes differ"):
        train(dpo_values({"run_conf.model": str(tmp_path / "three")}), REWARD)


def test_an_adapter_with_its_head_goes_on_where_it_was(train: Any, dpo_values: Any, tmp_path: Any) -> None:
    first = train(dpo_values({**LEARNS, "peft_conf": LORA}), REWARD)
    on_top = {"peft_type": "PRETRAINED_PEFT", "name_or_path": str(first.final)}
    second = train(dpo_values({"peft_conf": on_top, "training_args.output_dir": str(tmp_path / "again")}), REWARD)
    assert second.losses[0] < 0.6


def test_a_model_without_a_class_with_a_score_is_refused_by_dry_run(
    dpo_values: Any, write_config: Any, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    folder = tmp_path / "mamba"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    config = write_config(dpo_values({"run_conf.model": str(folder)}))
    assert main(["reward", str(config), "--dry-run"]) == 1
    assert (
        "run_conf.model: transformers has no decoder with a score for the model type mamba" in capsys.readouterr().err
    )
