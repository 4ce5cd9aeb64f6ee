"""Merge adapters into a base model: plan, write, verify and publish atomically (the command `merge_adapter`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetuning.atomic_io import (
    atomic_directory,
    digest_files,
    find_manifest_mismatch,
    require_empty,
    write_manifest,
)
from finetuning.errors import GuardStopped, Location, ModelError
from finetuning.export.auxiliary_files import select_tokenizer_folder, write_auxiliary_files
from finetuning.export.inputs import Adapter, BaseModel, read_adapter, read_base, read_json, resolve_folder
from finetuning.export.merge.apply import ChangedElements
from finetuning.export.merge.deltas import NeedsPeft
from finetuning.export.merge.merge_plan import MergePlan, plan_merge
from finetuning.export.merge.shard_stream import Progress, write_merged
from finetuning.export.merge.verification import (
    EXACT_DTYPES,
    VERIFICATION_FILE,
    MergeVerification,
    check_free_memory,
    verify_merge,
)
from finetuning.export.merge.with_peft import (
    DeviceMap,
    merge_with_peft,
)
from finetuning.export.safetensors_writer import check_free_space
from finetuning.model import fingerprint
from finetuning.model.older_checkpoint import find_stop_token_repair, read_generation_config
from finetuning.model.peft.adapter_files import check_mergeable
from finetuning.model.stop_tokens import copy_ids_to_model_config

_INPUTS_FILE = "merge_inputs.json"
_INPUT_PATTERNS = (
    "adapter_*", "config.json", "generation_config.json", "model*.safetensors*", "pytorch_model*", "*.model", "*.py",
    "token*", "special_tokens_map.json", "added_tokens*", "vocab*", "merges.txt", "chat_template*",
)  # fmt: skip
_SMALL_FILES_BYTES = 64 << 20
_MAX_ROUNDING_LOSS = 0.5
_MIN_SURVIVING_SHARE = 0.5


@dataclass(frozen=True)
class MergeResult:
    """The merged model."""

    out: Path
    num_bytes: int
    """Size of the weight files."""
    streamed: bool
    """Whether it was merged tensor by tensor; False if PEFT merged it in memory."""
    verification: MergeVerification | None
    """The comparison with base and adapters; None if it was skipped."""
    existed: bool = False
    """Whether the folder held this very merge before, complete and unchanged, and nothing was done."""


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
    dequantize: bool = False,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge adapters into a base model, one after the other in the given order, and save the model to `out`.

    Args:
        tokenizer: tokenizer to save with the model; by default the last adapter's, or else the base's.
        device_map: where models are loaded, for verification and for merges by PEFT.
        verify: compare the merged model with base and adapters before it is published.
        force: merge even if the base is not the recorded one, the adapter leaves out layers, or rounding loses most of
            what it changes.
        dequantize: merge into the weights that training had: those of the base, quantized as it was there.
        log: called with each note and warning.
        progress: called with the bytes written and the total.

    Raises:
        ModelError: the base or an adapter is missing, damaged, of an unsupported kind, or they do not fit together.
        StorageError: `out` holds something else than this merge, or the disk is full; nothing is left behind.
        GuardStopped: the merged model differs from base and adapters, or rounding loses most of what the adapters
            change; nothing is left behind.
    """
    _check_output(out)
    base = read_base(base_name, allow_pickle=allow_pickle)
    adapters = [read_adapter(name, allow_pickle=allow_pickle) for name in adapter_names]
    tokenizer_source = resolve_folder(tokenizer, "tokenizer") if tokenizer is not None else None
    quantization = _trained_quantization(base, adapters[-1], required=dequantize)
    inputs = _describe_inputs(base, adapters, tokenizer_source) | ({"dequantized": True} if dequantize else {})
    if _is_merged(out, inputs, verify):
        return MergeResult(out, _num_bytes(out), streamed=False, verification=None, existed=True)
    base_fingerprint = _check_fingerprint(base, adapters[0], force, log)
    plan = _plan(base, adapters, force=force, dequantize=dequantize, verify=verify, device_map=device_map, log=log)
    check_free_space(out, base.num_bytes + _SMALL_FILES_BYTES)
    with atomic_directory(out) as folder:
        merged_into = quantization if dequantize else None
        num_rows, elements = _write_model(
            base, adapters, plan, folder, tokenizer_source, device_map, log, progress, merged_into
        )
        _check_surviving_share(elements, force, log)
        verification = None
        if verify:
            log("verifying the merged model against base and adapter")
            verification = verify_merge(
                base, adapters, folder, device_map=device_map, num_rows=num_rows, base_fingerprint=base_fingerprint,
                surviving_share=elements.surviving_share, quantization=quantization, is_dequantized=dequantize,
            )  # fmt: skip
            _warn_of_losses(verification, dequantize, log)
        (folder / _INPUTS_FILE).write_text(json.dumps(inputs, indent=1) + "\n", encoding="utf-8")
        write_manifest(folder)
    return MergeResult(out, _num_bytes(out), isinstance(plan, MergePlan), verification)


