"""`finetuning selftest`: each check passes on a sound machine, and fails when what it compares is made to differ."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ForkServer
from safetensors.torch import load_file, save_file

from finetuning.cli.selftest import main
from finetuning.selftest.checks import Result, SelfTest, Trial, loss_difference, weight_difference, within
from finetuning.selftest.measure import Setup, measure_layouts, set_up
from finetuning.selftest.trials import STEPS, TrialFailed, TrialRunner, trial_overrides

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}}


@pytest.fixture
def forked_trials(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks the processes of a self-test, which spares each of them the imports."""
    monkeypatch.setattr(subprocess, "Popen", fork_server.popen)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_trials")
def test_all_checks_of_a_lora_run_pass(
    sft_values: Any, write_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(sft_values({"peft_conf": LORA}))
    assert main(["sft", str(config), "--json", "--folder", str(tmp_path / "trials")]) == 0
    results = {result["name"]: result for result in json.loads(capsys.readouterr().out)}
    assert list(results) == [
        "repeated run",
        "micro-batches 2 x 2",
        "micro-batches 4 x 1",
        "out-of-memory retry",
        "killed and resumed",
        "batch layouts",
        "merged adapter",
        "sampling and training",
    ]
    assert results.pop("sampling and training")["reason"] == "only grpo samples completions"
    assert {result["verdict"] for result in results.values()} == {"pass"}
    assert results["killed and resumed"]["difference"] == 0
    assert 0 < results["micro-batches 4 x 1"]["difference"] < 1e-5, "another order of sums, but the same sums"
    assert "packed" in results["batch layouts"]["reason"]
    assert "retrying with 2" in (tmp_path / "trials" / "out-of-memory.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param(name, marks=pytest.mark.full) for name in ("dpo", "grpo")])
def test_all_checks_of_other_methods_pass(
    request: pytest.FixtureRequest, write_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    config = write_config(request.getfixturevalue(f"{method}_values")({"peft_conf": LORA}))
    code = main([method, str(config), "--json", "--folder", str(tmp_path / "trials")])
    results = json.loads(capsys.readouterr().out)
    assert code == 0, results
    verdicts = {result["name"]: result["verdict"] for result in results}
    assert verdicts["sampling and training"] == ("pass" if method == "grpo" else "skipped")
    assert verdicts["batch layouts"] == "skipped"


@pytest.fixture
def runner(sft_values: Any, write_config: Any, tmp_path: Path) -> TrialRunner:
    from finetuning.config.sections.experiment import SFTExperiment

    values = sft_values({})
    overrides = trial_overrides(SFTExperiment.model_validate(values), 1, {})
    folder = tmp_path / "trials"
    folder.mkdir()
    return TrialRunner("sft", write_config(values), overrides, folder, "checkpoint-final")


def test_a_trial_that_fails_is_reported_with_its_error(runner: TrialRunner) -> None:
    with pytest.raises(TrialFailed, match=r"trial wrong ended with exit code 1: error: .*learning_rate"):
        runner.run("wrong", "training_args.learning_rate=fast")


def trial(folder: Path, losses: tuple[float, ...], grad_norms: tuple[float, ...] = ()) -> Trial:
    return Trial(folder, folder, losses, grad_norms)


def test_losses_are_compared_at_every_step(tmp_path: Path) -> None:
    assert loss_difference(trial(tmp_path, (4.0, 0.5)), trial(tmp_path, (4.0, 0.6))) == pytest.approx(0.1)
    assert loss_difference(trial(tmp_path, (4.0, 0.5)), trial(tmp_path, (2.0, 0.5))) == pytest.approx(0.5)
    assert math.isnan(loss_difference(trial(tmp_path, (4.0, 0.5)), trial(tmp_path, (4.0, math.nan))))
    with pytest.raises(ValueError, match="shorter"):
        loss_difference(trial(tmp_path, (4.0, 0.5)), trial(tmp_path, (4.0,)))


def test_a_gradient_of_another_size_fails_where_the_losses_agree(runner: TrialRunner, sft_values: Any) -> None:
    """Adam takes the same steps with all gradients twice as large."""
    from finetuning.config.sections.experiment import SFTExperiment

    test = SelfTest(SFTExperiment.model_validate(sft_values({})), runner, 1, "float32")

    def compare(*grad_norms: float) -> Result:
        second = trial(runner.folder / "second", (4.0, 0.5), grad_norms)
        return test._compare_steps("micro-batches 2 x 2", trial(runner.folder, (4.0, 0.5), (3.0, 2.0)), second)

    assert not compare(3.01, 2.0).failed
    wrong = compare(6.0, 4.0)
    assert wrong.failed
    assert (wrong.compared, wrong.difference) == ("gradient norm, every step", 0.5)
    assert compare(3.0, math.nan).failed


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda tensors: tensors, 0.0),
        (lambda tensors: {**tensors, "a": tensors["a"] + torch.tensor([0.0, 0.0, 0.5])}, 0.5),
        (
            lambda tensors: {**tensors, "a": tensors["a"] * torch.tensor([1.0, 1.0, torch.nan])},
            pytest.approx(math.nan, nan_ok=True),
        ),
        (lambda tensors: {"a": tensors["a"]}, float("inf")),
        (lambda tensors: {**tensors, "b": tensors["b"].bfloat16()}, float("inf")),
    ],
    ids=["equal", "a value", "not a number", "a missing tensor", "a dtype"],
)
def test_every_weight_is_compared(tmp_path: Path, change: Any, difference: float) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    for name, saved in (("first", tensors), ("second", change(tensors))):
        (tmp_path / name).mkdir()
        save_file(saved, tmp_path / name / "model.safetensors")
    assert weight_difference(tmp_path / "first", tmp_path / "second") == difference


