"""Compare the config of a run with that of the checkpoint it resumes from.

Each checkpoint holds `run_config.json`: the config by dotted key, with fingerprints of the data and the model. A
difference either makes the checkpoint unusable, changes the loss trajectory (allowed only by
`run_conf.allow_changed`), or is safe. Keys that only one of two versions of this package knows are compared with their
defaults."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from finetuning.config.redaction import redacted_json
from finetuning.config.sections.experiment import Experiment
from finetuning.config.validation.section_tree import members, sections_of
from finetuning.config.yaml.dump import dump_values
from finetuning.errors import CheckpointError, Location, Problem, read_json_object, reading
from finetuning.plan.plan import Plan
from finetuning.training.output_dir import installed_versions

if TYPE_CHECKING:
    from finetuning.data.prepared import DataFingerprint
    from finetuning.model.fingerprint import Fingerprint
    from finetuning.trainer.mixin import TrainerMixin


RUN_CONFIG_NAME = "run_config.json"
_OLD_RUN_CONFIG_NAME = "contract.json"  # old name
Effect = Literal["safe", "trajectory", "incompatible"]
RunConfig = dict[str, object]
"""Plain values by dotted key."""

INCOMPATIBLE = ("method", "model.parameters", "model.trained", "peft_conf.peft_type", "peft_conf.peft_kwargs.r")
"""Keys whose change makes the checkpoint unusable for the model."""
SAFE = (
    "plan.world_size",
    "plan.per_device",
    "plan.accumulation",
    "versions.mlflow",
    "batchsize_conf.max_per_device_train_batch_size",
    "batchsize_conf.per_device_eval_batch_size",
    "run_conf.model",
    "run_conf.tokenizer",
    "run_conf.use_fast_tokenizer",
    "run_conf.resume_from_checkpoint",
    "run_conf.allow_changed",
    "run_conf.on_existing_run",
    "run_conf.final_checkpoint_name",
    "run_conf.determinism",
    "run_conf.memory_check",
    "run_conf.max_time",
    "run_conf.name_hung_after",
    "run_conf.copy_checkpoints_to",
    "run_conf.model_args.cache_dir",
    "data_conf.cache",
    "data_conf.images.folder",
    "data_conf.images.max_file_pixels",
    "data_conf.prepared",
    "run_conf.model_args.local_files_only",
    "run_conf.model_args.force_download",
    "run_conf.model_args.max_memory",
    "run_conf.model_args.device_map",
    "run_conf.model_args.low_cpu_mem_usage",
    "training_args.output_dir",
    "training_args.logging_",
    "training_args.log_",
    "training_args.save_",
    "training_args.eval_",
    "training_args.report_to",
    "training_args.run_name",
    "training_args.load_best_model_at_end",
    "training_args.metric_for_best_model",
    "training_args.greater_is_better",
    "training_args.dataloader_",
    "training_args.gradient_checkpointing",
    "training_args.use_cpu",
    "training_args.ddp_",
    "sft_args.batching",
    "sft_args.logits_at_once",
    "sft_args.save_name_if_new_basemodel",
    "data_conf.on_bad_row",
    "data_conf.max_lost_fraction",
    "tracking",
    "telemetry",
    "guard",
    "trainer_controller",
    "logging_dir",
    "save_model_dir",
    "final_evaluation",
)
"""Keys, or prefixes of keys, that do not change the loss trajectory beyond the rounding of sums.

