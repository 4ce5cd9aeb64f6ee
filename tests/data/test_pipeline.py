from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

from finetuning.config.sections.data import ChatTemplateName, DataConfig
from finetuning.config.sections.training import SFTArgs
from finetuning.data.chat.template import get_template
from finetuning.data.pipeline import PreparedData, prepare_dpo, prepare_sft
from finetuning.data.preview import parse_text, to_text
from finetuning.errors import DataError

from .conversations import assistant, user

NAMED = [name for name in ChatTemplateName if get_template(name)]


def chat(index: int) -> dict[str, Any]:
    return {"messages": [user(f"What is {index}?"), assistant(f"It is {index}.")], "id": index}


def preference(index: int) -> dict[str, Any]:
    return {
        "prompt_messages": [user(f"What is {index}?")],
        "chosen_messages": [assistant(f"It is {index}.")],
        "rejected_messages": [assistant("No idea")],
    }


def config(*paths: str, validation: dict[str, Any] | None = None, **more: Any) -> DataConfig:
    training = more.pop("training", {"type": "CONCATENATION", "datasets": [{"path": path} for path in paths]})
    values = {"training_data": training, "validation_data": validation or {"type": "NONE"}, **more}
    return DataConfig.model_validate({"chat_template_name": "chat-ml", **values})


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    template = get_template(ChatTemplateName.CHAT_ML)
    assert template is not None
    return make_tokenizer("byte-level", template.source, template.special_tokens)


def sft(conf: DataConfig, tokenizer: Any, **args: Any) -> PreparedData:
    return prepare_sft(conf, SFTArgs.model_validate({"train_on_completions_only": True, **args}), tokenizer, 1)


def texts(data: PreparedData, tokenizer: Any, *, trained: bool) -> list[str]:
    rows = []
    for row in data.train:
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        rows.append(tokenizer.decode([item for item, label in pairs if not trained or label != -100]))
    return rows


