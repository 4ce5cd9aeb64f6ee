"""Convert an adapter so that vLLM can serve it, without loss (the command `create_vllm_compatible_adapter`).

Works on headers and bytes alone: no torch, no model in memory. Tensors that equal the base's are dropped. The rows of
new tokens can be moved to `new_embeddings.safetensors`, which vLLM read until November 2025.
"""

from __future__ import annotations

import filecmp
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.atomic_io import MANIFEST, atomic_directory, fsync, require_empty, update_manifest
from finetuning.config.yaml.reader import read_document
from finetuning.errors import ModelError, StorageError
from finetuning.export.auxiliary_files import max_token_id
from finetuning.export.inputs import (
    ADAPTER_CONFIG,
    Adapter,
    BaseModel,
    read_adapter,
    read_json,
)
from finetuning.export.merge.deltas import PREFIX
from finetuning.export.merge.merge_plan import has_tied_embeddings
from finetuning.export.safetensors_writer import (
    check_free_space,
    copied_tensor,
    read_metadata,
    same_bytes,
    write_tensor_file,
)
from finetuning.export.vllm.checks import TOKEN_ROWS, VllmCheck, base_tensor, check_for_vllm, first_rows_equal
from finetuning.export.vllm.serving import SERVING, Serving, describe_serving, find_base
from finetuning.model.fingerprint import ADAPTER_FINGERPRINT_FILE, write_adapter_fingerprint
from finetuning.model.peft.lora_support import lora_init
from finetuning.model.safetensors_io import (
    ADAPTER_WEIGHTS,
    ADDED_TOKENS_FILE,
    TensorEntry,
    read_header,
    read_model_headers,
)

if TYPE_CHECKING:
    from finetuning.model.older_checkpoint import StopTokenRepair

ORIGINAL = "old_with_extra_layers_adapter_model.safetensors"
ORIGINAL_CONFIG = "old_with_extra_layers_adapter_config.json"
_SMALL_FILES_BYTES = 16 << 20
NEW_EMBEDDINGS = "new_embeddings.safetensors"
_KINDS = {
    "lm_head.weight": "output_embeddings",
    "embed_tokens.weight": "input_embeddings",
    "wte.weight": "input_embeddings",
}
_MERGE = "vLLM needs it merged: merge_adapter"
_MERGE_ORIGINAL = "merge the adapter as it was trained: merge_adapter"


class NotServableError(ModelError):
    """vLLM cannot serve the adapter without loss. It is unchanged."""


@dataclass(frozen=True)
class VllmAdapter:
    """A converted adapter, and how to serve it."""

    folder: Path
    changed: bool
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    command: str


def make_vllm_compatible(
    model_path: Path,
    *,
    base_name: str | None = None,
    output: Path | None = None,
    new_embeddings: bool = False,
    initial_adapter: str | None = None,
) -> VllmAdapter:
    """Convert the adapter in `model_path` in place, keeping the original under another name, or into `output`.

    Args:
        base_name: the base model, if not the one that the adapter's config names.
        new_embeddings: whether to move the rows of new tokens to `new_embeddings.safetensors`. If the adapter has
            these rows only, because it was trained on an extended base, `base_name` must be the base without them.
        initial_adapter: the adapter before training, for an initialization that changed the base's weights.

    Raises:
        NotServableError: it cannot be served as an adapter without loss; nothing is changed.
        ModelError: a file is missing or damaged.
        StorageError: `output` is not empty, or there is a file with the other name already.
    """
    _require_adapter(model_path)
    if output is not None:
        require_empty(output)
    original = read_adapter(str(model_path))
    base = find_base(original, base_name)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = _as_plain_lora(original, base, initial_adapter, Path(scratch))
        extra = split_new_embeddings(adapter, base, base_name) if new_embeddings else None
        check = check_for_vllm(extra.rest if extra is not None else adapter, base)
        if check.blockers:
            raise _not_servable(original, check)
        conversion = _Conversion(original, base, base_name, check, extra, _find_stop_token_repair(model_path, base))
        serving = conversion.write_in_place() if output is None else conversion.write_to(output)
    dropped = tuple(check.dropped) + (extra.moved if extra is not None else ())
    repair = conversion.repair
    notes = (*serving["notes"], *([repair.note] if repair is not None else []))
    if extra is not None:
        notes = (*notes, f"{NEW_EMBEDDINGS} is read by vLLM before November 2025; for a later one, {_MERGE_ORIGINAL}")
    return VllmAdapter(output or model_path, conversion.is_changed, dropped, notes, serving["command"])


