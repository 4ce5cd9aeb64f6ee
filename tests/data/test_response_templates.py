"""The row formats of fms-hf-tuning, from files like those in its documentation."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.sections.data import DataConfig
from finetuning.config.sections.training import SFTArgs
from finetuning.data.pipeline import PreparedData, prepare_sft
from finetuning.data.processors.sft import SPLIT_TEXT
from finetuning.errors import ConfigError, DataError

EOS = "</s>"


@pytest.fixture(params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, make_tokenizer: Callable[..., Any]) -> Any:
    """A base model's tokenizer: no chat template."""
    return make_tokenizer(request.param)


def sft(
    path: str | list[str],
    tokenizer: Any,
    *,
    args: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **source: Any,
) -> PreparedData:
    conf = {
        "training_data": {"type": "CONCATENATION", "datasets": [{"path": path, **source}]},
        "validation_data": {"type": "NONE"},
        "chat_template_name": "keep-original",
        **(data or {}),
    }
    return prepare_sft(DataConfig.model_validate(conf), SFTArgs.model_validate(args or {}), tokenizer)


def displayed(data: PreparedData, tokenizer: Any) -> list[tuple[str, list[str]]]:
    """The text of each row, and its trained parts."""
    rows = []
    for row in data.train:
        stretches: list[list[int]] = [[]]
        for item, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (-100, item)
            if label != -100:
                stretches[-1].append(item)
            elif stretches[-1]:
                stretches.append([])
        rows.append((tokenizer.decode(row["input_ids"]), [tokenizer.decode(item) for item in stretches if item]))
    return rows


def trained(data: PreparedData, tokenizer: Any) -> list[str]:
    (stretches,) = zip(*(item[1] for item in displayed(data, tokenizer)), strict=True)
    return [text.removeprefix(" ") for text in stretches]


STATES = [
    {"input": "### Input: Colorado is a state in USA ### Output:", "output": "USA : Location"},
    {"input": "### Input: Arizona is also a state in USA ### Output:", "output": "USA : Location"},
]


def test_input_is_masked_and_output_ends_with_eos(write_lines: Callable[..., str], tokenizer: Any) -> None:
    data = sft(write_lines("train.jsonl", *STATES), tokenizer)
    assert displayed(data, tokenizer)[0][0] == f"{STATES[0]['input']} {STATES[0]['output']}{EOS}"
    assert trained(data, tokenizer) == [f"USA : Location{EOS}"] * 2
    assert list(data.statistics.report()[0]["formats"].values()) == ["input_output, auto-detected"]


