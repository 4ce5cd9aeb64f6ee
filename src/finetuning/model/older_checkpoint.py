"""Repair checkpoints of earlier versions, which lack the stop tokens that they were trained with.

Those versions aligned the stop tokens of the final model only. Their intermediate checkpoints have the base model's: a
model that learned to end a turn with another token never stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.errors import read_json_object, reading
from finetuning.model.safetensors_io import GENERATION_CONFIG
from finetuning.model.stop_tokens import StopTokens, align_stop_tokens, save_tokenizer
from finetuning.templates import ChatRenderer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerFast

_STATE = "trainer_state.json"
# The config of the run, which every checkpoint holds; see `training/resume/config_changes.py`.
_RUN_CONFIGS = ("run_config.json", "contract.json")  # old name


@dataclass(frozen=True)
class StopTokenRepair:
    """The stop tokens that a checkpoint should have been saved with."""

    checkpoint: Path
    tokenizer: PreTrainedTokenizerFast
    stop_tokens: StopTokens

    @property
    def note(self) -> str:
        return (
            f"{self.checkpoint} was saved by an earlier version, with the stop tokens of its base model; repaired:"
            f" {self.stop_tokens.report}"
        )

    def write(self, folder: Path, *, tokenizer: bool = True) -> None:
        """Write the configs, and the tokenizer unless it comes from elsewhere, into an existing folder."""
        if tokenizer:
            save_tokenizer(self.tokenizer, folder, self.stop_tokens)
        self.stop_tokens.write_configs(folder)


def find_stop_token_repair(
    folder: Path, base_generation_config: GenerationConfig | None = None
) -> StopTokenRepair | None:
    """Return how to repair a checkpoint; None for one with its own stop tokens, and for any other folder.

    Args:
        base_generation_config: that of the base model; a checkpoint's own comes first.

    Raises:
        ModelError: a file of the checkpoint is damaged.
    """
    if not (folder / _STATE).is_file() or _method(folder) in (None, "reward"):
        return None
    from transformers import AutoTokenizer

    with reading(f"the tokenizer of {folder} cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        end_of_turn = _token_after_answer(tokenizer)
    generation_config = read_generation_config(folder) or base_generation_config
    stop_tokens = align_stop_tokens(tokenizer, generation_config, end_of_turn)
    saved = generation_config.eos_token_id if generation_config is not None else None
    saved_ids = [] if saved is None else [saved] if isinstance(saved, int) else saved
    if stop_tokens.eos_token == tokenizer.eos_token and set(stop_tokens.eos_token_ids) == set(saved_ids):
        return None
    return StopTokenRepair(folder, tokenizer, stop_tokens)


def _token_after_answer(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the added token that the chat template writes after an answer; None if it writes none there.

    Only a single token can be an end-of-sequence token. For a template that ends turns with other text, nothing needs
    repair.
    """
    if not tokenizer.chat_template:
        return None
    question, answer = {"role": "user", "content": "first"}, {"role": "assistant", "content": "second"}
    text = ChatRenderer(tokenizer).text([question, answer])
    rest = text.rpartition("second")[2].lstrip()
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return max((token for token in tokens if rest.startswith(token)), key=len, default=None)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Return the generation config in a folder; None if there is none.

    Raises:
        ModelError: it is damaged.
    """
    if not (folder / GENERATION_CONFIG).is_file():
        return None
    from transformers import GenerationConfig

    with reading(f"{folder / GENERATION_CONFIG} cannot be read"):
        return GenerationConfig.from_pretrained(folder, local_files_only=True)


def _method(folder: Path) -> str | None:
    """Return the algorithm that a checkpoint was trained with; None for a checkpoint of another engine."""
    for name in _RUN_CONFIGS:
        if (folder / name).is_file():
            with reading(f"{folder / name} cannot be read"):
                return str(read_json_object(folder / name).get("method"))
    return None
