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
from finetuning.errors import ConfigError, DataError
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
EARLIER_MASKED = handler("tokenize_and_apply_instruction_masking", input_field_name="input", output_field_name="output")
EARLIER_FORMATTED = handler(
    "apply_custom_data_formatting_template", dataset_text_field="f", template="In: {{input}} Out: {{output}}"
)
WHOLE = "### Input: Q\n### Label: A"


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


def prepared(translation: Translation, tokenizer_dir: Path) -> tuple[Any, Any]:
    """Return the rows, after the YAML was written and read, and the tokenizer."""
    from transformers import AutoTokenizer

    document = parse_document(to_yaml(translation, "fms-hf-tuning"), "experiment.yaml")
    experiment = validate(document, SFTExperiment).experiment
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    if experiment.data_conf.chat_template:
        tokenizer.chat_template = experiment.data_conf.chat_template
    data_conf = experiment.data_conf.model_copy(update={"cache": "off"})
    return prepare_sft(data_conf, experiment.sft_args, tokenizer), tokenizer


def trained(translation: Translation, tokenizer_dir: Path) -> str:
    """Return the trained text of the first row."""
    rows, tokenizer = prepared(translation, tokenizer_dir)
    pairs = zip(rows.train[0]["input_ids"], rows.train[0]["labels"], strict=True)
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
        (
            "talks",
            {},
            [handler("tokenize_and_apply_chat_template_with_masking", conversation_column_name="talk")],
            f"one{END}two{END}",
        ),
        ("chats", TURNS, [handler("apply_tokenizer_chat_template")], f"one{END}two{END}"),
        (
            "pairs",
            {},
            [
                FORMATTED,
                handler("tokenize", text_column_name="formatted"),
                handler("duplicate_columns", existing_column_name="input_ids", new_column_name="labels"),
            ],
            f"In: Q Out: A{END}",
        ),
        # Names of earlier releases.
        ("pairs", {}, [EARLIER_MASKED], f" A{END}"),
        ("pairs", {"response_template": " Out:"}, [EARLIER_FORMATTED], f" A{END}"),
        ("texts", {"packing": True}, [handler("add_tokenizer_eos_token", text_column_name="output")], f"{WHOLE}{END}"),
        (
            "texts",
            {"packing": True},
            [handler("apply_dataset_formatting", dataset_text_field="output")],
            f"{WHOLE}{END}",
        ),
        (
            "texts",
            {},
            [
                handler("tokenize", dataset_text_field="output"),
                handler("duplicate_columns", old_column="input_ids", new_column="labels"),
            ],
            f"{WHOLE}{END}",
        ),
        (
            "pairs",
            {"packing": True},
            [
                handler(
                    "apply_custom_jinja_template",
                    formatted_text_column_name="f",
                    template="In: {{input}}",
                    add_eos_token=False,
                )
            ],
            "In: Q",
        ),
        (
            "chats",
            {
                "chat_template": "{% for m in messages['messages'] %}[{{ m.role }}]{{ m.content }}{{ eos_token }}"
                "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
            },
            [
                handler(
                    "tokenize_and_apply_chat_template_with_masking",
                    formatted_text_column_name="formatted",
                    conversation_column="messages",
                )
            ],
            f"one{END}two{END}",
        ),
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


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_dataset_may_be_held_out_in_part_and_not_trained_on(
    job: Callable[..., Translation], chatml_llama_dir: Path, tmp_path: Path
) -> None:
    held_out_rows = write_rows(tmp_path / "held_out.jsonl", [{"input": f"Q{n}", "output": f"A{n}"} for n in range(10)])
    held_out = {
        "name": "h",
        "data_paths": [held_out_rows],
        "data_handlers": [MASKED],
        "split": {"train": 0.0, "validation": 0.3},
    }
    out = job("pairs", {}, [MASKED], datasets=[held_out])
    rows, _ = prepared(out, chatml_llama_dir)
    assert (len(rows.train), len(rows.validation)) == (1, 3)
    weighted = [held_out, {"name": "w", "data_paths": [held_out_rows], "data_handlers": [MASKED], "sampling": 0.5}]
    mixed = job("pairs", {}, [MASKED], dataset={"sampling": 0.5}, datasets=weighted)
    assert len(prepared(mixed, chatml_llama_dir)[0].validation) == 3
    with pytest.raises(ConfigError, match="is set, but no row of this dataset is used for training"):
        job("pairs", {}, [MASKED], dataset={"sampling": 0.5}, datasets=[{**held_out, "sampling": 0.5}])


