"""The support matrix, row by row: what is refused is refused before any weight is read, what is allowed trains."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.pretrained_config import FLASH_ATTENTION_PACKAGES
from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import ProcessTopology
from finetuning.errors import ConfigError, MissingPackageError
from finetuning.plan import features as t
from finetuning.plan.compatibility import (
    INCOMPATIBILITIES,
    Incompatibility,
    check_packages,
    compatibility_page,
    required_packages,
)
from finetuning.plan.features import FEATURES, RunContext
from finetuning.plan.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
QV = {"target_modules": ["q_proj", "v_proj"]}


def adapter(peft_type: str, **kwargs: Any) -> dict[str, Any]:
    return {"peft_conf": {"peft_type": peft_type, "peft_kwargs": kwargs}}


def bits(number: str) -> dict[str, Any]:
    return {"quant_conf": {"quantization_type": "bits-and-bytes", f"load_in_{number}bit": True}}


ASKED: dict[str, dict[str, Any]] = {
    "all weights": {"peft_conf": {"peft_type": "NO_PEFT"}},
    "LoRA": adapter("LORA", r=4, **QV),
    "aLoRA": adapter("LORA", r=4, alora_invocation_tokens=[1], **QV),
    "AdaLoRA": adapter("ADALORA", init_r=4, target_r=2, **QV),
    "prefix tuning": adapter("PREFIX_TUNING", num_virtual_tokens=4),
    "virtual tokens": adapter("PROMPT_TUNING", num_virtual_tokens=4),
    "reads 4 bit weights": adapter("LOHA", r=4, **QV),
    "reads 8 bit weights": adapter("HRA", r=4, **QV),
    "not token by token": adapter("BEFT", target_modules=["v_proj"]),
    "anything but LoRA": adapter("IA3", target_modules=["k_proj"], feedforward_modules=[]),
    "PiSSA": adapter("LORA", r=4, init_lora_weights="pissa", **QV),
    "OLoRA": adapter("LORA", r=4, init_lora_weights="olora", **QV),
    "a random beginning": adapter("LORA", r=4, init_lora_weights=False, **QV),
    "8 bit": bits("8"),
    "4 bit": bits("4"),
    "torchao": {"quant_conf": {"quantization_type": "torchao"}},
    "not over GPTQ": adapter("IA3", target_modules=["k_proj"], feedforward_modules=[]),
    "a beginning from the weights": adapter("LORA", r=4, init_lora_weights="orthogonal", **QV),
    "DoRA": adapter("LORA", r=4, use_dora=True, **QV),
    "quantised anew": bits("4"),
    "not over torchao": adapter("IA3", target_modules=["k_proj"], feedforward_modules=[]),
    "trained weights in float16": {"run_conf.model_args.dtype": "float16"},
    "DeepSpeed": {"training_args.deepspeed": {"zero_optimization": {"stage": 2}}},
    "packing": {"sft_args.packing": True},
    "logits slice by slice": {"sft_args.logits_at_once": 64},
    "padding-free": {"sft_args.batching": "padding-free"},
    "bitsandbytes, 8 bit": {"training_args.optim": "paged_adamw_8bit"},
    "GaLore, APOLLO": {"training_args.optim": "galore_adamw"},
    "layer by layer": {"training_args.optim": "apollo_adamw_layerwise"},
    "LoRA+": {"overrides.loraplus_lr_ratio": 16},
    "fp16": {"training_args.fp16": True},
    "the best checkpoint at the end": {
        "training_args.load_best_model_at_end": True,
        "training_args.eval_strategy": "steps",
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 1,
        "training_args.eval_steps": 1,
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
    },
    "gradient checkpointing": {"training_args.gradient_checkpointing": True},
}
UNDER_LORA = ({"8 bit", "FSDP"}, {"quantised anew", "GPTQ"})
"""Pairs that without an adapter are refused for another reason."""
METHODS = {t.REFERENCE.name: "dpo", t.SCORES.name: "reward"}
"""The methods that a trait asks for; all others are asked for of sft."""
TOPOLOGIES = {
    "FSDP": ProcessTopology(world_size=2, sharded_by="fsdp"),
    "several processes": ProcessTopology(world_size=2),
}


@pytest.fixture
def gptq_config_dir(tmp_path: Path) -> Path:
    """All that the plan reads of a GPTQ checkpoint."""
    folder = tmp_path / "gptq"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    return folder


@pytest.fixture
def plan(sft_values: Any, dpo_values: Any, write_config: Any, gptq_config_dir: Path) -> Any:
    """A function that plans an experiment which asks for the named traits, on a model that is not there."""

    def make(*names: str) -> RunContext:
        changes = {"run_conf.model": str(gptq_config_dir) if "GPTQ" in names else "/not/there"}
        for name in ("LoRA" if set(names) in UNDER_LORA else "", *names):
            changes |= ASKED.get(name, {})
        method = next((METHODS[name] for name in names if name in METHODS), "sft")
        document = read_document(write_config((sft_values if method == "sft" else dpo_values)(changes)))
        experiment = validate(document, EXPERIMENTS[method]).experiment
        topology = next((TOPOLOGIES[name] for name in names if name in TOPOLOGIES), ProcessTopology())
        make_plan(experiment, topology)
        return RunContext(experiment, topology, 2)

    return make


@pytest.mark.parametrize("refusal", INCOMPATIBILITIES, ids=lambda row: f"{row.one.name} with {row.other.name}")
def test_what_does_not_go_together_is_refused(plan: Any, refusal: Incompatibility) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(refusal.one.name, refusal.other.name)
    keys = {refusal.one.key, refusal.other.key}
    problem = next(problem for problem in caught.value.problems if problem.place.key in keys)
    assert problem.hint


@pytest.mark.parametrize("trait", [trait for trait in FEATURES if trait.name in ASKED], ids=lambda trait: trait.name)
def test_each_trait_is_seen_and_goes_alone(sft_values: Any, write_config: Any, trait: t.Feature) -> None:
    needs = dict.fromkeys(("8 bit", "4 bit", "torchao", "quantised anew", "LoRA+"), "LoRA").get(trait.name, "")
    for names, expected in (((needs, trait.name), True), ((), trait is t.ALL_WEIGHTS or trait is t.NOT_LORA)):
        changes: dict[str, Any] = {}
        for name in names:
            changes |= ASKED.get(name, {})
        experiment = validate(read_document(write_config(sft_values(changes))), EXPERIMENTS["sft"]).experiment
        setting = RunContext(experiment, ProcessTopology(), 1)
        assert trait.has(setting) is expected
        assert not [row for row in INCOMPATIBILITIES if row.applies(setting)]


def test_the_command_names_the_line(run_cli: Any, sft_values: Any, write_config: Any, tmp_path: Path) -> None:
    changes = ASKED["packing"] | ASKED["virtual tokens"] | {"run_conf.model": "/not/there"}
    config = write_config(sft_values(changes))
    result = run_cli(["sft", config, "--dry-run"])
    line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if "packing" in text)
    assert result.returncode == 1
    assert f"{config}:{line}:" in result.stderr
    assert "sft_args.packing: packing does not go with virtual tokens (PROMPT_TUNING)" in result.stderr
    assert "Set sft_args.batching: auto and packing: false." in result.stderr


def test_a_package_that_is_missing_is_named_before_the_weights(plan: Any) -> None:
    with pytest.raises(MissingPackageError, match=r"training_args.optim: needs the package apollo_torch.*pip install"):
        ASKED["apollo"] = {"training_args.optim": "apollo_adamw"}
        plan("apollo")


@pytest.mark.parametrize(
    "name", [name for name, package in FLASH_ATTENTION_PACKAGES.items() if not package.is_installed]
)
def test_attention_that_is_missing_is_named_before_the_weights(plan: Any, name: str) -> None:
    ASKED[name] = {"run_conf.model_args.attn_implementation": name}
    with pytest.raises(MissingPackageError, match=r"attn_implementation: needs the package flash-attn.*pip install"):
        plan(name)


def test_a_gptq_checkpoint_names_what_loads_it(sft_values: Any, write_config: Any, gptq_config_dir: Path) -> None:
    document = read_document(write_config(sft_values(ASKED["LoRA"] | {"run_conf.model": str(gptq_config_dir)})))
    setting = RunContext(validate(document, EXPERIMENTS["sft"]).experiment, ProcessTopology(), 1)
    assert t.GPTQ.has(setting)
    assert {need.module for need in required_packages(setting)} == {"gptqmodel", "optimum"}
    if find_spec("gptqmodel") is None:
        with pytest.raises(
            MissingPackageError, match=r"run_conf.model: needs the package gptqmodel.*finetuning\[gptq\]"
        ):
            check_packages(setting)


def test_the_page_is_what_the_code_says() -> None:
    page = ROOT / "docs" / "reference" / "support.md"
    assert page.read_text() == compatibility_page(), "run: make docs"


@pytest.mark.parametrize(
    "names",
    [
        ("LoRA", "4 bit", "gradient checkpointing"),
        ("LoRA", "8 bit", "bitsandbytes, 8 bit"),
        ("LoRA", "LoRA+", "packing"),
        ("AdaLoRA", "packing"),
        ("LoRA", "torchao", "packing"),
        ("virtual tokens", "torchao"),
        ("AdaLoRA", "4 bit"),
        ("virtual tokens", "4 bit"),
        ("prefix tuning", "8 bit"),
        ("anything but LoRA", "8 bit"),
        ("all weights", "padding-free", "gradient checkpointing"),
        ("aLoRA", "gradient checkpointing"),
    ],
    ids=" and ".join,
)
def test_what_goes_together_trains(train: Any, sft_values: Any, names: tuple[str, ...]) -> None:
    changes: dict[str, Any] = {"training_args.max_steps": 2}
    for name in names:
        changes |= ASKED[name]
    assert len(train(sft_values(changes)).losses) == 2
