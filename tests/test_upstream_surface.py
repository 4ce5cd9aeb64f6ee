"""The private methods and attributes of upstream libraries that this package uses are known, and as they were read."""

from __future__ import annotations

import pytest
from upstream_surface import Entry, missing_entries, read_table

TABLE = read_table()


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"{entry.owner.partition(':')[2]}.{entry.name}")
def test_upstream_is_as_it_was_read(entry: Entry) -> None:
    name = f"{entry.owner}.{entry.name}"
    assert entry.exists(), f"{name} is gone. It was {entry.use}: {entry.why}"
    assert entry.digest() == entry.sha256, (
        f"the source of {name} has changed. It is {entry.use}: {entry.why}. Read the change, adapt our code, and run"
        " `make upstream-surface`."
    )


def test_every_private_upstream_name_is_in_the_table() -> None:
    assert missing_entries(TABLE) == []


def test_an_unlisted_override_and_an_unlisted_attribute_are_reported() -> None:
    shorter = [entry for entry in TABLE if entry.name not in ("_save", "_n_gpu")]
    missing = [text.rpartition(": ")[2] for text in missing_entries(shorter)]
    assert missing == ["_n_gpu", "_save of transformers.trainer:Trainer"]


def test_entries_are_unique() -> None:
    assert len({(entry.owner, entry.name) for entry in TABLE}) == len(TABLE)
