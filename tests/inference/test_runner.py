"""Whole runs: order, records, and what is kept when one is stopped."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuning.config.sections.experiment import GenerationModel
from finetuning.config.sections.model import NoQuantization
from finetuning.errors import ConfigError, FinetuningError, Interrupted
from finetuning.inference.prompts import GenerationPrompt, text_prompts
from finetuning.inference.runner import (
    GenerationJob,
    GenerationProgress,
    ProgressCallback,
    generate_records,
    input_output_record,
)

TEXTS = ["The quick", "What is two plus two? Two plus two is", "A", "Names of rows are", "Training moves", "system"]


@pytest.fixture
def job(tiny_llama_dir: Path) -> GenerationJob:
    return GenerationJob(
        prompts=text_prompts(TEXTS),
        model_conf=GenerationModel(model=str(tiny_llama_dir)),
        quant_conf=NoQuantization(),
        gen_params={"max_new_tokens": 8},
        batch_size=2,
    )


def test_records_are_in_the_order_of_the_prompts_and_have_silogens_keys(job: GenerationJob, tmp_path: Path) -> None:
    prompt = GenerationPrompt(
        id="a", text="The", correct_answers=("fox",), dataset="d", data_collection="c", carried={"tags": ["t"]}
    )
    output = tmp_path / "out.yaml"
    records = generate_records(replace(job, prompts=[*job.prompts, prompt]), output, ProgressCallback())
    assert yaml.safe_load(output.read_text(encoding="utf-8")) == records
    assert [record["prompt"] for record in records] == [*TEXTS, "The"]
    last = records[-1]
    expected = {
        "dataset": "d",
        "id": "a",
        "prompt": "The",
        "correct_answers": ["fox"],
        "test_type": "open-ended",
        "data_collection": "c",
        "truncated": False,
        "tags": ["t"],
    }
    assert {key: last[key] for key in expected} == expected
    assert last["all_text_raw"].startswith("<s>The")
    params = last["gen_params"]
    assert (params["max_new_tokens"], params["max_length"], params["pad_token_id"]) == (8, 512, 1)
    assert params["quant_conf"] == {"quantization_type": "no-quantization"}
    assert params["model_conf"]["model"] == job.model_conf.model


def test_fms_records_hold_the_prompt_in_the_output(job: GenerationJob, tmp_path: Path) -> None:
    records = generate_records(job, tmp_path / "out.json", ProgressCallback(), input_output_record)
    assert [record["input"] for record in records] == TEXTS
    assert all(record["output"].startswith(f"<s>{record['input']}") for record in records)
    assert all(record.keys() == {"input", "output"} for record in records)


class StopAfter:
    """Raises, or sends a signal to this process, when so many prompts are done."""

    def __init__(self, done: int, signal_number: int):
        self.done, self.signal_number = done, signal_number

    def __call__(self, progress: GenerationProgress) -> None:
        if progress.prompts_done >= self.done:
            os.kill(os.getpid(), self.signal_number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_what_is_done_and_goes_on_later(
    job: GenerationJob, tmp_path: Path, number: int, code: int
) -> None:
    sampled = replace(job, gen_params={"max_new_tokens": 8, "do_sample": True})
    whole = generate_records(sampled, tmp_path / "whole.json", ProgressCallback())
    output = tmp_path / "out.json"
    with pytest.raises(Interrupted, match=r"contains 2 of 6 answers") as error:
        generate_records(sampled, output, ProgressCallback(on_progress=StopAfter(2, number)))
    assert error.value.exit_code == code
    partial = json.loads(output.read_text())
    assert len(partial) == 2
    assert [record for record in whole if record in partial] == partial

    seen: list[int] = []
    assert (
        generate_records(
            sampled, output, ProgressCallback(on_progress=lambda progress: seen.append(progress.prompts_done))
        )
        == whole
    )
    assert seen == [2, 4, 6]
    assert json.loads(output.read_text()) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "whole.json"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_changed_job_starts_over(job: GenerationJob, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    with pytest.raises(Interrupted):
        generate_records(job, output, ProgressCallback(on_progress=StopAfter(2, signal.SIGINT)))
    seen: list[int] = []
    generate_records(
        replace(job, seed=7), output, ProgressCallback(on_progress=lambda progress: seen.append(progress.prompts_done))
    )
    assert seen == [0, 2, 4, 6]


@pytest.mark.parametrize(
    "change",
    [
        {"model_conf": GenerationModel(model="/none")},
        {"gen_params": {"max_new_tokens": 4000}},
        {"prompts": [GenerationPrompt(id=0, messages=({"role": "user", "content": "no template here"},))]},
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(job: GenerationJob, tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(FinetuningError):
        generate_records(replace(job, **change), tmp_path / "out.json", ProgressCallback())
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_ending_is_refused_before_the_model_is_looked_at(job: GenerationJob, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the extension selects"):
        generate_records(
            replace(job, model_conf=GenerationModel(model="/none")), tmp_path / "out.txt", ProgressCallback()
        )
