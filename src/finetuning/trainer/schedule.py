"""The optimizer's settings, which a checkpoint holds beside its states."""

from __future__ import annotations

from typing import Any

Settings = list[dict[str, Any]]


def settings_of(optimizer: Any) -> Settings:
    """The settings of each group of weights: learning rate, decay, betas and the like."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def apply_settings(optimizer: Any, scheduler: Any, settings: Settings) -> None:
    """Puts the settings back over those that a checkpoint brought, and the learning rate where the schedule has it at
    this step."""
    factors = [
        group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0 for group in optimizer.param_groups
    ]
    shapes = getattr(scheduler, "lr_lambdas", None)
    if shapes is not None:
        factors = [shape(scheduler.last_epoch) for shape in shapes]
    for group, wanted, factor in zip(optimizer.param_groups, settings, factors, strict=True):
        group.update(wanted)
        group["lr"] = wanted.get("initial_lr", wanted["lr"]) * factor
    rates = {
        "base_lrs": [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups],
        "_last_lr": [group["lr"] for group in optimizer.param_groups],
    }
    state = scheduler.state_dict()
    scheduler.load_state_dict(state | {name: rate for name, rate in rates.items() if name in state})
