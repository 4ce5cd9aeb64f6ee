"""Describe how to start vLLM with an adapter, for serving.json.

What vLLM reads for every request, with an adapter or without, belongs to the base model unless the command says
otherwise. Source: vllm 0.32, `v1/engine/input_processor.py` (stop ids: the end token of the tokenizer, and
`eos_token_id` of the generation config), `config/model.py` (`--generation-config`) and `renderers/` (the tokenizer, and
the chat template). It has no tokenizer or generation config of an adapter's own.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TypedDict

from finetuning.errors import ModelError
from finetuning.export.inputs import ADAPTER_CONFIG, Adapter, BaseModel, read_base, read_json
from finetuning.export.vllm.checks import VllmCheck
from finetuning.model.fingerprint import read_fingerprint
from finetuning.model.safetensors_io import GENERATION_CONFIG

SERVING = "serving.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_CHAT_TEMPLATE = "chat_template.jinja"


class ServedAdapter(TypedDict):
    """The adapter in serving.json."""

    name: str
    path: str
    rank: int


class Serving(TypedDict):
    """The content of serving.json: how to start vLLM with an adapter."""

    command: str
    base_model: str
    adapter: ServedAdapter
    max_lora_rank: int
    notes: list[str]


def find_base(adapter: Adapter, base_name: str | None) -> BaseModel | None:
    """Return the named base, or the one that the adapter's config names if its files are on this machine; else None."""
    if base_name is not None:
        return read_base(base_name)
    named = str(adapter.config.get("base_model_name_or_path") or "")
    folder = Path(named).expanduser() if named else None
    if folder is None or not (folder / "config.json").is_file():
        folder = _cached_folder(named)
    return read_base(str(folder)) if folder is not None else None


def _cached_folder(name: str) -> Path | None:
    """Return the folder of a hub id in the hub's cache, if its weights are there; the hub is not queried."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from finetuning.model.resolve import is_local_path

    if not name or is_local_path(name):
        return None
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def describe_serving(
    adapter: Adapter, check: VllmCheck, base: BaseModel | None, *, base_name: str | None, files: Path, target: Path
) -> Serving:
    """Return the content of serving.json.

    Args:
        base_name: the base that the user named, if any.
        files: folder with the adapter's tokenizer, chat template and generation config.
        target: folder that vLLM will read the adapter from.

    Raises:
        ModelError: nothing names the base model.
    """
    requested = base_name or adapter.config.get("base_model_name_or_path")
    if not requested:
        raise ModelError(
            f"{adapter.folder / ADAPTER_CONFIG} does not name the base model.", hint="Name it with --base."
        )
    folder = Path(requested).expanduser()
    model = str(folder.absolute()) if folder.is_dir() else str(requested)
    path, name = str(target.absolute()), target.absolute().name
    words = ["vllm", "serve", model, "--enable-lora", "--max-lora-rank", str(check.max_lora_rank)]
    words += ["--lora-modules", f"{name}={path}"]
    if _differs(files, base, *_TOKENIZER_FILES):
        words += ["--tokenizer", path]
    if _differs(files, base, GENERATION_CONFIG):
        words += ["--generation-config", path]
    if _differs(files, base, _CHAT_TEMPLATE):
        words += ["--chat-template", f"{path}/{_CHAT_TEMPLATE}"]
    notes = list(check.notes)
    recorded = read_fingerprint(adapter.folder)
    if recorded is not None and recorded.quantization is not None:
        notes.append(
            f"the adapter was trained on a base quantized by {recorded.quantization.get('quant_method')}, and this"
            " command serves the base in full precision; merge_adapter measures the difference, and merges into the"
            " trained weights with --dequantize"
        )
    if base is None:
        notes.append(
            f"the base model {requested} was not found on this machine: its tokenizer, chat template and stop tokens"
            " were not compared with the adapter's, and the command uses the adapter's; name its folder with --base"
        )
    return {
        "command": shlex.join(words),
        "base_model": model,
        "adapter": {"name": name, "path": path, "rank": check.rank},
        "max_lora_rank": check.max_lora_rank,
        "notes": notes,
    }


def _differs(files: Path, base: BaseModel | None, *names: str) -> bool:
    """Whether the adapter has one of the files, and the base does not have the same."""
    return any((files / name).is_file() and not _has_same(files / name, base) for name in names)


def _has_same(file: Path, base: BaseModel | None) -> bool:
    base_file = base.folder / file.name if base is not None else None
    if base_file is None or not base_file.is_file():
        return False
    if file.read_bytes() == base_file.read_bytes():
        return True
    if file.suffix != ".json":
        return False
    mine, theirs = read_json(file), read_json(base_file)
    for values in (mine, theirs):
        values.pop("transformers_version", None)
    return mine == theirs
