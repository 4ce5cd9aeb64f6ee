"""`new_embeddings.safetensors`: the rows of added tokens beside a pure LoRA, as vLLM before November 2025 read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from finetuning.errors import ModelError
from finetuning.export.inputs import Adapter, BaseModel, read_json
from finetuning.export.safetensors_writer import copied, write_tensor_file
from finetuning.export.vllm.checks import base_tensor, first_rows_equal
from finetuning.model.safetensors_io import ADDED_TOKENS, TensorEntry

NEW_EMBEDDINGS = "new_embeddings.safetensors"
_KINDS = {
    "lm_head.weight": "output_embeddings",
    "embed_tokens.weight": "input_embeddings",
    "wte.weight": "input_embeddings",
}


@dataclass(frozen=True)
class NewEmbeddings:
    """The rows of the new tokens, and the adapter without its embeddings."""

    tensors: Mapping[str, TensorEntry]
    moved: tuple[str, ...]
    rest: Adapter

    def write(self, file: Path) -> None:
        write_tensor_file(file, [copied(name, entry) for name, entry in self.tensors.items()], {"format": "pt"})


def split_new_embeddings(adapter: Adapter, base: BaseModel | None) -> NewEmbeddings | None:
    """The new rows apart from the rest; None when the adapter holds no embeddings.

    Raises:
        ModelError: it is not known how many rows are new, none is, or the old rows were trained as well.
    """
    tensors: dict[str, TensorEntry] = {}
    moved = []
    for key, entry in adapter.entries.items():
        kind = next((kind for end, kind in _KINDS.items() if key.endswith(end) and ".lora_" not in key), None)
        if kind is None:
            continue
        old = base_tensor(base, key.removeprefix("base_model.model.").replace(".base_layer.", ".")) if base else None
        num_new = _num_new_tokens(adapter, entry, old)
        if old is not None and old.shape[0] == entry.shape[0]:
            raise ModelError(
                f"{key}: the base itself has rows for the {num_new} new tokens; {NEW_EMBEDDINGS} would add them again.",
                hint="Merge the adapter instead: merge_adapter.",
            )
        if old is not None and not (old.shape[0] + num_new == entry.shape[0] and first_rows_equal(entry, old)):
            raise ModelError(
                f"{key} differs from the base's in rows of old tokens, which {NEW_EMBEDDINGS} cannot hold.",
                hint="Merge the adapter instead: merge_adapter.",
            )
        start = entry.stop - entry.num_bytes // entry.shape[0] * num_new
        tensors[kind] = TensorEntry(entry.file, entry.dtype, (num_new, *entry.shape[1:]), start, entry.stop)
        moved.append(key)
    if not moved:
        return None
    rest = {key: entry for key, entry in adapter.entries.items() if key not in moved}
    kept_modules = [m for m in adapter.config.get("modules_to_save") or [] if f"{m}.weight" not in _KINDS]
    config = {**adapter.config, "modules_to_save": kept_modules or None}
    return NewEmbeddings(tensors, tuple(moved), replace(adapter, entries=rest, config=config))


def _num_new_tokens(adapter: Adapter, entry: TensorEntry, old: TensorEntry | None) -> int:
    file = adapter.folder / ADDED_TOKENS
    if file.is_file():
        num_new = int(read_json(file).get("num_new_tokens", 0))
    elif old is not None:
        num_new = entry.shape[0] - old.shape[0]
    else:
        raise ModelError(f"{adapter.folder} has no {ADDED_TOKENS} and its base is not known: how many tokens are new?")
    if not 0 < num_new <= entry.shape[0]:
        raise ModelError(
            f"{adapter.folder} holds embeddings, but {num_new} tokens are new.",
            hint="Merge the adapter instead: merge_adapter.",
        )
    return num_new