The paths of the model and tokenizer are among them because their contents are fingerprinted."""
_CONTENT = "model.content"
_CODE = "code."
_DURATION = ("training_args.max_steps", "training_args.num_train_epochs")


@dataclass(frozen=True)
class ConfigDifference:
    """A value that differs from the one that the checkpoint was saved with."""

    key: str
    before: object
    now: object
    effect: Effect
    is_known: bool = True
    """Whether this version of finetuning knows the key."""

    def __str__(self) -> str:
        now = f"is {_shorten(self.now)}" if self.is_known else "which this version of finetuning does not know"
        return f"{self.key} was {_shorten(self.before)}, {now}"

    def problem(self, checkpoint: str) -> Problem:
        """Return why a run does not resume with this difference unless it is allowed."""
        effect = "which changes the loss trajectory" if self.is_known else "which may change the loss trajectory"
        undo = "Restore it" if self.is_known else "Resume with the version that saved the checkpoint"
        return Problem(
            f"{checkpoint} was saved with a different config: {self}, {effect}",
            Location(key=self.key),
            f"{undo}, or allow the change by run_conf.allow_changed: [{self.key}].",
        )


@dataclass(frozen=True)
class ResumeTerms:
    """The run config for the checkpoints of a run, and how it differs from that of the checkpoint it resumes from."""

    run_config: RunConfig
    notes: tuple[str, ...] = ()
    allowed_changes: tuple[str, ...] = ()
    """The keys that changed with permission. The optimizer settings in the checkpoint would overwrite their values."""

    def apply(self, trainer: TrainerMixin) -> None:
        """Have the trainer write the run config into its checkpoints, and keep this run's optimizer settings."""
        trainer.additional_files[RUN_CONFIG_NAME] = run_config_text(self.run_config)
        trainer.override_optimizer_settings = bool(self.allowed_changes)
        trainer.allowed_changes = self.allowed_changes


def compare_with_checkpoint(
    experiment: Experiment, plan: Plan, data: DataFingerprint, base: Fingerprint | None, checkpoint: Path | None
) -> ResumeTerms:
    """Compare a run with the checkpoint that it resumes from, if any.

    Args:
        base: the base model's fingerprint; None where it cannot be taken.

    Raises:
        CheckpointError: the checkpoint is incompatible, or the loss trajectory would change without permission.
    """
    run_config = make_run_config(experiment, plan, data, base)
    if checkpoint is None:
        return ResumeTerms(run_config)
    _check_step(checkpoint, plan)
    return compare(checkpoint, run_config, experiment)


def _check_step(checkpoint: Path, plan: Plan) -> None:
    """Raise CheckpointError if the run has fewer steps than the checkpoint has taken."""
    step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    if plan.num_steps is not None and step > plan.num_steps:
        raise CheckpointError(
            f"{checkpoint.name} is at step {step}, and this run ends after step {plan.num_steps}",
            location=Location(key="training_args.max_steps"),
            hint="Raise training_args.max_steps or num_train_epochs, or resume from an earlier checkpoint by its path.",
        )


def make_run_config(experiment: Experiment, plan: Plan, data: DataFingerprint, base: Fingerprint | None) -> RunConfig:
    """Return the config, and fingerprints of the data and the model, by dotted key.

    Args:
        base: the base model's fingerprint; None where it cannot be taken, and its path is compared instead.
    """
    values = dict(flatten(_without_paths(dump_values(experiment))))
    values |= {
        "method": experiment.method_name,
        "data": data.data,
        "data.template": data.template,
        "data.tokenizer": data.tokenizer,
        "model": str(base) if base is not None else experiment.run_conf.model,
        _CONTENT: base.content if base is not None else None,
        "model.parameters": plan.memory.parameters if plan.memory else None,
        "model.trained": plan.memory.trainable if plan.memory else None,
        "training_args.learning_rate": plan.learning_rate,
        "plan.world_size": plan.batch.world_size,
        "plan.per_device": plan.batch.per_device,
        "plan.accumulation": plan.batch.accumulation,
    }
    values |= _code_digests(experiment)
    return values | {f"versions.{name}": version for name, version in installed_versions().items()}


def _code_digests(experiment: Experiment) -> RunConfig:
    """Return the digest of the source of each function and class of the user that the config names, by dotted key."""
    rewards = getattr(getattr(experiment, "grpo_args", None), "rewards", ())
    paths = [experiment.run_conf.trainer_mixin, *(reward.path for reward in rewards if reward.type == "function")]
    if not any(paths):
        return {}
    from finetuning.trainer.user_code import source_digest

    return {f"{_CODE}{path}": source_digest(path) for path in paths if path}


