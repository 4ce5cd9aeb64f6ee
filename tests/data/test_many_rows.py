"""Many rows: shared out to processes, kept on disk, and the same whoever made them."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetuning.config.sections.data import ChatTemplateName, DataConfig
from finetuning.config.sections.training import SFTArgs
from finetuning.data.arrow import ArrowTableWriter, take_rows
from finetuning.data.chat.template import get_template
from finetuning.data.pipeline import PreparedData, prepare_kto, prepare_sft
from finetuning.data.preprocessor import DuplicateCounter, in_batches
from finetuning.data.sources import Line
from finetuning.data.statistics import RowCounts, SplitStatistics
from finetuning.data.worker_pool import WorkerPool
from finetuning.errors import DataError, InternalError, Location, Problem, StorageError

from .conversations import assistant, user

ROWS = 10_000
BAD, LONG, TWICE = 9_001, 9_500, 9_900


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    template = get_template(ChatTemplateName.CHAT_ML)
    assert template is not None
    return make_tokenizer("byte-level", template.source, template.special_tokens)


@pytest.fixture(scope="module")
def path(tmp_path_factory: Any) -> Path:
    """Chats, one of which is no JSON, one too long, and one there twice; all far into the file."""
    lines = [json.dumps({"messages": [user(f"What is {n}?"), assistant(f"It is {n}.")]}) for n in range(ROWS)]
    lines[BAD] = "{"
    lines[LONG] = json.dumps({"messages": [user("Why?"), assistant("because " * 200)]})
    lines[TWICE] = lines[3]
    file = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def prepare(path: Path, tokenizer: Any) -> Callable[..., PreparedData]:
    def call(workers: int, **conf: Any) -> PreparedData:
        values = {
            "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(path)}]},
            "validation_data": {"type": "AUTO_SPLIT", "ratio": 0.1},
            "chat_template_name": "chat-ml",
            "on_bad_row": "skip",
            "cache": "off",
            **conf,
        }
        args = SFTArgs(train_on_completions_only=True, max_seq_length=100)
        return prepare_sft(DataConfig.model_validate(values), args, tokenizer, workers)

    return call


def test_how_many_processes_share_the_work_changes_nothing(prepare: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    alone, shared = prepare(1), prepare(3)
    assert shared.train.to_list() == alone.train.to_list()
    assert shared.validation.to_list() == alone.validation.to_list()
    assert shared.statistics == alone.statistics
    assert shared.preview == alone.preview
    part = alone.statistics.splits[0]
    assert [(outcome.location.line, outcome.reason) for outcome in part.outcomes] == [
        (BAD + 1, "bad row"),
        (LONG + 1, "longer than the limit"),
    ]
    assert part.counts.warnings["the same as an earlier row"] == 1


def test_a_bad_row_that_another_process_finds_stops_the_run(prepare: Any, path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare(2, on_bad_row="error")
    assert str(caught.value.problems[0].location) == f"{path}:{BAD + 1}"


def test_processes_answer_in_order_and_report_what_went_wrong() -> None:
    def work(number: int) -> int:
        if number == 50:
            raise DataError([Problem("fifty", Location(file="a", line=5))])
        if number == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    with WorkerPool(work, 3) as workers:
        assert list(workers.map(range(40))) == [number * number for number in range(40)]
    with pytest.raises(DataError, match="a:5: fifty"), WorkerPool(work, 3) as workers:
        list(workers.map([1, 50, 2]))
    with pytest.raises(InternalError, match="was killed"), WorkerPool(work, 2) as workers:
        list(workers.map([60, *range(9)]))


CHILD = """
import os, sys
from finetuning.data.worker_pool import Workers
with Workers(lambda _: os.getpid(), 3) as workers:
    print(*workers.map(range(30)), flush=True)
    sys.stdin.read()
"""


def test_no_process_outlives_the_one_that_asked_it() -> None:
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pids = set(process.stdout.readline().split())
        process.kill()
        # All of them inherited its standard output, which ends when the last of them does.
        assert process.communicate(timeout=400)[0] == ""
    assert str(process.pid) not in pids


PEAKS = """
import gc, json, sys
from pathlib import Path
import pyarrow as pa
from transformers import AutoTokenizer
from finetuning.config.sections.data import DataConfig
from finetuning.config.sections.training import SFTArgs
from finetuning.data.pipeline import prepare_sft
folder = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
pool = pa.system_memory_pool()
pa.set_memory_pool(pool)