def _plan(
    base: BaseModel,
    adapters: Sequence[Adapter],
    *,
    force: bool,
    dequantize: bool,
    verify: bool,
    device_map: DeviceMap,
    log: Callable[[str], None],
) -> MergePlan | NeedsPeft:
    """Return how to merge, checked, and log what is to be known about it."""
    plan = plan_merge(base, adapters, force=force)
    if dequantize:
        plan = NeedsPeft("the base is quantized as in training; the adapter is merged into its dequantized weights")
    _check_plan(plan, base, adapters, verify, device_map)
    for note in (*plan.notes, *_note_on_other_base(base, adapters[0])):
        log(note)
    return plan


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _describe_inputs(base: BaseModel, adapters: Sequence[Adapter], tokenizer: Path | None) -> dict[str, object]:
    """Return digests of all files that a merge reads. Where the folders are makes no difference."""
    folders = [base.folder, *(adapter.folder for adapter in adapters), *([tokenizer] if tokenizer else [])]
    contents = [
        digest_files(folder, {path for pattern in _INPUT_PATTERNS for path in folder.glob(pattern)})
        for folder in folders
    ]
    num_models = 1 + len(adapters)
    return {"base": contents[0], "adapters": contents[1:num_models], "tokenizer": contents[num_models:]}


def _check_output(out: Path) -> None:
    """Raise StorageError before anything is read, unless a folder is new, empty or a finished merge."""
    if not (out / _INPUTS_FILE).is_file():
        require_empty(out)


def _is_merged(out: Path, inputs: Mapping[str, object], verify: bool) -> bool:
    """Return whether a folder holds the complete merge of these inputs, with every file as it was written.

    One that was not verified counts only if no verification is asked for.

    Raises:
        StorageError: the folder holds anything else.
    """
    has_files = (out / _INPUTS_FILE).is_file() and ((out / VERIFICATION_FILE).is_file() or not verify)
    if has_files and read_json(out / _INPUTS_FILE) == inputs and find_manifest_mismatch(out) is None:
        return True
    require_empty(out)
    return False


def _check_plan(
    plan: MergePlan | NeedsPeft, base: BaseModel, adapters: Sequence[Adapter], verify: bool, device_map: DeviceMap
) -> None:
    if isinstance(plan, NeedsPeft):
        for adapter in adapters:
            check_mergeable(adapter.folder, adapter.config)
    if verify or isinstance(plan, NeedsPeft):
        from finetuning.model.hardware import check_device_map

        check_device_map(device_map, Location(key="--device_map"))
    if verify:
        check_free_memory(base)


def _write_model(
    base: BaseModel,
    adapters: Sequence[Adapter],
    plan: MergePlan | NeedsPeft,
    folder: Path,
    tokenizer: Path | None,
    device_map: DeviceMap,
    log: Callable[[str], None],
    progress: Progress | None,
    quantization: Mapping[str, object] | None = None,
) -> tuple[int | None, ChangedElements]:
    """Write weights and auxiliary files into `folder`.

    Returns:
        The rows of the input embeddings if they are known; how many changed elements survive rounding.
    """
    changes: Mapping[str, int] | None = None
    folders = [adapter.folder for adapter in adapters]
    tokenizer = select_tokenizer_folder(tokenizer, folders, base.folder)
    if isinstance(plan, MergePlan):
        elements = write_merged(base, plan, folder, progress)
        changes, num_rows = plan.config_changes, _embedding_rows(base, plan)
    else:
        num_rows, elements = merge_with_peft(base, adapters, folder, tokenizer, device_map, quantization)
    write_auxiliary_files(folder, base, folders, tokenizer, changes, num_rows)
    repair = find_stop_token_repair(folders[-1], read_generation_config(base.folder))
    if repair is not None:
        log(f"note: {repair.note}")
        repair.write(folder, tokenizer=tokenizer == folders[-1])
    copy_ids_to_model_config(folder)
    return num_rows, elements


