"""Prepared rows as a folder: Arrow files that are mapped into memory, their ledger, their first rows, what they are of.

The folder appears whole or not at all, and is read only where its files are those that its manifest names.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.atomic_io import manifest_fault, staged, write_manifest
from finetuning.data.columns import as_dataset
from finetuning.data.ledger import Ledger, PartLedger
from finetuning.data.preview import PreviewRow
from finetuning.data.statistics import fate_of, totals_of, values_of
from finetuning.errors import Place

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

META = "prepared.json"
FORM = 2
"""Changes whenever what a folder holds is written in another way."""


@dataclass(frozen=True)
class Inputs:
    """All that prepared rows depend on; each value is text that tells one from another."""

    data: dict[str, str]
    """SHA-256 of each file or dataset, in order, by name."""
    template: str
    tokenizer: str
    rules: dict[str, str]
    """Settings of the method and of `data_conf`, by key."""
    versions: dict[str, str]

    def changes_since(self, former: Inputs) -> list[str]:
        """What differs from former inputs, a phrase each."""
        changes = []
        if self.data != former.data:
            changed = [name for name, digest in self.data.items() if former.data.get(name) != digest]
            gone = [name for name in former.data if name not in self.data]
            changes.append(f"the data ({', '.join((changed + gone)[:3]) or 'its order'})")
        changes += ["the chat template"] * (self.template != former.template)
        changes += ["the tokenizer"] * (self.tokenizer != former.tokenizer)
        for ours, theirs in ((self.rules, former.rules), (self.versions, former.versions)):
            for key in dict.fromkeys([*ours, *theirs]):
                if ours.get(key) != theirs.get(key):
                    changes.append(f"{key} ({theirs.get(key, 'unset')} before, {ours.get(key, 'unset')} now)")
        return changes


@dataclass(frozen=True)
class Stored:
    """What a folder of prepared rows holds."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    ledger: Ledger
    preview: list[PreviewRow]
    inputs: Inputs


def write(
    target: Path,
    train: datasets.Dataset,
    validation: datasets.Dataset | None,
    ledger: Ledger,
    preview: list[PreviewRow],
    inputs: Inputs,
    *,
    shards: int = 1,
) -> None:
    """Writes a folder of prepared rows.

    Raises:
        StorageError: `target` is there and not empty.
    """
    with staged(target) as folder:
        for name, dataset in (("train", train), ("validation", validation)):
            if dataset is not None:
                for index in range(shards):
                    part = dataset.shard(shards, index, contiguous=True) if shards > 1 else dataset
                    _write_table(folder / f"{name}-{index:05}-of-{shards:05}.arrow", part)
        meta = {
            "form": FORM,
            "rows": len(train),
            "inputs": asdict(inputs),
            "ledger": [
                {"totals": values_of(part.totals), "fates": [asdict(fate) for fate in part.fates]}
                for part in ledger.parts
            ],
            "preview": [asdict(row) for row in preview],
        }
        (folder / META).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
        write_manifest(folder)


def read(folder: Path) -> Stored | str:
    """What the folder holds, or why it cannot be used."""
    fault = manifest_fault(folder)
    if fault:
        return fault
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{META} is missing or damaged"
    if meta.get("form") != FORM:
        return "it was written by another version of the engine"
    train, validation = (_read_tables(folder, name) for name in ("train", "validation"))
    if train is None:
        return "there are no training rows in it"
    return Stored(
        train,
        validation,
        Ledger(
            tuple(
                PartLedger(totals_of(one["totals"]), [fate_of(fate) for fate in one["fates"]]) for one in meta["ledger"]
            )
        ),
        [_preview(row) for row in meta["preview"]],
        Inputs(**meta["inputs"]),
    )


def inputs_of(folder: Path) -> Inputs | None:
    """What the rows of a folder depend on; None where it cannot be told."""
    try:
        return Inputs(**json.loads((folder / META).read_text(encoding="utf-8"))["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_table(path: Path, dataset: datasets.Dataset) -> None:
    import pyarrow as pa

    table = dataset.with_format("arrow")[:].replace_schema_metadata()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _read_tables(folder: Path, name: str) -> datasets.Dataset | None:
    from datasets.table import MemoryMappedTable, concat_tables

    tables: list[pa.Table] = [MemoryMappedTable.from_file(str(one)) for one in sorted(folder.glob(f"{name}-*.arrow"))]
    if not tables:
        return None
    return as_dataset(tables[0] if len(tables) == 1 else concat_tables(tables))


def _preview(values: dict[str, Any]) -> PreviewRow:
    segments = tuple((text, trained) for text, trained in values["segments"])
    return PreviewRow(**{**values, "place": Place(**values["place"]), "segments": segments})
