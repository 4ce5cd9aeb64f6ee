"""grpo with images: completions see the images of their prompts, and so do their log-probabilities."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.algorithms import ALGORITHMS
from vision.conftest import COLORS
from vision.test_checkpoints import LORA
from vision.test_rows import WITH_PROCESSOR

EACH = [pytest.param(name, marks=pytest.mark.full) if name == "llava" else name for name in WITH_PROCESSOR]
LETTERS = """
def letters(completions, color, **columns):
    assert len(color) == len(completions)
    return [float(len(set(completion[0]["content"]))) for completion in completions]
"""


@pytest.fixture
def prompt_values(vision_values: Any, pictures: list[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that makes the values of a grpo run of a family on prompts of which one has no picture."""
    (tmp_path / "letters.py").write_text(LETTERS, encoding="utf-8")
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": "<image>\nWhich color?"}], "images": [name], "color": color}
        for name, color in zip(pictures, COLORS, strict=True)
    ]
    rows[1] = {**rows[1], "prompt": [{"role": "user", "content": "<image> or <image>?"}], "images": pictures[1:3]}
    rows[2] = {"prompt": [{"role": "user", "content": "Which color is blood?"}], "color": "red"}

    def make(name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        values = vision_values(
            name,
            rows,
            {
                "training_args.num_generations": 2,
                "training_args.max_completion_length": 6,
                "training_args.beta": 0.1,
                "batchsize_conf": {"total_train_batch_size": 8, "max_per_device_train_batch_size": 4},
                "grpo_args": {"rewards": [{"type": "function", "path": f"{tmp_path}/letters.py:letters"}]},
                **(changes or {}),
            },
        )
        del values["sft_args"]
        return values

    return make


@pytest.mark.parametrize("name", EACH)
def test_completions_have_the_log_probabilities_of_the_plain_model(name: str, prompt_values: Any, train: Any) -> None:
    run = train(prompt_values(name), ALGORITHMS["grpo"])
    assert "equals the policy before the first update" in run.trainer.reference_summary
    trainer, model = run.trainer, run.trainer.model.eval()
    trainer.generation_config.top_k = trainer.generation_kwargs["top_k"] = 1
    rows = list(trainer.train_dataset)
    batch = trainer._generate_and_score_completions(trainer.data_collator([row for row in rows for _ in range(2)]))
    computed = trainer._completion_log_probs(model, batch)
    prompt_length = batch["prompt_ids"].shape[1]
    for index in range(len(computed)):
        row = rows[index // 2]
        is_prompt, is_answer = batch["prompt_mask"][index].bool(), batch["completion_mask"][index].bool()
        answer = batch["completion_ids"][index][is_answer]
        assert batch["prompt_ids"][index][is_prompt].tolist() == row["prompt_ids"]
        assert prompt_length == max(len(each["prompt_ids"]) for each in rows)
        inputs = (
            trainer.data_collator.as_batch([row]) if row["images"] else {"input_ids": torch.tensor([row["prompt_ids"]])}
        )
        inputs_of_prompt = dict(inputs)
        ids = torch.cat([inputs["input_ids"], answer[None]], dim=1)
        for key, value in inputs.items():
            if value.shape == inputs["input_ids"].shape and key != "input_ids":
                inputs[key] = torch.cat([value, value.new_zeros((1, len(answer)))], dim=1)
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids}).logits[0, :-1].float().log_softmax(-1)
        plain = logits.gather(1, ids[0, 1:, None])[:, 0][-len(answer) :]
        torch.testing.assert_close(computed[index][is_answer], plain, atol=1e-4, rtol=1e-4)
        image_tokens = sorted(trainer.data_collator.processor.token_ids)
        greedy = model.generate(**inputs_of_prompt, max_new_tokens=6, do_sample=False, suppress_tokens=image_tokens)
        assert greedy[0, len(row["prompt_ids"]) :].tolist()[: len(answer)] == answer.tolist()


def test_an_adapter_of_grpo_resumes_between_the_completions_of_a_batch(
    prompt_values: Any, train: Any, tmp_path: Path
) -> None:
    steps = {
        "training_args.max_steps": 3,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 1,
        "training_args.num_iterations": 2,
        "peft_conf": LORA,
    }
    whole = train(prompt_values("qwen2_5_vl", steps), ALGORITHMS["grpo"])
    folder = tmp_path / "resumed"
    folder.mkdir()
    shutil.copytree(whole.output_dir / "checkpoint-1", folder / "checkpoint-1")
    changes = {"training_args.output_dir": str(folder), "run_conf.resume_from_checkpoint": "auto"}
    resumed = train(prompt_values("qwen2_5_vl", {**steps, **changes}), ALGORITHMS["grpo"])
    assert resumed.losses == whole.losses
