"""Every method trains and resumes on ten families of models, and no check of it raises a false alarm.

A run passes its own checks: causality, isolation, reference, initial loss, saved model, loaded state. `make test-zoo`
runs all combinations; a sample of them runs with the other tests.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from zoo.harness import (
    CONVERSATIONS,
    PASSED,
    Architecture,
    Mismatch,
    compare_tensors,
    outcome,
    prepare,
    read_tensors,
    recorded,
    train,
)
from zoo.test_zoo import EXPLAINED, ZOO_RESULTS
from zoo.test_zoo import SAMPLE as FAMILIES

METHODS = ("dpo", "kto", "reward", "grpo", "orpo", "cpo")
"""`sft` is in `test_zoo.py`."""
KINDS = ("full", "LoRA")
SAMPLE = (
    ("kto", "mixtral", "LoRA"),
    ("grpo", "falcon_h1", "LoRA"),
    pytest.param("reward", "qwen3_next", "full", marks=pytest.mark.full),
    pytest.param("orpo", "mamba", "full", marks=pytest.mark.full),
    pytest.param("cpo", "gpt_oss", "LoRA", marks=pytest.mark.full),
)
TRUE_WARNINGS = ("is experimental",)
"""What warnings of a run say that are no alarm."""
LETTERS = """
def letters(completions, **columns):
    return [float(len(set(completion[0]["content"]))) for completion in completions]
"""
_TRAINING_ARGS: dict[str, dict[str, Any]] = {
    "grpo": {"num_generations": 2, "max_completion_length": 8, "beta": 0.1},
}


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def rows_of(method: str) -> list[dict[str, Any]]:
    """Return eight rows: every question with the right answer, and with another."""
    pairs = [
        {
            "prompt_messages": [{"role": "user", "content": f"{question} {again}"}],
            "chosen_messages": [{"role": "assistant", "content": answer}],
            "rejected_messages": [{"role": "assistant", "content": f"No. {CONVERSATIONS[number - 1][1]}"}],
        }
        for again in ("", "Please.")
        for number, (question, answer) in enumerate(CONVERSATIONS)
    ]
    if method == "grpo":
        return [{"prompt_messages": pair["prompt_messages"]} for pair in pairs]
    if method != "kto":
        return pairs
    return [
        {
            "prompt_messages": pair["prompt_messages"],
            "completion_messages": pair["rejected_messages" if number % 2 else "chosen_messages"],
            "label": number % 2 == 0,
        }
        for number, pair in enumerate(pairs)
    ]


def values_of(architecture: Architecture, method: str, kind: str, name: str, **run_conf: Any) -> dict[str, Any]:
    """Return the config of a run of two steps."""
    rows = architecture.work / f"{method}.jsonl"
    rows.write_text("".join(json.dumps(row) + os.linesep for row in rows_of(method)), encoding="utf-8")
    values = architecture.values(name, kind, save_strategy="steps", **run_conf)
    del values["sft_args"]
    values["data_conf"]["training_data"]["datasets"] = [{"path": str(rows)}]
    values["training_args"] |= _TRAINING_ARGS.get(method, {})
    if method == "grpo":
        # A length would be the same for all completions of a model that never ends.
        (architecture.work / "letters.py").write_text(LETTERS, encoding="utf-8")
        values["grpo_args"] = {"rewards": [{"type": "function", "path": f"{architecture.work}/letters.py:letters"}]}
    if method == "reward" and kind == "LoRA":
        values["peft_conf"] = {**values["peft_conf"], "task_type": "SEQ_CLS"}
    return values


def run_and_resume(architecture: Architecture, method: str, kind: str) -> None:
    """Train two steps; train the second again from the checkpoint of the first, and compare the saved tensors."""
    name = f"{method}-{kind}"
    run = train(values_of(architecture, method, kind, name), method)
    values = values_of(architecture, method, kind, f"{name}-resumed", resume_from_checkpoint="auto")
    folder = Path(values["training_args"]["output_dir"])
    shutil.copytree(run.folder / "checkpoint-1", folder / "checkpoint-1")
    resumed = train(values, method)
    if resumed.losses[-1] != run.losses[-1]:
        raise Mismatch(f"the loss after resuming is {resumed.losses[-1]:.6f}, uninterrupted {run.losses[-1]:.6f}")
    compare_tensors(read_tensors(resumed.final), read_tensors(run.final))


@pytest.fixture
def check(tmp_path: Path, chatml_llama_dir: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., dict[str, Any]]:
    """A function that runs a method on a family, and returns the outcome and the warnings of the runs."""

    def run(method: str, model_type: str, kind: str) -> dict[str, Any]:
        architecture = prepare(model_type, tmp_path, AutoTokenizer.from_pretrained(chatml_llama_dir))
        with caplog.at_level(logging.WARNING, logger="finetuning"):
            result = outcome(lambda: run_and_resume(architecture, method, kind)).replace(str(tmp_path), "WORK")
        texts = dict.fromkeys(
            " ".join(record.getMessage().split()).replace(str(tmp_path), "WORK")
            for record in caplog.records
            if record.name.startswith("finetuning")
        )
        return {"result": result, "warnings": list(texts)}

    return run


def alarms(warnings: list[str]) -> list[str]:
    return [text for text in warnings if not any(part in text for part in TRUE_WARNINGS)]


@pytest.mark.parametrize(("method", "model_type", "kind"), SAMPLE)
def test_a_sample_raises_no_false_alarm(check: Any, method: str, model_type: str, kind: str) -> None:
    result = check(method, model_type, kind)
    assert result["result"] == recorded()["methods"][model_type][f"{method} {kind}"]
    assert not alarms(result["warnings"])


@pytest.mark.skipif(not ZOO_RESULTS, reason="ZOO_RESULTS names no folder; see make test-zoo")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_method_raises_no_false_alarm(check: Any, method: str, model_type: str, kind: str) -> None:
    result = check(method, model_type, kind)
    folder = Path(ZOO_RESULTS) / "methods"
    folder.mkdir(exist_ok=True)
    file = folder / f"{model_type} {method} {kind}.json"
    file.write_text(json.dumps({"model_type": model_type, "run": f"{method} {kind}", **result}), encoding="utf-8")
    assert result["result"] == PASSED or result["result"].startswith(EXPLAINED)
    assert not alarms(result["warnings"])
