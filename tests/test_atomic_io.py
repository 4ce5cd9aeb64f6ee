"""Folders that appear whole: staging, modes, manifests."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from finetuning.atomic_io import (
    MANIFEST,
    atomic_directory,
    block_sums,
    find_manifest_mismatch,
    remove_staging_directories,
    staging_path,
    write_manifest,
)
from finetuning.errors import StorageError


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), atomic_directory(target) as staging:
        (staging / "half").write_text("x")
        assert not target.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(target) as staging:
        (staging / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "whole").read_text() == "x"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_modes_that_the_umask_asks_for(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "model") as staging:
            file = staging / "weights"
            file.write_text("x")
            file.chmod(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model" / "weights").stat().st_mode) == mode


def test_what_was_published_is_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with atomic_directory(target) as staging:
        (staging / "a").write_text("first")
    with pytest.raises(StorageError, match="is not empty"), atomic_directory(target):
        pass
    assert (target / "a").read_text() == "first"


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    staging_path(tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / ".hidden").mkdir()
    assert [path.name for path in remove_staging_directories(tmp_path)] == [".checkpoint-4.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "checkpoint-2"]


def test_a_manifest_finds_what_changed(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "weights").write_bytes(bytes(1000))
    (tmp_path / "inner" / "state").write_text("x")
    assert find_manifest_mismatch(tmp_path) == "manifest.json is missing"
    write_manifest(tmp_path)
    assert sorted(json.loads((tmp_path / MANIFEST).read_text())) == ["inner/state", "weights"]
    assert find_manifest_mismatch(tmp_path) is None
    (tmp_path / "weights").write_bytes(bytes(999))
    assert find_manifest_mismatch(tmp_path) == "weights has 999 bytes, 1,000 were written"
    (tmp_path / "weights").write_bytes(bytes(500) + b"1" + bytes(499))
    assert find_manifest_mismatch(tmp_path) == "weights is not what was written"
    (tmp_path / "weights").unlink()
    assert find_manifest_mismatch(tmp_path) == "weights is missing"
    (tmp_path / MANIFEST).write_text("{")
    assert find_manifest_mismatch(tmp_path) == "manifest.json cannot be read"
    for text in ("{}", "[]", "3"):
        (tmp_path / MANIFEST).write_text(text)
        assert find_manifest_mismatch(tmp_path) == "manifest.json lists no files"
    for text in ('{"inner/state": 1}', '{"inner/state": {}}', '{"inner/state": {"bytes": "1"}}'):
        (tmp_path / MANIFEST).write_text(text)
        assert find_manifest_mismatch(tmp_path) == "manifest.json has no size of inner/state"
    (tmp_path / MANIFEST).write_text('{"inner/state": {"bytes": 1}}')
    assert find_manifest_mismatch(tmp_path) == "inner/state is not what was written"


def test_a_file_that_is_read_must_be_listed_in_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"a")
    write_manifest(tmp_path)
    (tmp_path / "b.pt").write_bytes(b"b")
    (tmp_path / "notes.txt").write_bytes(b"c")
    assert find_manifest_mismatch(tmp_path, ("*.pt",)) == "b.pt is not listed in manifest.json"
    assert find_manifest_mismatch(tmp_path) is None


@pytest.mark.parametrize("offset", [0, 2**20 + 12_345, 50 * 2**20 - 1, 65 * 2**20 + 2])
def test_one_changed_byte_of_a_large_file_is_found(tmp_path: Path, offset: int) -> None:
    file = tmp_path / "weights"
    file.touch()
    os.truncate(file, 65 * 2**20 + 3)
    write_manifest(tmp_path)
    assert find_manifest_mismatch(tmp_path) is None
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"1")
    assert find_manifest_mismatch(tmp_path) == "weights is not what was written"


def test_a_manifest_of_an_earlier_version_has_no_sums(tmp_path: Path) -> None:
    os.truncate(os.open(tmp_path / "weights", os.O_CREAT | os.O_WRONLY), 65 * 2**20)
    write_manifest(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["weights"]["sums_sha256"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert find_manifest_mismatch(tmp_path) is None


def test_block_sums_are_those_of_numpy(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 2**64, 3 * 2**17 + 5, np.uint64, endpoint=False)
    file = tmp_path / "data"
    file.write_bytes(b"xyz" + data.tobytes())
    sums = np.frombuffer(block_sums(file, 3, 3 + data.nbytes), "<u8")
    assert sums.tolist() == [int(data[start : start + 2**17].sum()) for start in range(0, len(data), 2**17)]