def test_an_empty_folder_is_not_equal(tmp_path: Path) -> None:
    assert weight_difference(tmp_path, tmp_path) == float("inf")


def test_nan_fails() -> None:
    assert within("a", "b", float("nan"), 1.0).failed


class Replayed(TrialRunner):
    """A runner whose resumed trial is a finished trial with one weight changed."""

    def run_interrupted(self, name: str) -> Trial:
        changed = self.run(name)
        file = changed.final / "model.safetensors"
        tensors = load_file(file)
        key = next(iter(tensors))
        tensors[key][0, 0] += 0.01
        save_file(tensors, file, {"format": "pt"})
        return changed


@pytest.mark.slow
@pytest.mark.usefixtures("forked_trials")
def test_a_resumed_run_with_one_other_weight_fails(runner: TrialRunner, sft_values: Any) -> None:
    from finetuning.config.sections.experiment import SFTExperiment

    replayed = Replayed(runner.method, runner.config, runner.overrides, runner.folder, runner.final_name)
    test = SelfTest(SFTExperiment.model_validate(sft_values({})), replayed, 1, "float32")
    first = replayed.run("reference")
    assert len(first.losses) == STEPS
    result = test._resume("killed and resumed", first)
    assert result.failed
    assert result.difference == pytest.approx(0.01, rel=1e-3)
    assert result.reason == "a repeated run is equal bit for bit"


@pytest.fixture
def setup(sft_values: Any, write_config: Any) -> Setup:
    return set_up("sft", str(write_config(sft_values({}))), [])


def test_layouts_agree_on_the_rows_of_the_config(setup: Setup) -> None:
    difference, reason = measure_layouts(setup)
    assert difference is not None
    assert difference < 1e-5
    assert [part.split()[0] for part in reason.split(", ")] == ["padded", "padding-free", "packed"]


def test_rows_that_see_each_other_are_caught(setup: Setup) -> None:
    """Plain attention takes the rows of a pack for one sequence."""
    setup.loaded.model.set_attn_implementation("eager")
    model = setup.loaded.model
    model.register_forward_pre_hook(lambda module, args, kwargs: (args, without_borders(kwargs)), with_kwargs=True)
    difference, _ = measure_layouts(setup)
    assert difference is not None
    assert difference > 1e-3


def without_borders(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward pass with positions that run over the borders of rows."""
    borders = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids")
    return {name: value for name, value in kwargs.items() if name not in borders}


def test_a_layout_without_padding_free_batches_says_so(setup: Setup) -> None:
    layout = replace(setup.loaded.layout, padded=True)
    difference, reason = measure_layouts(replace(setup, loaded=replace(setup.loaded, layout=layout)))
    assert difference is not None
    assert "packed" not in reason
    assert reason.endswith("this run only pads")


def test_sampling_agrees_with_training(dpo_values: Any, write_jsonl: Any, write_config: Any, tmp_path: Path) -> None:
    from finetuning.selftest.measure import measure_sampling

    row = {"prompt_messages": [{"role": "user", "content": "What is number 3?"}], "correct_answers": ["3"]}
    changes = {
        "data_conf.training_data.datasets": [{"path": str(write_jsonl(tmp_path / "prompts.jsonl", [row]))}],
        "training_args.max_length": None,
        "training_args.num_generations": 4,
        "grpo_args": {"rewards": [{"type": "length", "target": 4}]},
    }
    difference, reason = measure_sampling(set_up("grpo", str(write_config(dpo_values(changes))), []))
    assert difference is not None
    assert difference < 1e-4
    assert "tokens" in reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sfd", "CONFIG"], 'unknown method "sfd"'),
        (["sft", "CONFIG", "--nproc", "0"], "--nproc 0: must be at least 1"),
        (["sft", "CONFIG", "--folder", "."], "--folder .: the folder is not empty"),
        (["sft", "CONFIG", "data_conf.streaming=true"], "data_conf.streaming is not supported"),
        (["sft", "CONFIG", "run_conf.model=/no/where"], "cannot read the model's config"),
    ],
)
def test_wrong_arguments_are_reported(
    sft_values: Any,
    write_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    config = str(write_config(sft_values({})))
    monkeypatch.chdir(tmp_path)
    assert main([config if argument == "CONFIG" else argument for argument in arguments]) == 1
    assert message in capsys.readouterr().err
