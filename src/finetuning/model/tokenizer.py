"""The tokenizer, with the chat template, special tokens and padding that the run asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from finetuning.config.sections.data import MissingPadTokenStrategy
from finetuning.errors import Location, ModelError
from finetuning.model.resolve import resolve_model

_TEMPLATE_KEY = "data_conf.chat_template_name"


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer that is ready: template and padding set. It is not changed after this."""

    tokenizer: PreTrainedTokenizerBase
    new_tokens: tuple[str, ...]
    """Tokens that the vocabulary did not have: their rows of the embeddings are untrained."""
    pad_is: str
    """Which token pads, and why, in words."""
    pad_shown_as: int | None = None
    """Id that stands at padded places of `input_ids` instead of the padding token, which is then known only to the
    tokenizer; None for the padding token itself. Labels are -100 and the attention mask is 0 there either way."""
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        added = f", {len(self.new_tokens)} new: {' '.join(self.new_tokens)}" if self.new_tokens else ""
        side = self.tokenizer.padding_side
        return f"{len(self.tokenizer)} tokens{added}; padding on the {side} with {self.pad_is}"


def load_tokenizer(
    path: str,
    *,
    template_source: str | None,
    special_tokens: Sequence[str] = (),
    missing_pad_token_strategy: MissingPadTokenStrategy = MissingPadTokenStrategy.BOS_REPURPOSE,
    padding_side: Literal["right", "left"] = "right",
    trust_remote_code: bool = False,
    needs_template: bool = True,
    key: str | None = "run_conf.tokenizer",
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool | None = None,
    force_download: bool | None = None,
    token: str | None = None,
) -> LoadedTokenizer:
    """The tokenizer of a folder or hub id. Its own beginning and end tokens stay as they are.

    `template_source` is the chat template to set, None to keep the tokenizer's own; `special_tokens` are the tokens
    that the template writes.

    Raises:
        ModelError: no fast tokenizer is there; its own template is to be kept and it has none; nothing can pad.
    """
    location = resolve_model(
        path,
        "tokenizer",
        key=key,
        revision=revision,
        subfolder=subfolder,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
        token=token,
    )
    tokenizer = _read(location.name, trust_remote_code, location.hub_arguments, Location(key=key))
    warnings = []
    if template_source is None:
        if needs_template and not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {location} has no chat template to keep",
                place=Location(key=_TEMPLATE_KEY),
                hint="Set data_conf.chat_template_name to a template by name, such as chat-ml.",
            )
    else:
        if tokenizer.chat_template and tokenizer.chat_template != template_source:
            warnings.append(
                f"the tokenizer of {location} has a chat template of its own, which the configured one replaces;"
                f" `keep-original` as {_TEMPLATE_KEY} would keep it"
            )
        tokenizer.chat_template = template_source
    tokenizer.padding_side = padding_side
    new_tokens = _add_special_tokens(tokenizer, special_tokens)
    pad_is, pad_shown_as, pad_warning = _choose_padding(tokenizer, missing_pad_token_strategy, str(location))
    return LoadedTokenizer(tokenizer, new_tokens, pad_is, pad_shown_as, tuple(warnings + pad_warning))


def _read(name: str, trust_remote_code: bool, hub_arguments: Any, place: Location) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, use_fast=True, trust_remote_code=trust_remote_code, **hub_arguments
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"the tokenizer of {name} cannot be loaded: {lines[0]}",
            place=place,
            hint="A tokenizer.json is needed (a fast tokenizer).",
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {name} is not a fast one ({type(tokenizer).__name__})",
            place=place,
            hint="The loss mask is proven by character offsets, which only a tokenizer.json gives.",
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Out of a config without a vocabulary transformers makes a tokenizer that knows its special tokens only.
        raise ModelError(f"the tokenizer of {name} has no vocabulary: tokenizer.json is missing or empty", place=place)
    return tokenizer


def _add_special_tokens(tokenizer: PreTrainedTokenizerBase, wanted: Sequence[str]) -> tuple[str, ...]:
    """Marks the wanted tokens as special, adding those that the vocabulary lacks, which are returned."""
    known = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    missing = [token for token in dict.fromkeys(wanted) if token not in special]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    return tuple(token for token in missing if token not in known)


def _choose_padding(
    tokenizer: PreTrainedTokenizerBase, strategy: MissingPadTokenStrategy, where: str
) -> tuple[str, int | None, list[str]]:
    """What pads in words, the id shown instead of it, and what to warn of; sets the padding token if there is none."""
    if tokenizer.pad_token is not None:
        return f"{tokenizer.pad_token}, its own padding token", None, []
    tokens = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "unk": tokenizer.unk_token}
    names = {"bos": "beginning-of-sequence", "eos": "end-of-sequence", "unk": "unknown"}
    converts = strategy is MissingPadTokenStrategy.UNK_CONVERT_TO_EOS
    asked = "unk" if converts else strategy.value.split("-")[0]
    if converts and tokens["eos"] is None:
        raise ModelError(
            f"unk-convert-to-eos needs an end-of-sequence token, which the tokenizer of {where} does not have",
            place=Location(key="data_conf.missing_pad_token_strategy"),
        )
    chosen = next((name for name in (asked, "eos", "unk", "bos") if tokens[name] is not None), None)
    if chosen is None:
        raise ModelError(
            f"the tokenizer of {where} has no padding, beginning, end or unknown token: nothing can pad",
            place=Location(key="data_conf.missing_pad_token_strategy"),
            hint="Set pad_token in its tokenizer_config.json.",
        )
    tokenizer.pad_token = tokens[chosen]
    warnings = []
    if chosen != asked:
        warnings.append(
            f"the tokenizer of {where} has no {names[asked]} token to pad with ({strategy.value});"
            f" its {names[chosen]} token {tokens[chosen]} pads instead"
        )
    words = f"{tokens[chosen]}, its {names[chosen]} token"
    if converts and chosen == "unk":
        return f"{words}, shown to the model as {tokens['eos']}", tokenizer.eos_token_id, warnings
    return words, None, warnings
