"""LLaMA-Factory's dataset_info.json becomes the datasets of our YAML, which train on what was trained there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.sections.data import DataConfig, DatasetSource
from finetuning.config.yaml.reader import read_document
from finetuning.data.chat.template import configured_template
from finetuning.data.formats import Options
from finetuning.data.open_dataset import open_dataset
from finetuning.data.samples import Conversation, Preference, UnpairedPreference
from finetuning.errors import ConfigError
from finetuning.importers.llama_factory import from_llama_factory
from finetuning.importers.translation import Translation

CONFIG = "model_name_or_path: m\nstage: {stage}\ndataset: {name}\ndataset_dir: data\ntemplate: qwen\n"


@pytest.fixture
def translated(tmp_path: Path) -> Any:
    """A function: the entry of a dataset and its rows -> the translation of a config in a folder below."""

    def call(entry: dict[str, Any], *rows: dict[str, Any], stage: str = "sft", name: str = "ours") -> Translation:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "rows.json").write_text(json.dumps(rows), "utf-8")
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"ours": entry}), "utf-8")
        (tmp_path / "examples").mkdir(exist_ok=True)
        path = tmp_path / "examples" / "train.yaml"
        path.write_text(CONFIG.format(stage=stage, name=name), "utf-8")
        return from_llama_factory(read_document(str(path)), 1)

    return call


def parsed(translation: Translation, kind: str = "sft") -> Any:
    """The first row of the only dataset of a translation."""
    (values,) = translation.values["data_conf"]["training_data"]["datasets"]
    source = DatasetSource.model_validate(values)
    (row,) = open_dataset(source, "data_conf.x", kind, Options(chats="assistant")).rows
    return row


def test_columns_and_tags_are_renamed(translated: Any) -> None:
    entry = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "rule"},
        "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "client", "assistant_tag": "clerk"},
    }
    talk = [{"who": "client", "said": "Where is it?"}, {"who": "clerk", "said": "On its way."}]
    row = parsed(translated(entry, {"talk": talk, "rule": "Be kind."}))
    assert isinstance(row, Conversation)
    assert row.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "On its way."},
    ]
    assert (row.turns, row.unused) == ((2,), ())


def test_the_template_has_the_default_system_message_and_the_tools_of_theirs(translated: Any) -> None:
    """LLaMA-Factory 0.9.5 gives the same token ids for `qwen` as TRL's qwen2_5, with tools and without."""
    conf = translated({"file_name": "rows.json"}, {"instruction": "a", "output": "b"}).values["data_conf"]
    assert (conf["chat_template"], conf["special_tokens"]) == ("trl/qwen2_5", ["<|im_start|>", "<|im_end|>"])
    configured = configured_template(DataConfig.model_validate(conf))
    assert configured is not None
    # Exactly this text is printed there where a row has no system message.
    assert (
        "<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant." in configured.source
    )


def test_images_are_trained_on_by_sft_only(translated: Any) -> None:
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "messages", "images": "pics"}}
    row = {"messages": [{"from": "human", "value": "a"}], "pics": ["a.png"]}
    sft, dpo = translated(entry, row), translated({**entry, "ranking": True}, row, stage="dpo")
    (values,) = sft.values["data_conf"]["training_data"]["datasets"]
    assert values["columns"] == {"pics": "images"}
    assert "dataset: ours has images: its rows are refused unless the model takes images" in sft.notes
    assert "dataset: ours has images: its rows are refused unless ignore_columns names pics" in dpo.notes


