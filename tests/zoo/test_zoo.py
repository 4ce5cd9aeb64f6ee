"""Every causal LM class of transformers passes each step, or is refused with the recorded reason.

`make test-zoo` runs all classes. Ten of them run with the other tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from zoo.architectures import MODEL_TYPES, NOT_BUILT
from zoo.harness import PASSED, STEPS, check, prepare, recorded

ZOO_RESULTS = os.environ.get("ZOO_RESULTS", "")
SAMPLE = (
    "llama",  # grouped-query attention, padding-free
    "gpt2",  # Conv1D layers, learned positions
    "gemma3_text",  # sliding windows
    "mixtral",  # fused experts
    "deepseek_v3",  # latent attention, experts
    "gpt_oss",  # attention sinks
    "qwen3_next",  # linear attention, experts
    "mamba",  # state space
    "falcon_h1",  # state space and attention in one layer
    "bart",  # the decoder of an encoder-decoder
)
SAMPLED_STEPS = ("sft full", "sft LoRA", "sft LoRA padded", "resume LoRA", "reload", "merge", "generate")


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_does_what_is_recorded(model_type: str, tmp_path: Path, chatml_llama_dir: Path) -> None:
    architecture = prepare(model_type, tmp_path, AutoTokenizer.from_pretrained(chatml_llama_dir))
    expected = recorded()["architectures"][model_type]["results"]
    assert check(architecture, SAMPLED_STEPS) == {step: expected[step] for step in SAMPLED_STEPS}


@pytest.mark.skipif(not ZOO_RESULTS, reason="ZOO_RESULTS names no folder; see make test-zoo")
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in NOT_BUILT])
def test_an_architecture_passes_or_is_refused(model_type: str, tmp_path: Path, chatml_llama_dir: Path) -> None:
    architecture = prepare(model_type, tmp_path, AutoTokenizer.from_pretrained(chatml_llama_dir))
    results = check(architecture)
    record = {"class": transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}
    record |= {"results": results, "notes": architecture.notes}
    (Path(ZOO_RESULTS) / f"{model_type}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    unexplained = {step: text for step, text in results.items() if text != PASSED and not text.startswith(EXPLAINED)}
    assert not unexplained


EXPLAINED = ("refused with 1: ", "not run: ", "differs in plain transformers: ")


def test_the_record_has_every_architecture() -> None:
    record = recorded()
    if record["transformers"] != transformers.__version__:
        pytest.skip(f"recorded with transformers {record['transformers']}; run make test-zoo")
    assert {*record["architectures"], *NOT_BUILT} == {*MODEL_TYPES}
    for model_type, entry in record["architectures"].items():
        assert list(entry["results"]) == list(STEPS), model_type
