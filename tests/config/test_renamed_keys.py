from __future__ import annotations

from collections.abc import Callable

import pytest

from finetuning.config.sections.experiment import DPOExperiment, Experiment, SFTExperiment
from finetuning.config.sections.model import ModelArgs
from finetuning.config.validation.library_fields import LibraryFields, table_fields
from finetuning.config.validation.renamed_keys import (
    MODEL_ARGS,
    OLD_VALUES,
    TRAINING_ARGS,
    RemovedKey,
    RenamedKey,
    apply_renames,
)
from finetuning.config.validation.section_tree import sections_of
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import parse_document

Changed = Callable[..., str]


def current_fields(libraries: LibraryFields) -> set[str]:
    names: set[str] = set()
    for experiment in (SFTExperiment, DPOExperiment):
        names |= libraries.trainer_fields(experiment.trainer_config).keys()
        names |= sections_of(experiment.model_fields["training_args"].annotation)[0].model_fields.keys()
    return names


def test_the_table_agrees_with_the_installed_libraries() -> None:
    """Old names are unknown to the libraries, except those that another section sets; new ones are known."""
    libraries = table_fields()
    supported = current_fields(libraries)
    owned = {name for name, change in TRAINING_ARGS.items() if isinstance(change, RemovedKey) and change.always}
    # DPO has a prompt length of our own under TRL's old name.
    assert (TRAINING_ARGS.keys() - owned) & supported == {"max_prompt_length"}
    assert "max_prompt_length" not in libraries.trainer_fields(DPOExperiment.trainer_config)
    assert {change.to[0] for change in TRAINING_ARGS.values() if isinstance(change, RenamedKey)} <= supported
    arguments = {*libraries.from_pretrained_arguments(), *ModelArgs.model_fields}
    assert not MODEL_ARGS.keys() & arguments
    assert {change.to[0] for change in MODEL_ARGS.values() if isinstance(change, RenamedKey)} <= arguments


@pytest.mark.parametrize(
    ("old", "current"),
    [
        ("evaluation_strategy: no", {"eval_strategy": "no"}),
        ("warmup_ratio: 0.03", {"warmup_steps": 0.03}),
        ("warmup_ratio: 0", {}),
        ("warmup_ratio:", {}),
        ("warmup_ratio: 0.1\nwarmup_steps: 0", {"warmup_steps": 0.1}),
        ("warmup_ratio: 0.1\nwarmup_steps: 20", {"warmup_steps": 20}),
        ("group_by_length: true", {"train_sampling_strategy": "group_by_length"}),
        ("group_by_length: false", {}),
        ("no_cuda: true", {"use_cpu": True}),
        ("adafactor: true", {"optim": "adafactor"}),
        ("push_to_hub_token: x", {"hub_token": "x"}),
        ("include_inputs_for_metrics: true", {"include_for_metrics": ["inputs"]}),
        ("split_batches: true", {"accelerator_config": {"split_batches": True}}),
        ("fsdp_min_num_params: 0", {}),
        ("overwrite_output_dir: true", {}),
        ("save_safetensors: true", {}),
        ("include_tokens_per_second: true", {}),
        ("max_prompt_length: 1536", {}),
        ("resume_from_checkpoint: x", {}),
    ],
)
def test_old_training_args(old: str, current: dict[str, object], check: Callable, changed: Changed) -> None:
    text = changed(training_args=f"{old}\nseed: 1\n")
    translated = apply_renames(parse_document(text, "config.yaml"))
    assert translated.document.values["training_args"] == {**current, "seed": 1}
    validated = check(text)
    name = old.partition(":")[0]
    assert [str(warning).split(": ")[1] for warning in validated.warnings] == [f"training_args.{name}"]


def test_warnings_name_the_current_key_at_its_location(check: Callable, changed: Changed) -> None:
    training_args = "warmup_ratio: 0.03\noverwrite_output_dir: true\npush_to_hub_token: hf_secret\nno_cuda: yes\n"
    run_conf = "model_args:\n  torch_dtype: bfloat16\n  use_auth_token: hf_secret\n  use_flash_attention_2: true\n"
    validated = check(changed(training_args=training_args, run_conf=run_conf))
    assert [str(warning) for warning in validated.warnings] == [
        'config.yaml:14:3: training_args.warmup_ratio: was renamed to "warmup_steps". Write "warmup_steps: 0.03".',
        "config.yaml:15:3: training_args.overwrite_output_dir: no longer has an effect and is ignored:"
        " a run never overwrites another one. Remove it.",
        'config.yaml:16:3: training_args.push_to_hub_token: was renamed to "hub_token". Write "hub_token" instead.',
        'config.yaml:17:3: training_args.no_cuda: was renamed to "use_cpu". Write "use_cpu: yes".',
        'config.yaml:20:5: run_conf.model_args.torch_dtype: was renamed to "dtype". Write "dtype: bfloat16".',
        'config.yaml:21:5: run_conf.model_args.use_auth_token: was renamed to "token". Write "token" instead.',
        'config.yaml:22:5: run_conf.model_args.use_flash_attention_2: was renamed to "attn_implementation".'
        ' Write "attn_implementation: flash_attention_2".',
    ]
    model_args = validated.experiment.run_conf.model_args
    assert (model_args.dtype, model_args.attn_implementation) == ("bfloat16", "flash_attention_2")
    assert model_args.token.get_secret_value() == "hf_secret"
    assert validated.document.origin_of(("training_args", "warmup_steps")) == "config.yaml:14"


