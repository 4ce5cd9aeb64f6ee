"""The right name for a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

# What people write who come from other engines, and the key that means it here.
_ELSEWHERE_CALLED = {
    "lr": "training_args.learning_rate",
    "epochs": "training_args.num_train_epochs",
    "num_epochs": "training_args.num_train_epochs",
    "n_epochs": "training_args.num_train_epochs",
    "batch_size": "batchsize_conf.total_train_batch_size",
    "train_batch_size": "batchsize_conf.total_train_batch_size",
    "micro_batch_size": "batchsize_conf.max_per_device_train_batch_size",
    "model_name_or_path": "run_conf.model",
    "base_model": "run_conf.model",
    "model_name": "run_conf.model",
    "tokenizer_name_or_path": "run_conf.tokenizer",
    "sequence_len": "sft_args.max_seq_length",
    "cutoff_len": "sft_args.max_seq_length",
    "max_length": "sft_args.max_seq_length",
    "assistant_only_loss": "sft_args.train_on_completions_only",
    "completion_only_loss": "sft_args.train_on_completions_only",
    "chat_template": "data_conf.chat_template_name",
    "lora_r": "peft_conf.peft_kwargs.r",
    "lora_rank": "peft_conf.peft_kwargs.r",
    "rank": "peft_conf.peft_kwargs.r",
    "trainer_controller_config_file": "trainer_controller",
    "tracking_uri": "tracking.mlflow_server_uri",
}

_MANY = 8


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate that a name was probably meant to be, or None.

    >>> nearest("modl", ["model", "tokenizer"])
    'model'
    >>> nearest("lora", ["LORA", "LOHA"])
    'LORA'
    """
    plain: dict[str, str] = {}
    for candidate in candidates:
        plain.setdefault(_plain(candidate), candidate)
    wanted = _plain(name[:100])
    if wanted in plain:
        return plain[wanted]
    found = difflib.get_close_matches(wanted, plain, n=1, cutoff=cutoff)
    return plain[found[0]] if found else None


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """`Did you mean "…"?`, or None when no candidate is near."""
    found = nearest(name, candidates, cutoff)
    return f'Did you mean "{found}"?' if found is not None else None


def key_hint(name: str, siblings: Iterable[str], elsewhere: dict[str, list[str]]) -> str | None:
    """What to do about an unknown key: the nearest key of its section, or the section where it belongs.

    Args:
        siblings: the keys that its section knows.
        elsewhere: for each key of the whole schema, the sections that know it, as dotted paths; "" is the top.
    """
    siblings = list(siblings)
    close = nearest(name, siblings, cutoff=0.85)
    if close is not None:
        return f'Did you mean "{close}"?'
    if name in elsewhere:
        return belongs_to(elsewhere[name])
    if name.lower() in _ELSEWHERE_CALLED:
        full = _ELSEWHERE_CALLED[name.lower()]
        section, _, key = full.rpartition(".")
        if key in siblings:
            return f'Did you mean "{key}"?'
        if section in elsewhere.get(key, ()):
            return f'Did you mean "{full}"?'
    hint = did_you_mean(name, siblings)
    if hint is None:
        found = nearest(name, elsewhere, cutoff=0.85)
        hint = None if found is None else f'Did you mean "{found}"? It {belongs_to(elsewhere[found])[3:]}'
    return hint


def belongs_to(sections: Sequence[str]) -> str:
    """`It belongs under …`.

    >>> belongs(["sft_args"])
    'It belongs under sft_args.'
    """
    named = [section or "the top level" for section in sections]
    if named == ["the top level"]:
        return "It belongs at the top level."
    return f"It belongs under {' or '.join(named)}."


def unknown_value(what: str, shown: str | None, allowed: Sequence[str], hint: str | None) -> str:
    """`unknown …`, with the values that are allowed, unless they are many and the hint names the right one."""
    named = f"unknown {what} {shown}" if shown else f"unknown {what}"
    return f"{named}." if hint and len(allowed) > _MANY else f"{named}; one of: {', '.join(allowed)}."


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
