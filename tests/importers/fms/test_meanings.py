"""Which tokens an fms-hf-tuning job trains, with and without a data config, on real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.sections.experiment import SFTExperiment
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import parse_document
from finetuning.data.pipeline import prepare_sft
from finetuning.errors import ConfigError
from finetuning.importers import to_yaml
from finetuning.importers.fms.data_config import read_data_config
from finetuning.importers.fms.job import Readers, to_experiment
from finetuning.importers.translation import Translation

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
CHAT += [{"role": "user", "content": "b"}, {"role": "assistant", "content": "two"}]
ROWS = {
    "pairs": {"input": "Q", "output": "A"},
    "texts": {"output": "### Input: Q\n### Label: A"},
    "chats": {"messages": CHAT},
    "talks": {"talk": CHAT},
    "tokens": {"input_ids": [100, 101, 102], "labels": [-100, 101, 102]},
}
END = "<|im_end|>"
TURNS = {"instruction_template": "<|im_start|>user", "response_template": "<|im_start|>assistant"}


def handler(name: str, **fn_kwargs: Any) -> dict[str, Any]:
    arguments = {"remove_columns": "all", "batched": False, "num_proc": 2, "fn_kwargs": fn_kwargs}
    return {"name": name, "arguments": arguments}


FORMATTED = handler(
    "apply_custom_jinja_template",
    formatted_text_column_name="formatted",
    template="In: {{element['input']}} Out: {{element['output']}}{{eos_token}}",
)
CHAT_TEXT = handler("apply_tokenizer_chat_template", formatted_text_column_name="formatted")
TALK_TEXT = handler(
    "apply_tokenizer_chat_template", formatted_text_column_name="formatted", conversation_column_name="talk"
)
MASKED = handler("tokenize_and_apply_input_masking", input_column_name="input", output_column_name="output")


@pytest.fixture
def job(tmp_path: Path, chatml_llama_dir: Path) -> Callable[..., Translation]:
    """A function that translates a job on named rows; with handlers, through a data config."""
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")

    def made(
        name: str, keys: dict[str, Any], handlers: list[Any] | None = None, processes: int = 1, **config: Any
    ) -> Translation:
        path = str(tmp_path / f"{name}.jsonl")
        where = {"training_data_path": path}
        if handlers is not None or config:
            dataset = {"name": "d", "data_paths": [path], "data_handlers": handlers or []} | config.pop("dataset", {})
            file = tmp_path / "data.json"
            file.write_text(json.dumps({"datasets": [dataset, *config.pop("datasets", [])], **config}))
            where = {"data_config_path": str(file)}
        values = {"model_name_or_path": str(chatml_llama_dir), "output_dir": str(tmp_path / "out")} | where | keys
        return to_experiment(
            parse_document(json.dumps(values), "job.json"), Readers(read_data_config), processes=processes
        )

    return made


def trained(translation: Translation, tokenizer_dir: Path) -> str:
    """Return the trained text of the first row, after the YAML was written and read."""
    from transformers import AutoTokenizer

    document = parse_document(to_yaml(translation, "fms-hf-tuning"), "experiment.yaml")
    experiment = validate(document, SFTExperiment).experiment
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    if experiment.data_conf.chat_template:
        tokenizer.chat_template = experiment.data_conf.chat_template
    data_conf = experiment.data_conf.model_copy(update={"cache": "off"})
    row = prepare_sft(data_conf, experiment.sft_args, tokenizer).train[0]
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    return tokenizer.decode([token for token, label in pairs if label != -100])


@pytest.mark.parametrize(
    ("rows", "keys", "handlers", "expected"),
    [
        ("pairs", {}, None, f" A{END}"),
        ("texts", {"dataset_text_field": "output", "response_template": "\\n### Label:"}, None, f" A{END}"),
        ("chats", TURNS, None, f"one{END}two{END}"),
        ("chats", TURNS | {"dataset_text_field": "formatted"}, None, f"one{END}two{END}"),
        ("talks", TURNS | {"dataset_conversation_field": "talk"}, None, f"one{END}two{END}"),
        (
            "chats",
            TURNS
            | {
                "chat_template": "{% for m in messages %}[{{ m.role }}]\\n{{ m.content }}{{ eos_token }}{% endfor %}"
                "{% if add_generation_prompt %}[assistant]\\n{% endif %}"
            },
            None,
            f"one{END}two{END}",
        ),
        ("pairs", {"response_template": " Out:"}, [FORMATTED], f" A{END}"),
        ("pairs", {"response_template": " Out:", "dataset_text_field": "formatted"}, [FORMATTED], f" A{END}"),
        ("pairs", {"packing": True}, [FORMATTED], f"In: Q Out: A{END}"),
        ("pairs", {"padding_free": ["huggingface"]}, [FORMATTED], f"In: Q Out: A{END}"),
        (
            "pairs",
            {"response_template": " Out:"},
            [FORMATTED, handler("tokenize", text_column_name="formatted")],
            f" A{END}",
        ),
        ("pairs", {"response_template": "ignored"}, [MASKED], f" A{END}"),
        ("texts", {"dataset_text_field": "output", "response_template": "\n### Label:"}, [], f" A{END}"),
        ("texts", {"dataset_text_field": "output", "packing": True}, [], f"### Input: Q\n### Label: A{END}"),
        ("chats", TURNS, [CHAT_TEXT], f"one{END}two{END}"),
        ("chats", {"response_template": "<|im_start|>assistant"}, [CHAT_TEXT], f"two{END}"),
        ("talks", TURNS, [TALK_TEXT], f"one{END}two{END}"),
        ("chats", {}, [handler("tokenize_and_apply_chat_template_with_masking")], f"one{END}two{END}"),
    ],
)
def test_the_trained_text(
    rows: str,
    keys: dict[str, Any],
    handlers: list[Any] | None,
    expected: str,
    job: Callable[..., Translation],
    chatml_llama_dir: Path,
) -> None:
    assert trained(job(rows, keys, handlers), chatml_llama_dir) == expected


def test_token_ids_and_labels_are_used_unchanged(job: Callable[..., Translation], chatml_llama_dir: Path) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(chatml_llama_dir).decode([101, 102])
    assert trained(job("tokens", {}), chatml_llama_dir) == expected
    assert trained(job("tokens", {}, []), chatml_llama_dir) == expected


def test_text_rows_without_a_response_template_are_rejected(job: Callable[..., Translation]) -> None:
    for rows, handlers in (("pairs", [FORMATTED]), ("chats", [CHAT_TEXT])):
        with pytest.raises(ConfigError, match="set response_template to select the trained part; packing or"):
            job(rows, {}, handlers)


def test_the_chat_template_of_the_data_config_wins(job: Callable[..., Translation]) -> None:
    masked = [handler("tokenize_and_apply_chat_template_with_masking")]
    out = job("chats", {"chat_template": "mine"}, masked, dataprocessor={"chat_template": "theirs"})
    assert out.values["data_conf"]["chat_template"] == "theirs"
    assert any(note.startswith("chat_template: the data config's own") for note in out.notes)


def test_a_handler_can_lower_the_maximum_length(job: Callable[..., Translation]) -> None:
    def limit(keys: dict[str, Any], **arguments: Any) -> int:
        out = job("chats", keys, [handler("tokenize_and_apply_chat_template_with_masking", **arguments)])
        return out.values["sft_args"]["max_seq_length"]

    assert (limit({}), limit({}, max_seq_length=512), limit({"max_seq_length": 256}, max_seq_length=512)) == (
        4096,
        512,
        256,
    )


def test_a_streamed_batch_is_split_over_processes_in_order(job: Callable[..., Translation]) -> None:
    masked = [handler("tokenize_and_apply_input_masking", input_column_name="input", output_column_name="output")]
    held_out = {"name": "v", "data_paths": ["v.jsonl"], "split": {"validation": 1.0}}
    keys = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 5}
    streamed = {"dataprocessor": {"streaming": True}, "datasets": [held_out]}
    values = job("pairs", keys, masked, 2, **streamed).values
    assert values["batchsize_conf"]["total_train_batch_size"] == 12
    assert values["data_conf"]["shuffle_buffer"] == 1
    assert values["data_conf"]["validation_data"] == {"type": "CONCATENATION", "datasets": [{"path": "v.jsonl"}]}
    with pytest.raises(ConfigError, match="must be a multiple of the 3 processes"):
        job("pairs", keys, masked, 3, **streamed)


def test_special_tokens_are_added_and_the_template_is_kept(
    job: Callable[..., Translation], chatml_llama_dir: Path
) -> None:
    from finetuning.training.setup import load_tokenizer

    out = job("chats", TURNS | {"add_special_tokens": ["<doc>", "<|im_end|>"]})
    document = parse_document(to_yaml(out, "fms-hf-tuning"), "experiment.yaml")
    loaded = load_tokenizer(validate(document, SFTExperiment).experiment)
    assert loaded.new_tokens == ("<doc>",)
    assert len(loaded.tokenizer.encode("<doc>", add_special_tokens=False)) == 1


def test_packed_rows_are_masked_by_the_response_template(
    job: Callable[..., Translation], chatml_llama_dir: Path
) -> None:
    keys = {"dataset_text_field": "output", "response_template": "\n### Label:", "packing": True}
    out = job("texts", keys)
    assert trained(out, chatml_llama_dir) == f" A{END}"
    assert any(note.startswith("packing: the response template is applied") for note in out.notes)


def test_a_job_with_a_data_config_is_detected_by_its_keys(
    tmp_path: Path, chatml_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetuning.cli.config_commands import import_main

    (tmp_path / "data.json").write_text(json.dumps({"datasets": [{"name": "d", "data_paths": ["a.jsonl"]}]}))
    values = {"model_name_or_path": str(chatml_llama_dir), "output_dir": "out"}
    (tmp_path / "job.json").write_text(json.dumps(values | {"data_config_path": str(tmp_path / "data.json")}))
    assert import_main([str(tmp_path / "job.json")]) == 0
    assert "path: a.jsonl" in capsys.readouterr().out