@pytest.mark.parametrize(
    ("start", "end", "text"),
    [
        ("a", "b", "a b"),
        ("a ", "b", "a b"),
        ("a", " b", "a b"),
        ("a\n", "b", "a\nb"),
        ("a", "\tb", "a\tb"),
        ("a\t", "\nb", "a\t\nb"),
    ],
)
def test_one_space_separates_input_and_output(
    start: str, end: str, text: str, write_lines: Callable[..., str], make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer("byte-level")
    data = sft(write_lines("a.jsonl", {"input": start, "output": end}), tokenizer)
    assert displayed(data, tokenizer)[0][0] == f"{text}{EOS}"


ALPACA = [
    {"instruction": "Name a color.", "input": "", "output": "Red."},
    {"instruction": "Translate to Finnish.", "input": "naïve café", "output": "Älä huoli."},
]
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def single_sequences() -> list[dict[str, str]]:
    rows = []
    for row in ALPACA:
        inputs = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        text = f"{PREAMBLE}### Instruction:\n{row['instruction']}\n\n{inputs}### Response: {row['output']}"
        rows.append({"output": text})
    return rows


def test_text_is_trained_after_the_response_template(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("sft_alpaca_data.json", *single_sequences())
    data = sft(path, tokenizer, dataset_text_field="output", response_template="\n### Response:")
    assert trained(data, tokenizer) == [f"Red.{EOS}", f"Älä huoli.{EOS}"]
    assert displayed(data, tokenizer)[0][0].startswith(PREAMBLE)


@pytest.mark.parametrize("written", ["\n### Response:", r"\n### Response:"])
def test_escapes_in_templates_are_unescaped(written: str, write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", *single_sequences())
    data = sft(path, tokenizer, dataset_text_field="output", response_template=written)
    assert trained(data, tokenizer) == [f"Red.{EOS}", f"Älä huoli.{EOS}"]


def test_formatter_template_makes_the_text(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "Train.json"
    path.write_text(json.dumps([{"input": "Größe", "output": "XL"}, {"input": "a {{output}}", "output": "b"}]))
    template = "### Input: {{input}} \n\n## Label: {{output}}"
    data = sft(str(path), tokenizer, data_formatter_template=template, response_template="\n## Label:")
    assert [text for text, _ in displayed(data, tokenizer)] == [
        f"### Input: Größe \n\n## Label: XL{EOS}",
        f"### Input: a {{{{output}}}} \n\n## Label: b{EOS}",
    ]
    assert trained(data, tokenizer) == [f"XL{EOS}", f"b{EOS}"]


def test_rows_without_the_response_template_are_counted(write_lines: Callable[..., str], tokenizer: Any) -> None:
    template = "### Input: {{input}} \n\n##Label: {{output}}"
    rows = [{"input": str(number), "output": "b"} for number in range(5)]
    with pytest.raises(DataError, match=r"all 5 rows dropped: nothing to train on \(5\); first at .*:1: the response"):
        sft(
            write_lines("a.jsonl", *rows),
            tokenizer,
            data_formatter_template=template,
            response_template="\n## Label:",
        )
    rows = [{"text": f"Q: {number} A: yes"} for number in range(30)]
    path = write_lines("b.jsonl", *rows, {"text": "Q: without"}, {"text": "Q: x A: y A: z"})
    data = sft(path, tokenizer, response_template="A:")
    report = data.statistics.report()[0]
    assert report["dropped"] == {"nothing to train on": 1}
    assert report["warnings"] == {"the response template is in the text more than once: the last one counts": 1}
    assert trained(data, tokenizer)[-1] == f"z{EOS}"


def test_instruction_and_response_templates_delimit_turns(write_lines: Callable[..., str], tokenizer: Any) -> None:
    text = "System.\n[I] one\n[R] eins\n[I] two\n[R] zwei [R] twice\n[I] three"
    path = write_lines("a.jsonl", {"text": text}, {"text": "[R] no instruction"}, {"text": "[I] no response"})
    args = {"instruction_template": "\n[I]", "response_template": "\n[R]"}
    with pytest.raises(DataError, match=r"2 of 3 training rows"):
        sft(path, tokenizer, **args)
    path = write_lines("a.jsonl", {"text": text})
    ((whole, stretches),) = displayed(sft(path, tokenizer, **args), tokenizer)
    assert whole == text + EOS
    assert [item.strip() for item in stretches] == ["eins", "zwei [R] twice"]
    ((_, stretches),) = displayed(sft(path, tokenizer, args={"train_on": "last"}, **args), tokenizer)
    assert [item.strip() for item in stretches] == ["zwei [R] twice"]


def test_plain_text_is_trained_with_one_eos(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", {"text": "Hello there."}, {"text": f"It ends.{EOS}"})
    for args in ({}, {"train_on_completions_only": True}):
        data = sft(path, tokenizer, args=args)
        assert [text for text, _ in displayed(data, tokenizer)] == [f"Hello there.{EOS}", f"It ends.{EOS}"]
        assert all(row["labels"] == row["input_ids"] for row in data.train)
    data = sft(path, tokenizer, add_eos_token=False)
    assert [text for text, _ in displayed(data, tokenizer)] == ["Hello there.", f"It ends.{EOS}"]


@pytest.mark.parametrize("packing", [False, True])
def test_long_text_is_split_without_losing_tokens(
    packing: bool, write_lines: Callable[..., str], tokenizer: Any
) -> None:
    texts = [f"Größe {index}: " + "one two 你好 " * (index % 7 * 9) for index in range(40)]
    path = write_lines("a.jsonl", *({"text": text} for text in texts))
    args = {"length_handling": "split", "max_seq_length": 32, "packing": packing}
    data = sft(path, tokenizer, args=args)
    rows = [row["input_ids"] for row in data.train]
    whole = [tokenizer(text + EOS)["input_ids"] for text in texts]
    if not packing:
        assert rows == [ids[first : first + 32] for ids in whole for first in range(0, len(ids), 32)]
        assert all(row["labels"] == row["input_ids"] for row in data.train)
    assert sum(map(len, rows)) == sum(map(len, whole))
    (part,) = data.statistics.report()
    assert part["tokens"] == part["trained_tokens"] == sum(map(len, whole))
    assert part["warnings"][SPLIT_TEXT] == sum(-(-len(ids) // 32) for ids in whole if len(ids) > 32)
    streamed = sft(path, tokenizer, args=args, data={"streaming": True, "shuffle_buffer": 1}).train
    assert sorted(row["input_ids"].tolist() for row in islice(streamed, len(rows))) == sorted(rows)


def test_only_fully_trained_text_is_split(write_lines: Callable[..., str], tokenizer: Any) -> None:
    rows = [{"input": "word " * 30, "output": f"{index}"} for index in range(4)] + [{"input": "a", "output": "b"}]
    report = sft(
        write_lines("a.jsonl", *rows), tokenizer, args={"length_handling": "split", "max_seq_length": 32}
    ).statistics.report()
    assert (report[0]["kept"], report[0]["filtered_by_length"]) == (1, 4)


def test_corpus_of_text_files_is_read(tmp_path: Path, tokenizer: Any) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"Document {name}.\nSecond line.\n")
    data = sft(str(tmp_path), tokenizer, text_unit="document")
    assert [text for text, _ in displayed(data, tokenizer)] == [f"Document {item}.\nSecond line.{EOS}" for item in "ab"]


def test_train_on_all_trains_every_token(write_lines: Callable[..., str], tokenizer: Any) -> None:
    data = sft(write_lines("a.jsonl", *STATES), tokenizer, args={"train_on": "all"})
    assert all(row["labels"] == row["input_ids"] for row in data.train)


def test_chats_without_chat_template_are_an_error(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        sft(path, tokenizer)


def test_tokenized_rows_are_used_unchanged(write_lines: Callable[..., str], tokenizer: Any) -> None:
    row = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
    data = sft(write_lines("a.jsonl", row), tokenizer)
    assert data.train[:] == {"input_ids": [row["input_ids"]], "labels": [row["labels"]]}
    with pytest.raises(DataError, match="token id 99999 is outside the tokenizer's"):
        sft(write_lines("b.jsonl", {"input_ids": [99999], "labels": [99999]}), tokenizer)
    with pytest.raises(DataError, match="response_template is not supported for rows that are already tokenized"):
        sft(write_lines("a.jsonl", row), tokenizer, response_template="A:")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"format": "response_template"}, "datasets[0].format: requires response_template"),
        (
            {"format": "preference"},
            'datasets[0].format: "preference" is not supported by this method; it supports messages,',
        ),
    ],
)
def test_contradictory_settings_are_rejected(
    source: dict[str, str], message: str, write_lines: Callable[..., str], make_tokenizer: Callable[..., Any]
) -> None:
    path = write_lines("a.jsonl", {"text": "a"})
    with pytest.raises(ConfigError) as caught:
        sft(path, make_tokenizer("byte-level"), **source)
    assert f"data_conf.training_data.{message}" in str(caught.value)
