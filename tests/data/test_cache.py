"""Prepared rows are found again by all that they depend on, by several processes, and never half made."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import ForkServer, Process, wait_all

from finetuning.atomic_io import MANIFEST, write_manifest
from finetuning.config.sections.data import ChatTemplateName, DataConfig
from finetuning.config.sections.training import SFTArgs
from finetuning.data import cache
from finetuning.data import prepared as prepared_module
from finetuning.data.cache import cache_folder, prune
from finetuning.data.chat.template import get_template
from finetuning.data.pipeline import PreparedData, prepare_sft
from finetuning.errors import DataError, StorageError

from .conversations import assistant, user


def chat(index: int) -> dict[str, Any]:
    return {"messages": [user(f"What is {index}?"), assistant(f"It is {index}.")]}


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    template = get_template(ChatTemplateName.CHAT_ML)
    assert template is not None
    return make_tokenizer("byte-level", template.source, template.special_tokens)


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: Any, write_lines: Callable[..., str]) -> Callable[..., PreparedData]:
    """A function that prepares `a.jsonl` with the cache in `cache`."""
    path = write_lines("a.jsonl", *(chat(index) for index in range(40)), chat(1), {"messages": [user("Hi")]})

    def call(another: Any = None, conf: dict[str, Any] | None = None, **args: Any) -> PreparedData:
        values = {
            "training_data": {"type": "CONCATENATION", "datasets": [{"path": path}]},
            "validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
            "chat_template_name": "chat-ml",
            "cache": str(tmp_path / "cache"),
            **(conf or {}),
        }
        inputs = {"train_on_completions_only": True, "max_seq_length": 64, **args}
        return prepare_sft(DataConfig.model_validate(values), SFTArgs.model_validate(inputs), another or tokenizer)

    return call


def entries(folder: Path) -> list[Path]:
    return [item for item in (folder / "cache").iterdir() if item.is_dir()]


def test_a_second_run_reads_what_the_first_wrote(prepare: Any, tmp_path: Path, monkeypatch: Any) -> None:
    first = prepare()
    assert "no similar entry in the cache" in first.origin
    monkeypatch.setattr("finetuning.data.preprocessor.Preprocessor.read", None)
    second = prepare()
    assert "read from the cache: same data, template, tokenizer and rules" in second.origin
    assert second.train.to_list() == first.train.to_list()
    assert second.validation.to_list() == first.validation.to_list()
    assert second.train.features == first.train.features
    assert second.statistics == first.statistics
    assert second.preview == first.preview
    assert second.fingerprint == first.fingerprint
    assert len(entries(tmp_path)) == 1


def test_without_a_cache_the_rows_are_the_same(prepare: Any, tmp_path: Path) -> None:
    off = prepare(conf={"cache": "off"})
    assert off.origin == "prepared now; the cache is off"
    assert not (tmp_path / "cache").exists()
    assert off.train.to_list() == prepare().train.to_list()
    assert off.fingerprint == prepare().fingerprint


def test_a_change_is_named(prepare: Any, tmp_path: Path, tokenizer: Any, make_tokenizer: Any, monkeypatch: Any) -> None:
    prepare()
    assert "sft_args.max_seq_length (64 before, 32 now)" in prepare(max_seq_length=32).origin
    assert "data_conf.max_lost_fraction (0.05 before, 0.5 now)" in prepare(conf={"max_lost_fraction": 0.5}).origin
    with open(tmp_path / "a.jsonl", "a") as stream:
        stream.write(json.dumps(chat(99)) + "\n")
    assert f"changed since the most similar entry: the data ({tmp_path}/a.jsonl)" in prepare().origin
    assert "the chat template" not in prepare().origin
    tokenizer.chat_template += " "
    assert prepare().origin.endswith("changed since the most similar entry: the chat template")
    another = make_tokenizer("byte-level", tokenizer.chat_template, (), add_bos=True)
    assert prepare(another).origin.endswith("changed since the most similar entry: the tokenizer")
    monkeypatch.setattr("finetuning.data.prepared.RULES", "x")
    assert 'rules ("2" before, "x" now)' in prepare().origin


def test_other_projects_are_not_described(prepare: Any, tmp_path: Path, monkeypatch: Any) -> None:
    prepare()
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    assert prepare(max_seq_length=32).origin.endswith("no similar entry in the cache")
    assert "max_seq_length (32 before, 48 now)" in prepare(max_seq_length=48).origin
    monkeypatch.chdir(tmp_path)
    assert "read from the cache" in prepare(max_seq_length=32).origin, "what is cached is shared nevertheless"


def test_settings_that_touch_no_row_change_nothing(prepare: Any) -> None:
    prepare()
    assert "read from the cache" in prepare(conf={"padding_side": "left"}, batching="padded").origin
    packed = prepare(packing=True)
    assert "read from the cache" in packed.origin
    assert "lengths" in packed.train.column_names
    assert packed.fingerprint != prepare().fingerprint


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def replace_by_json(file: Path) -> None:
    file.write_text('{"inputs": [], "form": 2, "statistics": 3}')


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = [remove, truncate, empty, flip_a_bit, replace_by_json, replace_by_folder]
ENTRY_FILES = [cache.META, MANIFEST, "train-00000-of-00001.arrow", "validation-00000-of-00001.arrow"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ENTRY_FILES)
def test_a_damaged_entry_is_prepared_again(
    damage: Callable[[Path], None], name: str, prepare: Any, tmp_path: Path
) -> None:
    rows = prepare().train.to_list()
    (entry,) = entries(tmp_path)
    assert sorted(file.name for file in entry.iterdir()) == sorted(ENTRY_FILES)
    damage(entry / name)
    again = prepare()
    assert f"prepared now and cached in {entry}: the entry could not be used: " in again.origin
    assert again.train.to_list() == rows
    assert "read from the cache" in prepare().origin


@pytest.mark.parametrize("damage", [remove, empty, flip_a_bit, replace_by_json])
@pytest.mark.parametrize("name", ENTRY_FILES)
def test_a_damaged_folder_of_prepared_rows_is_refused(
    damage: Callable[[Path], None], name: str, prepare: Any, tmp_path: Path
) -> None:
    prepare()
    (entry,) = entries(tmp_path)
    damage(entry / name)
    with pytest.raises(DataError, match=r"finetuning prepare --output"):
        prepare(conf={"prepared": str(entry)})


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"prepared.json": null}', '{"prepared.json": {"bytes": 1}}'])
def test_a_manifest_that_lists_too_little_is_not_trusted(content: str, prepare: Any, tmp_path: Path) -> None:
    prepare()
    (entry,) = entries(tmp_path)
    (entry / MANIFEST).write_text(content)
    assert "the entry could not be used" in prepare().origin


def test_rows_that_the_manifest_does_not_list_are_not_read(prepare: Any, tmp_path: Path) -> None:
    rows = prepare().train.to_list()
    (entry,) = entries(tmp_path)
    shutil.copyfile(entry / "train-00000-of-00001.arrow", entry / "train-00001-of-00001.arrow")
    again = prepare()
    assert "train-00001-of-00001.arrow is not listed in manifest.json" in again.origin
    assert again.train.to_list() == rows


def test_an_entry_under_the_name_of_another_is_not_read(prepare: Any, tmp_path: Path) -> None:
    prepare()
    (first,) = entries(tmp_path)
    prepare(max_seq_length=32)
    (second,) = [entry for entry in entries(tmp_path) if entry != first]
    shutil.rmtree(second)
    shutil.copytree(first, second)
    again = prepare(max_seq_length=32)
    assert "it holds the rows of another cache key" in again.origin
    assert again.entry.key.rules["sft_args.max_seq_length"] == "32"


def test_a_file_in_the_place_of_an_entry_is_replaced(prepare: Any, tmp_path: Path) -> None:
    prepare()
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    entry.write_text("x")
    assert "the entry could not be used" in prepare().origin


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "3",
        '{"inputs": null}',
        '{"inputs": {"data": 1, "template": 2, "tokenizer": 3, "rules": 4, "versions": 5}}',
    ],
)
def test_a_damaged_entry_does_not_disturb_others(content: str, prepare: Any, tmp_path: Path) -> None:
    prepare()
    (entry,) = entries(tmp_path)
    (entry / cache.META).write_text(content)
    assert "prepared now" in prepare(max_seq_length=32).origin


def rewrite_in_an_old_form(entry: Path) -> None:
    """Rewrite an entry in a layout that is no longer read."""
    meta = json.loads((entry / cache.META).read_text())
    del meta["form"]
    meta["statistics"] = [{"rows": split["counts"]["rows"]} for split in meta["statistics"]]
    (entry / cache.META).write_text(json.dumps(meta))
    (entry / MANIFEST).unlink()
    write_manifest(entry)


@pytest.mark.parametrize("name", ["its own", "another"])
def test_an_entry_in_an_old_form_is_prepared_again(name: str, prepare: Any, tmp_path: Path) -> None:
    first = prepare()
    (entry,) = entries(tmp_path)
    rewrite_in_an_old_form(entry)
    if name == "another":
        entry.rename(entry.with_name("former"))
    again = prepare()
    assert "another version of finetuning" in again.origin
    assert again.train.to_list() == first.train.to_list()
    assert again.statistics == first.statistics
    assert "read from the cache" in prepare().origin


def test_rows_prepared_ahead_of_time_rewrite_in_an_old_form_are_refused(prepare: Any, tmp_path: Path) -> None:
    prepare()
    (entry,) = entries(tmp_path)
    rewrite_in_an_old_form(entry)
    with pytest.raises(DataError, match=r"written by another version of finetuning.*finetuning prepare --output"):
        prepare(conf={"prepared": str(entry)})


def test_a_fault_in_the_data_leaves_no_entry(prepare: Any, tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "a") as stream:
        stream.write("{\n")
    with pytest.raises(DataError, match="invalid JSON"):
        prepare()
    assert entries(tmp_path) == []


CHILD = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from finetuning.config.sections.data import DataConfig
from finetuning.config.sections.training import SFTArgs
from finetuning.data import prepared
from finetuning.data.pipeline import prepare_sft
folder = Path(sys.argv[1])
if sys.argv[2] == "dies":
    write = prepared.write_entry
    def stop(target, *rest):
        from finetuning.data import cache
        def hang(path):
            print("half", flush=True)
            time.sleep(600)
        cache.write_manifest = hang
        write(target, *rest)
    prepared.write_entry = stop
conf = DataConfig.model_validate({
    "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(folder / "a.jsonl")}]},
    "validation_data": {"type": "NONE"}, "chat_template_name": "chat-ml", "cache": str(folder / "cache")})
print("ready", flush=True)
while not (folder / "go").exists():
    time.sleep(0.01)
data = prepare_sft(conf, SFTArgs(max_seq_length=64), AutoTokenizer.from_pretrained(folder / "tokenizer"))
print(len(data.train), data.origin, flush=True)
"""


