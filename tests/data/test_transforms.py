"""Transforms of rows, and the data configs of fms-hf-tuning that contain them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.sections.data import DataConfig, DatasetSource
from finetuning.config.sections.training import SFTArgs
from finetuning.config.yaml.overrides import unescape
from finetuning.data.pipeline import prepare_sft
from finetuning.data.samples import Row, SkippedRow
from finetuning.data.text_template import TextTemplate, TextTemplateError
from finetuning.data.transforms import make_transforms
from finetuning.errors import ConfigError, DataError, Location, Problem
from finetuning.importers.fms.data_config import read_data_config

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def handled(values: dict[str, Any], *handlers: dict[str, Any], **source: Any) -> Any:
    recipe = make_transforms(
        DatasetSource.model_validate({"path": "a", "handlers": list(handlers), **source}), "data_conf.x.datasets[0]"
    )
    row = recipe(Row(values, Location("a.jsonl", 3)), {"eos_token": "</s>"})
    return row.values if isinstance(row, Row) else row


def step(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


ROW = {"a": 1, "b": "two", "c": [3]}


@pytest.mark.parametrize(
    ("handler", "values"),
    [
        (step("rename_columns", column_mapping={"a": "x"}), {"x": 1, "b": "two", "c": [3]}),
        (step("rename_columns", column_mapping={"a": "b", "b": "a"}), {"b": 1, "a": "two", "c": [3]}),
        (step("select_columns", column_names=["c", "a"]), {"c": [3], "a": 1}),
        (step("remove_columns", column_names=["c", "a"]), {"b": "two"}),
        (step("duplicate_columns", fn_kwargs={"existing_column_name": "a", "new_column_name": "d"}), {**ROW, "d": 1}),
        (step("skip_samples_with_large_columns", fn_kwargs={"column_name": "b", "max_allowed_length": 3}), ROW),
        (
            step(
                "apply_custom_jinja_template",
                formatted_text_column_name="t",
                template="{{b}}: {{ c[0] + a }}{{eos_token}}",
            ),
            {**ROW, "t": "two: 4</s>"},
        ),
        (
            step(
                "apply_custom_jinja_template", formatted_text_column_name="b", template="{{ b }}!", remove_columns="all"
            ),
            {"b": "two!"},
        ),
        (
            step(
                "duplicate_columns",
                remove_columns=["a"],
                fn_kwargs={"existing_column_name": "a", "new_column_name": "d"},
            ),
            {"b": "two", "c": [3], "d": 1},
        ),
    ],
)
def test_handlers_transform_rows(handler: dict[str, Any], values: dict[str, Any]) -> None:
    assert handled(ROW, handler) == values


def test_columns_are_renamed_before_handlers_run() -> None:
    assert handled(ROW, step("select_columns", column_names=["x"]), columns={"a": "x"}) == {"x": 1}
    assert handled(ROW, columns={"missing": "x"}) == ROW


def test_too_large_rows_are_skipped() -> None:
    skipped = handled(ROW, step("skip_samples_with_large_columns", column_name="b", max_allowed_length=2))
    assert skipped == SkippedRow(Location("a.jsonl", 3), "b is longer than 2")


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (step("rename_columns", column_mapping={"x": "y"}), "no column x to rename; columns: a, b, c"),
        (step("rename_columns", column_mapping={"a": "b"}), "a cannot be renamed to b: a column of that name exists"),
        (step("select_columns", column_names=["x"]), "no column x"),
        (step("remove_columns", column_names=["x"]), "no column x"),
        (step("duplicate_columns", existing_column_name="x", new_column_name="y"), "no column x"),
        (step("duplicate_columns", existing_column_name="a", new_column_name="b"), "a cannot be duplicated to b"),
        (step("skip_samples_with_large_columns", column_name="a", max_allowed_length=3), "a has no length"),
        (
            step("apply_custom_jinja_template", formatted_text_column_name="t", template="{{x}}"),
            "the template has {{x}}",
        ),
        (
            step("apply_custom_jinja_template", formatted_text_column_name="t", template="{{ ''.__class__ }}"),
            "the template uses something that the Jinja sandbox forbids",
        ),
    ],
)
def test_failed_transform_reports_the_row(handler: dict[str, Any], message: str) -> None:
    problem = handled(ROW, handler)
    assert isinstance(problem, Problem)
    assert str(problem).startswith(f"a.jsonl:3: {message}")


@pytest.mark.parametrize(
    ("handlers", "message"),
    [
        ([step("skip_large_text")], '[0]: unknown handler "skip_large_text"; supported are rename_columns, '),
        ([step("rename_columns")], "[0]: rename_columns requires column_mapping; its arguments are column_mapping"),
        ([step("select_columns", column_names=["a"], colums=1)], "[0]: select_columns has no argument colums"),
        (
            [step("skip_samples_with_large_columns", column_name="a", max_allowed_length="3")],
            "[0]: max_allowed_length must be an integer of at least 0",
        ),
        (
            [step("tokenize", text_column_name="a"), step("remove_columns", column_names=["a"])],
            "[1]: remove_columns cannot come after a handler that tokenizes",
        ),
        (
            [
                step("tokenize", text_column_name="a"),
                step("skip_samples_with_large_columns", column_name="input_ids", max_allowed_length=3),
            ],
            "[1]: use sft_args.max_seq_length",
        ),
    ],
)
def test_invalid_handlers_are_reported_with_their_key(handlers: list[Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        handled(ROW, *handlers)
    assert str(caught.value).startswith(f"data_conf.x.datasets[0].handlers{message}")


FIELDS = {"Tweet text": "@you hi", "a.b-c_1": 2, "Größe": "XL", " padded ": "yes", "flag": True, "list": [1]}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{Tweet text}}|{{ Tweet text }}", "@you hi|@you hi"),
        ("{{Tweet text}} }} end", "@you hi }} end"),
        ("{{ {'a': flag}['a'] }}", "True"),
        ("{{a.b-c_1}} {{Größe}}", "2 XL"),
        ("{{ padded }}{{flag}}", "yesTrue"),
        ("{{element['Tweet text'] | upper}}{{eos_token}}", "@YOU HI</s>"),
        ("{% for one in list %}{{ one }},{% endfor %}", "1,"),
        ("no field", "no field"),
    ],
)
def test_template_fields_are_columns_before_jinja(template: str, text: str) -> None:
    assert TextTemplate(template)(FIELDS, {"eos_token": "</s>"}) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{Tweet}}", "the template has {{Tweet}}, which is neither a column"),
        ("{{Tweet  text}}", "the template has {{Tweet  text}}, which is neither a column"),
        ("{{list}}", "list: expected text, got a list"),
        ("{{ ''.__class__.__mro__ }}", "the template uses something that the Jinja sandbox forbids"),
        ("{{ 1 / 0 }}", "the template failed on this row: division by zero"),
        ("{% if %}", "the template is not valid: "),
        ("}} {{Tweet text}} {{", "the template is not valid: "),
        ("{{Tweet text}} {{ ID", "the template is not valid: "),
    ],
)
def test_invalid_template_fields_are_errors(template: str, message: str) -> None:
    with pytest.raises(TextTemplateError) as caught:
        TextTemplate(template)(FIELDS, {})
    assert message in str(caught.value)


def test_only_escapes_are_unescaped() -> None:
    assert unescape("first\n\\nabla") == "first\n\\nabla"
    assert unescape(r"\n### Réponse:\t\\n 你") == "\n### Réponse:\t\\n 你"


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer("byte-level", CHATML)


def texts(data: Any, tokenizer: Any, *, trained: bool = True) -> list[str]:
    rows = []
    for row in data.train:
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        rows.append(tokenizer.decode([item for item, label in pairs if not trained or label != -100]))
    return rows


def prepare(section: dict[str, Any], tokenizer: Any, **args: Any) -> Any:
    return prepare_sft(DataConfig.model_validate(section), SFTArgs.model_validate(args), tokenizer)


def yaml_config(tmp_path: Path, config: dict[str, Any]) -> Path:
    path = tmp_path / "data_config.yaml"
    path.write_text(json.dumps(config))
    return path


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "handlers", "trained"),
    [
        (
            {"question": "Q:", "answer": "A"},
            [
                step(
                    "tokenize_and_apply_input_masking",
                    remove_columns="all",
                    batched=False,
                    fn_kwargs={"input_column_name": "question", "output_column_name": "answer"},
                )
            ],
            " A</s>",
        ),
        (
            {"input": "no", "question": "Q:", "answer": "A"},
            [
                step(
                    "tokenize_and_apply_input_masking",
                    fn_kwargs={
                        "input_column_name": "question",
                        "output_column_name": "answer",
                        "add_eos_token": False,
                    },
                )
            ],
            " A",
        ),
        (
            {"talk": CHAT},
            [step("tokenize_and_apply_chat_template_with_masking", fn_kwargs={"conversation_column": "talk"})],
            "Hello<|im_end|>",
        ),
        (
            {"messages": CHAT},
            [
                step("apply_tokenizer_chat_template", fn_kwargs={"formatted_text_column_name": "formatted"}),
                step("tokenize", fn_kwargs={"text_column_name": "formatted", "truncation": False}),
                step("duplicate_columns", existing_column_name="input_ids", new_column_name="labels"),
            ],
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
        ),
        (
            {"a": "one", "b": "two"},
            [
                step(
                    "apply_custom_jinja_template",
                    fn_kwargs={"formatted_text_column_name": "t", "template": "{{a}} {{b}}"},
                )
            ],
            "one two</s>",
        ),
    ],
)
def test_fms_handler_chains_give_the_expected_rows(
    row: dict[str, Any],
    handlers: list[Any],
    trained: str,
    write_lines: Callable[..., str],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    dataset = {"name": "d", "data_paths": [write_lines("a.jsonl", row)], "data_handlers": handlers}
    section = read_data_config(yaml_config(tmp_path, {"datasets": [dataset]}))
    assert texts(prepare(section, tokenizer), tokenizer) == [trained]


def test_a_data_config_of_fms_is_read_whole(write_lines: Callable[..., str], tokenizer: Any, tmp_path: Path) -> None:
    def file(name: str, count: int) -> str:
        return write_lines(f"{name}.jsonl", *({"input": f"{name} {number}", "output": "x"} for number in range(count)))

    (tmp_path / "template.jinja").write_text(CHATML)
    config = {
        "dataprocessor": {
            "type": "default",
            "seed": 7,
            "streaming": False,
            "sampling_stopping_strategy": "first_exhausted",
            "chat_template_path": "template.jinja",
        },
        "datasets": [
            {"name": "a", "data_paths": [file("a", 40)], "sampling": 0.6, "split": {"train": 0.5, "validation": 0.25}},
            {"name": "b", "data_paths": [file("b", 5), file("c", 5)], "sampling": 0.3},
            {"name": "d", "data_paths": [file("d", 10)], "sampling": 0.1, "split": {"train": 1.0}},
            {"name": "e", "data_paths": [file("e", 3)], "split": {"validation": 1.0}},
        ],
    }
    section = read_data_config(yaml_config(tmp_path, config))
    assert section["chat_template"] == CHATML
    data = prepare(section, tokenizer)
    train = texts(data, tokenizer, trained=False)
    validation = [tokenizer.decode(row["input_ids"]) for row in data.validation]
    assert (len(validation), sum(text.startswith("e ") for text in validation)) == (13, 3)
    assert len(set(train)) == len(train), "under first_exhausted no row comes twice"
    assert not set(train) & set(validation)
    counts = [sum(text.startswith(tuple(names)) for text in train) for names in ("a", "bc", "d")]
    assert counts[0] == 20 or counts[1] == 10 or counts[2] == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": []}, 'dataset: unknown key. Did you mean "datasets"?'),
        ({"datasets": []}, "datasets: at least one dataset is required"),
        ({"dataprocessor": {"sed": 1}}, "unknown key"),
        ({"dataprocessor": {"type": "odm"}}, '"odm" is not supported; only "default" is'),
        (
            {"dataprocessor": {"chat_template": "a", "chat_template_base64": "YQ=="}},
            "chat_template_base64: cannot be combined with chat_template",
        ),
        ({"dataprocessor": {"chat_template_base64": "?"}}, "is not base64"),
        ({"dataprocessor": {"chat_template_path": "missing.jinja"}}, "cannot read missing.jinja: No such file"),
        ({"datasets": [{"name": "a"}]}, "data_paths: a list of paths is required"),
        ({"datasets": [{"data_paths": ["a"], "sampling": 0.5}]}, "the sampling weights sum to 0.5"),
        (
            {"datasets": [{"data_paths": ["a"], "sampling": 1}, {"data_paths": ["b"]}]},
            "sampling is required, because other",
        ),
        ({"datasets": [{"data_paths": ["a"], "sampling": 0}]}, "must be a number above 0, up to 1"),
        ({"datasets": [{"data_paths": ["a.jsonl"], "builder": "webdataset"}]}, "unknown builder 'webdataset'"),
        ({"datasets": [{"data_paths": ["a.log"], "builder": "text"}]}, "rename it to .txt or .md"),
        ({"datasets": [{"data_paths": ["a.csv"], "builder": "json"}]}, "rename it to .json or .jsonl"),
        (
            {"datasets": [{"data_paths": ["a"], "shuffle": False, "split": {"train": 0.5, "validation": 0.5}}]},
            "shuffle: splits are always random",
        ),
        ({"datasets": [{"data_paths": ["a"], "split": {"train": 0.9, "validation": 0.2}}]}, "is 1.1; it must be"),
        ({"datasets": [{"data_paths": ["a"], "data_handlers": [{}]}]}, "data_handlers.0: name is required"),
    ],
)
def test_what_is_wrong_in_a_data_config_is_named_with_its_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = yaml_config(tmp_path, {"datasets": [{"data_paths": ["a"]}], **changes})
    with pytest.raises(ConfigError) as caught:
        read_data_config(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}:1:")


def test_keys_that_say_what_holds_anyway_are_taken(tmp_path: Path) -> None:
    dataset = {"name": "a", "data_paths": ["a.log", "b.jsonl.gz"], "builder": "json", "shuffle": False}
    section = read_data_config(yaml_config(tmp_path, {"datasets": [dataset | {"split": {"train": 1.0}}]}))
    assert section["training_data"]["datasets"] == [{"path": ["a.log", "b.jsonl.gz"]}]


def test_a_streamed_corpus_stays_one(tmp_path: Path) -> None:
    datasets = [{"data_paths": ["a"]}]
    config = {"dataprocessor": {"streaming": True}, "datasets": datasets}
    assert read_data_config(yaml_config(tmp_path, config))["streaming"] is True
    assert "streaming" not in read_data_config(yaml_config(tmp_path, {"datasets": datasets}))


def test_sampling_need_not_be_exact_in_floating_point(tmp_path: Path) -> None:
    datasets = [{"data_paths": ["a"], "sampling": share} for share in (0.6, 0.3, 0.1)]
    section = read_data_config(yaml_config(tmp_path, {"datasets": datasets}))
    assert [item["sampling_weight"] for item in section["training_data"]["datasets"]] == [0.6, 0.3, 0.1]


def test_a_chat_template_is_looked_for_where_the_job_runs_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    processor = {"chat_template_path": "t.jinja"}
    path = yaml_config(folder, {"dataprocessor": processor, "datasets": [{"data_paths": ["a"]}]})
    (folder / "t.jinja").write_text("{{ nearby }}")
    monkeypatch.chdir(tmp_path)
    assert read_data_config(path)["chat_template"] == "{{ nearby }}"
    (tmp_path / "t.jinja").write_text("{{ here }}")
    assert read_data_config(path)["chat_template"] == "{{ here }}"


def test_a_chat_template_may_come_in_base64(tmp_path: Path) -> None:
    processor = {"chat_template_base64": base64.b64encode("{{ä}}".encode()).decode()}
    config = {"dataprocessor": processor, "datasets": [{"data_paths": ["a"]}]}
    assert read_data_config(yaml_config(tmp_path, config))["chat_template"] == "{{ä}}"


def test_skipped_rows_are_counted(write_lines: Callable[..., str], tokenizer: Any) -> None:
    path = write_lines("a.jsonl", *({"text": "x" * size} for size in (1, 2, 30)), {"text": "short"})
    source = {
        "path": path,
        "handlers": [step("skip_samples_with_large_columns", column_name="text", max_allowed_length=9)],
    }
    section = {"training_data": {"type": "CONCATENATION", "datasets": [source]}, "validation_data": {"type": "NONE"}}
    report = prepare(section, tokenizer).statistics.report()[0]
    assert (report["rows"], report["kept"], report["dropped"]) == (4, 3, {"text is longer than 9": 1})
    assert (report["invalid_rows"], report["filtered_by_length"]) == (0, 0)
    with pytest.raises(DataError, match=r"a.jsonl:1: no column text; columns: other"):
        section["training_data"]["datasets"] = [{**source, "columns": {"text": "other"}}]
        prepare(section, tokenizer)
