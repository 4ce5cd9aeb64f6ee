"""Convert an adapter so that vLLM can serve it, without loss (the command `create_vllm_compatible_adapter`).

Works on headers and bytes alone: no torch, no model in memory. Tensors that equal the base's are dropped. The rows of
new tokens can be moved to `new_embeddings.safetensors`, which vLLM read until November 2025.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.atomic_io import atomic_directory, require_empty, update_manifest
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
from finetuning.export.safetensors_writer import check_free_space, copied_tensor, read_metadata, write_tensor_file
from finetuning.export.vllm.checks import VllmCheck, base_tensor, check_for_vllm, first_rows_equal
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
        new_embeddings: whether to move the rows of new tokens to `new_embeddings.safetensors`.
        initial_adapter: the adapter before training, for an initialization that changed the base's weights.

    Raises:
        ModelError: it cannot be served as an adapter without loss; nothing is changed.
        StorageError: `output` is not empty, or there is a file with the other name already.
    """
    _require_adapter(model_path)
    if output is not None:
        require_empty(output)
    original = read_adapter(str(model_path))
    base = find_base(original, base_name)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = _as_plain_lora(original, base, initial_adapter, Path(scratch))
        extra = split_new_embeddings(adapter, base) if new_embeddings else None
        check = check_for_vllm(extra.rest if extra is not None else adapter, base)
        if check.blockers:
            raise _not_servable(original, check)
        conversion = _Conversion(original, base, base_name, check, extra, _find_stop_token_repair(model_path, base))
        serving = conversion.write_in_place() if output is None else conversion.write_to(output)
    dropped = tuple(check.dropped) + (extra.moved if extra is not None else ())
    repair = conversion.repair
    notes = (*serving["notes"], *([repair.note] if repair is not None else []))
    return VllmAdapter(output or model_path, conversion.is_changed, dropped, notes, serving["command"])


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
        check_free_space(output, sum(entry.num_bytes for entry in self.check.kept.values()) + _SMALL_FILES_BYTES)
        with atomic_directory(output) as folder:
            _copy_auxiliary_files(self.adapter.folder, folder)
            if self.repair is not None:
                self.repair.write(folder)
            self._write_weights(folder / ADAPTER_WEIGHTS)
            _write_json(folder / ADAPTER_CONFIG, self.check.config)
            write_adapter_fingerprint(folder)
            serving = self._describe(folder, output)
            _write_json(folder / SERVING, serving)
            if self.extra is not None:
                self.extra.write(folder / NEW_EMBEDDINGS)
        return serving

    def write_in_place(self) -> Serving:
        """Replace the files that change, and return the content of serving.json."""
        folder = self.adapter.folder
        if self.is_changed:
            # A conversion that is interrupted leaves a complete adapter without a fingerprint.
            (folder / ADAPTER_FINGERPRINT_FILE).unlink(missing_ok=True)
            _replace_in_place(folder, self._write_weights, self.check.config, self.adapter.config)
            write_adapter_fingerprint(folder)
        if self.extra is not None:
            _publish_file(folder / NEW_EMBEDDINGS, self.extra.write)
        if self.repair is not None:
            _repair_in_place(folder, self.repair)
        serving = self._describe(folder, folder)
        _publish_file(folder / SERVING, lambda file: _write_json(file, serving))
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


def _repair_in_place(folder: Path, repair: StopTokenRepair) -> None:
    """Replace the checkpoint's configs and tokenizer one by one, and their entries in its manifest."""
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        repair.write(Path(staging))
        names = sorted(file.name for file in Path(staging).iterdir())
        for name in names:
            source = Path(staging, name)
            _publish_file(folder / name, lambda file, source=source: shutil.copyfile(source, file))
    update_manifest(folder, names)


def _require_adapter(model_path: Path) -> None:
    """Raise ModelError if the folder does not exist or contains a whole model."""
    if not model_path.is_dir():
        raise ModelError(f"there is no folder {model_path}")
    if not (model_path / ADAPTER_CONFIG).is_file() and (model_path / "config.json").is_file():
        raise ModelError(
            f"{model_path} contains a whole model, not an adapter; vLLM serves it unchanged:"
            f" vllm serve {shlex.quote(str(model_path.absolute()))}"
        )


def _not_servable(adapter: Adapter, check: VllmCheck) -> ModelError:
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
    return ModelError(f"vLLM cannot serve {adapter.folder} as an adapter without loss: {reasons}.", hint=hint)


def _replace_in_place(
    folder: Path, write_weights: Callable[[Path], None], config: Mapping[str, object], before: Mapping[str, object]
) -> None:
    """Replace weights and config; the original stays under another name. Every step leaves a complete adapter.

    Raises:
        StorageError: there is a file with the other name already.
    """
    if (folder / ORIGINAL).exists():
        raise StorageError(
            f"{folder / ORIGINAL} exists and may be the only copy of an original adapter.",
            hint="Move it away, or write to another folder with --output.",
        )
    check_free_space(folder, (folder / ADAPTER_WEIGHTS).stat().st_size + _SMALL_FILES_BYTES)
    os.link(folder / ADAPTER_WEIGHTS, folder / ORIGINAL)
    try:
        _publish_file(folder / ADAPTER_WEIGHTS, write_weights)
    except BaseException:
        (folder / ORIGINAL).unlink()
        raise
    if dict(config) != dict(before):
        _publish_file(folder / ORIGINAL_CONFIG, lambda file: shutil.copyfile(folder / ADAPTER_CONFIG, file))
        _publish_file(folder / ADAPTER_CONFIG, lambda file: _write_json(file, config))


def _publish_file(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically, with the permissions of the umask: under a temporary name, flushed, then renamed."""
    staging = target.with_name(f".{target.name}.partial")
    try:
        write(staging)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(staging, 0o666 & ~umask)
        with staging.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(staging, target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def _write_json(file: Path, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _copy_auxiliary_files(source: Path, folder: Path) -> None:
    """Copy the adapter's other files, such as tokenizer, chat template and generation config, but no weights."""
    weights = (".safetensors", ".bin", ".pt", ".pth")
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and file.suffix not in weights
            and file.name not in (ADAPTER_CONFIG, ORIGINAL_CONFIG, SERVING, ADAPTER_FINGERPRINT_FILE)
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


def split_new_embeddings(adapter: Adapter, base: BaseModel | None) -> NewEmbeddings | None:
    """Separate the rows of new tokens from the rest; return None if the adapter contains no embeddings.

    Raises:
        ModelError: the number of new rows is unknown or zero, or rows of old tokens were trained as well.
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
                f"{key}: the base already has rows for the {num_new} new tokens; {NEW_EMBEDDINGS} would repeat them.",
                hint="Merge the adapter instead: merge_adapter.",
            )
        if old is not None and not (old.shape[0] + num_new == entry.shape[0] and first_rows_equal(entry, old)):
            raise ModelError(
                f"{key} differs from the base's in rows of old tokens, for which {NEW_EMBEDDINGS} has no place.",
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