def test_a_name_that_is_old_for_one_trainer_is_current_for_another(changed: Changed) -> None:
    class WithCompletions(Experiment):
        trainer_config = "trl.trainer.grpo_config:GRPOConfig"

    text = changed(training_args="{max_completion_length: 64, warmup_ratio: 0.1}")
    validated = validate(parse_document(text, "config.yaml"), WithCompletions)
    assert validated.experiment.training_args.model_extra == {"max_completion_length": 64}
    assert len(validated.warnings) == 1


def test_values_that_are_gone(check: Callable, changed: Changed) -> None:
    validated = check(changed(training_args="{optim: adamw_hf}"))
    assert validated.experiment.training_args.optim == "adamw_torch"
    assert str(validated.warnings[0]).endswith(
        'training_args.optim: "adamw_hf" was removed; "adamw_torch" is used instead. Write "optim: adamw_torch".'
    )
    allowed = table_fields().choices("optim")
    assert not OLD_VALUES["training_args", "optim"].keys() & set(allowed)
    assert set(OLD_VALUES["training_args", "optim"].values()) <= set(allowed)


def test_current_key_wins(check: Callable, changed: Changed) -> None:
    validated = check(changed(run_conf="{model_args: {torch_dtype: float16, dtype: bfloat16}}"))
    assert validated.experiment.run_conf.model_args.dtype == "bfloat16"
    assert 'was renamed to "dtype", which is also set and takes precedence. Remove it.' in str(validated.warnings[0])


@pytest.mark.parametrize(
    ("old", "loss", "weights", "smoothing"),
    [
        ("loss_type: aot_pair", "aot_unpaired", None, 0.0),
        ("loss_type: [aot_pair, sigmoid]", ["aot_unpaired", "sigmoid"], None, 0.0),
        ("loss_type: exo_pair", "exo_pair", None, 0.001),
        ("loss_type: exo_pair, label_smoothing: 0.1", "exo_pair", None, 0.1),
        ("rpo_alpha: 0.5", ["sigmoid", "sft"], [1.0, 0.5], 0.0),
        ("loss_type: ipo, rpo_alpha: 1", ["ipo", "sft"], [1.0, 1.0], 0.0),
        ("rpo_alpha: null", ["sigmoid"], None, 0.0),
    ],
)
def test_old_preference_losses_are_translated(
    check: Callable, changed: Changed, old: str, loss: str | list[str], weights: list[float] | None, smoothing: float
) -> None:
    validated = check(changed(training_args=f"{{{old}}}"), "dpo")
    arguments = validated.experiment.training_args
    assert (arguments.loss_type, arguments.loss_weights, arguments.label_smoothing) == (loss, weights, smoothing)
    is_current = "null" in old or "0.1" in old
    assert len(validated.warnings) == (0 if is_current else 1)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5])
def test_label_smoothing_of_the_cross_entropy_is_bounded(
    messages: Callable[..., list[str]], changed: Changed, value: float
) -> None:
    assert (
        "training_args.label_smoothing_factor"
        in messages(changed(training_args=f"{{label_smoothing_factor: {value}}}"))[0]
    )


def test_what_cannot_be_honoured_is_refused(messages: Callable[..., list[str]], changed: Changed) -> None:
    text = "loss_weights: [1.0]\nrpo_alpha: 1.0\nreference_free: true\nper_gpu_train_batch_size: 2\nwarmup_ratio: 3\n"
    assert messages(changed(training_args=text), "dpo") == [
        "config.yaml:15:3: training_args.rpo_alpha: is no longer supported."
        " Use loss_type: [sigmoid, sft] with loss_weights: [1.0, alpha] instead.",
        "config.yaml:16:3: training_args.reference_free: is no longer supported."
        " Every loss of the installed release has a reference.",
        "config.yaml:17:3: training_args.per_gpu_train_batch_size: is no longer supported. Use batchsize_conf instead.",
        "config.yaml:18:3: training_args.warmup_ratio: must be a fraction of the steps, below 1 (got 3)."
        ' It was renamed to "warmup_steps".',
    ]