def read_run_config(checkpoint: Path) -> RunConfig | None:
    """Return the run config in a checkpoint, under its current or old file name; None if there is none."""
    for name in (RUN_CONFIG_NAME, _OLD_RUN_CONFIG_NAME):
        if (checkpoint / name).is_file():
            with reading(f"{checkpoint / name} cannot be read", CheckpointError):
                return read_json_object(checkpoint / name)
    return None


def run_config_text(config: Mapping[str, object]) -> str:
    """Return the text of `run_config.json`."""
    return redacted_json(config, indent=1, sort_keys=True) + "\n"


def differences(
    before: Mapping[str, object], now: Mapping[str, object], experiment: Experiment
) -> list[ConfigDifference]:
    """Return what differs, by key, with its effect.

    A field that is newer than the checkpoint differs where it is not at its default, because the default of a new field
    does what was done without it.
    """
    before, now = expand_lists(before, json.loads(run_config_text(now)))
    defaults = json.loads(run_config_text(dict(missing_defaults(before, experiment))))
    before |= {key: value for key, value in defaults.items() if key in now}
    if _CONTENT not in before:
        # Written before the fingerprint covered the content.
        del now[_CONTENT]
    # Which code is used is compared by the keys that name it, and older checkpoints have no digests.
    one_sided = {key for key in before.keys() ^ now.keys() if key.startswith(_CODE)}
    before, now = ({key: value for key, value in config.items() if key not in one_sided} for config in (before, now))
    has_constant_lr = str(now.get("training_args.lr_scheduler_type", "")).startswith("constant")
    return [
        ConfigDifference(
            key,
            before.get(key),
            now.get(key),
            "incompatible" if _has_other_state(key, before.get(key), now.get(key)) else _effect(key, has_constant_lr),
            key in now or is_known_key(type(experiment), key),
        )
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def compare(checkpoint: Path, now: RunConfig, experiment: Experiment) -> ResumeTerms:
    """Compare a checkpoint's run config with this run's.

    `run_conf.allow_changed` lists keys that may change although that changes the loss trajectory; `versions` includes
    all keys below it.

    Raises:
        CheckpointError: a difference makes the checkpoint unusable, or changes the loss trajectory and is not allowed.
    """
    before = read_run_config(checkpoint)
    if before is None:
        return ResumeTerms(now, (f"{checkpoint.name} has no {RUN_CONFIG_NAME}: its config was not compared",))
    changes = differences(before, now, experiment)
    problems = [
        Problem(
            f"{checkpoint.name} is incompatible: {difference}",
            Location(key=difference.key),
            "A run cannot be resumed with this change. Start a new one in another output_dir.",
        )
        for difference in changes
        if difference.effect == "incompatible"
    ] or [
        difference.problem(checkpoint.name)
        for difference in changes
        if difference.effect == "trajectory" and not _is_below(difference.key, experiment.run_conf.allow_changed)
    ]
    if problems:
        raise CheckpointError(problems)
    allowed = [difference for difference in changes if difference.effect == "trajectory"]
    notes = [
        f"{difference}: allowed, and {'applied' if difference.is_known else 'ignored'} from this checkpoint on"
        for difference in allowed
    ]
    notes += [
        f"{difference}: {_EXPLANATIONS[difference.key]}" for difference in changes if difference.key in _EXPLANATIONS
    ]
    notes += [
        f"{difference}: it does not affect the loss trajectory"
        for difference in changes
        if difference.effect == "safe" and not difference.is_known
    ]
    return ResumeTerms(now, tuple(notes), tuple(difference.key for difference in allowed))


_EXPLANATIONS = {
    "plan.world_size": "same rows per step; random numbers of each process, such as for dropout, differ",
    "plan.accumulation": "same rows per step, summed in a different order",
}


_SAME_STATE = ({"adamw_torch", "adamw_torch_fused"}, {"adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"})
"""Optimizers whose states are interchangeable."""
_OTHER_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Schedules with a state of their own. All others compute the rate from the step."""


def _has_other_state(key: str, before: object, now: object) -> bool:
    """Whether a change is one of an optimizer or schedule whose saved state the new one cannot continue from."""
    if key == "training_args.optim":
        return not any({before, now} <= names for names in _SAME_STATE)
    return key == "training_args.lr_scheduler_type" and bool({before, now} & set(_OTHER_SCHEDULES))


def _effect(key: str, has_constant_lr: bool) -> Effect:
    if _is_below(key, INCOMPATIBLE) or key.startswith("peft_conf.peft_kwargs.target_"):
        return "incompatible"
    if key in _DURATION and has_constant_lr:
        return "safe"
    return "safe" if key in SAFE or _is_below(key, SAFE) or _has_safe_prefix(key) else "trajectory"


def _is_below(key: str, parents: Sequence[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _has_safe_prefix(key: str) -> bool:
    return any(prefix.endswith("_") and key.startswith(prefix) for prefix in SAFE)


def _without_paths(values: Mapping[str, object]) -> RunConfig:
    """Return the config without the paths of its data, whose contents are fingerprinted."""

    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in ("path", "name_or_path")}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return {key: strip(item) if key == "data_conf" else item for key, item in values.items()}


def _shorten(value: object) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:24]}…{text[-24:]}"


def flatten(values: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the leaves of nested mappings by dotted key; a list is a leaf."""
    if isinstance(values, Mapping) and values:
        for key, item in values.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def expand_lists(before: Mapping[str, object], now: Mapping[str, object]) -> tuple[RunConfig, RunConfig]:
    """Return both run configs with lists of equally many sections as keys of their own: `datasets.0.format`."""
    before, now = dict(before), dict(now)
    pending = [*now]
    while pending:
        key = pending.pop()
        if _are_section_lists(before.get(key), now[key]):
            for config in (before, now):
                items = config.pop(key)
                for index, item in enumerate(items if isinstance(items, list) else ()):
                    config |= dict(flatten(item, f"{key}.{index}"))
            pending += [name for name in now if name.startswith(f"{key}.")]
    return before, now


def _are_section_lists(before: object, now: object) -> bool:
    lists = [value for value in (before, now) if isinstance(value, list) and value]
    return (
        len(lists) == 2
        and len(lists[0]) == len(lists[1])
        and all(isinstance(item, Mapping) for value in lists for item in value)
    )


def missing_defaults(before: Mapping[str, object], config: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the defaults of the fields of a config that a run config lacks, by dotted key.

    Only of fields that a section declares, and only of sections that the run config has. An optional section that was
    off has no defaults, and where keys are passed through to a library, a missing key means the library's default.
    """
    for name, default in dump_values(type(config).model_construct()).items():
        if not _has(before, f"{prefix}{name}"):
            yield from flatten(default, f"{prefix}{name}")
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel) and _has(before, f"{prefix}{name}"):
            yield from missing_defaults(before, value, f"{prefix}{name}.")
        for index, item in enumerate(value if isinstance(value, list) else ()):
            if isinstance(item, BaseModel) and _has(before, f"{prefix}{name}.{index}"):
                yield from missing_defaults(before, item, f"{prefix}{name}.{index}.")


def _has(config: Mapping[str, object], key: str) -> bool:
    return key in config or any(name.startswith(f"{key}.") for name in config)


def is_known_key(root: type[BaseModel], key: str) -> bool:
    """Return whether a config of this class may have a dotted key; keys passed through to a library are accepted."""
    sections: Sequence[type[BaseModel]] = [root]
    for part in key.split("."):
        if any(section.model_config.get("extra") == "allow" for section in sections):
            return True
        if part.isdecimal():
            continue
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        if any(typing.get_origin(member) is dict for field in fields for member in members(field.annotation)):
            return True
        sections = [section for field in fields for section in sections_of(field.annotation)]
        if not fields:
            return False
    return True