def test_rows_are_filtered_by_their_number_of_tokens(
    job: Callable[..., Translation], chatml_llama_dir: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "pairs.jsonl", [{"input": "Q", "output": "A" * count} for count in (1, 2, 40)])
    skip = handler("skip_samples_with_large_columns", column_name="input_ids", max_allowed_length=10)
    rows, _ = prepared(job("pairs", {}, [MASKED, skip]), chatml_llama_dir)
    lengths = [len(row["input_ids"]) for row in rows.train]
    assert len(lengths) == 2 and max(lengths) <= 10
    # A filter above the length that rows are truncated to filters nothing.
    both = job("pairs", {"max_seq_length": 8}, [MASKED, skip])
    assert both.values["sft_args"]["length_handling"] == "truncate"
    assert len(prepared(both, chatml_llama_dir)[0].train) == 3
    unfiltered = {"name": "u", "data_paths": ["u.jsonl"], "data_handlers": [MASKED]}
    with pytest.raises(ConfigError, match=r"only some datasets filter rows by .* of 10 tokens; all of them must"):
        job("pairs", {}, [MASKED, skip], datasets=[unfiltered])


def test_a_stream_needs_only_a_number_of_steps(job: Callable[..., Translation]) -> None:
    streamed = {"dataprocessor": {"streaming": True}}
    out = job("pairs", {"max_steps": 40}, [MASKED], **streamed)
    document = parse_document(to_yaml(out, "fms-hf-tuning"), "experiment.yaml")
    arguments = validate(document, SFTExperiment).experiment.training_args
    assert (arguments.save_strategy, arguments.save_steps) == ("steps", 40)
    assert (arguments.logging_strategy, arguments.logging_steps) == ("steps", 40)
    explicit = job("pairs", {"max_steps": 4000, "save_strategy": "epoch", "save_steps": 100}, [MASKED], **streamed)
    assert explicit.values["training_args"]["save_steps"] == 100
    assert any(note.startswith("save_strategy: a stream has no known epochs") for note in explicit.notes)
    assert explicit.values["training_args"]["logging_steps"] == 500


@pytest.mark.parametrize("template", ["}} {{input}} {{", "a {{ b", "{% for m in input %}{{ m }}", "{{ {'a': 1} }} {{"])
def test_a_template_with_stray_braces_is_refused(template: str, job: Callable[..., Translation]) -> None:
    with pytest.raises(ConfigError, match=r"job.json:1:\d+: data_formatter_template: the template is not valid"):
        job("pairs", {"data_formatter_template": template, "response_template": "x"})
    made = handler("apply_custom_jinja_template", formatted_text_column_name="f", template=template)
    with pytest.raises(ConfigError, match=r"data.json:1:\d+: datasets.0.*template: the template is not valid"):
        job("pairs", {"response_template": "x"}, [made])


def test_tokenized_training_rows_need_tokenized_validation_rows(
    job: Callable[..., Translation], tmp_path: Path
) -> None:
    for name in ("tokens", "pairs"):
        keys = {"validation_data_path": str(tmp_path / f"{name}.jsonl")}
        if name == "tokens":
            assert job("tokens", keys).values["data_conf"]["validation_data"]["type"] == "CONCATENATION"
        else:
            with pytest.raises(ConfigError, match="validation_data_path: must hold input_ids and labels"):
                job("tokens", keys)
            assert job("pairs", {"validation_data_path": str(tmp_path / "tokens.jsonl")}).problems == []


def test_a_job_may_lose_rows_without_trained_tokens(
    job: Callable[..., Translation], chatml_llama_dir: Path, tmp_path: Path
) -> None:
    """In Parquet files with columns of both list types, half of the rows have no trained token."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    paths = []
    for name, kind in (("large", pa.large_list(pa.int64())), ("small", pa.list_(pa.int32()))):
        table = pa.table({"input_ids": [[5, 6]] * 2, "labels": [[-100, 6], [-100, -100]]})
        schema = pa.schema([("input_ids", kind), ("labels", kind)])
        paths.append(str(tmp_path / f"{name}.parquet"))
        parquet.write_table(table.cast(schema), paths[-1])
    dataset = {"data_paths": paths}
    with pytest.raises(DataError, match="max_lost_fraction"):
        prepared(job("pairs", {}, [], dataset=dataset), chatml_llama_dir)
    rows, _ = prepared(job("pairs", {"max_lost_fraction": 0.5}, [], dataset=dataset), chatml_llama_dir)
    assert [row["labels"] for row in rows.train] == [[-100, 6]] * 2
