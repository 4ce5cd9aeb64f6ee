"""What the device of a run cannot do is refused before its weights are loaded.

Whether the model has a position for every token of the longest row.

aLoRA: the text that switches an adapter on, as token ids that every row is shown to hold."""

from __future__ import annotations

from collections.abc import Sized
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuning.config.sections.experiment import Experiment
from finetuning.config.sections.model import NewPeft
from finetuning.errors import ConfigError, DataError, Location, Problem
from finetuning.model.hardware import Device, training_device
from finetuning.plan.compatibility import NEEDS_GPU

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from finetuning.config.sections.experiment import Experiment
    from finetuning.data.prepared import PreparedData

_INSTEAD = {
    "bf16": "Set bf16: false; fp16: true where the device has it.",
    "fp16": "Set fp16: false; bf16: true where the device has it.",
    "tf32": "Remove it.",
}
_ASKED_BY = {"bf16": ("bf16", "bf16_full_eval"), "fp16": ("fp16",), "tf32": ("tf32",)}


def check_device(experiment: Experiment, device: Device | None = None) -> None:
    """Nothing when the run's device can do what is asked for: its number types, and what only a GPU can.

    Raises:
        ConfigError: everything that it lacks.
        ModelError: there is no such attention implementation, or it needs another device.
        MissingPackageError: the attention implementation is not installed.
    """
    check_precision(experiment, device)
    args = experiment.training_args
    passed_on: dict[str, Any] = args.model_extra or {}
    device = device or training_device(bool(passed_on.get("use_cpu")))
    _check_attention(experiment, device)
    asked = [key for key in NEEDS_GPU if getattr(args, key, None) or passed_on.get(key)]
    if asked and device.kind == "cpu":
        raise ConfigError(
            [
                Problem(
                    f"is true, but needs a GPU: {NEEDS_GPU[key][0]}",
                    Location(key=f"training_args.{key}"),
                    NEEDS_GPU[key][1],
                )
                for key in asked
            ]
        )


def _check_attention(experiment: Experiment, device: Device) -> None:
    implementation = experiment.run_conf.model_args.attn_implementation
    if implementation is None:
        return
    from finetuning.model.load import check_attn_implementation

    check_attn_implementation(implementation)
    if implementation == "flex_attention" and device.kind == "cpu":
        raise ConfigError(
            "flex_attention has no backward pass on a CPU",
            place=Location(key="run_conf.model_args.attn_implementation"),
            hint="Use sdpa here.",
        )


def check_precision(experiment: Experiment, device: Device | None = None) -> None:
    """Nothing when the device computes in all that is asked for. `finetuning doctor` shows what it can.

    Raises:
        ConfigError: every number type that it lacks, with what is in the way.
    """
    args = experiment.training_args
    passed_on: dict[str, Any] = args.model_extra or {}
    asked = {
        key: ability
        for ability, keys in _ASKED_BY.items()
        for key in keys
        if getattr(args, key, None) or passed_on.get(key)
    }
    if not asked:
        return
    device = device or training_device(bool(passed_on.get("use_cpu")))
    found = {key: device.support_for(ability) for key, ability in asked.items()}
    problems = [
        Problem(
            f"is true, but {device.name} does not compute in {asked[key]}: {ability.note}",
            Location(key=f"training_args.{key}"),
            _INSTEAD[asked[key]],
        )
        for key, ability in found.items()
        if not ability.is_supported
    ]
    if problems:
        raise ConfigError(problems)


def compute_precision(experiment: Experiment, model: Any, device: Device | None = None) -> tuple[str, str]:
    """What the run computes in; and what its device has that is faster, nothing where nothing is known to be."""
    args = experiment.training_args
    weights = str(model.dtype).removeprefix("torch.")
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    if autocast:
        return f"{autocast} by autocast, the weights in {weights}", ""
    if args.deepspeed or weights != "float32":
        return weights, ""
    device = device or training_device(bool((args.model_extra or {}).get("use_cpu")))
    ability = device.support_for("bf16")
    if not ability.is_supported or ability.note.startswith("emulated"):
        return weights, ""
    return weights, f"{device.name} has bfloat16 in hardware, which training_args.bf16 uses"


_LEARNED = ("wpe", "embed_positions", "position_embeddings")


