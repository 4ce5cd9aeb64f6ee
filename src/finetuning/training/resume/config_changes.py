"""What a checkpoint was made under, and whether a run that would go on from it computes the same curve.

Keys of a config that one version of the engine knows and another does not, between a checkpoint and a run."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from finetuning.config.sections.experiment import Experiment
from finetuning.config.validation.section_tree import members, sections_of
from finetuning.config.yaml.dump import dump_values
from finetuning.errors import CheckpointError, Location, Problem
from finetuning.plan.plan import Plan
from finetuning.training.output_dir import installed_versions

if TYPE_CHECKING:
    from finetuning.data.prepared import DataFingerprint


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by dotted key; a list is a leaf."""
    if isinstance(values, Mapping) and values:
        for key, item in values.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def item_by_item(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both contracts with lists of as many sections taken apart: `datasets.0.format`."""
    before, now = dict(before), dict(now)
    pending = [*now]
    while pending:
        key = pending.pop()
        if _are_alike(before.get(key), now[key]):
            for contract in (before, now):
                for index, item in enumerate(contract.pop(key)):
                    contract |= dict(flat(item, f"{key}.{index}"))
            pending += [found for found in now if found.startswith(f"{key}.")]
    return before, now


def _are_alike(before: Any, now: Any) -> bool:
    lists = [value for value in (before, now) if isinstance(value, list) and value]
    return (
        len(lists) == 2
        and len(lists[0]) == len(lists[1])
        and all(isinstance(item, Mapping) for value in lists for item in value)
    )


def defaults_unknown_to(before: Mapping[str, Any], config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The defaults of the fields of a config that a contract does not know, by dotted key.

    Only fields that a section declares, and only of sections that the contract has: an optional section that was off is
    no default, and in what passes through to a library an absent key means the library's own default.
    """
    for name, default in dump_values(type(config).model_construct()).items():
        if not _has(before, f"{prefix}{name}"):
            yield from flat(default, f"{prefix}{name}")
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel) and _has(before, f"{prefix}{name}"):
            yield from defaults_unknown_to(before, value, f"{prefix}{name}.")
        for index, item in enumerate(value if isinstance(value, list) else ()):
            if isinstance(item, BaseModel) and _has(before, f"{prefix}{name}.{index}"):
                yield from defaults_unknown_to(before, item, f"{prefix}{name}.{index}.")


def _has(contract: Mapping[str, Any], key: str) -> bool:
    return key in contract or any(found.startswith(f"{key}.") for found in contract)


def is_known(root: type[BaseModel], key: str) -> bool:
    """Whether some config of this class may hold a dotted key; whatever passes through to a library may be."""
    current: Sequence[type[BaseModel]] = [root]
    for part in key.split("."):
        if any(section.model_config.get("extra") == "allow" for section in current):
            return True
        if part.isdecimal():
            continue
        fields = [section.model_fields[part] for section in current if part in section.model_fields]
        if any(typing.get_origin(member) is dict for field in fields for member in members(field.annotation)):
            return True
        current = [section for field in fields for section in sections_of(field.annotation)]
        if not fields:
            return False
    return True


RUN_CONFIG_NAME = "run_config.json"
_OLD_RUN_CONFIG_NAME = "contract.json"  # old name
Effect = Literal["safe", "curve", "impossible"]

IMPOSSIBLE = ("method", "model.parameters", "model.trained", "peft_conf.peft_type", "peft_conf.peft_kwargs.r")
"""Keys without whose old value the checkpoint does not fit the model."""
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
    "run_conf.final_checkpoint_name",
    "run_conf.determinism",
    "run_conf.memory_check",
    "run_conf.max_time",
    "run_conf.name_hung_after",
    "run_conf.copy_checkpoints_to",
    "run_conf.model_args.cache_dir",
    "data_conf.cache",
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
)
"""Keys, or beginnings of keys, that leave the curve as it is, to the rounding of sums. The model's and tokenizer's
places are among them because what lies there is fingerprinted."""
_DURATION = ("training_args.max_steps", "training_args.num_train_epochs")


@dataclass(frozen=True)
class ConfigDifference:
    """One thing that is not what it was when the checkpoint was made."""

    key: str
    before: Any
    now: Any
    effect: Effect
    is_known: bool = True
    """Whether this version of the engine knows the key."""

    def __str__(self) -> str:
        now = f"is {_short(self.now)}" if self.is_known else "which this version of the engine does not know"
        return f"{self.key} was {_short(self.before)}, {now}"

    def refusal(self, checkpoint: str) -> Problem:
        """Why a run does not go on over this difference without leave."""
        changes = "which changes the curve" if self.is_known else "so that the curve may change"
        back = "Put it back" if self.is_known else "Go on with the version that saved the checkpoint"
        return Problem(
            f"{checkpoint} was made otherwise: {self}, {changes}",
            Location(key=self.key),
            f"{back}, or name it in run_conf.allow_changed: [{self.key}].",
        )


@dataclass(frozen=True)
class ResumeTerms:
    """What a run's checkpoints are made under, and what of it a resumed run does otherwise than the checkpoint's."""

    contract: dict[str, Any]
    notes: tuple[str, ...] = ()
    applies: bool = False
    """Whether something changed that the checkpoint's own optimizer settings would hide."""

    def bind(self, trainer: Any) -> None:
        """Has the trainer write the contract into its checkpoints, and apply what has changed."""
        trainer.companions[RUN_CONFIG_NAME] = run_config_text(self.contract)
        trainer.applies_settings = self.applies