class FreezeCounts:
    """Notes how many objects are excluded from garbage collection while rows are prepared."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def measure(self, rows: object, batch: object) -> int:
        return gc.get_freeze_count()

    def add(self, split: str, measured: int) -> None:
        self.counts.append(measured)


@pytest.mark.parametrize("is_frozen_before", [False, True])
def test_existing_objects_are_excluded_from_collection_while_rows_are_prepared(
    write_lines: Callable[..., str], tokenizer: Any, is_frozen_before: bool
) -> None:
    conf = config(write_lines("a.jsonl", chat(0)), cache="off")
    kept = [[number] for number in range(10_000)]
    seen = FreezeCounts()
    gc.unfreeze()
    if is_frozen_before:
        gc.freeze()
    try:
        prepare_sft(conf, SFTArgs(train_on_completions_only=True), tokenizer, 1, inspector=seen)
        assert seen.counts and min(seen.counts) >= len(kept)
        # What was excluded before, by the console script or by the caller, stays so.
        assert (gc.get_freeze_count() > 0) == is_frozen_before
    finally:
        gc.unfreeze()


def test_sft_rows_train_on_answers_only(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", *(chat(index) for index in range(5)))
    data = sft(config(path), tokenizer)
    assert data.train.column_names == ["input_ids", "labels"]
    assert texts(data, tokenizer, trained=True) == [f"It is {index}.<|im_end|>" for index in range(5)]
    assert data.validation is None
    assert data.statistics.report()[0]["kept"] == 5


def test_without_completions_only_every_token_is_trained(write_lines: Callable[..., str], tokenizer: Any) -> None:
    data = sft(config(write_lines("a.jsonl", chat(1))), tokenizer, train_on_completions_only=False)
    assert data.train[0]["labels"] == data.train[0]["input_ids"]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_every_named_template_prepares_both_methods(
    name: ChatTemplateName, kind: str, write_lines: Callable[..., str], make_tokenizer: Callable[..., Any]
) -> None:
    template = get_template(name)
    assert template is not None
    tokenizer = make_tokenizer(kind, template.source, template.special_tokens)
    end = template.end_of_turn or tokenizer.eos_token
    data = sft(config(write_lines("a.jsonl", chat(1)), chat_template_name=name.value), tokenizer)
    assert texts(data, tokenizer, trained=True) == [f"It is 1.{end}"]
    conf = config(write_lines("p.jsonl", preference(1)), chat_template_name=name.value)
    (row,) = prepare_dpo(conf, 512, tokenizer, 1).train
    prompt = tokenizer.apply_chat_template([user("What is 1?")], add_generation_prompt=True)["input_ids"]
    assert row["prompt_ids"] == prompt
    assert tokenizer.decode(row["chosen_ids"]) == f"It is 1.{end}"
    assert tokenizer.decode(row["rejected_ids"]) == f"No idea{end}"


def test_longer_rows_are_filtered_or_cut_and_counted(write_lines: Callable[..., str], tokenizer: Any) -> None:
    long = {"messages": [user("Hi"), assistant("word " * 50)]}
    path = write_lines("a.jsonl", chat(1), long, chat(2))
    data = sft(config(path), tokenizer, max_seq_length=40)
    assert len(data.train) == 2
    assert data.statistics.report()[0]["filtered_by_length"] == 1
    assert any("warning: 33.3% of the rows" in line for line in data.statistics.lines())
    data = sft(config(path), tokenizer, max_seq_length=40, length_handling="truncate")
    assert [len(row["input_ids"]) <= 40 for row in data.train] == [True] * 3
    report = data.statistics.report()[0]
    assert report["answers_cut"] == 1
    assert report["tokens_cut"] > 0


def test_a_row_whose_answer_is_cut_off_whole_is_a_fault(write_lines: Callable[..., str], tokenizer: Any) -> None:
    long = {"messages": [user("word " * 50), assistant("Hi")]}
    path = write_lines("a.jsonl", *(chat(index) for index in range(30)), long)
    report = sft(config(path), tokenizer, max_seq_length=40, length_handling="truncate").statistics.report()[0]
    assert report["dropped"] == {"nothing left to train on": 1}
    assert report["invalid_rows"] == 1


def test_when_no_row_is_left_the_shortest_is_named(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("train.jsonl", *(chat(index) for index in range(5)))
    with pytest.raises(DataError, match=r"all 5 rows dropped: shortest is \d+ tokens, max_seq_length 8"):
        sft(config(path), tokenizer, max_seq_length=8)


def test_bad_rows_stop_the_run_all_at_once(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", chat(1), b"{", {"messages": []}, {"messages": [user("Hi"), assistant(None)]})
    with pytest.raises(DataError) as caught:
        sft(config(path), tokenizer)
    text = str(caught.value)
    assert f"{path}:2: invalid JSON" in text
    assert f"{path}:3: messages: needs at least one message" in text
    assert f"{path}:4: messages[1].content: expected text, got null" in text
    assert "3 bad rows" in text


def test_skipped_bad_rows_are_counted_and_limited(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", *(chat(index) for index in range(30)), b"{")
    data = sft(config(path, on_bad_row="skip"), tokenizer)
    assert data.statistics.report()[0]["dropped"] == {"bad row": 1}
    path = write_lines("a.jsonl", *(chat(index) for index in range(10)), b"{")
    with pytest.raises(DataError, match=r"1 of 11 training rows \(9.1%\) are invalid"):
        sft(config(path, on_bad_row="skip"), tokenizer)


def test_rows_without_an_answer_are_counted(write_lines: Callable[..., str], tokenizer: Any) -> None:
    rows = [chat(index) for index in range(30)]
    path = write_lines("a.jsonl", *rows, {"messages": [user("Hi")]}, rows[0], {"messages": [user("a"), assistant("")]})
    report = sft(config(path), tokenizer).statistics.report()[0]
    assert report["dropped"] == {"nothing to train on": 1}
    assert report["warnings"] == {
        "the same as an earlier row": 1,
        "an assistant turn without text": 1,
        "column id is not used": 31,
    }


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("Hi")], "no assistant message"),
        ([user("Hi"), {**assistant("one"), "train": False}], "no assistant message is selected for training"),
    ],
)
def test_a_row_that_trains_nothing_is_reported_with_its_reason(
    write_lines: Callable[..., str], tokenizer: Any, messages: list[Any], reason: str
) -> None:
    with pytest.raises(DataError, match=f"nothing to train on.*{reason}"):
        sft(config(write_lines("a.jsonl", {"messages": messages})), tokenizer)


def test_missing_files_are_named_together(tokenizer: Any, tmp_path: Any) -> None:
    with pytest.raises(DataError) as caught:
        sft(config(str(tmp_path / "a.jsonl"), str(tmp_path)), tokenizer)
    assert "data_conf.training_data.datasets[0].path: " in str(caught.value)
    assert "data_conf.training_data.datasets[1].path: " in str(caught.value)


def test_a_weighted_mix_takes_turns_and_survives_dropped_rows(write_lines: Callable[..., str], tokenizer: Any) -> None:
    first = write_lines("a.jsonl", chat(0), chat(1), chat(2))
    second = write_lines("b.jsonl", chat(10), {"messages": [user("Hi"), assistant("word " * 99)]})
    datasets = [{"path": first}, {"path": "never read", "sampling_weight": 0}, {"path": second}]
    conf = config(training={"type": "PRECOMPUTE_WEIGHTED_MIX", "datasets": datasets})
    rows = texts(sft(conf, tokenizer, max_seq_length=40), tokenizer, trained=True)
    assert [row.split()[2] for row in rows] == [f"{index}.<|im_end|>" for index in (0, 10, 1, 2, 10)]


def test_validation_by_split_and_by_file(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", *(chat(index) for index in range(10)))
    data = sft(config(path, validation={"type": "AUTO_SPLIT", "ratio": 0.2}), tokenizer)
    assert (len(data.train), len(data.validation or ())) == (8, 2)
    seen = [row["input_ids"] for part in (data.train, data.validation) for row in part]
    assert len({tuple(row) for row in seen}) == 10
    training, validation = data.statistics.report()
    assert training["rows"] == 10
    assert {**validation, "formats": {}} == {
        **training,
        "split": "validation",
        "formats": {},
        "rows": 2,
        "kept": 2,
        "tokens": sum(len(row["input_ids"]) for row in data.validation),
        "trained_tokens": sum(label != -100 for row in data.validation for label in row["labels"]),
        "warnings": {},
    }
    assert "  split off the rows above: AUTO_SPLIT" in data.statistics.lines()
    another = write_lines("b.jsonl", chat(3), chat(99))
    validation = {"type": "CONCATENATION", "datasets": [{"path": another}]}
    data = sft(config(path, validation=validation), tokenizer)
    assert len(data.validation or ()) == 2
    assert data.statistics.report()[1]["warnings"] == {"the same as a training row": 1, "column id is not used": 2}


def test_dpo_counts_and_cuts(write_lines: Callable[..., str], tokenizer: Any) -> None:
    same = {**preference(1), "rejected_messages": [assistant("It is 1.")]}
    long = {**preference(2), "chosen_messages": [assistant("word " * 99)]}
    full = {**preference(3), "prompt_messages": [user("word " * 99)]}
    path = write_lines("p.jsonl", *(preference(index) for index in range(50)), same, long, full)
    data = prepare_dpo(config(path), 64, tokenizer, 1)
    report = data.statistics.report()[0]
    assert report["dropped"] == {"the chosen and the rejected answer are the same": 1, "nothing left to train on": 1}
    assert report["truncated"] == 1
    assert max(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in data.train) == 64
    assert [row.title for row in data.preview[:2]] == ["chosen", "rejected"]


def test_dpo_keeps_the_last_tokens_of_a_long_prompt(write_lines: Callable[..., str], tokenizer: Any) -> None:
    long = {**preference(3), "prompt_messages": [user("word " * 99)]}
    path = write_lines("p.jsonl", preference(1), long)
    whole, cut = (prepare_dpo(config(path), 512, tokenizer, 1, max_prompt_length=limit) for limit in (None, 16))
    prompts = [row["prompt_ids"] for row in whole.train]
    assert [row["prompt_ids"] for row in cut.train] == [prompt[-16:] for prompt in prompts]
    assert max(map(len, prompts)) > 16
    for name in ("chosen_ids", "rejected_ids"):
        assert cut.train[name] == whole.train[name]
    assert cut.statistics.report()[0]["truncated"] == sum(len(prompt) > 16 for prompt in prompts)
    # A prompt that fills max_length is dropped, unless it is cut.
    assert len(prepare_dpo(config(path, max_lost_fraction=1.0), 64, tokenizer, 1).train) == 1
    assert len(prepare_dpo(config(path), 64, tokenizer, 1, max_prompt_length=16).train) == 2


def test_dpo_rows_go_through_trls_collator(write_lines: Callable[..., str], tokenizer: Any) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    data = prepare_dpo(config(write_lines("p.jsonl", preference(1), preference(2))), 64, tokenizer, 1)
    batch = DataCollatorForPreference(pad_token_id=0)([data.train[0], data.train[1]])
    assert batch["input_ids"].shape[0] == 4
    completion = batch["input_ids"][0][batch["completion_mask"][0].bool()]
    assert tokenizer.decode(completion) == "It is 1.<|im_end|>"


def test_the_preview_shows_what_is_trained(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", *(chat(index) for index in range(9)))
    data = sft(config(path), tokenizer)
    assert len(data.preview) == 9
    text = to_text(data.preview)
    assert "<|im_start|>assistant\n⟦It is 0.<|im_end|>⟧\n" in text
    assert f"{path}:1 (row)" in text
    assert "\x1b[32mIt is 0." in to_text(data.preview, color=True)
    for row, parsed in zip(data.preview, parse_text(text), strict=True):
        assert (parsed.location, parsed.title) == (row.location, row.title)
        assert (parsed.tokens, parsed.trained, parsed.tokens_cut) == (row.tokens, row.trained, row.tokens_cut)
        assert to_text([parsed]).rstrip("\n") == to_text([row]).rstrip("\n")
        assert parsed.segments[:2] == row.segments[:2]


def test_the_fingerprint_names_what_changed(
    write_lines: Callable[..., str], tokenizer: Any, make_tokenizer: Callable[..., Any]
) -> None:
    path = write_lines("a.jsonl", chat(1))
    first = sft(config(path), tokenizer).fingerprint
    assert sft(config(path), tokenizer).fingerprint == first
    longer = sft(config(path), tokenizer, max_seq_length=100).fingerprint
    assert (longer.rules != first.rules, longer.data == first.data) == (True, True)
    write_lines("a.jsonl", chat(2))
    assert sft(config(path), tokenizer).fingerprint.data != first.data
    template = get_template(ChatTemplateName.PORO)
    assert template is not None
    another = sft(config(path), make_tokenizer("byte-level", template.source, template.special_tokens)).fingerprint
    assert another.template != first.template
    assert another.tokenizer != first.tokenizer
    assert another.digest != first.digest