@pytest.fixture
def start(tmp_path: Path, tokenizer: Any, write_lines: Any, fork_server: ForkServer) -> Callable[..., Process]:
    """A function that starts a process which prepares as soon as there is a file `go`."""
    write_lines("a.jsonl", *(chat(index) for index in range(3000)))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = tmp_path / "child.py"
    program.write_text(CHILD, encoding="utf-8")

    def call(how: str = "lives") -> Process:
        process = fork_server.start([tmp_path, how], program=str(program))
        assert process.wait_for(lambda: "ready\n" in process.stdout), process.output
        return process

    return call


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_whole(start: Any, tmp_path: Path) -> None:
    process = start("dies")
    (tmp_path / "go").touch()
    assert process.wait_for(lambda: process.stdout.endswith("half\n")), process.output
    process.kill()
    left = entries(tmp_path)
    assert [item.name.endswith(".partial") for item in left] == [True]
    again = start()
    assert again.wait() == 0, again.output
    assert "\n3000 prepared now" in again.stdout
    assert [item.name.endswith(".partial") for item in entries(tmp_path)] == [False]


def test_processes_that_want_the_same_rows_prepare_them_once(start: Any, tmp_path: Path) -> None:
    processes = [start() for _ in range(3)]
    (tmp_path / "go").touch()
    assert wait_all(processes) == [0, 0, 0], "".join(process.output for process in processes)
    reported = [process.stdout for process in processes]
    assert sorted("prepared now" in item for item in reported) == [False, False, True]
    assert all("\n3000 " in item for item in reported)
    assert len(entries(tmp_path)) == 1


