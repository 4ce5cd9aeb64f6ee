"""`create_vllm_compatible_adapter`: an adapter that vLLM loads, with nothing lost, by headers and bytes alone."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning.atomic_io import refuse_occupied, staged
from finetuning.errors import ModelError, StorageError
from finetuning.export.inputs import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, BaseModel, read_adapter, read_base
from finetuning.export.safetensors_writer import copied, read_metadata, require_room, write_tensor_file
from finetuning.export.vllm.checks import VllmCheck, check_for_vllm
from finetuning.export.vllm.new_embeddings import NEW_EMBEDDINGS, split_new_embeddings

ORIGINAL = "old_with_extra_layers_adapter_model.safetensors"
ORIGINAL_CONFIG = "old_with_extra_layers_adapter_config.json"
SERVING = "serving.json"
_SMALL_FILES_BYTES = 16 << 20


@dataclass(frozen=True)
class VllmAdapter:
    """What was done, and how the result is served."""

    folder: Path
    changed: bool
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    command: str


def make_vllm_compatible(
    model_path: Path, *, base_name: str | None = None, output: Path | None = None, new_embeddings: bool = False
) -> VllmAdapter:
    """The adapter in `model_path` made loadable for vLLM, there (the original stays beside it) or in `output`.

    Raises:
        ModelError: it cannot be served as an adapter without losing something; nothing is changed.
        StorageError: `output` is not empty, or the original's second name is taken.
    """
    _refuse_other_things(model_path)
    if output is not None:
        refuse_occupied(output)
    adapter = read_adapter(str(model_path))
    base = find_base(adapter, base_name)
    extra = None
    if new_embeddings:
        extra = split_new_embeddings(adapter, base)
        adapter = extra.rest if extra is not None else adapter
    check = check_for_vllm(adapter, base)
    if check.blockers:
        raise _not_servable(model_path, adapter, check)
    target = output or model_path
    serving = _serving(adapter, check, base, target)
    changed = extra is not None or not check.is_unchanged(adapter)

    def write_weights(file: Path) -> None:
        tensors = [copied(name, entry) for name, entry in sorted(check.kept.items(), key=lambda item: item[1].start)]
        write_tensor_file(file, tensors, read_metadata(model_path / ADAPTER_WEIGHTS))

    if output is not None:
        require_room(output, sum(entry.num_bytes for entry in check.kept.values()) + _SMALL_FILES_BYTES)
        with staged(output) as folder:
            _copy_others(model_path, folder)
            write_weights(folder / ADAPTER_WEIGHTS)
            _write_json(folder / ADAPTER_CONFIG, check.config)
            _write_json(folder / SERVING, serving)
            if extra is not None:
                extra.write(folder / NEW_EMBEDDINGS)
    else:
        if changed:
            _replace_in_place(model_path, write_weights, check.config, adapter.config)
        if extra is not None:
            _publish_file(model_path / NEW_EMBEDDINGS, extra.write)
        _publish_file(model_path / SERVING, lambda file: _write_json(file, serving))
    dropped = tuple(check.dropped) + (extra.moved if extra is not None else ())
    return VllmAdapter(target, changed, dropped, tuple(check.notes), serving["command"])


def _refuse_other_things(model_path: Path) -> None:
    """Nothing, or a ModelError when there is no adapter but something else, or nothing at all."""
    if not model_path.is_dir():
        raise ModelError(f"there is no folder {model_path}")
    if not (model_path / ADAPTER_CONFIG).is_file() and (model_path / "config.json").is_file():
        raise ModelError(
            f"{model_path} holds a whole model, not an adapter; vLLM serves it as it is:"
            f" vllm serve {shlex.quote(str(model_path.absolute()))}"
        )


def find_base(adapter: Adapter, base_name: str | None) -> BaseModel | None:
    """The base given, or the one that the adapter's config names when that is a folder here; else None."""
    if base_name is not None:
        return read_base(base_name)
    named = adapter.config.get("base_model_name_or_path")
    return read_base(named) if named and (Path(named) / "config.json").is_file() else None


def _serving(adapter: Adapter, check: VllmCheck, base: BaseModel | None, target: Path) -> dict[str, Any]:
    """serving.json: how vLLM is started with this adapter."""
    named = adapter.config.get("base_model_name_or_path")
    model = str(base.folder.absolute()) if base is not None else named
    if not model:
        raise ModelError(
            f"{adapter.folder / ADAPTER_CONFIG} does not name the base model.", hint="Name it with --base."
        )
    path, name = str(target.absolute()), target.absolute().name
    words = ["vllm", "serve", model, "--enable-lora", "--max-lora-rank", str(check.max_lora_rank)]
    words += ["--lora-modules", f"{name}={path}"]
    template = adapter.folder / "chat_template.jinja"
    known = base.folder / "chat_template.jinja" if base is not None else None
    if template.is_file() and not (known and known.is_file() and known.read_bytes() == template.read_bytes()):
        words += ["--chat-template", f"{path}/chat_template.jinja"]
    return {
        "command": shlex.join(words),
        "base_model": model,
        "adapter": {"name": name, "path": path, "rank": check.rank},
        "max_lora_rank": check.max_lora_rank,
        "notes": check.notes,
    }


def _not_servable(model_path: Path, adapter: Adapter, check: VllmCheck) -> ModelError:
    base = adapter.config.get("base_model_name_or_path") or "BASE"
    reasons = "; ".join(check.blockers[:3]) + (
        f"; and {len(check.blockers) - 3} more" if len(check.blockers) > 3 else ""
    )
    folder = model_path.resolve()
    command = shlex.join(["merge_adapter", str(base), str(folder), f"{folder}-merged"])
    return ModelError(
        f"{model_path} cannot be served by vLLM as an adapter without losing something: {reasons}.",
        hint=f"Merge it instead: {command}",
    )


def _replace_in_place(
    folder: Path, write_weights: Callable[[Path], None], config: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    """New weights and config under the usual names; the original keeps a second name. Each step leaves a whole adapter.

    Raises:
        StorageError: the second name is taken already.
    """
    if (folder / ORIGINAL).exists():
        raise StorageError(
            f"{folder / ORIGINAL} exists already and may be the only copy of an original.",
            hint="Move it away, or write to another folder with --output.",
        )
    require_room(folder, (folder / ADAPTER_WEIGHTS).stat().st_size + _SMALL_FILES_BYTES)
    os.link(folder / ADAPTER_WEIGHTS, folder / ORIGINAL)
    try:
        _publish_file(folder / ADAPTER_WEIGHTS, write_weights)
    except BaseException:
        (folder / ORIGINAL).unlink()
        raise
    if dict(config) != dict(before):
        _publish_file(folder / ORIGINAL_CONFIG, lambda file: shutil.copyfile(folder / ADAPTER_CONFIG, file))
        _publish_file(folder / ADAPTER_CONFIG, lambda file: _write_json(file, config))


def _publish_file(target: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside its name, flushes it, gives it the umask's mode, and puts it in place at one stroke."""
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


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _copy_others(source: Path, folder: Path) -> None:
    """Copies the files beside the adapter: tokenizer, template, generation config; no weights, no checkpoints."""
    weights = (".safetensors", ".bin", ".pt", ".pth")
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and file.suffix not in weights
            and file.name not in (ADAPTER_CONFIG, ORIGINAL_CONFIG, SERVING)
        ):
            shutil.copyfile(file, folder / file.name)
