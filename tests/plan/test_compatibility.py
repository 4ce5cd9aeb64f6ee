"""The compatibility matrix: incompatible features are rejected before weights load, compatible ones train."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import ProcessTopology
from finetuning.errors import ConfigError, MissingPackageError
from finetuning.plan import features
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


CONFIG_CHANGES: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"peft_conf": {"peft_type": "NO_PEFT"}},
    "LoRA": adapter("LORA", r=4, **QV),
    "aLoRA": adapter("LORA", r=4, alora_invocation_tokens=[1], **QV),
    "AdaLoRA": adapter("ADALORA", init_r=4, target_r=2, **QV),
    "prefix tuning": adapter("PREFIX_TUNING", num_virtual_tokens=4),
    "virtual tokens": adapter("PROMPT_TUNING", num_virtual_tokens=4),
    "adapters without 4-bit support": adapter("LOHA", r=4, **QV),
    "adapters without 8-bit support": adapter("HRA", r=4, **QV),
    "adapters that mix tokens": adapter("BEFT", target_modules=["v_proj"]),
    "other than LoRA": adapter("IA3", target_modules=["k_proj"], feedforward_modules=[]),
    "PiSSA": adapter("LORA", r=4, init_lora_weights="pissa", **QV),
    "OLoRA": adapter("LORA", r=4, init_lora_weights="olora", **QV),
    "random LoRA initialization": adapter("LORA", r=4, init_lora_weights=False, **QV),
    "8-bit quantization": bits("8"),
    "4-bit quantization": bits("4"),
    "torchao": {"quant_conf": {"quantization_type": "torchao"}},
    "adapters without GPTQ support": adapter("IA3", target_modules=["k_proj"], feedforward_modules=[]),
    "weight-based LoRA initialization": adapter("LORA", r=4, init_lora_weights="orthogonal", **QV),
    "DoRA": adapter("LORA", r=4, use_dora=True, **QV),
    "quantization on load": bits("4"),
    "adapters without torchao support": adapter("IA3", target_modules=["k_proj"], feedforward_modules=[]),
    "sharded adapter weights in float16": {
        "run_conf.model_args.dtype": "float16",
        "training_args.deepspeed": {"zero_optimization": {"stage": 2}},
        **adapter("LORA", r=4, **QV),
    },
    "DeepSpeed": {"training_args.deepspeed": {"zero_optimization": {"stage": 2}}},
    "packing": {"sft_args.packing": True},
    "chunked logits": {"sft_args.logits_at_once": 64},
    "padding-free": {"sft_args.batching": "padding-free"},
    "8-bit bitsandbytes optimizer": {"training_args.optim": "paged_adamw_8bit"},
    "GaLore, APOLLO": {"training_args.optim": "galore_adamw"},
    "layer-wise optimizer": {"training_args.optim": "apollo_adamw_layerwise"},
    "LoRA+": {"overrides.loraplus_lr_ratio": 16},
    "learning rates of parts": {"overrides.part_learning_rates": {"language_model": 1e-5}},
    "fp16": {"training_args.fp16": True},
    "load_best_model_at_end": {
        "training_args.load_best_model_at_end": True,
        "training_args.eval_strategy": "steps",
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 1,
        "training_args.eval_steps": 1,
        "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.2},
    },
    "gradient checkpointing": {"training_args.gradient_checkpointing": True},
    "compiled layers": {"training_args.torch_compile": "layers"},
    "resuming": {"run_conf.resume_from_checkpoint": "auto"},
    "layer-wise optimizers and AdaLomo": {"training_args.optim": "adalomo"},
    "a moving reference of DPO": {"training_args.sync_ref_model": True},
    "an adapter": adapter("LORA", r=4, **QV),
    "a moving reference under FSDP or DeepSpeed": {
        "training_args.sync_ref_model": True,
        "training_args.deepspeed": {"zero_optimization": {"stage": 2}},
    },
}
NEED_LORA = ({"8-bit quantization", "FSDP"}, {"quantization on load", "GPTQ"})
"""Pairs that would be rejected for another reason without an adapter."""
METHODS = {
    features.REFERENCE_MODEL.name: "dpo",
    features.REWARD.name: "reward",
    features.MOVING_REFERENCE.name: "dpo",
    features.SHARDED_MOVING_REFERENCE.name: "dpo",
}
"""The algorithm that shows a feature; all others are shown with sft."""
TOPOLOGIES = {
    "FSDP": ProcessTopology(world_size=2, sharded_by="fsdp"),
    "multiple processes": ProcessTopology(world_size=2),
}


@pytest.fixture
def gptq_config_dir(tmp_path: Path) -> Path:
    """The part of a GPTQ checkpoint that the plan reads."""
    folder = tmp_path / "gptq"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    return folder


@pytest.fixture
def plan(sft_values: Any, dpo_values: Any, write_config: Any, gptq_config_dir: Path) -> Any:
    """A function that plans an experiment with the named features, for a model that does not exist."""

    def make(*names: str) -> RunContext:
        changes = {"run_conf.model": str(gptq_config_dir) if "GPTQ" in names else "/not/there"}
        for name in ("LoRA" if set(names) in NEED_LORA else "", *names):
            changes |= CONFIG_CHANGES.get(name, {})
        method = next((METHODS[name] for name in names if name in METHODS), "sft")
        document = read_document(write_config((sft_values if method == "sft" else dpo_values)(changes)))
        experiment = validate(document, EXPERIMENTS[method]).experiment
        topology = next((TOPOLOGIES[name] for name in names if name in TOPOLOGIES), ProcessTopology())
        make_plan(experiment, topology)
        return RunContext(experiment, topology, 2)

    return make


@pytest.mark.parametrize(
    "incompatibility", INCOMPATIBILITIES, ids=lambda row: f"{row.first.name} with {row.second.name}"
)
def test_incompatible_features_are_rejected(plan: Any, incompatibility: Incompatibility) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(incompatibility.first.name, incompatibility.second.name)
    keys = {incompatibility.first.key, incompatibility.second.key}
    problem = next(problem for problem in caught.value.problems if problem.location.key in keys)
    assert problem.hint


@pytest.mark.parametrize(
    "feature", [feature for feature in FEATURES if feature.name in CONFIG_CHANGES], ids=lambda feature: feature.name
)
def test_each_feature_is_detected_and_valid_alone(
    sft_values: Any, write_config: Any, feature: features.Feature
) -> None:
    needs = dict.fromkeys(
        ("8-bit quantization", "4-bit quantization", "torchao", "quantization on load", "LoRA+"), "LoRA"
    ).get(feature.name, "")
    for names, expected in (
        ((needs, feature.name), True),
        ((), feature is features.FULL_FINE_TUNING or feature is features.NOT_LORA),
    ):
        changes: dict[str, Any] = {}
        for name in names:
            changes |= CONFIG_CHANGES.get(name, {})
        experiment = validate(read_document(write_config(sft_values(changes))), EXPERIMENTS["sft"]).experiment
        context = RunContext(experiment, ProcessTopology(), 1)
        assert feature.has(context) is expected
        rejected = [row for row in INCOMPATIBILITIES if row.applies(context)]
        assert not rejected


def test_dry_run_reports_file_and_line(run_cli: Any, sft_values: Any, write_config: Any, tmp_path: Path) -> None:
    changes = CONFIG_CHANGES["packing"] | CONFIG_CHANGES["virtual tokens"] | {"run_conf.model": "/not/there"}
    config = write_config(sft_values(changes))
    result = run_cli(["sft", config, "--dry-run"])
    line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if "packing" in text)
    assert result.returncode == 1
    assert f"{config}:{line}:" in result.stderr
    assert "sft_args.packing: packing cannot be combined with virtual tokens (PROMPT_TUNING)" in result.stderr
    assert "Set sft_args.batching: auto and packing: false." in result.stderr


def test_missing_package_is_reported_before_weights_load(plan: Any) -> None:
    with pytest.raises(MissingPackageError, match=r"training_args.optim: needs the package apollo_torch.*pip install"):
        CONFIG_CHANGES["apollo"] = {"training_args.optim": "apollo_adamw"}
        plan("apollo")


def test_gptq_checkpoint_requires_its_packages(sft_values: Any, write_config: Any, gptq_config_dir: Path) -> None:
    document = read_document(
        write_config(sft_values(CONFIG_CHANGES["LoRA"] | {"run_conf.model": str(gptq_config_dir)}))
    )
    context = RunContext(validate(document, EXPERIMENTS["sft"]).experiment, ProcessTopology(), 1)
    assert features.GPTQ.has(context)
    assert {need.module for need in required_packages(context)} == {"gptqmodel", "optimum"}
    if find_spec("gptqmodel") is None:
        with pytest.raises(
            MissingPackageError, match=r"run_conf.model: needs the package gptqmodel.*finetuning\[gptq\]"
        ):
            check_packages(context)


def test_compatibility_page_is_up_to_date() -> None:
    page = ROOT / "docs" / "reference" / "support.md"
    assert page.read_text() == compatibility_page(), "run: make docs"


@pytest.mark.parametrize(
    "names",
    [
        ("LoRA", "4-bit quantization", "gradient checkpointing"),
        ("LoRA", "8-bit quantization", "8-bit bitsandbytes optimizer"),
        ("LoRA", "LoRA+", "packing"),
        ("AdaLoRA", "packing"),
        ("LoRA", "torchao", "packing"),
        ("virtual tokens", "torchao"),
        ("AdaLoRA", "4-bit quantization"),
        ("virtual tokens", "4-bit quantization"),
        ("prefix tuning", "8-bit quantization"),
        ("other than LoRA", "8-bit quantization"),
        ("full fine-tuning", "padding-free", "gradient checkpointing"),
        ("aLoRA", "gradient checkpointing"),
    ],
    ids=" and ".join,
)
def test_compatible_features_train_together(train: Any, sft_values: Any, names: tuple[str, ...]) -> None:
    changes: dict[str, Any] = {"training_args.max_steps": 2}
    for name in names:
        changes |= CONFIG_CHANGES[name]
    assert len(train(sft_values(changes)).losses) == 2