def plan_serving(model_path: Path, base_name: str | None = None) -> Serving | None:
    """Return how to serve an adapter as it is; None if it has to be converted first. Nothing is written.

    Raises:
        NotServableError: it cannot be served as an adapter without loss.
        ModelError: a file is missing or damaged.
    """
    _require_adapter(model_path)
    adapter = read_adapter(str(model_path))
    base = find_base(adapter, base_name)
    init = lora_init(adapter.config)
    if adapter.peft_type == "LORA" and init.changes_base and init.is_convertible:
        return None
    check = check_for_vllm(adapter, base)
    if check.blockers:
        raise _not_servable(adapter, check)
    conversion = _Conversion(adapter, base, base_name, check, None, _find_stop_token_repair(model_path, base))
    if conversion.is_changed or conversion.repair is not None:
        return None
    return describe_serving(adapter, check, base, base_name=base_name, files=model_path, target=model_path)


@dataclass(frozen=True)
class _Conversion:
    """What to write for vLLM."""

    adapter: Adapter
    """The adapter as it is."""
    base: BaseModel | None
    base_name: str | None
    check: VllmCheck
    extra: NewEmbeddings | None
    repair: StopTokenRepair | None

    @property
    def is_changed(self) -> bool:
        return self.extra is not None or not self.check.is_unchanged(self.adapter)

    def write_to(self, output: Path) -> Serving:
        """Write a new folder, and return the content of its serving.json."""
        check_free_space(output, self._num_bytes)
        with atomic_directory(output) as folder:
            return self._write_files(folder, output)

    def write_in_place(self) -> Serving:
        """Replace the files that change, and return the content of serving.json.

        The new files are copied from the old ones, so nothing is replaced before all of them are written and verified.
        """
        folder = self.adapter.folder
        if self.is_changed:
            _require_no_original(folder)
            check_free_space(folder, self._num_bytes)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".vllm-", suffix=".partial") as name:
            staging = Path(name)
            serving = self._write_files(staging, folder, includes_adapter=self.is_changed)
            _flush(staging)
            if self.is_changed:
                _replace_adapter(folder, staging)
            # The other files are copies, unless an older checkpoint was repaired.
            repaired = [file.name for file in sorted(staging.iterdir()) if not _has_same_content(file, folder)]
            for file_name in repaired:
                os.replace(staging / file_name, folder / file_name)
        update_manifest(folder, set(repaired) - {SERVING})
        fsync(folder)
        return serving

    @property
    def _num_bytes(self) -> int:
        entries = [*self.check.kept.values(), *(self.extra.tensors.values() if self.extra is not None else ())]
        return sum(entry.num_bytes for entry in entries) + _SMALL_FILES_BYTES

    def _write_files(self, folder: Path, target: Path, *, includes_adapter: bool = True) -> Serving:
        """Write the converted adapter into an empty folder, and compare its tensors with those they were copied from.

        Args:
            target: folder that vLLM will read the adapter from.
        """
        _copy_auxiliary_files(self.adapter.folder, folder)
        if self.repair is not None:
            self.repair.write(folder)
        if includes_adapter:
            self._write_weights(folder / ADAPTER_WEIGHTS)
            _check_tensors(folder / ADAPTER_WEIGHTS, self.check.kept)
            _write_json(folder / ADAPTER_CONFIG, self.check.config)
            write_adapter_fingerprint(folder)
        if self.extra is not None:
            self.extra.write(folder / NEW_EMBEDDINGS)
            _check_tensors(folder / NEW_EMBEDDINGS, self.extra.tensors)
        serving = self._describe(folder, target)
        _write_json(folder / SERVING, serving)
        return serving

    def _write_weights(self, file: Path) -> None:
        kept = sorted(self.check.kept.items(), key=lambda item: item[1].start)
        metadata = read_metadata(self.adapter.folder / ADAPTER_WEIGHTS)
        write_tensor_file(file, [copied_tensor(name, entry) for name, entry in kept], metadata)

    def _describe(self, files: Path, target: Path) -> Serving:
        return describe_serving(
            self.adapter, self.check, self.base, base_name=self.base_name, files=files, target=target
        )


