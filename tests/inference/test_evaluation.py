"""The share of correct answers, its intervals, and the comparison of models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetuning.config.sections.experiment import GenerationModel
from finetuning.errors import ModelError
from finetuning.inference.evaluation import (
    Candidate,
    Evaluation,
    MetricDifference,
    MetricValue,
    evaluate_answers,
    metrics_of,
    paired_interval,
    wilson_interval,
)
from finetuning.inference.lm_eval import (
    HarnessOptions,
    _check_adapter,
    _differences,
    _Measured,
    _measured,
    _results,
    command_for,
    is_share_metric,
)
from finetuning.inference.prompts import chat_prompts


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998),
        # table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_interval_has_the_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_paired_interval_has_the_published_value() -> None:
    # A. Agresti, "Categorical Data Analysis", ratings of a prime minister: 86 and 150 of 1,600 persons changed their
    # minds. The book's interval has no half rows, which change it less than its three digits show.
    low, high = paired_interval(86, 150, 1600)
    assert (low, high) == (pytest.approx(-0.059, abs=5e-4), pytest.approx(-0.021, abs=5e-4))


def test_equal_answers_on_few_rows_leave_an_interval() -> None:
    low, high = paired_interval(0, 0, 10)
    assert low < 0 < high


def test_models_are_compared_on_the_same_rows(chatml_llama_dir: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    prompts = chat_prompts(["What is two plus two?", "What is the capital of France?", "Names"], None)
    plain = Candidate("base", GenerationModel(model=str(chatml_llama_dir)))
    # The model's own answer to the first question is declared correct.
    first = evaluate_answers(
        [plain], [replace(prompts[0], correct_answers=("?",))], "exact", {"max_new_tokens": 5, "do_sample": False},
        name="own", source="own.jsonl", folder=tmp_path,
    )  # fmt: skip
    assert first.results[0].value == 0
    answer = json.loads((tmp_path / "own.base.jsonl").read_text())["answer"]
    prompts = [
        replace(prompts[0], correct_answers=(answer,)),
        replace(prompts[1], correct_answers=("nothing says this",)),
        prompts[2],
    ]
    second = Candidate("other", GenerationModel(model=str(tiny_llama_dir), tokenizer=str(chatml_llama_dir)))
    evaluation = evaluate_answers(
        [plain, second], prompts, "exact", {"max_new_tokens": 5, "do_sample": False},
        name="rows-exact", source="data/rows.jsonl", folder=tmp_path,
    )  # fmt: skip
    assert [(item.task, item.model, item.value, item.rows) for item in evaluation.results] == [
        ("rows.jsonl", "base", 0.5, 2),
        ("rows.jsonl", "other", 0.0, 2),
    ]
    assert (evaluation.results[0].low, evaluation.results[0].high) == wilson_interval(1, 2)
    (difference,) = evaluation.differences
    assert (difference.before, difference.after, difference.value) == ("base", "other", -0.5)
    assert (difference.better, difference.worse) == (0, 1)
    assert (difference.low, difference.high) == paired_interval(0, 1, 2)
    assert evaluation.notes == ("1 rows have no correct answers and were not scored",)
    assert json.loads(evaluation.write(tmp_path).read_text())["models"]["other"] == str(tiny_llama_dir)


def test_a_table_says_where_a_difference_is_not_clear() -> None:
    results = (
        MetricValue("t", "exact", "base", 0.5, 0.1, 0.9, 4),
        MetricValue("t", "word_perplexity", "base", 81.5, 80, 83, 4, is_share=False),
    )
    evaluation = Evaluation(
        "t-exact",
        "t.jsonl",
        {},
        results,
        (
            MetricDifference("t", "exact", "base", "adapter", 0.25, -0.1, 0.6, 1, 0),
            MetricDifference("t", "word_perplexity", "base", "adapter", -3.5, -4, -3, is_share=False),
        ),
    )
    header, share, number, unclear, clear = evaluation.table().splitlines()
    assert header.split() == ["task", "metric", "model", "value", "95", "%", "interval", "rows"]
    assert "50.0%  10.0% to 90.0%" in share and "81.5" in number and "80 to 83" in number
    assert unclear.startswith("t, exact: adapter - base = +25.0 points (-10.0 to +60.0; 1 rows better, 0 worse)")
    assert unclear.endswith(": no clear difference on so few rows")
    assert clear == "t, word_perplexity: adapter - base = -3.5 (-4 to -3)"
    assert metrics_of(evaluation) == {"evaluation/t/exact/base": 0.5, "evaluation/t/word_perplexity/base": 81.5}


def test_lm_eval_gets_tokenizer_and_template_of_the_adapter(tiny_llama_dir: Path, chatml_llama_dir: Path) -> None:
    options = HarnessOptions("lm_eval", ("orders", "arc_easy"), Path("tasks"), limit=5, batch_size="auto", seed=3)
    conf = GenerationModel.model_validate(
        {"model": str(tiny_llama_dir), "adapter": str(chatml_llama_dir), "model_args": {"dtype": "float32"}}
    )
    words = command_for(Candidate("adapter", conf), options, Path("out"))
    assert words == [
        "run", "--model", "hf",
        "--model_args",
        f"pretrained={tiny_llama_dir},peft={chatml_llama_dir},tokenizer={chatml_llama_dir},dtype=float32",
        "--tasks", "orders,arc_easy", "--batch_size", "auto", "--seed", "3", "--include_path", "tasks",
        "--limit", "5", "--apply_chat_template", "--output_path", "out",
    ]  # fmt: skip
    words = command_for(Candidate("base", GenerationModel(model=str(tiny_llama_dir))), options, Path("out"))
    assert "--apply_chat_template" not in words, "the model has no chat template"


def test_lm_eval_refuses_trained_token_rows_on_tied_embeddings(
    tmp_path: Path, chatml_llama_dir: Path, tiny_llama_dir: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"trainable_token_indices": {"embed_tokens": [1]}}))
    tied, untied = (
        Candidate("adapter", GenerationModel(model=str(base), adapter=str(tmp_path)))
        for base in (chatml_llama_dir, tiny_llama_dir)
    )
    _check_adapter(untied)
    with pytest.raises(ModelError, match="trained token rows"):
        _check_adapter(tied)


def test_the_results_of_lm_eval_are_read() -> None:
    values = {
        "results": {
            "orders": {
                "alias": "orders", "exact_match,none": 0.75, "exact_match_stderr,none": 0.05,
                "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A",
            }
        },
        "n-samples": {"orders": {"original": 80, "effective": 40}},
    }  # fmt: skip
    values_read = {key: (item.value, item.error, item.rows) for key, item in _measured(values)}
    assert values_read == {
        ("orders", "exact_match"): (0.75, 0.05, 40),
        ("orders", "exact_match (strict)"): (0.5, None, 40),
    }
    results = list(
        _results({"base": {("t", "acc"): _Measured(0, 0.0, 4)}, "tuned": {("t", "acc"): _Measured(0.5, 0.3, 4)}})
    )
    assert [(item.low, item.high) for item in results] == [wilson_interval(0, 4), wilson_interval(2, 4)]
    (difference,) = _differences("base", "tuned", results)
    low, high = wilson_interval(2, 4)
    zero = wilson_interval(0, 4)[1]
    assert difference.low == pytest.approx(0.5 - ((0.5 - low) ** 2 + zero**2) ** 0.5)
    assert difference.high == pytest.approx(high)
    (value,) = _results({"base": {("t", "word_perplexity"): _Measured(20.0, 1.0, 4)}})
    assert (value.low, value.high) == (pytest.approx(18.04, abs=0.01), pytest.approx(21.96, abs=0.01))
    assert is_share_metric("acc_norm") and not is_share_metric("word_perplexity")
