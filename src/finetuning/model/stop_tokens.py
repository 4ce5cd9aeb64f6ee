"""Make every saved file agree on the end of a turn: tokenizer, generation config and chat template."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetuning.errors import first_line, read_json_object, reading
from finetuning.model.safetensors_io import GENERATION_CONFIG
from finetuning.model.tokenizer import SpecialTokenName, special_token, special_token_id

EndOfTurn = str | tuple[str, ...] | None
"""The texts with which a chat template ends an assistant turn; see `align_stop_tokens`."""
# Sampling parameters, with the values at which they have no effect.
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
_SETTINGS = ("model_max_length", "clean_up_tokenization_spaces", "split_special_tokens")
"""Settings of a tokenizer that change texts or ids, and are in its own config only."""


@dataclass(frozen=True)
class StopTokens:
    """The tokens at which a saved model stops, and what was changed so that it does."""

    eos_token: str | None
    """End-of-sequence token of the saved tokenizer: the token that ends a turn."""
    eos_token_ids: tuple[int, ...]
    """Ids at which generation stops: the end of a turn first, then those of the base model."""
    pad_token_id: int | None
    adds_bos: bool
    """Whether the tokenizer adds its beginning-of-sequence token to a text; never changed."""
    generation_config: GenerationConfig
    """The generation config to save with the model."""
    changes: tuple[str, ...]
    """Differences from the base model's files, one sentence each."""

    @property
    def report(self) -> str:
        summary = f"{self.eos_token!r} ends a turn; generation stops at ids {list(self.eos_token_ids)}"
        return "; ".join((summary, *self.changes))

    def __str__(self) -> str:
        return self.report

    def write_configs(self, folder: Path) -> None:
        """Write generation_config.json, and the same ids into config.json if the folder has one."""
        self.generation_config.save_pretrained(folder)
        copy_ids_to_model_config(folder)


def align_stop_tokens(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None, end_of_turn: EndOfTurn
) -> StopTokens:
    """Return what to save so that the model stops where it was trained to; the arguments are not modified.

    Args:
        end_of_turn: the text with which the chat template ends an assistant turn; None for the tokenizer's own
            end-of-sequence token. If the text is not a single token, nothing is changed and the report says so:
            a server then needs it as a stop string. Of several texts the first ends an answer, and generation stops at
            the others, too: templates may end a tool call with a token of its own.
    """
    generation = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    changes: list[str] = []
    before = eos_token = special_token(tokenizer, "eos")
    first, *more_ends = [end_of_turn or ""] if isinstance(end_of_turn, str | None) else [*end_of_turn] or [""]
    turn_ends_with = first.strip()
    if turn_ends_with and turn_ends_with != before:
        if _single_id(tokenizer, turn_ends_with) is None:
            changes.append(f"{turn_ends_with!r}, which ends a turn, is not one token: servers need it as a stop string")
        else:
            changes.append(f"the saved tokenizer's end-of-sequence token is {turn_ends_with!r}, was {before!r}")
            eos_token = turn_ends_with
    base = generation.eos_token_id
    base_ids = [] if base is None else [base] if isinstance(base, int) else list(base)
    eos_id = _token_id(tokenizer, eos_token) if eos_token is not None else None
    # The base's own stop ids stay: an instruct model may stop at several, such as <|eot_id|> and <|end_of_text|>.
    more_ids = [_single_id(tokenizer, end) for end in more_ends]
    ids = tuple(dict.fromkeys(token_id for token_id in (eos_id, *base_ids, *more_ids) if token_id is not None))
    if set(ids) != set(base_ids):
        changes.append(f"generation_config.eos_token_id is {list(ids)}, was {base}")
        generation.eos_token_id = ids[0] if len(ids) == 1 else list(ids)
    own_pad = special_token_id(tokenizer, "pad")
    pad = own_pad if own_pad is not None else eos_id
    if pad is not None and generation.pad_token_id != pad:
        changes.append(f"generation_config.pad_token_id is {pad}, was {generation.pad_token_id}")
        generation.pad_token_id = pad
    changes += fix_sampling_config(generation)
    adds_bos, adds_eos = _added_special_tokens(tokenizer)
    if adds_eos:
        changes.append("the saved tokenizer no longer adds an end-of-sequence token to each text")
    return StopTokens(eos_token, ids, pad, adds_bos, generation, tuple(changes))


