"""Every type of adapter in the table: merged, verified, loaded, and generating the same text as base and adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from adapter_types import EXPERTS, GROWN, LORA_BY_PEFT, LORA_KINDS, LORA_OF_GPT2, MINIMAL, QV, UNMERGEABLE
from matrix import sample

from finetuning.cli.merge_adapter import main

from .conftest import load_for

MakeAdapter = Callable[..., Path]
BaseOf = Callable[[str], Path]


@dataclass(frozen=True)
class Case:
    """An adapter, the base that it is put on, and how far its weights are moved from where they begin."""

    arguments: dict[str, Any]
    peft_type: str = "LORA"
    task: str = "CAUSAL_LM"
    base: str = "llama"
    scale: float = 0.1
    new_tokens: int = 0
    streamed: bool = True

    def config(self) -> Any:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        return PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type](task_type=self.task, **self.arguments)


def mergeable() -> dict[str, Case]:
    """All cases by name."""
    cases = {
        name: Case(arguments, name, streamed=name == "LORA")
        for name, arguments in MINIMAL.items()
        if name not in UNMERGEABLE
    }
    # These move what they adapt by much less or more than others, or want biases.
    for name, change in {
        "BEFT": {"base": "biased"},
        "BOFT": {"scale": 5.0},
        "FROD": {"scale": 3.0},
        "HIRA": {"scale": 0.3},
        "PVERA": {"scale": 3.0},
        "RANDLORA": {"scale": 0.03},
        "VERA": {"scale": 1.0},
    }.items():
        cases[name] = replace(cases[name], **change)
    cases |= {f"lora: {name}": Case(arguments) for name, arguments in LORA_KINDS.items()}
    cases |= {f"lora: {name}": Case(arguments, base="gpt2") for name, arguments in LORA_OF_GPT2.items()}
    cases |= {f"lora: {name}": Case(arguments, streamed=False) for name, arguments in LORA_BY_PEFT.items()}
    cases |= {
        f"tied: {name}": Case(LORA_KINDS[name], base="tied")
        for name in ("plain", "head and embeddings", "modules to save", "tokens")
    }
    cases |= {
        f"grown: {base}, {name}": Case(arguments, base=base, new_tokens=8)
        for base in ("llama", "tied")
        for name, arguments in GROWN.items()
    }
    cases["experts"] = Case(EXPERTS, base="mixtral", streamed=False)
    cases["attention of a mixture of experts"] = Case({"r": 4, **QV}, base="mixtral")
    return cases


CASES = mergeable()
# The types that PEFT merges take the same path here: a sample of them, and every case that is merged from file to file.
BY_PEFT = ("ADALORA", "BEFT", "FOURIERFT", "IA3", "LN_TUNING", "LOHA", "OFT", "TRAINABLE_TOKENS", "VERA")
SAMPLE = [name for name, case in CASES.items() if name not in MINIMAL or case.streamed or name in BY_PEFT]


def generated(model: Any, tokenizer: Any) -> list[str]:
    """The greedy continuations of three prompts; the last holds the tokens whose rows the adapters change."""
    import torch

    prompts = [tokenizer(text)["input_ids"] for text in ("What is the capital of France?", "Two plus two is")]
    said = []
    for ids in [*prompts, [3, 5, 6, 7, 17, 300]]:
        with torch.inference_mode():
            output = model.eval().generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=0)
        said.append(tokenizer.decode(output[0, len(ids) :]))
    return said


def loaded(base: Path, adapter: Path, case: Case, rows: int | None) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load_for(case.task, base, rows), adapter)


@pytest.mark.parametrize("name", sample(CASES, SAMPLE))
def test_a_merged_model_generates_the_text_of_base_and_adapter(
    name: str, base_of: BaseOf, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    case, out = CASES[name], tmp_path / "out"
    base = base_of(case.base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = load_for(case.task, base).get_input_embeddings().weight.shape[0] + case.new_tokens
    adapter = make_adapter(base, case.config(), tmp_path / "adapter", scale=case.scale, rows=rows)
    assert main([str(base), str(adapter), str(out)]) == 0
    assert ("merging in memory with PEFT" in capsys.readouterr().err) is not case.streamed
    verification = json.loads((out / "merge_verification.json").read_text())
    assert verification["passed"] and verification["base_against_adapter"]["rms_relative"] > 1e-3
    together = generated(loaded(base, adapter, case, rows), tokenizer)
    assert generated(AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)) == together
    assert generated(AutoModelForCausalLM.from_pretrained(base), tokenizer) != together


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_reward_model_scores_as_base_and_adapter_do(
    base: str, base_of: BaseOf, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    targets = QV if base == "llama" else LORA_OF_GPT2["transposed"]
    case = Case({"r": 4, **targets}, task="SEQ_CLS", base=base)
    adapter = make_adapter(base_of(base), case.config(), tmp_path / "adapter", scale=case.scale)
    assert main([str(base_of(base)), str(adapter), str(tmp_path / "out")]) == 0
    verification = json.loads((tmp_path / "out" / "merge_verification.json").read_text())
    assert verification["passed"] and verification["base_against_adapter"]["rms_relative"] > 1e-3
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 1
    together = loaded(base_of(base), adapter, case, None)
    for ids in ([5, 6, 7, 8], [30, 31, 32, 33, 34], [9]):
        with torch.inference_mode():
            scores = [model.eval()(torch.tensor([ids])).logits for model in (merged, together)]
        assert torch.allclose(*scores, rtol=1e-4, atol=1e-6) and scores[0].abs() > 1e-4


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a merge into `out` is refused with."""
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("peft_type", UNMERGEABLE)
def test_types_that_do_not_change_weights_are_refused_in_one_line(
    peft_type: str, base_of: BaseOf, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base_of("llama"), Case(MINIMAL[peft_type], peft_type).config(), tmp_path / "adapter")
    message = refusal([str(base_of("llama")), str(adapter), str(tmp_path / "out")], capsys)
    assert message.startswith(f"error: an adapter of type {peft_type} cannot be merged: {UNMERGEABLE[peft_type]}. ")
    assert "Serve base model and adapter unmerged" in message
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_activated_lora_is_refused_in_one_line(
    base_of: BaseOf, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case({"r": 4, "alora_invocation_tokens": [5, 6], **QV})
    adapter = make_adapter(base_of("llama"), case.config(), tmp_path / "adapter")
    message = refusal([str(base_of("llama")), str(adapter), str(tmp_path / "out")], capsys)
    assert "cannot be merged: activated LoRA is switched on by tokens at run time" in message
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_types_that_only_some_bases_can_hold(
    base_of: BaseOf, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base_of("llama"), Case(MINIMAL["BEFT"], "BEFT").config(), tmp_path / "adapter")
    assert main([str(base_of("llama")), str(adapter), str(tmp_path / "out")]) == 1
    assert "of type BEFT cannot be merged into this base: Base layer has no bias" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_mixtures_of_adapters_are_refused(
    base_of: BaseOf, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftConfig, PolyConfig, XLoraConfig, get_peft_model

    lora = make_adapter(base_of("llama"), Case(MINIMAL["LORA"]).config(), tmp_path / "lora")
    configs: dict[str, PeftConfig] = {
        "XLORA": XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters={"0": str(lora)}),
        "POLY": PolyConfig(task_type="CAUSAL_LM", r=4, n_tasks=2, n_skills=2, target_modules=["q_proj"]),
    }
    for name, config in configs.items():
        model = load_for("CAUSAL_LM", base_of("llama"))
        model.config.use_cache = False
        get_peft_model(model, config).save_pretrained(tmp_path / name)
        message = refusal([str(base_of("llama")), str(tmp_path / name), str(tmp_path / "out")], capsys)
        assert f"of type {name} cannot be merged: " in message
