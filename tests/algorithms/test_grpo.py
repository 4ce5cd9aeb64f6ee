"""GRPO raises the reward of what the model writes, from prompts as they are served, near a true reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import finetuning
from finetuning.algorithms import ALGORITHMS
from finetuning.data.formats import FORMATS
from finetuning.data.samples import Prompt, Row
from finetuning.errors import ConfigError, DataError, GuardStopped, Location, Problem

GRPO = ALGORITHMS["grpo"]
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}}
VOWELS = """
import json

def vowels(completions, correct_answers, **columns):
    texts = [one[0]["content"] for one in completions]
    return [sum(letter in "aeiou" for letter in text) / (len(text) or 1) for text in texts]

def seen(prompts, completions, correct_answers, note, rare, **columns):
    with open(note[0]["file"], "a") as stream:
        stream.write(json.dumps([prompts[0], completions[0], correct_answers[0], rare[0]]) + "\\n")
    return [0.0] * len(completions)

def silent(completions, **columns):
    return [None] * len(completions)

def late(completions, trainer_state):
    if trainer_state.global_step == 1:
        raise LookupError("no judge")
    return [1.0] * len(completions)
"""


@pytest.fixture
def grpo_values(tmp_path: Path, grpo_values: Any, write_jsonl: Any) -> Callable[..., dict[str, Any]]:
    """Rows with answers and columns of their own, and the reward functions above."""
    (tmp_path / "own.py").write_text(VOWELS)
    rows = [
        {
            "prompt_messages": [{"role": "user", "content": f"What is number {number}?"}],
            "correct_answers": [str(number)],
            "note": {"file": str(tmp_path / "seen.jsonl")},
            **({"rare": number} if number == 0 else {}),
        }
        for number in range(12)
    ]
    path = write_jsonl(tmp_path / "prompts_with_columns.jsonl", rows)

    def make(changes: dict[str, Any]) -> dict[str, Any]:
        return grpo_values(
            {
                "data_conf.training_data.datasets": [{"path": str(path)}],
                "training_args.max_completion_length": 10,
                "batchsize_conf": {"total_train_batch_size": 16, "max_per_device_train_batch_size": 8},
                "grpo_args": {"rewards": [{"type": "function", "path": f"{tmp_path}/own.py:vowels"}]},
                **changes,
            }
        )

    return make


@pytest.fixture
def decided_llama_dir(tmp_path: Path, chatml_llama_dir: Path) -> Path:
    """A model that has preferences: an adapter that leaves the embeddings alone could not give it any."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(chatml_llama_dir, tmp_path / "decided")
    model = AutoModelForCausalLM.from_pretrained(chatml_llama_dir)
    with torch.no_grad():
        model.model.norm.weight.mul_(8)
    model.save_pretrained(tmp_path / "decided")
    return tmp_path / "decided"


@pytest.mark.parametrize(
    ("peft_conf", "rate", "beta"), [({"peft_type": "NO_PEFT"}, 3e-3, 0.0), (LORA, 2e-2, 0.01)], ids=["full", "lora"]
)
def test_the_mean_reward_more_than_doubles(
    train: Any, grpo_values: Any, read_tensors: Any, decided_llama_dir: Path, peft_conf: Any, rate: float, beta: float
) -> None:
    """The share of vowels in what is written, from 0.14 on."""
    changes = {
        "run_conf.model": str(decided_llama_dir),
        "batchsize_conf": {"total_train_batch_size": 64, "max_per_device_train_batch_size": 64},
        "training_args.num_generations": 16,
        "training_args.max_completion_length": 6,
        "training_args.max_steps": 12,
        "training_args.learning_rate": rate,
        "training_args.lr_scheduler_type": "constant",
        "training_args.beta": beta,
    }
    run = train(grpo_values({"peft_conf": peft_conf, **changes}), GRPO)
    rewards = [entry["reward"] for entry in run.trainer.state.log_history if "reward" in entry]
    assert rewards[0] < 0.2
    assert min(rewards[-3:]) > 0.34
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(run.final).values())
    assert run.trainer.tokens_seen > 12 * 64


