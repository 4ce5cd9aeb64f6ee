"""From datasets of the config to rows that are trained on, in all formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetuning.config.sections.data import ChatTemplateName, DataConfig
from finetuning.config.sections.training import SFTArgs
from finetuning.data.chat.template import get_template
from finetuning.data.pipeline import prepare_dpo, prepare_kto, prepare_reward, prepare_sft
from finetuning.data.prepared import count_training_rows
from finetuning.errors import ConfigError, DataError

from .conversations import assistant, user


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    template = get_template(ChatTemplateName.CHAT_ML)
    assert template is not None
    return make_tokenizer("byte-level", template.source, template.special_tokens)


def config(*sources: dict[str, Any], validation: dict[str, Any] | None = None) -> DataConfig:
    training = {"type": "CONCATENATION", "datasets": list(sources)}
    values = {"training_data": training, "validation_data": validation or {"type": "NONE"}}
    return DataConfig.model_validate({**values, "chat_template_name": "chat-ml"})


def sft(conf: DataConfig, tokenizer: Any, **args: Any) -> Any:
    return prepare_sft(conf, SFTArgs.model_validate({"train_on_completions_only": True, **args}), tokenizer)


def trained(data: Any, tokenizer: Any) -> list[str]:
    rows = zip(data.train["input_ids"], data.train["labels"], strict=True)
    return [tokenizer.decode([item for item, label in zip(*row, strict=True) if label != -100]) for row in rows]


CHAT = {"messages": [user("a"), assistant("one")]}


def test_formats_can_be_mixed_in_one_run(write_lines: Callable[..., str], tokenizer: Any, tmp_path: Path) -> None:
    chats = write_lines("chats.jsonl", CHAT)
    texts = write_lines("texts.txt", b"Some text.")
    pairs = write_lines("pairs.csv", b"question,answer\nWhat?,That.\n")
    ready = write_lines("ready.jsonl", {"input_ids": [3, 4], "labels": [-100, 4]})
    conf = config(
        {"path": chats},
        {"path": texts},
        {"path": pairs, "columns": {"question": "instruction", "answer": "output"}},
        {"path": ready},
    )
    data = sft(conf, tokenizer)
    assert trained(data, tokenizer)[:3] == ["one<|im_end|>", "Some text.</s>", "That.<|im_end|>"]
    assert data.train[3]["labels"] == [-100, 4]
    assert list(data.statistics.report()[0]["formats"].values()) == [
        f"{name}, auto-detected" for name in ("messages", "text", "alpaca", "tokens")
    ]
    assert f"  {chats}: messages, auto-detected" in data.statistics.lines()
    assert count_training_rows(conf).rows == 4


@pytest.mark.parametrize("prepare", [prepare_dpo, prepare_kto, prepare_sft])
def test_validation_rows_that_are_also_trained_on_are_counted(
    prepare: Callable[..., Any], write_lines: Callable[..., str], tokenizer: Any
) -> None:
    rows = [{"prompt": str(number), "chosen": "b", "rejected": "c"} for number in range(10)]
    if prepare is prepare_sft:
        rows = [{"prompt": row["prompt"], "completion": "b"} for row in rows]
    source = {"path": write_lines("a.jsonl", *rows, *rows)}
    conf = config(source, validation={"type": "AUTO_SPLIT", "ratio": 0.5})
    arguments = {prepare_sft: (SFTArgs(),), prepare_dpo: (None,), prepare_kto: (None, 0)}[prepare]
    data = prepare(conf, *arguments, tokenizer)
    columns = sorted({*data.train.column_names} - {"labels", "label"})

    def texts(part: Any) -> list[str]:
        return [str([row[column] for column in columns]) for row in part]

    train = set(texts(data.train))
    leaked = sum(text in train for text in texts(data.validation))
    assert leaked
    assert data.statistics.report()[1]["warnings"] == {"the same as a training row": leaked}


@pytest.mark.parametrize("kind", ["CONCATENATION", "PRECOMPUTE_WEIGHTED_MIX"])
def test_dataset_without_kept_rows_is_reported(kind: str, write_lines: Callable[..., str], tokenizer: Any) -> None:
    many = write_lines("a.jsonl", *({"prompt": str(number), "completion": "b"} for number in range(40)))
    lost = write_lines("b.jsonl", {"prompt": "word " * 200, "completion": "b"})
    training = {"type": kind, "datasets": [{"path": many}, {"path": lost}]}
    values = {"training_data": training, "validation_data": {"type": "NONE"}, "chat_template_name": "chat-ml"}
    with pytest.raises(
        DataError, match=r"datasets\[1\]: every row of .*b\.jsonl was dropped; first at .*b\.jsonl:1: longer than"
    ):
        sft(DataConfig.model_validate(values), tokenizer, max_seq_length=64)
    values |= {"max_lost_fraction": 1.0}
    assert len(sft(DataConfig.model_validate(values), tokenizer, max_seq_length=64).train) == 40


def test_missing_columns_to_rename_are_reported(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(ConfigError, match=r"datasets\[0\]\.columns: none of qestion is a column .* prompt, completion"):
        sft(config({"path": path, "columns": {"qestion": "prompt"}}), tokenizer)
    either = {"path": path, "columns": {"query": "prompt", "completion": "completion"}}
    assert len(sft(config(either), tokenizer).train) == 1


def test_columns_of_different_types_combine(write_lines: Callable[..., str], tokenizer: Any, tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    larger = pa.struct([("content", pa.large_string()), ("role", pa.dictionary(pa.int8(), pa.string()))])
    for name, kind in (("a", pa.list_(message)), ("b", pa.large_list(larger)), ("c", pa.list_(message, 2))):
        column = pa.array([[user("q"), assistant(name)]], kind)
        pq.write_table(
            pa.table({"messages": column, "id": pa.array([1 if name == "a" else "x"])}), tmp_path / f"{name}.parquet"
        )
    jsonl = write_lines("d.jsonl", {"messages": [user("q"), assistant("d")], "other": 1})
    data = sft(config({"path": [f"{tmp_path}/*.parquet", jsonl]}), tokenizer)
    assert trained(data, tokenizer) == [f"{name}<|im_end|>" for name in "abcd"]


def test_row_locations_refer_to_files(write_lines: Callable[..., str], tokenizer: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "a.parquet")
    path = write_lines("b.jsonl", {"text": "a"}, b"{")
    with pytest.raises(DataError) as caught:
        sft(config({"path": [f"{tmp_path}/a.parquet", path]}), tokenizer)
    assert f"{tmp_path}/a.parquet:2: expected text; found none" in str(caught.value)
    assert f"{path}:2: invalid JSON" in str(caught.value)


def test_max_rows_stops_reading(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", CHAT, {"messages": [user("a"), assistant("two")]}, b"{")
    conf = config({"path": path, "max_rows": 2})
    assert trained(sft(conf, tokenizer), tokenizer) == ["one<|im_end|>", "two<|im_end|>"]
    assert count_training_rows(conf).rows == 2


def test_configured_format_is_enforced(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", {"instruction": "i", "input": "x", "output": "y"})
    assert trained(sft(config({"path": path}), tokenizer), tokenizer) == ["y<|im_end|>"]
    assert trained(sft(config({"path": path, "format": "input_output"}), tokenizer), tokenizer) == [" y</s>"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: expected messages; found input, instruction, output"):
        sft(config({"path": path, "format": "messages"}), tokenizer)


def test_a_first_bad_row_does_not_hide_the_format(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", b"{", {"other": 1}, {"prompt": "a", "completion": " b"})
    with pytest.raises(DataError) as caught:
        sft(config({"path": path}), tokenizer)
    assert f"{path}:2: expected prompt, completion; found other" in str(caught.value)


@pytest.mark.parametrize("train_on", ["last", "completions", "assistant", "all"])
def test_train_on_determines_the_labels(train_on: str, write_lines: Callable[..., str], tokenizer: Any) -> None:
    talk = [user("a"), assistant("one"), user("b"), assistant("two"), assistant("three")]
    path = write_lines("a.jsonl", {"messages": talk})
    (text,) = trained(sft(config({"path": path}), tokenizer, train_on=train_on), tokenizer)
    expected = {
        "last": "three<|im_end|>",
        "completions": "two<|im_end|>three<|im_end|>",
        "assistant": "one<|im_end|>two<|im_end|>three<|im_end|>",
        "all": tokenizer.apply_chat_template(talk, tokenize=False),
    }
    assert text == expected[train_on]


def test_message_flags_determine_the_labels(write_lines: Callable[..., str], tokenizer: Any) -> None:
    talk = [user("a"), {**assistant("one"), "train": False}, user("b"), {**assistant("two"), "weight": 1}]
    path = write_lines("a.jsonl", {"messages": talk}, CHAT)
    assert trained(sft(config({"path": path}), tokenizer), tokenizer) == ["two<|im_end|>", "one<|im_end|>"]


def test_text_preferences_need_no_chat_template(write_lines: Callable[..., str], tokenizer: Any) -> None:
    explicit = write_lines("a.jsonl", {"prompt": "The sky is", "chosen": " blue.", "rejected": " bleak."})
    implicit = write_lines("b.jsonl", {"chosen": "The sky is blue.", "rejected": "The sky is bleak."})
    chats = write_lines(
        "c.jsonl", {"chosen": [user("Sky?"), assistant("Blue")], "rejected": [user("Sky?"), assistant("No")]}
    )
    for prepare in (prepare_dpo, prepare_reward):
        for path in (explicit, implicit):
            (row,) = prepare(config({"path": path}), 64, tokenizer).train
            decoded = {name: tokenizer.decode(ids) for name, ids in row.items()}
            assert decoded == {"prompt_ids": "The sky is", "chosen_ids": " blue.</s>", "rejected_ids": " bleak.</s>"}
    (row,) = prepare_dpo(config({"path": chats}), 64, tokenizer).train
    assert tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"
    both = prepare_dpo(config({"path": [explicit]}, {"path": chats}), 64, tokenizer)
    assert len(both.train) == 2


def test_trl_labels_and_pairs_are_read_for_kto(write_lines: Callable[..., str], tokenizer: Any) -> None:
    rated = write_lines("a.jsonl", {"prompt": "a", "completion": " b", "label": True})
    pairs = write_lines("b.jsonl", {"prompt": "The sky is", "chosen": " blue.", "rejected": " bleak."})
    rows = prepare_kto(config({"path": rated}, {"path": pairs}), 64, 0, tokenizer).train
    result = {(tokenizer.decode(row["completion_ids"]), row["label"]) for row in rows}
    assert result == {(" b</s>", True), (" blue.</s>", True), (" bleak.</s>", False)}


def test_validation_ratio_of_each_dataset(write_lines: Callable[..., str], tokenizer: Any) -> None:
    rows = [{"text": f"text {number}"} for number in range(10)]
    conf = config(
        {"path": write_lines("a.jsonl", *rows), "validation_ratio": 0.2},
        {"path": write_lines("b.jsonl", CHAT)},
        validation={"type": "FROM_DATASETS"},
    )
    data = sft(conf, tokenizer)
    assert (len(data.train), len(data.validation)) == (9, 2)
    assert count_training_rows(conf).rows == 9
