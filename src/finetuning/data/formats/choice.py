"""Which messages of a chat are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from finetuning.data.formats.row_format import FieldError, TrainOn
from finetuning.data.samples import Message, json_type

_FLAGS = ("train", "weight")


def choose_turns(
    messages: Sequence[Message], key: str, train_on: TrainOn, prompt: int = 0
) -> tuple[list[Message], tuple[int, ...] | Literal["all"]]:
    """The messages without their flags `train` and `weight`, and the indices of those that are trained.

    A flag of a message stands above `train_on`; messages before `prompt` have no say. `key` names the messages.
    """
    if not any(["train" in one or "weight" in one for one in messages]):
        return list(messages), "all" if train_on == "all" else _turns(messages, train_on, prompt)
    flags = [_flag(message, f"{key}[{index}]") for index, message in enumerate(messages)]
    if all(flag is None for flag in flags):
        return _without(messages), "all" if train_on == "all" else _turns(messages, train_on, prompt)
    if train_on == "all" and False in flags:
        raise FieldError(
            f"{key}[{flags.index(False)}]",
            "is not to be trained, but the run trains on every token; set sft_args.train_on: assistant, and messages"
            " that say nothing are trained where they are the assistant's",
        )
    chosen: set[int] = set() if train_on == "all" else set(_turns(messages, train_on, prompt))
    for index, flag in enumerate(flags):
        if flag and messages[index]["role"] != "assistant" and train_on != "all":
            raise FieldError(
                f"{key}[{index}]", f'cannot be trained: its role is "{messages[index]["role"]}", not "assistant"'
            )
        if flag is not None:
            (chosen.add if flag else chosen.discard)(index)
    return _without(messages), "all" if train_on == "all" else tuple(sorted(chosen))


def _turns(messages: Sequence[Message], train_on: TrainOn, prompt: int) -> tuple[int, ...]:
    """The assistant's turns: all, the last one, or those after the last message of the user."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= prompt]
    if train_on == "last":
        return tuple(turns[-1:])
    if train_on == "completions" and not prompt:
        asked = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
        return tuple(index for index in turns if index > asked)
    return tuple(turns)


def _without(messages: Sequence[Message]) -> list[Message]:
    return [{name: value for name, value in one.items() if name not in _FLAGS} for one in messages]


def _flag(message: Message, key: str) -> bool | None:
    """What a message says itself: `train: true|false`, or `weight: 0|1`; None when it says nothing."""
    train: Any = message.get("train")
    weight: Any = message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise FieldError(f"{key}.train", f"expected true or false, got {json_type(train)}")
    if weight is None:
        return train
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise FieldError(f"{key}.weight", f"expected 0 or 1, got {json_type(weight)}")
    if weight not in (0, 1):
        raise FieldError(f"{key}.weight", f"expected 0 or 1, got {weight:g}: a message is trained, or it is not")
    if train is not None and train != bool(weight):
        raise FieldError(f"{key}.weight", f"is {weight:g}, but train is {str(train).lower()}")
    return bool(weight)