@pytest.mark.parametrize("peft_conf", [{"peft_type": "NO_PEFT"}, LORA], ids=["full", "lora"])
def test_the_first_loss_and_the_first_divergence_are_0(train: Any, grpo_values: Any, peft_conf: Any) -> None:
    """Advantages within a group add up to 0, and so does the loss, which is a mean over completions here."""
    whole = {"batchsize_conf": {"total_train_batch_size": 16, "max_per_device_train_batch_size": 16}}
    changes = {"training_args.beta": 0.5, "training_args.loss_type": "grpo", **whole}
    run = train(grpo_values({"peft_conf": peft_conf, **changes}), GRPO)
    first, later = run.trainer.state.log_history[0], run.trainer.state.log_history[2]
    assert first["loss"] == pytest.approx(0, abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert later["kl"] > first["kl"]


def test_a_wrong_reference_stops_the_run(train: Any, grpo_values: Any) -> None:
    """Of noise so small that the divergence is below 0.001."""

    def build(inputs: Any) -> Any:
        def load() -> Any:
            reference = inputs.load_reference()
            with torch.no_grad():
                for weight in reference.parameters():
                    weight.add_(torch.randn_like(weight) * 1e-3)
            return reference

        return GRPO.build_trainer(replace(inputs, load_reference=load))

    with pytest.raises(GuardStopped, match="the reference is not the model that is trained"):
        train(grpo_values({"training_args.beta": 1e-4}), replace(GRPO, build_trainer=build))


def test_dropout_is_not_taken_for_a_wrong_reference(train: Any, grpo_values: Any) -> None:
    dropout = {"peft_type": "LORA", "peft_kwargs": {**LORA["peft_kwargs"], "lora_dropout": 0.4}}
    changes = {"training_args.max_steps": 1, "training_args.beta": 0.1, "peft_conf": dropout}
    run = train(grpo_values({**changes, "training_args.disable_dropout": False}), GRPO)
    assert "equals the policy before the first update: 16 sequences" in run.trainer.reference_summary


def test_an_adapter_that_changes_the_base_is_caught(train: Any, grpo_values: Any, move_base_into_adapter: Any) -> None:
    def build(inputs: Any) -> Any:
        trainer = GRPO.build_trainer(inputs)
        move_base_into_adapter(trainer)
        return trainer

    with pytest.raises(GuardStopped, match="It differs from the model in its files"):
        train(grpo_values({"training_args.beta": 0.1, "peft_conf": LORA}), replace(GRPO, build_trainer=build))


def test_an_adapter_that_goes_on_is_its_own_reference(
    train: Any, grpo_values: Any, sft_values: Any, read_tensors: Any, tmp_path: Path
) -> None:
    tuned = train(sft_values({"peft_conf": LORA, "training_args.output_dir": str(tmp_path / "sft")}))
    on_top = {"peft_type": "PRETRAINED_PEFT", "name_or_path": str(tuned.final)}
    run = train(grpo_values({"peft_conf": on_top, "training_args.beta": 0.1}), GRPO)
    assert run.trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert read_tensors(run.final).keys() == read_tensors(tuned.final).keys()


@pytest.mark.parametrize("constant", [True, False])
def test_rewards_that_never_vary_are_reported(
    train: Any, grpo_values: Any, tmp_path: Path, caplog: Any, constant: bool
) -> None:
    rewards = [{"type": "function", "path": f"{tmp_path}/own.py:{'seen' if constant else 'vowels'}"}]
    # Weight decay moves the weights, which rewards that never vary do not: they would fail verification.
    changes = {"grpo_args.rewards": rewards, "training_args.max_steps": 3, "training_args.weight_decay": 0.1}
    run = train(grpo_values(changes), GRPO)
    warnings = json.loads((run.output_dir / "run.json").read_text())["warnings"]
    reported = [text for text in warnings if text.startswith("step ")]
    assert len(reported) == constant
    assert all(text.startswith("step 3: in the last 3 steps all completions") for text in reported)


def test_rewards_that_are_all_missing_are_reported_at_the_first_batch(
    grpo_values: Any, tmp_path: Path, caplog: Any
) -> None:
    seen: list[int] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(sum("no reward function has returned a reward" in text for text in caplog.messages))

    rewards = [{"type": "function", "path": f"{tmp_path}/own.py:silent"}]
    # Weight decay moves the weights, which missing rewards do not: they would fail verification.
    changes = {"grpo_args.rewards": rewards, "training_args.max_steps": 3, "training_args.weight_decay": 0.1}
    finetuning.run(grpo_values(changes), method="grpo", callbacks=[Steps()])
    assert seen == [0, 1, 1], "said once, before the second step"


def test_resuming_goes_on(train: Any, grpo_values: Any) -> None:
    saves = {"training_args.save_strategy": "steps", "training_args.save_steps": 1}
    train(grpo_values({**saves, "training_args.max_steps": 2, "run_conf.final_checkpoint_name": "first"}), GRPO)
    longer = {"training_args.max_steps": 3, "run_conf.allow_changed": ["training_args.max_steps"]}
    run = train(grpo_values({**saves, **longer, "run_conf.resume_from_checkpoint": "auto"}), GRPO)
    assert run.result.steps == 3
    assert [entry["step"] for entry in run.trainer.state.log_history if "reward" in entry] == [1, 2, 3]


def test_rewards_see_prompts_answers_and_columns(train: Any, grpo_values: Any, tmp_path: Path) -> None:
    rewards = [{"type": "function", "path": f"{tmp_path}/own.py:seen"}, {"type": "length", "target": 5, "weight": 0.5}]
    run = train(grpo_values({"grpo_args.rewards": rewards, "training_args.max_steps": 1}), GRPO)
    prompt, completion, right, rare = json.loads((tmp_path / "seen.jsonl").read_text().splitlines()[0])
    assert prompt[0]["content"] == f"What is number {right[0]}?"
    assert completion[0]["role"] == "assistant"
    assert rare in (None, 0)
    first = run.trainer.state.log_history[0]
    assert first["reward"] == pytest.approx(0.5 * first["rewards/length/mean"])


def test_prompts_are_those_of_the_served_model(train: Any, grpo_values: Any) -> None:
    run = train(grpo_values({"training_args.max_steps": 1}), GRPO)
    row = run.trainer.train_dataset[0]
    served = run.trainer.processing_class.apply_chat_template(
        json.loads(row["row"])["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert row["prompt_ids"] == served
    ends = run.trainer.processing_class.convert_tokens_to_ids("<|im_end|>")
    assert ends in run.trainer.eos_token_ids


def test_completions_end_where_the_template_ends_a_turn(train: Any, grpo_values: Any, tiny_llama_dir: Any) -> None:
    """Of a base model that knows no turns, whose template brings new tokens."""
    run = train(grpo_values({"run_conf.model": str(tiny_llama_dir), "training_args.max_steps": 1}), GRPO)
    assert run.trainer.processing_class.convert_tokens_to_ids("<|im_end|>") in run.trainer.eos_token_ids


def test_validation_measures_the_reward(train: Any, grpo_values: Any) -> None:
    changes = {
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.25},
        "training_args.eval_strategy": "steps",
        "training_args.eval_steps": 2,
        "training_args.max_steps": 2,
    }
    run = train(grpo_values(changes), GRPO)
    assert any("eval_reward" in entry for entry in run.trainer.state.log_history)


def test_steps_are_planned_as_the_trainer_counts_them(train: Any, grpo_values: Any) -> None:
    """12 prompts of 4 completions: three batches of 16, twice trained on, an epoch."""
    changes = {"training_args.max_steps": None, "training_args.num_train_epochs": 1, "training_args.num_iterations": 2}
    run = train(grpo_values(changes), GRPO)
    assert run.trainer.state.max_steps == run.result.steps == 6
    assert json.loads((run.output_dir / "run.json").read_text())["plan"]["steps"]["total"] == 6


def test_a_reward_that_fails_in_training_is_named(train: Any, grpo_values: Any, tmp_path: Path) -> None:
    rewards = [{"type": "json_valid"}, {"type": "function", "path": f"{tmp_path}/own.py:late"}]
    with pytest.raises(ConfigError, match=r"rewards\[1\]: the reward .*own.py:late raised LookupError: no judge"):
        train(grpo_values({"grpo_args.rewards": rewards}), GRPO)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"batchsize_conf": {"total_train_batch_size": 10, "max_per_device_train_batch_size": 8}},
            ConfigError,
            "10 is not a multiple of training_args.num_generations 4. The nearest that are: 8 and 12",
        ),
        (
            {"batchsize_conf": {"total_train_batch_size": 64, "max_per_device_train_batch_size": 8}},
            ConfigError,
            "a batch needs 16 prompts, but there are 12",
        ),
        ({"grpo_args": None}, ConfigError, "grpo_args"),
        ({"grpo_args.rewards": []}, ConfigError, "grpo_args.rewards"),
        ({"training_args.reward_weights": [1.0]}, ConfigError, "is set by grpo_args.rewards"),
        ({"training_args.chat_template_kwargs": {}}, ConfigError, "column chat_template_kwargs"),
        ({"training_args.num_generations": 1}, ConfigError, "num_generations"),
        ({"grpo_args.rewards": [{"type": "exact_match", "column": "answer"}]}, DataError, "no answer, which the rew"),
        ({"grpo_args.rewards": [{"type": "exact"}]}, ConfigError, "exact_match"),
        ({"grpo_args.max_prompt_length": 3}, DataError, "all 12 rows dropped"),
    ],
)
def test_what_does_not_fit_is_refused(
    train: Any, grpo_values: Any, changes: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(grpo_values(changes), GRPO)


def test_pairs_are_reported_where_they_belong(train: Any, grpo_values: Any, sft_values: Any) -> None:
    rows = sft_values({})["data_conf"]["training_data"]["datasets"]
    with pytest.raises(DataError, match=r"messages\[\d\]: is an answer, but the model generates the answer"):
        train(grpo_values({"data_conf.training_data.datasets": rows}), GRPO)
    with pytest.raises(ConfigError, match="looks like a grpo config"):
        train(grpo_values({}), ALGORITHMS["sft"])


def test_a_row_keeps_its_other_columns() -> None:
    location = Location(file="a.jsonl", line=1)
    row = {"messages": [{"role": "user", "content": "a"}], "tools": [], "id": 7, "correct_answers": ["b"]}
    result = FORMATS["prompt"].parse(Row(row, location))
    assert isinstance(result, Prompt)
    assert result.columns == {"id": 7, "correct_answers": ["b"]}
    problem = FORMATS["prompt"].parse(Row({**row, "completions": 1}, location))
    assert isinstance(problem, Problem)
    assert "rename the column" in str(problem)
