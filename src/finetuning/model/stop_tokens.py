"""The end of a turn, said the same way by everything that is saved: tokenizer, generation config, chat template."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

# Sampling settings with the values at which they do nothing.
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}


@dataclass(frozen=True)
class StopTokens:
    """What a saved model stops at, and what was repaired so that it does."""

    eos_token: str | None
    """The end-of-sequence token of the saved tokenizer: the one that ends a turn."""
    eos_token_ids: tuple[int, ...]
    """Ids at which generation stops: the end of a turn first, then those of the base model."""
    pad_token_id: int | None
    adds_bos: bool
    """Whether the tokenizer puts its beginning token before a text; kept as it was."""
    generation_config: GenerationConfig
    """To be saved with the model."""
    changes: tuple[str, ...]
    """What differs from the base model's files, one sentence each."""

    @property
    def report(self) -> str:
        ends = f"{self.eos_token!r} ends a turn; generation stops at ids {list(self.eos_token_ids)}"
        return "; ".join((ends, *self.changes))

    def __str__(self) -> str:
        return self.report


def align_stop_tokens(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None, end_of_turn: str | None
) -> StopTokens:
    """What has to be saved for the model to stop where it was trained to; neither argument is changed.

    `end_of_turn` is the text that the chat template ends an assistant's turn with; None for the tokenizer's own
    end-of-sequence token. A text that is no single token cannot be an end-of-sequence token: then everything stays as
    it is, and the report says so.
    """
    generation = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig()
    changes = []
    before = eos_token = tokenizer.eos_token
    turn_ends_with = (end_of_turn or "").strip()
    if turn_ends_with and turn_ends_with != before:
        if _single_id(tokenizer, turn_ends_with) is None:
            changes.append(f"{turn_ends_with!r}, which ends a turn, is not one token: servers need it as a stop string")
        else:
            changes.append(f"the saved tokenizer's end-of-sequence token is {turn_ends_with!r}, it was {before!r}")
            eos_token = turn_ends_with
    base = generation.eos_token_id
    base_ids = [] if base is None else [base] if isinstance(base, int) else list(base)
    own = tokenizer.convert_tokens_to_ids(eos_token) if eos_token is not None else None
    ids = tuple(dict.fromkeys(token_id for token_id in (own, *base_ids) if token_id is not None))
    if set(ids) != set(base_ids):
        changes.append(f"generation_config.eos_token_id is {list(ids)}, it was {base}")
        generation.eos_token_id = list(ids) if len(ids) > 1 else ids[0]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else own
    if pad is not None and generation.pad_token_id != pad:
        changes.append(f"generation_config.pad_token_id is {pad}, it was {generation.pad_token_id}")
        generation.pad_token_id = pad
    changes += fix_sampling_config(generation)
    adds_bos, adds_eos = _additions(tokenizer)
    if adds_eos:
        changes.append("the saved tokenizer no longer puts an end token after each text")
    return StopTokens(eos_token, ids, pad, adds_bos, generation, tuple(changes))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, stop_tokens: StopTokens | None = None) -> None:
    """The tokenizer's files with the end of a turn as end-of-sequence token. The tokenizer in use stays as it is.

    `add_bos_token` and `add_eos_token` are written out: engines that build the tokenizer from its config instead of
    from tokenizer.json would otherwise guess them.
    """
    saved = copy.deepcopy(tokenizer)
    adds_bos, adds_eos = _additions(tokenizer)
    if stop_tokens is not None and stop_tokens.eos_token is not None:
        saved.eos_token = stop_tokens.eos_token
    if adds_eos:
        # Either setter rebuilds the whole post-processor, so both are set.
        saved.add_bos_token = adds_bos
        saved.add_eos_token = False
    saved.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # The folder or revision that it was loaded from is of no use to others, and tells them about this machine.
    for key in ("local_files_only", "is_local", "name_or_path", "cache_dir", "token"):
        config.pop(key, None)
    config |= {"add_bos_token": adds_bos, "add_eos_token": False}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _single_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    ids = tokenizer.encode(text, add_special_tokens=False) if text else []
    return ids[0] if len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == text else None


def _additions(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a beginning and an end token are put round each text: by trying, as the flags need not be true."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    begins = tokenizer.bos_token_id is not None and full[:1] == [tokenizer.bos_token_id] != plain[:1]
    ends = tokenizer.eos_token_id is not None and full[-1:] == [tokenizer.eos_token_id] != plain[-1:]
    return begins, ends


def fix_sampling_config(generation: GenerationConfig) -> list[str]:
    """Turns sampling on, and says so, where its settings are there but it is off: transformers would not save that."""
    given = [name for name, idle in _SAMPLING.items() if getattr(generation, name, None) not in (None, idle)]
    if generation.do_sample or not given:
        return []
    generation.do_sample = True
    return [f"generation_config.do_sample is true, as {', '.join(given)} asks for; it was off"]