def check_positions(model: Any, experiment: Experiment, data: PreparedData) -> tuple[str, ...]:
    """Nothing where each token has a position that the model was made for; else a warning.

    Raises:
        ConfigError: the model has learned its positions, and has none for the end of a row.
    """
    key = "sft_args.max_seq_length" if hasattr(experiment, "sft_args") else "training_args.max_length"
    is_stream = not isinstance(data.train, Sized)
    longest = experiment.sft_args.max_seq_length if is_stream else _longest(data.train)
    if longest is None:
        return ()
    learned = _learned_positions(model)
    if learned is not None and longest > learned:
        has = "of a stream may have" if is_stream else "has"
        raise ConfigError(
            f"a row {has} {longest} tokens, and the model has learned {learned} positions",
            place=Location(key=key),
            hint=f"Set it to {learned} or less.",
        )
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if learned is None and not is_stream and isinstance(made_for, int) and longest > made_for:
        return (f"a row has {longest} tokens, more than the {made_for} positions that the model was made for ({key})",)
    return ()


def _longest(dataset: datasets.Dataset) -> int | None:
    """Most tokens of a row: of a prompt with its longer answer; None for rows without tokens of their own."""
    import numpy as np

    from finetuning.data.arrow import row_lengths

    if "input_ids" in dataset.column_names:
        return int(row_lengths(dataset).max())
    answers = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in dataset.column_names]
    if not answers or "prompt_ids" not in dataset.column_names:
        return None
    longer = np.maximum.reduce([row_lengths(dataset, name) for name in answers])
    return int((row_lengths(dataset, "prompt_ids") + longer).max())


def _learned_positions(model: Any) -> int | None:
    from torch import nn

    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in _LEARNED and isinstance(module, nn.Embedding):
            return module.num_embeddings - getattr(module, "offset", 0)
    return None


_KEY, _IDS = "peft_conf.alora_invocation_string", "alora_invocation_tokens"


def with_invocation(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> Experiment:
    """The experiment with the ids of its invocation text among the adapter's arguments; itself, where it has no text.

    Raises:
        ConfigError: the text has no token, the ids are given, too, or the adapter is no LoRA.
    """
    conf = experiment.peft_conf
    if not isinstance(conf, NewPeft) or conf.alora_invocation_string is None:
        return experiment
    if conf.peft_type.upper() != "LORA":
        raise ConfigError(f"is for LORA, not for {conf.peft_type}", place=Location(key=_KEY))
    if _IDS in conf.peft_kwargs:
        raise ConfigError(f"excludes peft_kwargs.{_IDS}", place=Location(key=_KEY), hint="Remove one of them.")
    ids = tokenizer.encode(conf.alora_invocation_string, add_special_tokens=False)
    if not ids:
        raise ConfigError("has no token", place=Location(key=_KEY))
    conf = conf.model_copy(update={"peft_kwargs": {**conf.peft_kwargs, _IDS: ids}})
    return experiment.model_copy(update={"peft_conf": conf})


def check_invoked(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> None:
    """Nothing when each row holds the ids that switch the adapter on; without them it would learn nothing there.

    Raises:
        DataError: rows do not, with their number.
    """
    conf = with_invocation(experiment, tokenizer).peft_conf
    ids = conf.peft_kwargs.get(_IDS) if isinstance(conf, NewPeft) else None
    for rows in filter(None, (data.train, data.validation)) if ids else ():
        column = "input_ids" if "input_ids" in rows.column_names else "prompt_ids"
        missing = sum(not has_invocation(row, ids) for row in _lists(rows, column))
        if missing:
            where = "the rows" if column == "input_ids" else "the prompts"
            raise DataError(
                f"{missing:,} of {len(rows):,} rows never switch the adapter on: {where} do not hold"
                f" {tokenizer.decode(ids)!r} as the tokens {ids}",
                place=Location(key=_KEY),
                hint="Take a text that begins and ends where tokens do, such as the chat template's start of an"
                " assistant's turn.",
            )


def _lists(rows: datasets.Dataset, column: str) -> list[list[int]]:
    return rows[column][:]


def has_invocation(row: list[int], ids: list[int]) -> bool:
    """Whether the ids stand in the row, one after another."""
    if len(row) < len(ids):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(row), len(ids))
    return bool((windows == np.asarray(ids)).all(axis=1).any())