def copy_ids_to_model_config(folder: Path) -> None:
    """Set the ids in config.json, if the folder has one, to those in generation_config.json.

    Engines that find no generation config, and converters to other formats, read the ids of config.json.
    """
    path, source = folder / "config.json", folder / GENERATION_CONFIG
    if not path.is_file() or not source.is_file():
        return
    with reading(f"config.json or generation_config.json of {folder} cannot be read"):
        config, generation = read_json_object(path), read_json_object(source)
    set_generation_ids(config, generation)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def set_generation_ids(config: dict[str, Any], generation: Mapping[str, Any]) -> None:
    """Set the end and padding ids of a model config, and of its text model's, to those of a generation config."""
    eos, pad = generation.get("eos_token_id"), generation.get("pad_token_id")
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict) or (part is not config and "eos_token_id" not in part):
            continue
        if eos is not None:
            # Some architectures accept a single id only.
            has_list = isinstance(part.get("eos_token_id"), list)
            part["eos_token_id"] = eos[0] if isinstance(eos, list) and not has_list else eos
        if pad is not None:
            part["pad_token_id"] = pad


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, stop_tokens: StopTokens | None = None) -> None:
    """Save the tokenizer, with the end of a turn as its end-of-sequence token. `tokenizer` itself is not modified.

    `add_bos_token` and `add_eos_token` are written explicitly: engines that build the tokenizer from its config instead
    of tokenizer.json would guess them. An end token after each prompt would make the model stop at once.
    """
    saved = copy.deepcopy(tokenizer)
    adds_bos, adds_eos = _added_special_tokens(tokenizer)
    if stop_tokens is not None and stop_tokens.eos_token is not None:
        saved.eos_token = stop_tokens.eos_token
    if adds_eos:
        # Each setter rebuilds the whole post-processor from both flags, so both must be set.
        saved.add_bos_token = adds_bos
        saved.add_eos_token = False
    if isinstance(saved, PreTrainedTokenizerFast):
        # A tokenizer keeps how it last cut and padded a text, and would save that. Other programs cut prompts by it.
        saved.backend_tokenizer.no_truncation()
        saved.backend_tokenizer.no_padding()
    saved.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers records how the tokenizer was loaded. That is useless elsewhere, and leaks local paths.
    for key in ("local_files_only", "is_local", "name_or_path", "cache_dir", "token"):
        config.pop(key, None)
    config |= {"add_bos_token": adds_bos, "add_eos_token": False}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def compare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, stop_tokens: StopTokens | None = None
) -> list[str]:
    """Load the tokenizer that `save_tokenizer` wrote, and return how it differs from what was meant; [] if it does not.

    Compared are the vocabulary, the merges and whatever else splits a text or puts it together again, the special
    tokens, what is added to a text and cut off it, and the chat template. The padding side is the run's, and
    transformers does not save it.
    """
    # A class of its own code is not looked up by name, which would have to run the code again.
    is_custom = type(tokenizer).__module__.startswith("transformers_modules")
    auto_class: Any = type(tokenizer) if is_custom else AutoTokenizer
    try:
        saved = auto_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"the tokenizer cannot be loaded: {first_line(error)}"]
    differences = _file_differences(tokenizer, saved, folder, stop_tokens)
    # Comparing the vocabularies themselves takes longer, and is only needed to say what differs.
    if _text_to_tokens(saved) != _text_to_tokens(tokenizer):
        is_same = saved.get_vocab() == tokenizer.get_vocab()
        what = "the vocabulary is the same, but texts are split differently" if is_same else "the vocabulary is another"
        differences.append(f"tokenizer.json: {what}")
    names: tuple[SpecialTokenName, ...] = get_args(SpecialTokenName)
    end = stop_tokens.eos_token if stop_tokens is not None else None
    for name in names:
        token = end if name == "eos" and end is not None else special_token(tokenizer, name)
        if (saved_token := special_token(saved, name)) != token:
            differences.append(f"tokenizer_config.json: {name}_token is {saved_token!r} instead of {token!r}")
    adds_bos, adds_eos = _added_special_tokens(saved)
    if (adds_bos, adds_eos) != (_added_special_tokens(tokenizer)[0], False):
        added = " and ".join(name for name, adds in (("a BOS", adds_bos), ("an EOS", adds_eos)) if adds) or "no special"
        differences.append(f"tokenizer.json: {added} token is added to each text")
    special, saved_special = (
        _special_tokens(each) - {special_token(tokenizer, "eos"), end} for each in (tokenizer, saved)
    )
    if missing := special - saved_special:
        differences.append(f"the tokenizer's files: {sorted(missing)[0]!r} is not a special token")
    if extra := saved_special - special:
        differences.append(f"the tokenizer's files: {sorted(extra)[0]!r} is a special token")
    differences += _setting_differences(tokenizer, saved)
    if saved.chat_template != tokenizer.chat_template:
        differences.append(f"the chat template is {'another one' if saved.chat_template else 'missing'}")
    return differences


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the special tokens, and the added ones that decoding leaves out as if they were."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {str(token) for token in tokenizer.all_special_tokens} | added