def compare_with_checkpoint(
    experiment: Experiment, plan: Plan, data: DataFingerprint, checkpoint: Path | None
) -> ResumeTerms:
    """The terms of a run that goes on from a checkpoint, or starts afresh.

    Raises:
        CheckpointError: the checkpoint does not fit, or the curve would change without leave.
    """
    from finetuning.model.fingerprint import can_fingerprint, compute_fingerprint

    folder = Path(experiment.run_conf.model)
    contract = make_run_config(experiment, plan, data, compute_fingerprint(folder) if can_fingerprint(folder) else None)
    if checkpoint is None:
        return ResumeTerms(contract)
    return compare(checkpoint, contract, experiment)


def make_run_config(experiment: Experiment, plan: Plan, data: DataFingerprint, base: object) -> dict[str, Any]:
    """Plain values by dotted key: the config, and fingerprints of what it names.

    Args:
        base: the base model's fingerprint; None where it cannot be taken, so that its place has to stand for it.
    """
    values = dict(flat(_without_paths(dump_values(experiment))))
    values |= {
        "method": experiment.method_name,
        "data": data.data,
        "data.template": data.template,
        "data.tokenizer": data.tokenizer,
        "model": str(base) if base is not None else experiment.run_conf.model,
        "model.parameters": plan.memory.parameters if plan.memory else None,
        "model.trained": plan.memory.trainable if plan.memory else None,
        "training_args.learning_rate": plan.learning_rate,
        "plan.world_size": plan.batch.world_size,
        "plan.per_device": plan.batch.per_device,
        "plan.accumulation": plan.batch.accumulation,
    }
    return values | {f"versions.{name}": version for name, version in installed_versions().items()}


def read_run_config(checkpoint: Path) -> dict[str, Any] | None:
    """Return the run config that a checkpoint was saved with, under its current or its old file name; None without."""
    for name in (RUN_CONFIG_NAME, _OLD_RUN_CONFIG_NAME):
        with suppress(FileNotFoundError):
            return json.loads((checkpoint / name).read_text(encoding="utf-8"))
    return None


def run_config_text(contract: Mapping[str, Any]) -> str:
    """The contract as it stands in a checkpoint."""
    return json.dumps(contract, indent=1, sort_keys=True, default=str) + "\n"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], experiment: Experiment) -> list[ConfigDifference]:
    """What differs, by key, each with its effect on the curve.

    A field that the contract's version of the engine did not know differs where it is not at its default: the default
    of a new field does what was done without it.
    """
    before, now = item_by_item(before, json.loads(run_config_text(now)))
    defaults = json.loads(run_config_text(dict(defaults_unknown_to(before, experiment))))
    before |= {key: value for key, value in defaults.items() if key in now}
    constant = str(now.get("training_args.lr_scheduler_type", "")).startswith("constant")
    return [
        ConfigDifference(
            key, before.get(key), now.get(key), _effect(key, constant), key in now or is_known(type(experiment), key)
        )
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def compare(checkpoint: Path, now: dict[str, Any], experiment: Experiment) -> ResumeTerms:
    """What may differ between a checkpoint's contract and this run's, and does.

    What `run_conf.allow_changed` names may change though it changes the curve; `versions` allows all below it.

    Raises:
        CheckpointError: something differs that makes the checkpoint unfit, or changes the curve without leave.
    """
    before = read_run_config(checkpoint)
    if before is None:
        return ResumeTerms(now, (f"{checkpoint.name} does not say what it was made under: nothing was compared",))
    found = differences(before, now, experiment)
    problems = [
        Problem(
            f"{checkpoint.name} does not fit: {difference}",
            Location(key=difference.key),
            "A checkpoint cannot be carried over such a change: start afresh in another output_dir.",
        )
        for difference in found
        if difference.effect == "impossible"
    ] or [
        difference.refusal(checkpoint.name)
        for difference in found
        if difference.effect == "curve" and not _is_below(difference.key, experiment.run_conf.allow_changed)
    ]
    if problems:
        raise CheckpointError(problems)
    changed = [difference for difference in found if difference.effect == "curve"]
    notes = [
        f"{difference}: allowed, and {'applied' if difference.is_known else 'left out'} from this checkpoint on"
        for difference in changed
    ]
    notes += [f"{difference}: {_SAID[difference.key]}" for difference in found if difference.key in _SAID]
    notes += [
        f"{difference}: the curve is the same without it"
        for difference in found
        if difference.effect == "safe" and not difference.is_known
    ]
    return ResumeTerms(now, tuple(notes), applies=bool(changed))


_SAID = {
    "plan.world_size": "the same rows a step; what is random in a process, such as dropout, is drawn anew",
    "plan.accumulation": "the same rows a step, summed in another order",
}


def _effect(key: str, constant_rate: bool) -> Effect:
    if _is_below(key, IMPOSSIBLE) or key.startswith("peft_conf.peft_kwargs.target_"):
        return "impossible"
    if key in _DURATION and constant_rate:
        return "safe"
    return "safe" if key in SAFE or _is_below(key, SAFE) or _begins(key) else "curve"


def _is_below(key: str, parents: Sequence[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


def _begins(key: str) -> bool:
    return any(beginning.endswith("_") and key.startswith(beginning) for beginning in SAFE)


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """The config without the places of its data, whose bytes are fingerprinted."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in ("path", "name_or_path")}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return {key: strip(item) if key == "data_conf" else item for key, item in values.items()}


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:24]}…{text[-24:]}"
