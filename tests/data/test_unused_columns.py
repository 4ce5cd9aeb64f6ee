"""Every column and key of a row is trained on, used, or reported as unused; what changes its meaning is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuning.config.sections.data import ChatTemplateName, DatasetSource
from finetuning.data.chat.template import get_template
from finetuning.data.formats import FORMATS, Options
from finetuning.data.open_dataset import OpenDataset, open_dataset
from finetuning.data.pipeline import prepare_dpo, prepare_kto, prepare_prompts
from finetuning.data.samples import Problem
from finetuning.errors import ConfigError, DataError

from .conversations import assistant, user
from .test_pipeline import config, sft

TALK = [user("What is 1?"), assistant("It is 1.")]
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": ("sft", {"messages": TALK, "tools": []}),
    "alpaca": ("sft", {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": []}),
    "prompt_completion": ("sft", {"prompt": "a", "completion": "b"}),
    "input_output": ("sft", {"input": "a", "output": "b"}),
    "segments": ("sft", {"segments": [{"text": "a", "label": False}, {"text": "b", "label": True}]}),
    "text": ("sft", {"text": "a"}),
    "response_template": ("sft", {"text": "a ### b"}),
    "tokens": ("sft", {"input_ids": [1, 2], "labels": [-100, 2]}),
    "preference": (
        "preference",
        {"prompt_messages": TALK[:1], "chosen_messages": TALK[1:], "rejected_messages": [assistant("No.")]},
    ),
    "chosen_rejected": ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    "unpaired": ("unpaired", {"prompt_messages": TALK[:1], "completion_messages": TALK[1:], "label": True}),
    "completion_label": ("unpaired", {"prompt": "a", "completion": "b", "label": False}),
}
# A row with NUL is refused.
TEXTS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1)
VALUES = st.one_of(TEXTS, st.integers(), st.booleans(), st.lists(st.integers(), min_size=1))
READ = {
    *("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns", "tools", "documents"),
    *("system", "chat_template_kwargs", "input", "history", "prompt", "completion", "label", "text", "output"),
    *("instruction", "image", "images", "audio", "audios", "video", "videos"),
}


@pytest.fixture
def opened(write_lines: Callable[..., str]) -> Callable[..., OpenDataset]:
    """A function that opens a dataset of some rows."""

    def call(kind: str, *rows: dict[str, Any], **settings: Any) -> OpenDataset:
        source = DatasetSource.model_validate({"path": write_lines("a.jsonl", *rows), **settings})
        return open_dataset(source, "data_conf.x", kind, Options(chats="assistant"))

    return call


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    template = get_template(ChatTemplateName.CHAT_ML)
    assert template is not None
    return make_tokenizer("byte-level", template.source, template.special_tokens)


@pytest.mark.parametrize("name", ROWS)
def test_any_other_column_is_unused(name: str, opened: Callable[..., OpenDataset]) -> None:
    kind, row = ROWS[name]
    options = {"response_template": "###"} if name == "response_template" else {}
    parse = opened(kind, row, format=name, **options).parse
    location = opened(kind, row, format=name, **options)
    (read,) = [item for item in location.unparsed]

    @given(st.text(min_size=1).filter(lambda column: column not in READ | row.keys()), VALUES)
    @settings(max_examples=25, deadline=None)
    def check(column: str, value: Any) -> None:
        from finetuning.data.samples import Row

        parsed = parse(Row({**row, column: value}, read.row().location))
        first = parsed[0] if isinstance(parsed, list) else parsed
        assert not isinstance(first, Problem), first
        assert first.unused == (column,)

    check()


def test_every_format_is_tried() -> None:
    assert ROWS.keys() | {"prompt"} == FORMATS.keys(), "the columns of a prompt are those of reward functions"


@given(st.text(min_size=3).filter(lambda key: key not in ("role", "content")), VALUES)
@settings(max_examples=25, deadline=None)
def test_any_other_key_of_a_message_is_unused(key: str, value: Any) -> None:
    from finetuning.data.processors.base import MessageWarnings

    warnings = MessageWarnings((), frozenset({"role", "content", "tool_calls"}))
    expected = set() if key == "tool_calls" else {f"message key {key} is not used: the chat template does not read it"}
    assert warnings([user("a"), {**assistant("b"), key: value}]) == expected


def test_unused_columns_and_keys_are_counted(write_lines: Callable[..., str], tokenizer: Any) -> None:
    rows = [{"messages": TALK, "context": "c"}, {"messages": TALK, "context": None}]
    rows += [{"messages": [user("Hi"), {**assistant("Ho"), "mood": "calm"}], "score": 0}]
    data = sft(config(write_lines("a.jsonl", *rows)), tokenizer)
    assert data.statistics.report()[0]["warnings"] == {
        "the same as an earlier row": 1,
        "column context is not used": 1,
        "column score is not used": 1,
        "message key mood is not used: the chat template does not read it": 1,
    }
    assert "  note: 1 row: column context is not used" in data.statistics.lines()
    ignored = {"path": data_path(write_lines, rows), "ignore_columns": ["context", "score", "messages.mood"]}
    conf = config(training={"type": "CONCATENATION", "datasets": [ignored]})
    assert sft(conf, tokenizer).statistics.report()[0]["warnings"] == {"the same as an earlier row": 1}


def data_path(write_lines: Callable[..., str], rows: list[dict[str, Any]]) -> str:
    return write_lines("b.jsonl", *rows)


def test_columns_that_a_template_or_a_handler_reads_are_used(opened: Callable[..., OpenDataset]) -> None:
    row = {"a": "x", "b c": "y", "d": "z", "e": "w"}
    (parsed,) = opened("sft", row, data_formatter_template="{{a}} {{b c}} {{element['d']}}").rows
    assert parsed.unused == ("e",)
    handler = {
        "name": "apply_custom_jinja_template",
        "arguments": {"formatted_text_column_name": "made", "template": "{% if a %}{{ d }}{% endif %}"},
    }
    (parsed,) = opened("sft", row, handlers=[handler]).rows
    assert (parsed.text, parsed.unused) == ("z", ("b c", "e"))


def test_a_template_that_is_not_valid_is_an_error_of_the_config(opened: Callable[..., OpenDataset]) -> None:
    with pytest.raises(ConfigError, match=r"data_conf\.x\.data_formatter_template: the template is not valid"):
        opened("sft", {"a": "b"}, data_formatter_template="{% if %}")


def test_a_column_to_ignore_must_exist(opened: Callable[..., OpenDataset]) -> None:
    with pytest.raises(ConfigError, match=r"none of contxt is a column of the first rows; their columns: text"):
        opened("sft", {"text": "a", "context": "b"}, ignore_columns=["contxt"])


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("images", ["a.png"], "images"),
        ("image", {"bytes": "abc", "path": None}, "images"),
        ("audio", "a.wav", "sound"),
        ("videos", ["a.mp4"], "video"),
    ],
)
def test_media_are_refused_until_they_are_ignored(
    column: str, value: Any, what: str, opened: Callable[..., OpenDataset]
) -> None:
    row = {"messages": TALK, column: value}
    (problem,) = opened("sft", row).rows
    assert isinstance(problem, Problem)
    assert f"holds {what}, on which the engine does not train yet" in problem.message
    assert f"ignore_columns: [{column}]" in problem.message and problem.location.key == column
    (parsed,) = opened("sft", row, ignore_columns=[column]).rows
    assert parsed.messages == TALK
    (parsed,) = opened("sft", {"messages": TALK, column: None}).rows
    assert parsed.messages == TALK


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize(
    ("extra", "missing"),
    [({"tools": TOOLS}, "the tools of the row"), ({"documents": [{"text": "d"}]}, "the documents of the row")],
)
def test_what_the_template_does_not_print_is_refused(
    extra: dict[str, Any], missing: str, write_lines: Callable[..., str], tokenizer: Any
) -> None:
    path = write_lines("a.jsonl", {"messages": TALK, **extra})
    with pytest.raises(DataError, match=rf"a\.jsonl:1: the chat template does not print {missing}: choose another"):
        sft(config(path), tokenizer)
    pair = {"prompt_messages": TALK[:1], "chosen_messages": TALK[1:], "rejected_messages": [assistant("No.")]}
    path = write_lines("b.jsonl", {**pair, **extra})
    with pytest.raises(DataError, match=rf"b\.jsonl:1: the chat template does not print {missing}"):
        prepare_dpo(config(path), None, tokenizer)
    path = write_lines("c.jsonl", {"prompt_messages": TALK[:1], **extra})
    with pytest.raises(DataError, match=rf"c\.jsonl:1: the chat template does not print {missing}"):
        prepare_prompts(config(path), None, {}, tokenizer)


WITHOUT_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_system_message_that_is_not_printed_is_refused(
    write_lines: Callable[..., str], make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer("byte-level", WITHOUT_SYSTEM, ("<|im_start|>", "<|im_end|>"))
    system = {"role": "system", "content": "Answer in verse.\n"}
    conf = config(write_lines("a.jsonl", {"messages": [system, *TALK]}), chat_template_name="keep-original")
    with pytest.raises(DataError, match=r"does not print the system message: .*ignore_columns: \[system\]"):
        sft(conf, tokenizer)
    column = {"messages": TALK, "system": "Answer in verse."}
    source = {"path": write_lines("b.jsonl", column), "ignore_columns": ["system"]}
    conf = config(training={"type": "CONCATENATION", "datasets": [source]}, chat_template_name="keep-original")
    assert len(sft(conf, tokenizer).train) == 1


def test_a_system_message_without_its_switches_is_printed(
    write_lines: Callable[..., str], make_tokenizer: Callable[..., Any]
) -> None:
    template = WITHOUT_SYSTEM.replace(" if m.role != 'system'", "").replace(
        "{{ m.content }}", "{{ m.content.replace('/no_think', '').rstrip() if m.role == 'system' else m.content }}"
    )
    tokenizer = make_tokenizer("byte-level", template, ("<|im_start|>", "<|im_end|>"))
    rows = [
        {"messages": [{"role": "system", "content": content}, *TALK]}
        for content in ("Be brief. /no_think", "Look into /etc/hosts and /usr/bin first.", "/no_think")
    ]
    conf = config(write_lines("a.jsonl", *rows), chat_template_name="keep-original")
    assert len(sft(conf, tokenizer).train) == 3


CHAT_ROWS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "messages": (sft, {"messages": TALK}, "messages"),
    "prompt_completion": (sft, {"prompt": TALK[:1], "completion": TALK[1:]}, "completion"),
    "preference": (prepare_dpo, ROWS["preference"][1], "rejected_messages"),
    "chosen_rejected": (
        prepare_dpo,
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [assistant("No.")]},
        "chosen",
    ),
    "unpaired": (prepare_kto, ROWS["unpaired"][1], "prompt_messages"),
    "completion_label": (prepare_kto, {"prompt": TALK[:1], "completion": TALK[1:], "label": True}, "completion"),
    "prompt": (prepare_prompts, {"prompt": TALK[:1]}, "prompt"),
}
KEYS = st.lists(st.from_regex(r"x[ .a-zA-Z0-9_]{1,8}", fullmatch=True), min_size=1, max_size=5, unique=True)


@pytest.mark.parametrize("name", CHAT_ROWS)
def test_any_other_key_is_named_in_the_report_of_each_format(
    name: str, tokenizer: Any, write_lines: Callable[..., str]
) -> None:
    prepare, row, column = CHAT_ROWS[name]
    arguments = {sft: (), prepare_dpo: (None,), prepare_kto: (None, 0), prepare_prompts: (None, {})}[prepare]

    @given(KEYS, VALUES)
    @settings(max_examples=4, deadline=None)
    def check(keys: list[str], value: Any) -> None:
        rows = [{**row, column: [{**row[column][0], key: value}]} for key in keys]
        if name == "messages":
            rows = [{"messages": [{**TALK[0], key: value}, TALK[1]]} for key in keys]
        data = prepare(config(write_lines("a.jsonl", *rows), cache="off"), *arguments, tokenizer)
        notes = data.statistics.report()[0]["warnings"]
        assert {note for note in notes if note.startswith("message key")} == {
            f"message key {key} is not used: the chat template does not read it" for key in keys
        }

    check()
