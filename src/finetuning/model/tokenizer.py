"""Load the tokenizer and set its chat template, special tokens and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetuning.config.sections.data import MissingPadTokenStrategy
from finetuning.distributed import announce_wait
from finetuning.errors import Location, ModelError, read_json_object, reading
from finetuning.model.resolve import ModelLocation, resolve_model

SpecialTokenName: TypeAlias = Literal["bos", "eos", "pad", "unk"]
_TEMPLATE_KEY = "data_conf.chat_template_name"


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with its template and padding set. It is not modified after this."""

    tokenizer: PreTrainedTokenizerFast
    new_tokens: tuple[str, ...]
    """Tokens that were added to the vocabulary: their embedding rows are untrained."""
    pad_description: str
    """Which token pads, and why."""
    pad_input_id: int | None = None
    """Id at the padded positions of `input_ids`, if it differs from the tokenizer's padding token; else None. Labels
    are -100 and the attention mask is 0 at these positions in either case."""
    warnings: tuple[str, ...] = ()
    template_description: str = "its own"
    """Which chat template it has, and why."""

    def __str__(self) -> str:
        added = f", {len(self.new_tokens)} new: {' '.join(self.new_tokens)}" if self.new_tokens else ""
        side = self.tokenizer.padding_side
        template = f"chat template: {self.template_description}"
        return f"{len(self.tokenizer)} tokens{added}; {template}; padding on the {side} with {self.pad_description}"