def _check_surviving_share(elements: ChangedElements, force: bool, log: Callable[[str], None]) -> None:
    """Raise GuardStopped if most changes are smaller than what the base's dtype resolves, unless `force` is set."""
    share = elements.surviving_share
    if share is None or share >= _MIN_SURVIVING_SHARE:
        return
    message = (
        f"rounding to the base's dtype loses what the adapter changes: of {elements.changed:,} changed elements that"
        f" were counted, {elements.surviving:,} ({share:.1%}) still differ from the base after rounding"
    )
    if not force:
        raise GuardStopped(
            f"{message}.",
            hint="Nothing was published. Serve the adapter unmerged, merge into a copy of the base in float32, or merge"
            " anyway with --force.",
        )
    log(f"warning: {message}")


def _warn_of_losses(verification: MergeVerification, is_dequantized: bool, log: Callable[[str], None]) -> None:
    _warn_of_rounding_loss(verification, log)
    _warn_of_quantization(verification, is_dequantized, log)


def _warn_of_rounding_loss(verification: MergeVerification, log: Callable[[str], None]) -> None:
    if verification.rounding_loss <= _MAX_ROUNDING_LOSS:
        return
    if verification.dtype in EXACT_DTYPES:
        effect = verification.base_against_adapter.max_logit_difference
        log(f"warning: the adapter changes almost nothing: logits by at most {effect:.2g}, about what rounding changes")
    else:
        log(
            f"warning: rounding to {verification.dtype} loses {verification.rounding_loss:.0%} of the adapter's effect;"
            " serve the adapter unmerged, or merge into a base of float32"
        )


def _trained_quantization(base: BaseModel, adapter: Adapter, *, required: bool) -> dict[str, object] | None:
    """Return how training quantized the base of an adapter; None if it did not, or the base's files are quantized.

    Raises:
        ModelError: it is required, and there is none.
    """
    recorded = fingerprint.read_fingerprint(adapter.folder)
    quantization = recorded.quantization if recorded is not None else None
    if base.config.get("quantization_config"):
        quantization = None
    if required and quantization is None:
        raise ModelError(
            f"--dequantize: {adapter.folder} has no record that its base was quantized in training.",
            hint="Merge without --dequantize.",
        )
    return quantization


def _warn_of_quantization(verification: MergeVerification, is_dequantized: bool, log: Callable[[str], None]) -> None:
    method = verification.trained_quantization
    if verification.not_measured is not None:
        log(
            f"warning: the adapter was trained on a base quantized by {method}; how far the merged model differs from"
            f" that was not measured: {verification.not_measured}"
        )
    elif verification.differs_from_trained:
        hint = "" if is_dequantized else "; merge with --dequantize to get the weights that were trained"
        log(
            f"warning: the adapter was trained on a base quantized by {method}, and the merged model differs from that"
            f" by more than rounding: {verification.merged_against_trained}{hint}"
        )


def _embedding_rows(base: BaseModel, plan: MergePlan) -> int | None:
    rows = plan.config_changes.get("vocab_size") or base.text_config.get("vocab_size")
    return int(rows) if rows is not None else None


def _note_on_other_base(base: BaseModel, adapter: Adapter) -> list[str]:
    """Return a note if the adapter names another base and has no fingerprint that could settle whether it differs."""
    named = str(adapter.config.get("base_model_name_or_path") or "")
    folder = base.folder.resolve()
    # The hub's cache names a repository's folder by this scheme.
    is_same = (
        Path(named).name in (base.folder.name, folder.name) or f"models--{named.replace('/', '--')}" in folder.parts
    )
    if not named or is_same or fingerprint.read_fingerprint(adapter.folder) is not None:
        return []
    return [
        f"note: the adapter names {named} as its base and has no fingerprint of it: whether {base.folder} has the same"
        " weights is unknown; only names and shapes are checked"
    ]


def _check_fingerprint(base: BaseModel, adapter: Adapter, force: bool, log: Callable[[str], None]) -> str:
    """Compare the base with the fingerprint that the adapter recorded in training, and return the result in words.

    Only the first adapter's base is checked: a later one may have been trained on the result of an earlier merge, whose
    fingerprint is not recorded.

    Raises:
        ModelError: the fingerprints differ, and `force` is off.
    """
    recorded = fingerprint.read_fingerprint(adapter.folder)
    if recorded is None:
        return "not recorded at training"
    if not fingerprint.can_fingerprint(base.folder):
        return "not compared: the base has no safetensors weights"
    difference = fingerprint.describe_difference(recorded, fingerprint.compute_fingerprint(base.folder))
    if difference is None:
        return f"the base recorded at training ({recorded})"
    message = f"the adapter {adapter.folder} was trained on another base than {base.folder}: {difference}."
    if not force:
        raise ModelError(message, hint="Name the base that it was trained on, or merge anyway with --force.")
    log(message)
    return f"another base than the one recorded at training: {difference}"