def test_what_the_entry_does_not_name_is_ignored_as_it_was_there(translated: Any) -> None:
    entry = {"file_name": "rows.json", "columns": {"prompt": "instruction", "response": "answer"}}
    row = parsed(translated(entry, {"instruction": "a", "input": "not read", "answer": "b", "system": "nor this"}))
    assert isinstance(row, Conversation)
    assert row.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert row.unused == ()


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
def test_instruction_and_input_are_joined_as_they_were_there(translated: Any, stage: str) -> None:
    columns = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
    columns |= {"dpo": {"chosen": "chosen", "rejected": "rejected"}, "kto": {"kto_tag": "kto_tag"}}.get(stage, {})
    entry = {"file_name": "rows.json", "columns": columns, **({"ranking": True} if stage == "dpo" else {})}
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "history": [["1, 1?", "2"]]}
    row |= {"chosen": "4", "rejected": "5"} if stage == "dpo" else {"kto_tag": True} if stage == "kto" else {}
    translation = translated(entry, row, stage=stage)
    assert [note.partition(":")[0] for note in translation.notes] == ["template"]
    kind = {"sft": "sft", "dpo": "preference", "kto": "unpaired"}[stage]
    (values,) = translation.values["data_conf"]["training_data"]["datasets"]
    options = Options(chats="assistant", completions="assistant")
    (row,) = open_dataset(DatasetSource.model_validate(values), "data_conf.x", kind, options).rows
    messages = row.messages if stage == "sft" else row.prompt
    assert [message["content"] for message in messages][:3] == ["1, 1?", "2", "Add.\n2, 2"]
    # There, the answers of the history are learned as well.
    assert stage != "sft" or row.turns == (1, 3)


@pytest.mark.parametrize(
    ("line", "train_on"), [("", "assistant"), ("mask_history: true", "last"), ("train_on_prompt: true", "all")]
)
def test_which_turns_are_trained(line: str, train_on: str, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(f"model_name_or_path: m\nstage: sft\ntemplate: qwen\n{line}\n", "utf-8")
    assert from_llama_factory(read_document(str(path)), 1).values["sft_args"]["train_on"] == train_on


def test_a_ranking_is_read_as_preferences(translated: Any) -> None:
    entry = {"file_name": "rows.json", "ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}}
    row = parsed(translated(entry, {"q": "Sky?", "good": "Blue.", "bad": "No."}, stage="dpo"), "preference")
    assert isinstance(row, Preference) and not row.is_text
    assert [row.prompt[0]["content"], row.chosen[0]["content"], row.rejected[0]["content"]] == ["Sky?", "Blue.", "No."]


def test_a_chat_with_ranking_is_read_as_preferences(translated: Any) -> None:
    entry = {"file_name": "rows.json", "ranking": True, "formatting": "sharegpt"}
    entry |= {"columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}}
    good, bad = {"from": "gpt", "value": "Blue."}, {"from": "gpt", "value": "No."}
    rows = {"conversations": [{"from": "human", "value": "Sky?"}], "chosen": good, "rejected": bad}
    row = parsed(translated(entry, rows, stage="dpo"), "preference")
    assert isinstance(row, Preference) and row.chosen[0]["content"] == "Blue."


def test_a_tag_for_kto_is_read_as_a_label(translated: Any) -> None:
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "ok"}}
    entry["tags"] = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    chat = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]
    row = parsed(translated(entry, {"messages": chat, "ok": True}, stage="kto"), "unpaired")
    assert isinstance(row, UnpairedPreference) and row.label is True


def test_hub_datasets_and_limits_are_carried_over(translated: Any) -> None:
    entry = {"hf_hub_url": "some/set", "subset": "en", "split": "test", "num_samples": 7, "folder": "x"}
    translation = translated(entry)
    (source,) = translation.values["data_conf"]["training_data"]["datasets"]
    place = {"path": "some/set", "subset": "en", "split": "test", "max_rows": 7}
    assert source == {**place, "format": "alpaca", "input_separator": "\n"}
    assert "dataset: folder of ours is not carried over: x" in translation.notes


def test_a_name_that_is_not_in_the_file_is_an_error(translated: Any) -> None:
    with pytest.raises(ConfigError, match=r"our is not in .*dataset_info\.json.*ours"):
        translated({"file_name": "rows.json"}, name="our")


def test_an_entry_without_a_place_is_an_error(translated: Any) -> None:
    with pytest.raises(ConfigError, match="has neither file_name nor hf_hub_url"):
        translated({"script_url": "x"})