def test_pruning_takes_the_longest_unused_and_what_was_left_half_made(prepare: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for length in (32, 48, 64):
        prepare(max_seq_length=length)
    order = sorted(
        entries(tmp_path),
        key=lambda item: int(json.loads((item / cache.META).read_text())["inputs"]["rules"]["sft_args.max_seq_length"]),
    )
    for age, entry in enumerate(order):
        os.utime(entry / cache.META, (time.time() - 1000 + age,) * 2)
    prepare(max_seq_length=32)
    (folder / f".{order[0].name}.partial").mkdir()
    size = sum(file.stat().st_size for file in order[0].iterdir())
    assert [path for path, _ in prune(folder, int(2.5 * size))] == [order[1]]
    assert sorted(entries(tmp_path)) == sorted([order[0], order[2]])
    assert len(prune(folder, 0)) == 2


def test_shards_are_read_in_order(prepare: Any, tmp_path: Path) -> None:
    made = prepare()
    cache.write_entry(tmp_path / "out", made.train, None, made.statistics, made.preview, made.entry.key, shards=5)
    assert len(list((tmp_path / "out").glob("train-*-of-00005.arrow"))) == 5
    stored = cache.read_entry(tmp_path / "out")
    assert stored.train.to_list() == made.train.to_list()
    assert stored.validation is None


def test_rows_prepared_ahead_of_time_need_no_data(prepare: Any, tmp_path: Path, make_tokenizer: Any) -> None:
    made = prepare()
    cache.write_entry(tmp_path / "out", made.train, made.validation, made.statistics, made.preview, made.entry.key)
    (tmp_path / "a.jsonl").unlink()
    conf = {"prepared": str(tmp_path / "out")}
    later = prepare(conf=conf)
    assert later.origin == f"prepared ahead of time in {tmp_path}/out"
    assert later.train.to_list() == made.train.to_list()
    message = r"data_conf.prepared: .*with other settings: sft_args.max_seq_length \(64 before"
    with pytest.raises(DataError, match=message):
        prepare(conf=conf, max_seq_length=32)
    with pytest.raises(DataError, match="with other settings: the chat template; the tokenizer"):
        prepare(make_tokenizer("byte-level", "x{{ messages[0].content }}"), conf=conf)
    with pytest.raises(DataError, match="no such folder"):
        prepare(conf={"prepared": str(tmp_path / "nothing")})


def test_where_the_cache_lies(monkeypatch: Any, tmp_path: Path) -> None:
    assert cache_folder("off") is None
    assert cache_folder("auto") is None
    assert cache_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("FINETUNING_CACHE", str(tmp_path / "x"))
    assert cache_folder("auto") == tmp_path / "x"
    monkeypatch.delenv("FINETUNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "finetuning" / "prepared"


def test_a_cache_without_file_locks_is_not_used(
    prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:  # as on NFS without a lock service
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "default"))
    monkeypatch.delenv("FINETUNING_CACHE")
    assert cache_folder("auto") is None
    assert "has no file locks" in caplog.text
    with pytest.raises(StorageError, match="its file system has no file locks"):
        prepare(conf={"cache": str(tmp_path / "chosen")})


def test_without_a_cache_the_processes_of_a_job_prepare_once(
    prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    registered: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cache.atexit, "register", lambda *arguments, **_: registered.append(arguments))
    alone = prepare(conf={"cache": "off"})
    assert alone.origin == "prepared now; the cache is off"
    prepared: list[Path] = []
    write = prepared_module.write_entry
    monkeypatch.setattr(prepared_module, "write_entry", lambda *args: (prepared.append(args[0]), write(*args)))
    for rank in ("0", "1"):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        result = prepare(conf={"cache": "off"})
        assert result.origin == "prepared once for the processes on this machine; the cache is off"
        assert result.train[:] == alone.train[:]
    assert len(prepared) == 1
    [(remove, folder)] = registered
    assert folder == prepared[0].parent and folder.stat().st_mode & 0o777 == 0o700
    assert result.train[:] == alone.train[:]
    remove(folder)
    assert result.train[:] == alone.train[:], "the rows are mapped, and outlive their files"
