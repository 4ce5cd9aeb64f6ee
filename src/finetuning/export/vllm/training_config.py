"""What a training config says about the layers in an adapter beside its LoRA."""

from __future__ import annotations

from pathlib import Path

from finetuning.config.yaml.reader import read_document
from finetuning.export.auxiliary_files import largest_id
from finetuning.export.inputs import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from finetuning.model.safetensors_io import read_header, read_model_headers

_MERGE = "vLLM needs it merged: merge_adapter"


def why_layers_are_needed(config_file: str, folder: Path) -> str | None:
    """Why nothing may be removed from what was trained so; None when extra layers are only copies.

    They are needed when the whole model was trained (NO_PEFT), when modules were named to be saved, and when the
    vocabulary grew: in each case they were trained.

    Raises:
        ConfigError: the file is no YAML.
        ModelError: the folder's files are damaged.
    """
    peft = read_document(config_file).values.get("peft_conf") or {}
    if peft.get("peft_type") == "NO_PEFT":
        return "NO_PEFT trained the whole model; vLLM serves it as it is"
    modules = (peft.get("peft_kwargs") or {}).get("modules_to_save")
    if modules:
        return f"modules_to_save trained {', '.join(map(str, modules))}; {_MERGE}"
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if base and (Path(base) / "config.json").is_file() and (folder / ADAPTER_WEIGHTS).is_file():
        rows = _embedding_rows(Path(base))
        saved = [
            e.shape[0] for n, e in read_header(folder / ADAPTER_WEIGHTS).items() if n.endswith("embed_tokens.weight")
        ]
        largest = largest_id(folder)
        if rows and (any(count > rows for count in saved) or (largest is not None and largest >= rows)):
            return f"the vocabulary grew beyond the base's {rows} rows; {_MERGE}"
    return None


def _embedding_rows(base: Path) -> int | None:
    entries = read_model_headers(base)
    return next((e.shape[0] for n, e in entries.items() if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