def _as_plain_lora(adapter: Adapter, base: BaseModel | None, initial_name: str | None, scratch: Path) -> Adapter:
    """Return the adapter converted to a plain LoRA if its initialization changed the base, and that is possible.

    Raises:
        ModelError: the initial adapter is not one, or was named for nothing.
    """
    init = lora_init(adapter.config)
    if adapter.peft_type != "LORA" or not init.is_convertible:
        if initial_name is not None:
            raise ModelError(
                f"{adapter.folder} needs no initial adapter: its initialization ({init.label}) did not change the base"
                " in a way that can be converted"
            )
        return adapter
    from finetuning.export.plain_lora import convert_to_plain_lora, find_initial_adapter

    initial = find_initial_adapter(adapter, base, initial_name)
    return adapter if initial is None else convert_to_plain_lora(adapter, initial, scratch)


def _find_stop_token_repair(folder: Path, base: BaseModel | None) -> StopTokenRepair | None:
    """Return how to repair a checkpoint of an earlier version; None for any other adapter."""
    if not (folder / "trainer_state.json").is_file():
        return None
    # It needs transformers, which most conversions do without.
    from finetuning.model.older_checkpoint import find_stop_token_repair, read_generation_config

    return find_stop_token_repair(folder, read_generation_config(base.folder) if base is not None else None)


def _require_adapter(model_path: Path) -> None:
    """Raise ModelError if the folder does not exist or contains a whole model."""
    if not model_path.is_dir():
        raise ModelError(f"there is no folder {model_path}")
    if not (model_path / ADAPTER_CONFIG).is_file() and (model_path / "config.json").is_file():
        raise ModelError(
            f"{model_path} contains a whole model, not an adapter; vLLM serves it unchanged:"
            f" vllm serve {shlex.quote(str(model_path.absolute()))}"
        )


def _not_servable(adapter: Adapter, check: VllmCheck) -> NotServableError:
    base = adapter.config.get("base_model_name_or_path") or "BASE"
    reasons = "; ".join(check.blockers[:3]) + (
        f"; and {len(check.blockers) - 3} more" if len(check.blockers) > 3 else ""
    )
    init = lora_init(adapter.config)
    folder = adapter.folder.resolve()
    command = shlex.join(["merge_adapter", str(base), str(folder), f"{folder}-merged"])
    hint = f"Merge it instead: {command}"
    if adapter.peft_type == "LORA" and init.is_convertible:
        hint = "Name the adapter as it was saved before training with --initial-adapter."
        if init.is_repeated:
            hint = f"Name the base with --base, and it is converted, or merge it instead: {command}"
    return NotServableError(f"vLLM cannot serve {adapter.folder} as an adapter without loss: {reasons}.", hint=hint)


def _require_no_original(folder: Path) -> None:
    """Raise StorageError if an earlier conversion kept an original, which this one would overwrite."""
    if (folder / ORIGINAL).exists():
        raise StorageError(
            f"{folder / ORIGINAL} exists and may be the only copy of an original adapter.",
            hint="Move it away, or write to another folder with --output.",
        )


def _check_tensors(file: Path, expected: Mapping[str, TensorEntry]) -> None:
    """Compare the tensors of a new file with those that they were copied from, byte by byte.

    Raises:
        StorageError: one is missing or differs.
    """
    written = read_header(file)
    wrong = [name for name, entry in expected.items() if name not in written or not same_bytes(written[name], entry)]
    if wrong or len(written) != len(expected):
        raise StorageError(
            f"{file.name} was read back with different content ({', '.join(wrong[:3]) or 'names'});"
            " the adapter is unchanged.",
            hint="Check the disk, or write to another one with --output.",
        )


def _flush(staging: Path) -> None:
    """Flush new files to disk, with the permissions of the umask: what follows only renames them."""
    umask = os.umask(0)
    os.umask(umask)
    for file in staging.iterdir():
        os.chmod(file, 0o666 & ~umask)
        fsync(file)