def _file_differences(
    tokenizer: PreTrainedTokenizerBase,
    saved: PreTrainedTokenizerBase,
    folder: Path,
    stop_tokens: StopTokens | None,
) -> list[str]:
    """Return what other programs would read from the files of a tokenizer that transformers does not take from there.

    transformers corrects the special tokens of tokenizer.json when it loads it, prefers the template in a file of its
    own, and forgets how texts are cut and padded as soon as it encodes one.
    """
    differences: list[str] = []
    config = read_json_object(folder / "tokenizer_config.json")
    if config.get("chat_template", saved.chat_template) != saved.chat_template:
        differences.append("tokenizer_config.json: it has another chat template than chat_template.jinja")
    meant = {"add_bos_token": _added_special_tokens(tokenizer)[0], "add_eos_token": False}
    differences += [
        f"tokenizer_config.json: {key} is {config.get(key)} instead of {value}"
        for key, value in meant.items()
        if config.get(key) != value
    ]
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not (folder / "tokenizer.json").is_file():
        return differences
    file = read_json_object(folder / "tokenizer.json")
    texts = {"cut": file.get("truncation"), "padded": file.get("padding")}
    differences += [f"tokenizer.json: texts are {how}: {value}" for how, value in texts.items() if value]
    ends = {special_token(tokenizer, "eos"), stop_tokens.eos_token if stop_tokens is not None else None}
    in_memory = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = {token["id"]: token["special"] for token in file["added_tokens"]}
    differences += [
        f"tokenizer.json: {token.content!r} is {'not ' if token.special else ''}a special token"
        for token_id, token in in_memory.items()
        if special.get(token_id) != token.special and (token.special or token.content not in ends)
    ]
    return differences


def _setting_differences(tokenizer: PreTrainedTokenizerBase, saved: PreTrainedTokenizerBase) -> list[str]:
    """Return the settings of a saved tokenizer that change texts or ids, and differ from those in memory."""
    differences: list[str] = []
    ids = tokenizer.encode("a")
    meant = ids[:-1] if _added_special_tokens(tokenizer)[1] else ids
    if (encoded := saved.encode("a")) != meant and saved.get_vocab() == tokenizer.get_vocab():
        pair = " instead of ".join(str(saved.convert_ids_to_tokens(each)) for each in (encoded, meant))
        differences.append(f"tokenizer.json: 'a' is encoded to {pair}")
    for name in _SETTINGS:
        value, expected = getattr(saved, name, None), getattr(tokenizer, name, None)
        if value != expected:
            differences.append(f"tokenizer_config.json: {name} is {value!r} instead of {expected!r}")
    return differences


def _text_to_tokens(tokenizer: PreTrainedTokenizerBase) -> object:
    """Return what turns a text into tokens, without the special tokens around it, in a form that can be compared."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer.get_vocab()
    backend: Any = tokenizer.backend_tokenizer
    parts = (backend.normalizer, backend.pre_tokenizer, backend.model, backend.decoder)
    added = {
        # All but whether it is special, which a new end token changes.
        token_id: (token.content, token.single_word, token.lstrip, token.rstrip, token.normalized)
        for token_id, token in tokenizer.added_tokens_decoder.items()
    }
    return [None if part is None else part.__getstate__() for part in parts], added


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id if isinstance(token_id, int) else None


def _single_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Return the id of a text that is exactly one token; None for any other text."""
    ids = tokenizer.encode(text, add_special_tokens=False) if text else []
    return ids[0] if len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == text else None


def _added_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer adds a BOS and an EOS token to a text; by encoding one, as its flags may be wrong."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    adds_bos = tokenizer.bos_token_id is not None and full[:1] == [tokenizer.bos_token_id] != plain[:1]
    adds_eos = tokenizer.eos_token_id is not None and full[-1:] == [tokenizer.eos_token_id] != plain[-1:]
    return adds_bos, adds_eos


def fix_sampling_config(generation: GenerationConfig) -> list[str]:
    """Set `do_sample` where sampling parameters are set without it, and return a description of the change.

    transformers refuses to save such a contradictory config, which would fail every checkpoint.
    """
    parameters = [
        name for name, default in _SAMPLING_DEFAULTS.items() if getattr(generation, name, None) not in (None, default)
    ]
    if generation.do_sample or not parameters:
        return []
    generation.do_sample = True
    return [f"generation_config.do_sample is true, was off: {', '.join(parameters)} only apply to sampling"]