def peaks(name):
    conf = DataConfig.model_validate({
        "training_data": {"type": "CONCATENATION", "datasets": [{"path": str(folder / name)}]},
        "validation_data": {"type": "AUTO_SPLIT", "ratio": 0.5}, "chat_template_name": "chat-ml",
        "cache": str(folder / "cache")})
    data = prepare_sft(conf, SFTArgs(max_seq_length=4096, packing=True), tokenizer)
    assert data.entry.train.num_rows + data.entry.validation.num_rows == int(name)
    gc.collect()
    with open("/proc/self/status") as stream:
        held = next(int(line.split()[1]) for line in stream if line.startswith("RssAnon"))
    return {"arrow, most": pool.max_memory(), "held": held * 1024}

print(json.dumps([peaks(name) for name in sys.argv[2:]]))
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    few, many = 3_000, 12_000
    for count in (few, many):
        with open(tmp_path / str(count), "w") as stream:
            for number in range(count):
                ids = [number % 250] * 500
                stream.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    command = [sys.executable, "-c", PEAKS, str(tmp_path), str(few), str(many)]
    # What is freed goes back at once, from one heap for all threads, so that what the process has is what it holds.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, **malloc}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    more_data = (many - few) * 500 * 8
    assert {name: second[name] - first[name] for name in first if second[name] - first[name] > more_data / 2} == {}


def test_texts_that_came_before_are_counted_by_where_they_came() -> None:
    repeats, training, validation = (
        DuplicateCounter(),
        SplitStatistics(RowCounts("training")),
        SplitStatistics(RowCounts("validation")),
    )
    repeats.add(np.array([1, 2, 1]))
    repeats.add(np.array([1, 3]))
    repeats.finish_split(training)
    repeats.add(np.array([3, 4, 4, 3, 5]))
    repeats.finish_split(validation)
    assert training.counts.warnings == {"the same as an earlier row": 2}
    assert validation.counts.warnings == {"the same as a training row": 2, "the same as an earlier row": 1}


def test_batches_are_small_where_rows_are_long() -> None:
    short = [Line("a", number, 0, b"{}") for number in range(3000)]
    assert [len(batch) for batch in in_batches(short)] == [1024, 1024, 952]
    long = [Line("a", number, 0, b"x" * 3_000_000) for number in range(5)]
    assert [len(batch) for batch in in_batches(long)] == [2, 2, 1]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    import pyarrow as pa

    writer = ArrowTableWriter(tmp_path)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, former[1]))
    try:
        with pytest.raises(StorageError, match=re.escape(f"cannot write prepared rows to {tmp_path}: ")):
            writer.add(pa.table({"a": list(range(100_000))}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_taken_in_any_order() -> None:
    import pyarrow as pa

    writer = ArrowTableWriter()
    for first in range(0, 90, 30):
        writer.add(pa.table({"a": [[number] * (number % 4) for number in range(first, first + 30)]}))
    rows = np.random.default_rng(0).permutation(90).repeat(2)[:120]
    assert take_rows(writer.table(), rows)["a"].to_pylist() == [[row] * (row % 4) for row in rows.tolist()]


def test_kto_rows_are_in_the_order_of_a_shuffle(tmp_path: Path, tokenizer: Any, write_lines: Any) -> None:
    path = write_lines("a.jsonl", *({"prompt": f"{n}", "completion": " yes", "label": n % 2 == 0} for n in range(50)))
    values = {
        "training_data": {"type": "CONCATENATION", "datasets": [{"path": path}]},
        "validation_data": {"type": "NONE"},
        "cache": str(tmp_path / "cache"),
    }
    data = prepare_kto(DataConfig.model_validate(values), 100, 7, tokenizer)
    assert data.train.to_list() == data.entry.train.shuffle(seed=7).to_list()
    assert data.train.to_list() != data.entry.train.to_list()