def _replace_adapter(folder: Path, staging: Path) -> None:
    """Move weights, config and new embeddings from `staging` to `folder`, and keep the original under another name.

    An interruption leaves a complete adapter without a fingerprint, or one whose original is complete.
    """
    if (staging / NEW_EMBEDDINGS).is_file():
        os.replace(staging / NEW_EMBEDDINGS, folder / NEW_EMBEDDINGS)
    (folder / ADAPTER_FINGERPRINT_FILE).unlink(missing_ok=True)
    os.link(folder / ADAPTER_WEIGHTS, folder / ORIGINAL)
    os.replace(staging / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    if read_json(staging / ADAPTER_CONFIG) != read_json(folder / ADAPTER_CONFIG):
        shutil.copyfile(folder / ADAPTER_CONFIG, folder / ORIGINAL_CONFIG)
        os.replace(staging / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    else:
        (staging / ADAPTER_CONFIG).unlink()
    os.replace(staging / ADAPTER_FINGERPRINT_FILE, folder / ADAPTER_FINGERPRINT_FILE)


def _has_same_content(file: Path, folder: Path) -> bool:
    """Whether a folder has a file of this name and content."""
    existing = folder / file.name
    return existing.is_file() and filecmp.cmp(file, existing, shallow=False)


def _write_json(file: Path, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _copy_auxiliary_files(source: Path, folder: Path) -> None:
    """Copy the adapter's other files, such as tokenizer, chat template and generation config, but no weights."""
    weights = (".safetensors", ".bin", ".pt", ".pth")
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and file.suffix not in weights
            and file.name not in (ADAPTER_CONFIG, ORIGINAL_CONFIG, SERVING, ADAPTER_FINGERPRINT_FILE, MANIFEST)
        ):
            shutil.copyfile(file, folder / file.name)


@dataclass(frozen=True)
class NewEmbeddings:
    """The embedding rows of new tokens, and the adapter without its embeddings."""

    tensors: Mapping[str, TensorEntry]
    moved: tuple[str, ...]
    rest: Adapter

    def write(self, file: Path) -> None:
        write_tensor_file(file, [copied_tensor(name, entry) for name, entry in self.tensors.items()], {"format": "pt"})


def split_new_embeddings(adapter: Adapter, base: BaseModel | None, base_name: str | None) -> NewEmbeddings | None:
    """Separate the rows of new tokens from the rest; return None if the adapter contains no embeddings.

    The adapter has either whole embeddings (`modules_to_save`) or single rows (`trainable_token_indices`). The latter
    belong to an extended base, and the result to the one without the new rows, `base_name`.

    Raises:
        NotServableError: rows of old tokens were trained as well, or new tokens have rows in the base.
        ModelError: the number of new rows is unknown or zero.
    """
    tensors: dict[str, TensorEntry] = {}
    moved: list[str] = []
    config = dict(adapter.config)
    for key, entry in adapter.entries.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(TOKEN_ROWS, ".weight")
        kind = next((kind for end, kind in _KINDS.items() if name.endswith(end) and ".lora_" not in key), None)
        if kind is None:
            continue
        old = base_tensor(base, name) if base else None
        if key.endswith(TOKEN_ROWS):
            _check_token_rows(adapter, key, entry, old)
            tensors[kind] = entry
            config["base_model_name_or_path"] = base_name or config.get("base_model_name_or_path")
        else:
            tensors[kind] = _last_rows(adapter, key, entry, old)
        moved.append(key)
    if not moved:
        return None
    if base is not None and has_tied_embeddings(base) and "input_embeddings" in tensors:
        tensors.setdefault("output_embeddings", tensors["input_embeddings"])
    rest = {key: entry for key, entry in adapter.entries.items() if key not in moved}
    kept_modules = [m for m in config.get("modules_to_save") or [] if f"{m}.weight" not in _KINDS]
    config["modules_to_save"] = kept_modules or None
    return NewEmbeddings(tensors, tuple(moved), replace(adapter, entries=rest, config=config))


def _last_rows(adapter: Adapter, key: str, entry: TensorEntry, old: TensorEntry | None) -> TensorEntry:
    """Return the rows of new tokens at the end of whole embeddings."""
    num_new = _num_new_tokens(adapter, entry, old)
    if old is not None and old.shape[0] == entry.shape[0]:
        raise NotServableError(
            f"{key}: the base already has rows for the {num_new} new tokens; {NEW_EMBEDDINGS} would repeat them.",
            hint="Merge the adapter instead: merge_adapter.",
        )
    if old is not None and not (old.shape[0] + num_new == entry.shape[0] and first_rows_equal(entry, old)):
        raise NotServableError(
            f"{key} differs from the base's in rows of old tokens, for which {NEW_EMBEDDINGS} has no place.",
            hint="Merge the adapter instead: merge_adapter.",
        )
    start = entry.stop - entry.num_bytes // entry.shape[0] * num_new
    return TensorEntry(entry.file, entry.dtype, (num_new, *entry.shape[1:]), start, entry.stop)


def _check_token_rows(adapter: Adapter, key: str, entry: TensorEntry, old: TensorEntry | None) -> None:
    """Check that single trained rows are those of new tokens: vLLM appends them to the rows of the base."""
    module = key.removesuffix(TOKEN_ROWS)
    indices = adapter.config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        indices = next((ids for name, ids in indices.items() if module.endswith(name)), None)
    if old is None:
        raise ModelError(
            f"{key}: which of its {entry.shape[0]} rows are new is unknown without the base.",
            hint="Name the base without the new tokens with --base.",
        )
    if indices != list(range(old.shape[0], old.shape[0] + entry.shape[0])):
        raise NotServableError(
            f"{key} has rows of tokens that the base has rows for (it has {old.shape[0]}), and vLLM appends the rows of"
            f" {NEW_EMBEDDINGS} to the base's.",
            hint="Name the base that has no rows for the new tokens with --base, or merge the adapter: merge_adapter.",
        )


def _num_new_tokens(adapter: Adapter, entry: TensorEntry, old: TensorEntry | None) -> int:
    file = adapter.folder / ADDED_TOKENS_FILE
    if file.is_file():
        num_new = int(read_json(file).get("num_new_tokens", 0))
    elif old is not None:
        num_new = entry.shape[0] - old.shape[0]
    else:
        raise ModelError(
            f"the number of new tokens is unknown: {adapter.folder} has no {ADDED_TOKENS_FILE}, and no base is known.",
            hint="Name the base with --base.",
        )
    if not 0 < num_new <= entry.shape[0]:
        raise ModelError(
            f"{adapter.folder} contains embeddings, but {num_new} new tokens.",
            hint="Merge the adapter instead: merge_adapter.",
        )
    return num_new


def extra_layers_reason(config_file: str, folder: Path) -> str | None:
    """Return why the adapter needs its layers other than LoRA; None if they are copies of the base's.

    They were trained, and so are needed, if the whole model was trained (NO_PEFT), if `modules_to_save` was set, or if
    the vocabulary was resized.

    Raises:
        ConfigError: the training config is not valid YAML.
        ModelError: a file in the folder is damaged.
    """
    config = read_document(config_file)
    if config.get(("peft_conf", "peft_type")) == "NO_PEFT":
        return "NO_PEFT trained the whole model; vLLM serves it unchanged"
    modules = config.get(("peft_conf", "peft_kwargs", "modules_to_save"))
    if modules:
        named = modules if isinstance(modules, list) else [modules]
        return f"modules_to_save trained {', '.join(map(str, named))}; {_MERGE}"
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if base and (Path(base) / "config.json").is_file() and (folder / ADAPTER_WEIGHTS).is_file():
        rows = _embedding_rows(Path(base))
        saved = [
            e.shape[0] for n, e in read_header(folder / ADAPTER_WEIGHTS).items() if n.endswith("embed_tokens.weight")
        ]
        largest = max_token_id(folder)
        if rows and (any(count > rows for count in saved) or (largest is not None and largest >= rows)):
            return f"the vocabulary has more tokens than the base's {rows} rows; {_MERGE}"
    return None


def _embedding_rows(base: Path) -> int | None:
    entries = read_model_headers(base)
    return next((e.shape[0] for n, e in entries.items() if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