def load_tokenizer(
    path: str,
    *,
    template_source: str | None,
    default_template: tuple[str, str] | None = None,
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
    """Load the tokenizer of a folder or hub id. Its beginning- and end-of-sequence tokens are not changed.

    Args:
        template_source: the chat template to set; None keeps the tokenizer's own.
        default_template: name and source of the chat template to set if there is none otherwise.
        special_tokens: the tokens that the template writes, to be encoded as one token each.
        needs_template: whether it is an error to end up without a chat template.
        key: config key that names the tokenizer, for error messages.

    Raises:
        ModelError: there is no fast tokenizer, no chat template although one is needed, or no token to pad with.
    """
    source = resolve_model(
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
    tokenizer = _load_fast_tokenizer(source, trust_remote_code, Location(key=key))
    template_description, warnings = _set_template(tokenizer, source, template_source, default_template, needs_template)
    tokenizer.padding_side = padding_side
    new_tokens = _add_special_tokens(tokenizer, special_tokens)
    pad_description, pad_input_id, pad_warning = _choose_padding(tokenizer, missing_pad_token_strategy, str(source))
    return LoadedTokenizer(
        tokenizer, new_tokens, pad_description, pad_input_id, tuple(warnings + pad_warning), template_description
    )


def _set_template(
    tokenizer: PreTrainedTokenizerFast,
    location: ModelLocation,
    template_source: str | None,
    default_template: tuple[str, str] | None,
    needs_template: bool,
) -> tuple[str, list[str]]:
    """Set the chat template, and return which one it is, and warnings. The arguments are those of `load_tokenizer`.

    Raises:
        ModelError: there is no chat template although one is needed.
    """
    if not tokenizer.chat_template and location.folder is not None:
        tokenizer.chat_template = _processor_template(location.folder)
    source, shipped = str(location), tokenizer.chat_template
    if template_source is not None:
        tokenizer.chat_template = template_source
        warning = f"the configured chat template replaces the one of {source}; {_TEMPLATE_KEY}: keep-original keeps it"
        return "as configured", [warning] if shipped and shipped != template_source else []
    if shipped:
        return "its own", []
    if default_template is not None:
        name, tokenizer.chat_template = default_template
        return f"{name}, as it has none", []
    if needs_template:
        raise ModelError(
            f"the tokenizer of {source} has no chat template",
            location=Location(key=_TEMPLATE_KEY),
            hint="Set data_conf.chat_template_name to a template by name, such as chat-ml.",
        )
    return "none", []


def _processor_template(folder: Path) -> str | None:
    """Return the chat template that a processor of images has in a file of its own, as older releases wrote it."""
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            with reading(f"{folder / name} cannot be read", location=Location(file=str(folder / name))):
                template = read_json_object(folder / name).get("chat_template")
            if isinstance(template, str):
                return template
    return None


def _load_fast_tokenizer(source: ModelLocation, trust_remote_code: bool, location: Location) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    name = source.name
    hint = "A tokenizer.json is needed (a fast tokenizer)."
    problem = f"the tokenizer of {name} cannot be loaded"
    with reading(problem, location=location, hint=hint), announce_wait(f"the tokenizer of {source} to load"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, use_fast=True, trust_remote_code=trust_remote_code, **source.hub_kwargs
        )
        # Values of a wrong type are not noticed before they are used.
        tokenizer.encode("a")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"the tokenizer of {name} is not a fast tokenizer ({type(tokenizer).__name__})",
            location=location,
            hint="The loss mask is computed from character offsets, which only fast tokenizers (tokenizer.json) have.",
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # From a config without a vocabulary transformers builds a tokenizer that has nothing but special tokens.
        raise ModelError(
            f"the tokenizer of {name} has no vocabulary: tokenizer.json is missing or empty", location=location
        )
    return tokenizer


def special_token(tokenizer: PreTrainedTokenizerBase, name: SpecialTokenName) -> str | None:
    """Return a special token; None if the tokenizer has none of that name.

    The type that transformers infers for `tokenizer.eos_token` includes lists and ids.
    """
    token = getattr(tokenizer, f"{name}_token")
    return None if token is None else str(token)


def special_token_id(tokenizer: PreTrainedTokenizerBase, name: SpecialTokenName) -> int | None:
    """Return the id of a special token; None if the tokenizer has none of that name."""
    token_id = getattr(tokenizer, f"{name}_token_id")
    return None if token_id is None else int(token_id)


def _add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[str, ...]:
    """Mark tokens as special, and return those that had to be added to the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    missing = [token for token in dict.fromkeys(tokens) if token not in special]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    return tuple(token for token in missing if token not in vocabulary)


def _choose_padding(
    tokenizer: PreTrainedTokenizerBase, strategy: MissingPadTokenStrategy, source: str
) -> tuple[str, int | None, list[str]]:
    """Set a padding token if there is none, and return `pad_description`, `pad_input_id` and warnings.

    An existing token is reused, because a new one would resize the embeddings. Attention mask and labels are made from
    lengths, not by comparing with the padding id, so the token keeps its other role in the text.
    """
    if tokenizer.pad_token is not None:
        return f"{tokenizer.pad_token}, its own padding token", None, []
    tokens = {
        "bos": special_token(tokenizer, "bos"),
        "eos": special_token(tokenizer, "eos"),
        "unk": special_token(tokenizer, "unk"),
    }
    names = {"bos": "beginning-of-sequence", "eos": "end-of-sequence", "unk": "unknown"}
    converts = strategy is MissingPadTokenStrategy.UNK_CONVERT_TO_EOS
    preferred = "unk" if converts else strategy.value.split("-")[0]
    if converts and tokens["eos"] is None:
        raise ModelError(
            f"unk-convert-to-eos needs an end-of-sequence token, which the tokenizer of {source} does not have",
            location=Location(key="data_conf.missing_pad_token_strategy"),
        )
    chosen = next((name for name in (preferred, "eos", "unk", "bos") if tokens[name] is not None), None)
    if chosen is None:
        raise ModelError(
            f"the tokenizer of {source} has no padding, BOS, EOS or unknown token to pad with",
            location=Location(key="data_conf.missing_pad_token_strategy"),
            hint="Set pad_token in its tokenizer_config.json.",
        )
    tokenizer.pad_token = tokens[chosen]
    warnings: list[str] = []
    if chosen != preferred:
        warnings.append(
            f"the tokenizer of {source} has no {names[preferred]} token to pad with ({strategy.value});"
            f" its {names[chosen]} token {tokens[chosen]} pads instead"
        )
    description = f"{tokens[chosen]}, its {names[chosen]} token"
    if converts and chosen == "unk":
        return f"{description}, replaced by {tokens['eos']} in input_ids", special_token_id(tokenizer, "eos"), warnings
    return description, None, warnings
