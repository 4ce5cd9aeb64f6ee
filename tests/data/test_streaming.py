"""Rows that are made as they are trained on: the rows, the order and the counts of prepared ones, in flat memory."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetuning.config.sections.data import DataConfig, Handler
from finetuning.config.sections.training import SFTArgs
from finetuning.data.packing import pack
from finetuning.data.pipeline import prepare_sft
from finetuning.data.sources import Line
from finetuning.data.streaming.dataset import RowStream
from finetuning.errors import DataError

Make = Callable[..., RowStream]


@pytest.fixture
def conf(tmp_path: Path, write_jsonl: Any, sft_rows: Any) -> Callable[..., DataConfig]:
    """A config with datasets of so many rows each."""

    def make(*sizes: int, rows: list | None = None, **values: Any) -> DataConfig:
        datasets = []
        for number, size in enumerate(sizes):
            result = sft_rows(size) if rows is None else rows
            for row in result:
                row["messages"][0]["content"] += f" It is of set {number}."
            datasets.append({"path": str(write_jsonl(tmp_path / f"{number}.jsonl", result))})
        training = {"type": "CONCATENATION", "datasets": datasets}
        weights = values.pop("weights", None)
        if weights:
            for dataset, weight in zip(datasets, weights, strict=True):
                dataset["sampling_weight"] = weight
            training["type"] = "PRECOMPUTE_WEIGHTED_MIX"
        return DataConfig(
            **{
                "training_data": training,
                "validation_data": {"type": "NONE"},
                "chat_template_name": "keep-original",
                "streaming": True,
                "shuffle_buffer": 1,
                **values,
            }
        )

    return make


@pytest.fixture
def stream(chatml_tokenizer: Any) -> Make:
    def make(conf: DataConfig, *, seed: int = 1, **args: Any) -> RowStream:
        result = prepare_sft(conf, SFTArgs(max_seq_length=256, **args), chatml_tokenizer, seed=seed).train
        assert isinstance(result, RowStream)
        return result

    return make


def ids(rows: Any) -> list[tuple[list[int], list[int]]]:
    return [(list(row["input_ids"]), list(row["labels"])) for row in rows]


def selected(rows: RowStream, count: int) -> list[tuple[list[int], list[int]]]:
    return ids(islice(iter(rows), count))


@pytest.mark.parametrize("weights", [None, (1.0, 1.0), (0.7, 0.3)])
def test_a_pass_is_what_preparation_makes_of_the_same_rows(
    conf: Any, stream: Make, chatml_tokenizer: Any, weights: Any
) -> None:
    streamed = conf(40, 1100, weights=weights)
    args = {"train_on_completions_only": True}
    prepared = prepare_sft(
        streamed.model_copy(update={"streaming": False}), SFTArgs(max_seq_length=256, **args), chatml_tokenizer
    )
    rows = ids(prepared.train)
    result = stream(streamed, **args)
    assert selected(result, len(rows)) == rows
    report, expected = result.statistics.report()[0], prepared.statistics.report()[0]
    if weights is None:
        assert {**expected, "epochs": 0} == report
    assert report["formats"] == expected["formats"]


def test_shuffling_goes_by_the_seed_and_each_pass_has_its_own_order(conf: Any, stream: Make) -> None:
    data = conf(300, shuffle_buffer=50)
    first = selected(stream(data), 600)
    assert first == selected(stream(data), 600)
    assert first != selected(stream(data, seed=2), 600)
    first_half, second_half = first[:300], first[300:]
    assert first_half != second_half
    assert sorted(first_half) == sorted(second_half) == sorted(selected(stream(conf(300)), 300))


def with_old_names(state: dict[str, Any]) -> dict[str, Any]:
    """A stream state with the names that earlier versions wrote."""
    names = {"split": "part", "warnings": "noticed", "first_dropped": "firsts"}
    names |= {"invalid": "faults", "first_invalid": "first_faults"}
    position = {"passes": state["position"]["epoch"], "rows": state["position"]["rows"]}
    counts = {names.get(key, key): value for key, value in state["counts"].items()}
    return {"given": state["num_yielded"], "left_out": state["num_skipped"], "rejects": state["rejects_bytes"]} | {
        "position": position,
        "totals": counts,
    }


@pytest.mark.parametrize(
    ("packing", "consumed"), [(False, 0), (False, 1024), (False, 1030), (False, 2300), (True, 7), (True, 230)]
)
def test_a_stream_goes_on_where_it_was(conf: Any, stream: Make, packing: bool, consumed: int) -> None:
    data = conf(1500, 600, weights=(0.6, 0.4), shuffle_buffer=100)
    whole, goes_on = stream(data, packing=packing), stream(data, packing=packing)
    whole.lookahead = 5000
    rows = iter(whole)
    before = ids(islice(rows, consumed))
    # What is fetched ahead is no part of the state.
    ahead = ids(islice(rows, 30))
    state = json.loads(json.dumps(whole.state_dict(consumed)))
    goes_on.load_state_dict(with_old_names(state) if consumed == 1030 else state, 3)
    again = iter(goes_on)
    assert [list(row["labels"]) for row in islice(again, 3)] == [[-100]] * 3
    assert ids(islice(again, 30)) == ahead
    assert ids(islice(again, 300)) == ids(islice(rows, 300))
    assert goes_on.statistics.report() == whole.statistics.report()
    assert len(before) == consumed


def test_packs_are_few_and_hold_each_row_once(conf: Any, stream: Make) -> None:
    data = conf(1024)
    rows = [item for item, _ in selected(stream(data), 1024)]
    packs = []
    for item in stream(data, packing=True):
        assert len(item["input_ids"]) == len(item["labels"]) == sum(item["lengths"]) <= 256
        packs.append(item)
        if sum(len(each["lengths"]) for each in packs) == 1024:
            break
    parts = []
    for item in packs:
        left = list(item["input_ids"])
        for length in item["lengths"]:
            parts.append(tuple(left[:length]))
            left = left[length:]
    assert Counter(parts) == Counter(map(tuple, rows))
    assert len(packs) == len(pack(np.array([len(row) for row in rows]), 256)), "as few as prepared rows need"


def held() -> int:
    """Rows as they were read that are alive in this process."""
    return sum(type(item) is Line for item in gc.get_objects())


def test_memory_holds_the_buffer_and_two_blocks_however_many_rows_there_are(conf: Any, stream: Make) -> None:
    gc.collect()
    before, most = held(), 0
    rows = iter(stream(conf(7000, shuffle_buffer=500)))
    for number, _ in enumerate(islice(rows, 6500)):
        if number % 500 == 0:
            most = max(most, held() - before)
    assert 500 <= most <= 500 + 2 * 1024


def bad(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"{number}"}, {"role": "nobody", "content": "x"}]}


def test_too_many_lost_rows_stop_the_stream_once_enough_were_seen(conf: Any, stream: Make, sft_rows: Any) -> None:
    good = sft_rows(3000)
    rows = good[:2000] + [bad(number) for number in range(400)] + good[2000:]
    data = conf(1, rows=rows, on_bad_row="skip")
    iterator = iter(stream(data))
    with pytest.raises(DataError, match=r"400 of 3072 training rows \(13.0%\) are invalid"):
        for _ in iterator:
            pass
    few = conf(1, rows=[*sft_rows(20), bad(1), bad(2)], on_bad_row="skip")
    with pytest.raises(DataError, match=r"2 of 22 training rows \(9.1%\) are invalid"):
        selected(stream(few), 50)


def test_a_bad_row_in_the_middle_stops_the_stream_with_its_line(conf: Any, stream: Make, sft_rows: Any) -> None:
    good = sft_rows(1500)
    data = conf(1, rows=[*good[:1200], bad(1), *good[1200:]])
    rows = iter(stream(data))
    assert len(list(islice(rows, 1024))) == 1024
    with pytest.raises(DataError, match=r"0.jsonl:1201: messages\[1\].role: unknown role"):
        next(rows)


def test_a_stream_of_which_nothing_is_left_stops(conf: Any, stream: Make, sft_rows: Any) -> None:
    rows = sft_rows(5)
    for row in rows:
        row["messages"][0]["content"] = "word " * 400
    with pytest.raises(DataError, match="all 5 rows dropped: shortest is"):
        selected(stream(conf(1, rows=rows)), 1)


def test_a_stream_without_rows_is_an_error_at_once(conf: Any, stream: Make, tmp_path: Path) -> None:
    data = conf(3)
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.csv").write_text("prompt,completion\n")
    path = data.training_data.datasets[0].model_copy(update={"path": str(folder)})
    data = data.model_copy(update={"training_data": data.training_data.model_copy(update={"datasets": [path]})})
    with pytest.raises(DataError, match="0 rows"):
        stream(data)
    skipped = data.training_data.datasets[0].model_copy(
        update={
            "path": str(tmp_path / "0.jsonl"),
            "handlers": [
                Handler(
                    name="skip_samples_with_large_columns", arguments={"column_name": "id", "max_allowed_length": 1}
                )
            ],
        }
    )
    data = data.model_copy(update={"training_data": data.training_data.model_copy(update={"datasets": [skipped]})})
    with pytest.raises(DataError, match="all 3 rows dropped: "):
        selected(stream(data), 1)


def test_rejects_are_written_as_rows_go_by_and_once_where_a_stream_goes_on(
    conf: Any, stream: Make, sft_rows: Any, tmp_path: Path
) -> None:
    rows = sft_rows(2500)
    for row in rows[::100]:
        row["messages"][0]["content"] = "word " * 400
    data = conf(1, rows=rows)
    out = tmp_path / "out"
    out.mkdir()

    def read() -> list[int]:
        return [json.loads(line)["line"] for line in (out / "rejects.jsonl").read_text().splitlines()]

    whole = stream(data)
    whole.lookahead = 5000
    whole.statistics.write(out)
    iterator = iter(whole)
    list(islice(iterator, 1100))
    state = whole.state_dict(1100)
    list(islice(iterator, 500))
    assert read() == list(range(1, 2049, 100))
    goes_on = stream(data)
    goes_on.load_state_dict(state, 0)
    goes_on.statistics.write(out)
    list(islice(iter(goes_on), 1300))
    goes_on.statistics.write(out)
    assert read() == list(range(1, 2500, 100))
    (report,) = json.loads((out / "data_report.json").read_text())
    assert (report["rows"], report["kept"], report["filtered_by_length"], report["epochs"]) == (2500, 2475, 25, 0)


def test_validation_rows_are_prepared_and_those_that_leak_are_counted(
    conf: Any, chatml_tokenizer: Any, sft_rows: Any, tmp_path: Path, write_jsonl: Any
) -> None:
    data = conf(30)
    leaked = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()][:3]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [*leaked, *sft_rows(4)])
    data = data.model_copy(
        update={"validation_data": conf(1, rows=sft_rows(1)).training_data.model_copy(
            update={"datasets": [data.training_data.datasets[0].model_copy(update={"path": str(held_out)})]}
        )}
    )  # fmt: skip
    conf(30)
    made = prepare_sft(data, SFTArgs(max_seq_length=256), chatml_tokenizer)
    assert made.validation is not None and len(made.validation) == 7
    training, validation = made.statistics.report()
    assert training["warnings"]["the same as a validation row"] == 3
    assert (validation["split"], validation["rows"]) == ("validation", 7)
    assert made.rows is None
    assert len(made.preview) == 30


def test_a_stream_of_several_files_needs_no_row_ahead_of_its_turn(conf: Any, stream: Make, tmp_path: Path) -> None:
    data = conf(1100, 3)
    path = tmp_path / "1.jsonl"
    text = path.read_text()
    rows: Iterator[Any] = iter(stream(data))
    path.write_text(text.replace("set 1", "set 9"))
    assert len(list(islice(rows, 1103))) == 1103
