"""Checkpoints are uploaded during training, here to an S3 server."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetuning.atomic_io import find_manifest_mismatch
from finetuning.callbacks.checkpoint_upload import CheckpointUploader, make_uploader
from finetuning.cli.main import main
from finetuning.errors import ConfigError

SAVED = {"training_args.save_strategy": "steps", "training_args.save_steps": 1, "training_args.save_total_limit": 1}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server on the loopback device, with a bucket `runs`, in the environment for clients."""
    import s3fs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    deadline = time.monotonic() + 400
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
            break
        except OSError:
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.1)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("runs")
    yield address
    server.terminate()
    server.wait()


def test_each_checkpoint_is_uploaded_completely(train: Any, sft_values: Any, s3: str, tmp_path: Path) -> None:
    import s3fs

    run = train(sft_values({**SAVED, "run_conf.copy_checkpoints_to": "s3://runs/colors"}))
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    assert [name.rpartition("/")[2] for name in sorted(store.ls("runs/colors"))] == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-final",
    ]
    for folder in ("checkpoint-3", "checkpoint-final"):
        entries = json.loads(store.cat(f"runs/colors/{folder}/manifest.json"))
        assert "model.safetensors" in entries
        for name, entry in entries.items():
            assert store.info(f"runs/colors/{folder}/{name}")["size"] == entry["bytes"]
    record = json.loads((run.output_dir / "run.json").read_text())
    assert record["uploaded_checkpoints"] == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-final"]
    assert record["upload_errors"] == []
    local = run.output_dir / "checkpoint-3" / "model.safetensors"
    assert store.cat("runs/colors/checkpoint-3/model.safetensors") == local.read_bytes()
    assert not list(run.output_dir.glob(".*copying*"))


def test_a_store_that_fails_costs_a_warning(
    sft_values: Any, write_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    (tmp_path / "a-file").write_text("not a folder")
    config = write_config(sft_values({**SAVED, "run_conf.copy_checkpoints_to": str(tmp_path / "a-file")}))
    assert main(["sft", str(config)]) == 0
    assert "checkpoint-1 was not uploaded to" in caplog.text
    out = tmp_path / "out"
    assert "checkpoint-final was not uploaded to" in json.loads((out / "run.json").read_text())["upload_errors"][-1]
    assert f"nothing to {tmp_path}/a-file; checkpoint-final was not uploaded" in capsys.readouterr().out
    assert not list(out.glob(".*copying*"))


def test_the_next_start_uploads_the_model_of_a_killed_run(train: Any, sft_values: Any, tmp_path: Path) -> None:
    store = tmp_path / "store"
    values = sft_values({"run_conf.resume_from_checkpoint": "auto", "run_conf.copy_checkpoints_to": str(store)})
    first = train(values)
    shutil.rmtree(store)
    record = first.output_dir / "run.json"
    record.write_text(record.read_text().replace('"completed"', '"running"'))
    assert train(values).result.status == "already complete"
    assert find_manifest_mismatch(store / "checkpoint-final") is None
    assert (store / "checkpoint-final" / "manifest.json").is_file()


def test_a_store_that_hangs_is_not_waited_for(tmp_path: Path, caplog: Any) -> None:
    class Hangs(CheckpointUploader):
        def _upload(self, folder: Path, address: str) -> None:
            time.sleep(30)

    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "weights").write_text("w")
    with caplog.at_level(logging.WARNING):
        uploader = Hangs("memory://store")
        for _ in range(4):
            uploader.add(folder)
        uploader.finish(0.2)
    assert any("earlier uploads are not done" in error for error in uploader.errors)
    assert uploader.errors[-1] == "remaining files was not uploaded to memory://store: not done after 0 s"
    assert uploader.summary() == f"nothing to memory://store; {uploader.errors[-1]}"


def test_an_unknown_scheme_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"run_conf.copy_checkpoints_to: .*gopher"):
        make_uploader("gopher://x", is_main=True)
    assert make_uploader(None, is_main=True) is None
    assert make_uploader("gopher://x", is_main=False) is None
