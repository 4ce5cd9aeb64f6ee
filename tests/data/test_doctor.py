"""`finetuning data doctor` finds each planted fault, names its rows, and finds nothing in data without faults."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from finetuning.config.sections.data import ChatTemplateName, DataConfig
from finetuning.config.sections.training import SFTArgs
from finetuning.data.chat.template import get_template
from finetuning.data.doctor.doctor_page import DataReport, to_html, to_text
from finetuning.data.doctor.findings import Examined, Finding, Histogram, Verdict, all_findings, histogram
from finetuning.data.doctor.measures import RowInspector, TokenFacts, call_problems
from finetuning.data.doctor.minhash import near_duplicates, signatures
from finetuning.data.pipeline import prepare_dpo, prepare_kto, prepare_sft

from .conversations import TOOLS, assistant, user
from .test_loss_mask_matrix import source_of
from .test_pipeline import config

WORDS = [f"{start}{end}" for start in "abdeghiklmnoprstu" for end in ("an", "ei", "oru", "ista", "em")]
LENIENT = {"on_bad_row": "skip", "max_lost_fraction": 1.0, "cache": "off"}


def prose(seed: int, words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def chat(seed: int, words: int = 40) -> dict[str, Any]:
    return {"messages": [user(prose(seed, 8)), assistant(prose(seed + 10_000, words))]}


@pytest.fixture
def chat_ml(make_tokenizer: Callable[..., Any]) -> Any:
    template = get_template(ChatTemplateName.CHAT_ML)
    assert template is not None
    return make_tokenizer("byte-level", template.source, template.special_tokens)


@pytest.fixture
def examined(write_lines: Callable[..., str]) -> Callable[..., dict[str, Finding]]:
    """A function: tokenizer and rows -> the findings of an SFT run by title."""

    def call(
        tokenizer: Any, *rows: dict[str, Any], prepare: Callable[..., Any] | None = None, conf: Any = None, **args: Any
    ) -> dict[str, Finding]:
        conf = conf or config(write_lines("a.jsonl", *rows))
        lenient = DataConfig.model_validate(conf.model_dump() | LENIENT)
        stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        facts = TokenFacts(tokenizer.bos_token_id, None, (stop, tokenizer.eos_token_id))
        inspector = RowInspector(facts)
        sft_args = SFTArgs.model_validate({"train_on_completions_only": True, **args})
        if prepare is None:
            data = prepare_sft(lenient, sft_args, tokenizer, 1, inspector=inspector)
        else:
            data = prepare(lenient, tokenizer, inspector)
        statistics = {split.split: split for split in data.statistics.splits}
        limit = sft_args.max_seq_length
        result = Examined(conf, limit, "sft_args.max_seq_length", inspector.by_split, statistics)
        return {finding.title: finding for finding in all_findings(result)}

    return call


def lines(finding: Finding) -> list[int | None]:
    return [row.location.line for row in finding.rows]


def test_rows_without_faults_are_ok(examined: Callable[..., Any], chat_ml: Any) -> None:
    findings = examined(chat_ml, *map(chat, range(60)))
    assert {title: f.text for title, f in findings.items() if f.verdict is not Verdict.OK} == {}
    assert findings["Scripts"].text == "Latin 100.0%"
    assert findings["Turns"].text == "answers per chat: 1: 60 rows"


def test_bad_rows_stop(examined: Callable[..., Any], chat_ml: Any) -> None:
    finding = examined(chat_ml, *map(chat, range(9)), {"messages": []})["Rows"]
    assert (finding.verdict, finding.key) == (Verdict.STOP, "data_conf.max_lost_fraction")
    assert lines(finding) == [10] and "needs at least one message" in finding.rows[0].detail


@pytest.mark.parametrize(("handling", "what"), [("filter", "2 rows dropped"), ("truncate", "of 2 answers the end")])
def test_what_is_longer_than_the_limit_is_reported(
    handling: str, what: str, examined: Callable[..., Any], chat_ml: Any
) -> None:
    rows = [*map(chat, range(8)), chat(1, 700), chat(2, 900)]
    finding = examined(chat_ml, *rows, max_seq_length=500, length_handling=handling)["Lengths"]
    assert (finding.verdict, finding.key) == (Verdict.LOOK, "sft_args.max_seq_length")
    assert what in finding.text and "2 rows (20.0%) longer than 500" in finding.text
    assert lines(finding) == [10, 9]


def test_copies_and_near_copies_are_found(examined: Callable[..., Any], chat_ml: Any) -> None:
    rows = [chat(seed, 120) for seed in range(30)]
    near = chat(3, 120)
    near["messages"][1]["content"] = near["messages"][1]["content"].replace("an ", "ai ", 1)
    short = {"messages": [user("Hi"), assistant("Hello")]}
    findings = examined(chat_ml, *rows, rows[7], rows[7], near, short, {"messages": [user("Hi"), assistant("Hello!")]})
    assert findings["Duplicates"].text.startswith("2 rows of 35")
    assert lines(findings["Duplicates"]) == [8]
    assert findings["Duplicates"].rows[0].detail == "the same text as 2 other rows"
    assert lines(findings["Near duplicates"]) == [33]
    assert "a.jsonl:4" in findings["Near duplicates"].rows[0].detail


def test_validation_rows_that_are_trained_on_are_found(
    examined: Callable[..., Any], chat_ml: Any, write_lines: Callable[..., str]
) -> None:
    near = chat(3, 120)
    near["messages"][1]["content"] += " and more"
    validation = {"type": "CONCATENATION", "datasets": [{"path": write_lines("v.jsonl", chat(5, 120), near, chat(99))}]}
    conf = config(write_lines("t.jsonl", *(chat(seed, 120) for seed in range(20))), validation=validation)
    finding = examined(chat_ml, conf=conf)["Validation rows"]
    assert finding.verdict is Verdict.STOP and finding.key == "data_conf.validation_data"
    assert finding.text == "1 row of 3 are training rows, too, 1 more nearly so"
    assert [str(row.location).rsplit("/", 1)[-1] for row in finding.rows] == ["v.jsonl:2"]


def pair(seed: int, chosen: int, rejected: int) -> dict[str, Any]:
    answers = {"chosen": [assistant(prose(seed + 1, chosen))], "rejected": [assistant(prose(seed + 2, rejected))]}
    return {"prompt": [user(prose(seed, 9))], **answers}


def test_pairs_that_are_equal_empty_or_biased_are_found(examined: Callable[..., Any], chat_ml: Any) -> None:
    rows = [pair(3 * seed, 30, 10) for seed in range(30)]
    rows[4]["rejected"] = rows[4]["chosen"]
    rows[9]["rejected"] = [assistant(" ")]

    def prepare(conf: DataConfig, tokenizer: Any, inspector: RowInspector) -> Any:
        return prepare_dpo(conf, None, tokenizer, inspector=inspector)

    findings = examined(chat_ml, *rows, prepare=prepare)
    assert lines(findings["Equal pairs"]) == [5]
    assert lines(findings["Empty answers"]) == [10]
    bias = findings["Length of answers"]
    assert bias.verdict is Verdict.LOOK and "is the longer one in 100% of the pairs" in bias.text
    even = [pair(3 * seed, 30 - 20 * (seed % 2), 10 + 20 * (seed % 2)) for seed in range(30)]
    assert examined(chat_ml, *even, prepare=prepare)["Length of answers"].verdict is Verdict.OK


@pytest.mark.parametrize(
    ("labels", "verdict", "key"),
    [
        ([True] * 3 + [False] * 3, Verdict.OK, ""),
        ([True] * 9 + [False], Verdict.LOOK, "training_args.undesirable_weight"),
        ([False] * 9 + [True], Verdict.LOOK, "training_args.desirable_weight"),
        ([True] * 5, Verdict.LOOK, "the file"),
    ],
)
def test_the_balance_of_labels(
    labels: list[bool], verdict: Verdict, key: str, examined: Callable[..., Any], chat_ml: Any
) -> None:
    rows = [
        {"prompt": prose(i, 9), "completion": f" {prose(-i - 1, 9)}", "label": label} for i, label in enumerate(labels)
    ]

    def prepare(conf: DataConfig, tokenizer: Any, inspector: RowInspector) -> Any:
        return prepare_kto(conf, None, 0, tokenizer, inspector=inspector)

    finding = examined(chat_ml, *rows, prepare=prepare)["Labels"]
    assert (finding.verdict, finding.key) == (verdict, key)


def call(name: str, arguments: Any) -> list[dict[str, Any]]:
    return [assistant(None, tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])]


@pytest.mark.parametrize(
    ("name", "arguments", "problems"),
    [
        ("get_weather", {"city": "a"}, []),
        ("get_weather", '{"city": "a"}', []),
        ("weather", {}, ["calls weather, which is not among its tools"]),
        ("get_weather", {}, ["get_weather: city is required"]),
        ("get_weather", {"city": 1}, ["get_weather: city is not of the type string"]),
        ("get_weather", {"city": "a", "day": 1}, ["get_weather: day is not a parameter"]),
        ("get_weather", "city", ["get_weather: its arguments are not a JSON object"]),
    ],
)
def test_calls_against_the_schema_are_found(name: str, arguments: Any, problems: list[str]) -> None:
    assert call_problems(call(name, arguments), TOOLS) == problems


def test_rows_with_bad_calls_are_named(
    examined: Callable[..., Any], make_tokenizer: Callable[..., Any], write_lines: Callable[..., str]
) -> None:
    rows = [
        {"messages": [user("Weather?"), *call("get_weather", {"city": prose(seed, 2)})], "tools": TOOLS}
        for seed in range(5)
    ]
    rows[3]["messages"][1]["tool_calls"][0]["function"]["name"] = "get_rain"
    conf = config(write_lines("a.jsonl", *rows), chat_template_name="keep-original")
    finding = examined(make_tokenizer("byte-level", source_of("qwen3")), conf=conf)["Tool calls"]
    assert (finding.verdict, lines(finding)) == (Verdict.LOOK, [4])
    assert finding.rows[0].detail == "calls get_rain, which is not among its tools"


def test_answers_that_repeat_their_question_are_found(examined: Callable[..., Any], chat_ml: Any) -> None:
    rows = [*map(chat, range(9))]
    rows[2]["messages"][0]["content"] = prose(2, 20)
    rows[2]["messages"][1]["content"] = f"You ask: {rows[2]['messages'][0]['content']} I do not know."
    finding = examined(chat_ml, *rows)["Repeated questions"]
    assert (finding.verdict, lines(finding)) == (Verdict.LOOK, [3])


def test_answers_without_an_end_are_found(
    examined: Callable[..., Any], chat_ml: Any, write_lines: Callable[..., str]
) -> None:
    rows = [{"prompt": prose(seed, 9), "completion": f" {prose(-seed - 1)}"} for seed in range(5)]
    assert examined(chat_ml, *rows)["End of answers"].verdict is Verdict.OK
    source = {"path": write_lines("b.jsonl", *rows), "add_eos_token": False}
    conf = config(training={"type": "CONCATENATION", "datasets": [source]})
    finding = examined(chat_ml, conf=conf)["End of answers"]
    assert finding.verdict is Verdict.LOOK and sorted(lines(finding)) == [1, 2, 3, 4, 5]


def test_two_bos_tokens_are_found(examined: Callable[..., Any], chat_ml: Any) -> None:
    rows = [{"text": f"<s>{prose(1)}"}, {"text": f"<s><s>{prose(2)}"}]
    assert lines(examined(chat_ml, *rows)["Beginning of sequence"]) == [2]


def test_rows_that_are_split_into_many_tokens_are_found(examined: Callable[..., Any], chat_ml: Any) -> None:
    rows = [chat(seed, 200) for seed in range(9)]
    rows[5]["messages"][1]["content"] = "\u2592\u2591\u2593" * 200
    assert lines(examined(chat_ml, *rows)["Tokens"]) == [6]


def test_unused_columns_are_named(examined: Callable[..., Any], chat_ml: Any) -> None:
    finding = examined(chat_ml, *({**chat(seed), "context": "c"} for seed in range(3)))["Unused columns"]
    assert (finding.verdict, finding.text) == (Verdict.LOOK, "column context is not used (3 rows)")


def test_the_estimated_similarity_is_near_the_true_one() -> None:
    base = prose(0, 300).split()
    rng = random.Random(1)
    texts = [" ".join(base)]
    for changed in (3, 15, 150):
        changed_words = list(base)
        for index in rng.sample(range(300), changed):
            changed_words[index] = f"new{index}"
        texts.append(" ".join(changed_words))
    near = near_duplicates(signatures(texts), np.arange(len(texts)))
    assert near.rows.tolist() == [1] or near.rows.tolist() == [1, 2]
    true = len(set(zip(base, base[1:], base[2:], strict=False)) & set(_shingles(texts[1]))) / len(
        set(zip(base, base[1:], base[2:], strict=False)) | set(_shingles(texts[1]))
    )
    assert abs(near.similarities[0] - true) < 0.12


def _shingles(text: str) -> list[tuple[str, str, str]]:
    words = text.split()
    return list(zip(words, words[1:], words[2:], strict=False))


def test_the_histogram_counts_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 5000, 1000)
    for limit in (None, 10, 1000, 9000):
        result = histogram(lengths, limit)
        assert sum(result.bars) == 1000
    assert histogram(np.array([1, 1, 1]), 512) == Histogram((3,), 1, 512)


def test_the_report_is_written_as_text_and_as_a_page() -> None:
    from finetuning.data.doctor.measures import Worst
    from finetuning.errors import Location

    worst = Worst(1, Location("data/<a>.jsonl", 3), "an <b>answer</b>")
    findings = (Finding("Rows", Verdict.STOP, "1 row is <bad>", "data_conf.on_bad_row", (worst,)),)
    report = DataReport("The data of a.yaml", (("rows", "3"),), findings, Histogram((1, 2), 10, 10))
    text, page = to_text(report), to_html(report)
    assert "stop  Rows: 1 row is <bad>\n      change: data_conf.on_bad_row\n        data/<a>.jsonl:3: an" in text
    assert text.endswith("stop: 0 x OK, 0 x look, 1 x stop") and "11+  " in text and "over the limit" in text
    assert 'data/&lt;a&gt;.jsonl<span class="line">:3</span>' in page and "<code>data_conf.on_bad_row</code>" in page
    assert "an &lt;b&gt;answer" in page and "<b>answer" not in page
