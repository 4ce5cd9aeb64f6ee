"""`merge_adapter`: a base model and adapters become one model, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.atomic_io import atomic_directory, require_empty
from finetuning.errors import ModelError
from finetuning.export.auxiliary_files import select_tokenizer_folder, write_auxiliary_files
from finetuning.export.inputs import Adapter, BaseModel, read_adapter, read_base, resolve_folder
from finetuning.export.merge.deltas import NeedsPeft
from finetuning.export.merge.merge_plan import MergePlan, plan_merge
from finetuning.export.merge.shard_stream import Progress, write_merged
from finetuning.export.merge.verification import MergeVerification, check_free_memory, verify_merge
from finetuning.export.merge.with_peft import (
    DeviceMap,
    check_device_map,
    check_mergeable,
    merge_with_peft,
)
from finetuning.export.safetensors_writer import check_free_space
from finetuning.model import fingerprint

_SMALL_FILES_BYTES = 64 << 20
_MOST_LOST = 0.5


@dataclass(frozen=True)
class MergeResult:
    """What a merge made."""

    out: Path
    num_bytes: int
    streamed: bool
    verification: MergeVerification | None


def merge_adapters(
    base_name: str,
    adapter_names: Sequence[str],
    out: Path,
    *,
    tokenizer: str | None = None,
    device_map: DeviceMap = None,
    verify: bool = True,
    force: bool = False,
    allow_pickle: bool = False,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> MergeResult:
    """One model in `out`, made of the base and the adapters, merged one after the other in the order given.

    Raises:
        ModelError: base or adapter is missing, damaged, of another kind, or does not fit.
        StorageError: `out` is not empty, or the disk has no room; nothing is left behind.
        GuardStopped: the merged model is not base plus adapter; nothing is left behind.
    """
    require_empty(out)
    base = read_base(base_name, allow_pickle=allow_pickle)
    adapters = [read_adapter(name, allow_pickle=allow_pickle) for name in adapter_names]
    # An adapter that follows another may have been trained on what came out before it, which has no record here.
    known_base = _check_fingerprint(base, adapters[0], force, log)
    plan = plan_merge(base, adapters, force=force)
    if isinstance(plan, NeedsPeft):
        for adapter in adapters:
            check_mergeable(adapter)
    if verify or isinstance(plan, NeedsPeft):
        check_device_map(device_map)
    for note in (*plan.notes, *_other_name(base, adapters[0])):
        log(note)
    check_free_space(out, base.num_bytes + _SMALL_FILES_BYTES)
    if verify:
        check_free_memory(base)
    given = resolve_folder(tokenizer, "tokenizer") if tokenizer is not None else None
    verification = None
    with atomic_directory(out) as folder:
        num_rows = _write_model(base, adapters, plan, folder, given, device_map, progress)
        if verify:
            log("verifying: the merged model against base and adapter")
            verification = verify_merge(
                base, adapters, folder, device_map=device_map, base_fingerprint=known_base, num_rows=num_rows
            )
            _warn_of_rounding_loss(verification, log)
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return MergeResult(out, num_bytes, isinstance(plan, MergePlan), verification)


def _write_model(
    base: BaseModel,
    adapters: Sequence[Adapter],
    plan: MergePlan | NeedsPeft,
    folder: Path,
    tokenizer: Path | None,
    device_map: DeviceMap,
    progress: Progress | None,
) -> int | None:
    """Writes weights and all that goes along into `folder`; returns the rows of the input embeddings, where known."""
    changes: Mapping[str, Any] | None = None
    folders = [adapter.folder for adapter in adapters]
    tokenizer = select_tokenizer_folder(tokenizer, folders, base.folder)
    if isinstance(plan, MergePlan):
        write_merged(base, plan, folder, progress)
        changes, num_rows = plan.config_changes, _embedding_rows(base, plan)
    else:
        num_rows = merge_with_peft(base, adapters, folder, tokenizer, device_map)
    write_auxiliary_files(folder, base, folders, tokenizer, changes, num_rows)
    return num_rows


def _warn_of_rounding_loss(verification: MergeVerification, log: Callable[[str], None]) -> None:
    if verification.lost_share > _MOST_LOST:
        log(
            f"warning: rounding to {verification.dtype} loses {verification.lost_share:.0%} of the adapter's effect;"
            " serve the adapter unmerged, or merge into a base of float32"
        )


def _embedding_rows(base: BaseModel, plan: MergePlan) -> int | None:
    rows = plan.config_changes.get("vocab_size") or base.text_config.get("vocab_size")
    return int(rows) if rows is not None else None


def _other_name(base: BaseModel, adapter: Adapter) -> list[str]:
    """A note where the adapter names another base and nothing was recorded that would log the two apart."""
    named = str(adapter.config.get("base_model_name_or_path") or "")
    folder = base.folder.resolve()
    same = Path(named).name in (base.folder.name, folder.name) or f"models--{named.replace('/', '--')}" in folder.parts
    if not named or same or fingerprint.read_fingerprint(adapter.folder) is not None:
        return []
    return [
        f"note: the adapter names {named} as its base; whether {base.folder} has the same weights was not recorded at"
        " training, only names and shapes are compared"
    ]


def _check_fingerprint(base: BaseModel, adapter: Adapter, force: bool, log: Callable[[str], None]) -> str:
    """What is known of the base that the adapter was trained on, for the verification.

    Raises:
        ModelError: it is another one, and `force` is off.
    """
    recorded = fingerprint.read_fingerprint(adapter.folder)
    if recorded is None:
        return "not recorded at training"
    if not fingerprint.can_fingerprint(base.folder):
        return "not compared: the base has no safetensors weights"
    differs = fingerprint.describe_difference(recorded, fingerprint.compute_fingerprint(base.folder))
    if differs is None:
        return f"the base recorded at training ({recorded})"
    text = f"the adapter {adapter.folder} was trained on another base than {base.folder}: {differs}."
    if not force:
        raise ModelError(text, hint="Name the base that it was trained on; --force merges it anyway.")
    log(text)
    return f"another base than the one recorded at training: {differs}"
