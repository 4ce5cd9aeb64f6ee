"""The methods of a user's class come before those of the trainer, and a change of its code is not silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

import finetuning
from finetuning.errors import CheckpointError, ConfigError
from finetuning.trainer.user_code import extend_trainer

MIXIN = '''
class PlusOne:
    """Adds 1 to the loss, which changes no gradient."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (output[0] + 1, *output[1:]) if return_outputs else output + 1


class Nothing:
    """Overrides no method."""

    def compute_los(self):
        """A typo."""


from trl import SFTTrainer


class OfTRL(SFTTrainer):
    """A subclass of a trainer that the run does not use."""


number = 3


def function():
    """No class."""
'''


class KeepsNorm(Trainer):
    """Does not train the last norm. Derived from the trainer, as an editor completes its methods then."""

    def create_optimizer(self, model: Any = None) -> Any:
        """Return the optimizer of all other weights."""
        assert self.model is not None
        self.model.get_parameter("model.norm.weight").requires_grad_(False)
        return super().create_optimizer(model)


class OwnLoss:
    """Replaces the loss."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return nothing: it is not called here."""


class Losses(TrainerCallback):
    """Keeps the logged losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.values += [logs["loss"]] if "loss" in logs else []


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(MIXIN)
    return file


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo", "grpo"])
def test_a_loss_of_the_user(
    method: str, sft_values: Any, dpo_values: Any, grpo_values: Any, code: Path, tmp_path: Path
) -> None:
    make = {"sft": sft_values, "grpo": grpo_values}.get(method, dpo_values)
    batch = {"total_train_batch_size": 4, "max_per_device_train_batch_size": 4}
    history = []
    for name in (None, f"{code}:PlusOne"):
        out = str(tmp_path / f"out-{len(history)}")
        changes = {"run_conf.trainer_mixin": name, "training_args.output_dir": out, "training_args.max_steps": 2}
        losses = Losses()
        finetuning.run(make({**changes, "batchsize_conf": batch}), method=method, callbacks=[losses])
        history.append(losses.values)
    assert len(history[0]) == 2
    assert history[1] == pytest.approx([loss + 1 for loss in history[0]], abs=1e-5)


def test_a_class_from_python_is_named_in_the_record(sft_values: Any, tmp_path: Path, capsys: Any) -> None:
    values = sft_values()
    result = finetuning.run(values, method="sft", trainer_mixin=KeepsNorm)
    assert result.folder is not None
    assert f"trainer_mixin: {__name__}:KeepsNorm" in (tmp_path / "out" / "config.resolved.yaml").read_text("utf-8")
    assert f"trainer            {__name__}:KeepsNorm overrides create_optimizer" in capsys.readouterr().out
    base, tuned = (
        load_file(Path(folder) / "model.safetensors") for folder in (values["run_conf"]["model"], result.folder)
    )
    same = {name for name in base if torch.equal(base[name], tuned[name].to(base[name].dtype))}
    assert same == {"model.norm.weight"}


def test_a_local_class_is_refused(sft_values: Any) -> None:
    class Local:
        """Has no name in its module."""

    with pytest.raises(ConfigError, match=r"<locals>\.Local is not found in .*test_user_code, so the run could not"):
        finetuning.run(sft_values(), method="sft", trainer_mixin=Local)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{code}:Nothing", "has no method that a trainer has"),
        ("{code}:OfTRL", "is a subclass of TRL's SFTTrainer, which does not train here"),
        ("{code}:number", "has no class number.*PlusOne"),
        ("{code}:function", "is a function, not a class"),
        ("{code}.py:KeepsNorm", "there is no file"),
        ("nowhere.at_all:KeepsNorm", "cannot import the trainer mixin nowhere.at_all:KeepsNorm"),
    ],
)
def test_what_is_no_mixin(name: str, message: str, sft_values: Any, code: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        finetuning.run(sft_values({"run_conf.trainer_mixin": name.format(code=code)}), method="sft")
    assert caught.value.problems[0].location.key == "run_conf.trainer_mixin"


def test_a_file_that_raises_is_named_with_its_line(sft_values: Any, code: Path) -> None:
    code.write_text("\nimport finetuning\nraise OSError('no disk')\n")
    with pytest.raises(ConfigError, match=r"own\.py:PlusOne raised OSError: no disk \(own\.py, line 3\)"):
        finetuning.run(sft_values({"run_conf.trainer_mixin": f"{code}:PlusOne"}), method="sft")


def test_batches_are_not_split_for_a_loss_that_is_not_known() -> None:
    class Base(Trainer):
        supports_batch_splitting = True

    assert not getattr(extend_trainer(Base, f"{__name__}:OwnLoss"), "supports_batch_splitting")  # noqa: B009
    assert getattr(extend_trainer(Base, f"{__name__}:KeepsNorm"), "supports_batch_splitting")  # noqa: B009


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_changed_code_is_a_change_of_the_run(
    method: str, sft_values: Any, grpo_values: Any, code: Path, tmp_path: Path
) -> None:
    """The mixin of sft, and the reward function of grpo."""
    saved = {"training_args.save_strategy": "steps", "training_args.save_steps": 1, "training_args.max_steps": 1}
    if method == "sft":
        file, values = code, sft_values({**saved, "run_conf.trainer_mixin": f"{code}:PlusOne"})
    else:
        file, values = tmp_path / "letters.py", grpo_values(saved)
    finetuning.run(values, method=method)
    file.write_text(file.read_text("utf-8") + "\n# changed\n", "utf-8")
    again = {"run_conf.resume_from_checkpoint": True, "training_args.max_steps": 2, "run_conf.on_existing_run": "move"}
    again |= {"training_args.lr_scheduler_type": "linear"}
    allowed = ["training_args.max_steps"]
    with pytest.raises(CheckpointError, match=rf"code\..*{file.name}:\w+ was .*, is .*changes the loss trajectory"):
        finetuning.run(values, {**again, "run_conf.allow_changed": allowed}, method=method)
    result = finetuning.run(values, {**again, "run_conf.allow_changed": [*allowed, "code"]}, method=method)
    assert result.steps == 2
