"""The dtype of the weights in a full fine-tune: which one is chosen, what it costs and what it loses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import ProcessTopology
from finetuning.plan.features import RunContext
from finetuning.plan.plan import Plan, make_plan

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": ["q_proj"]}}
AUTOCAST = {"training_args.bf16": True}
BFLOAT16 = {"run_conf.model_args.dtype": "bfloat16"}
FLOAT16 = {"run_conf.model_args.dtype": "float16"}
FSDP = ProcessTopology(world_size=2, sharded_by="fsdp")
ALONE = ProcessTopology()


@pytest.fixture
def plan(sft_values: Any, write_config: Any, tmp_path: Path) -> Callable[..., tuple[RunContext, Plan]]:
    """A function that plans a run on a checkpoint of a dtype: 1,000 values in one matrix."""

    def make(
        checkpoint: str | None, changes: dict[str, Any], topology: ProcessTopology = ALONE
    ) -> tuple[RunContext, Plan]:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"dtype": checkpoint} if checkpoint else {}))
        save_file({"layer.weight": np.zeros((10, 100), dtype=np.float16)}, folder / "model.safetensors")
        values = sft_values({"run_conf.model": str(folder), "training_args.learning_rate": 1e-5, **changes})
        experiment = validate(read_document(write_config(values)), EXPERIMENTS["sft"]).experiment
        return RunContext(experiment, topology, 2), make_plan(experiment, topology)

    return make


def test_a_config_and_a_launcher_that_both_shard_are_a_warning(plan: Any) -> None:
    _, twice = plan("bfloat16", AUTOCAST | {"training_args.fsdp": True}, FSDP)
    [warning] = twice.warnings
    assert warning.location.key == "training_args.fsdp" and "the launcher shards the model with FSDP" in warning.message
    [alone] = plan("bfloat16", AUTOCAST | {"training_args.fsdp": True})[1].warnings
    assert "over several processes, and this is one" in alone.message
    two = ProcessTopology(world_size=2)
    assert plan("bfloat16", AUTOCAST | {"training_args.fsdp": True}, two)[1].warnings == []
    assert plan("bfloat16", AUTOCAST, FSDP)[1].warnings == []


@pytest.mark.parametrize(
    ("checkpoint", "changes", "topology", "loaded", "trained"),
    [
        ("bfloat16", AUTOCAST, ALONE, "float32", "float32"),
        ("float16", AUTOCAST, ALONE, "float32", "float32"),
        (None, AUTOCAST, ALONE, "float32", "float32"),
        ("float16", {}, ALONE, "float32", "float32"),
        ("bfloat16", {}, ALONE, "auto", "bfloat16"),
        ("bfloat16", FLOAT16, ALONE, "float32", "float32"),
        ("float16", AUTOCAST | FLOAT16, ALONE, "float32", "float32"),
        ("float16", {"training_args.fp16": True} | FLOAT16, ALONE, "float32", "float32"),
        ("float16", FLOAT16, FSDP, "float32", "float32"),
        ("float16", AUTOCAST | FLOAT16 | {"peft_conf": LORA}, ALONE, "float16", None),
        ("bfloat16", AUTOCAST | BFLOAT16, ALONE, "bfloat16", "bfloat16"),
        ("bfloat16", AUTOCAST | BFLOAT16, FSDP, "bfloat16", "float32"),
        ("bfloat16", AUTOCAST | {"training_args.deepspeed": {"bf16": {"enabled": True}}}, ALONE, "auto", "float32"),
        ("bfloat16", AUTOCAST | {"peft_conf": LORA}, ALONE, "auto", None),
    ],
)
def test_dtype_of_the_weights(
    plan: Any, checkpoint: str | None, changes: dict[str, Any], topology: ProcessTopology, loaded: str, trained: str
) -> None:
    if "training_args.deepspeed" in changes:
        pytest.importorskip("deepspeed")
    context, _ = plan(checkpoint, changes, topology)
    assert (context.weights_dtype, context.trained_dtype) == (loaded, trained)


def test_the_plan_says_what_float32_costs(plan: Any) -> None:
    _, raised = plan("bfloat16", AUTOCAST)
    _, kept = plan("bfloat16", AUTOCAST | BFLOAT16)
    # Weights, gradients and the two moments of Adam.
    assert (raised.memory.total, kept.memory.total) == (4 * 4 * 1000, 4 * 2 * 1000)
    decision = next(decision for decision in raised.decisions if decision.name == "trained weights")
    assert decision.value == "float32"
    assert "15.6 KiB instead of 7.8 KiB" in decision.reason
    assert "run_conf.model_args.dtype: bfloat16" in decision.reason
    assert raised.warnings == []


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        (AUTOCAST | BFLOAT16, True),
        ({}, True),
        (AUTOCAST | BFLOAT16 | {"training_args.learning_rate": 1e-3}, False),
        (AUTOCAST | BFLOAT16 | {"overrides.lr_multiplier": 100.0}, False),
        (AUTOCAST | BFLOAT16 | {"peft_conf": LORA}, False),
        (AUTOCAST, False),
    ],
)
def test_updates_that_bfloat16_rounds_off_are_reported(plan: Any, changes: dict[str, Any], warns: bool) -> None:
    _, made = plan("bfloat16", changes)
    assert bool(made.warnings) is warns
    if warns:
        (warning,) = made.warnings
        assert warning.location.key == "run_conf.model_args.dtype"
        assert "at a learning rate of 1e-05, Adam's updates of weights above about 0.0051 are lost" in str(warning)


@pytest.mark.parametrize("precision", ["bf16", "fp16", None])
def test_float16_weights_are_trained_in_float32_with_a_warning(plan: Any, precision: str | None) -> None:
    changes = FLOAT16 | ({f"training_args.{precision}": True} if precision else {})
    _, made = plan("bfloat16", changes)
    (warning,) = made.warnings
    assert warning.location.key == "run_conf.model_args.dtype"
    assert "turns float16 weights into NaN" in str(warning) and "saved in float16" in str(warning)
    assert made.memory.total == 4 * 4 * 1000
    assert plan("bfloat16", changes | {"peft_conf": LORA})[1].warnings == []


def test_the_warning_names_the_line_that_the_user_wrote(
    run_cli: Any, sft_values: Any, write_config: Any, chatml_llama_dir: Path
) -> None:
    config = write_config(sft_values({"run_conf.model_args.torch_dtype": "bfloat16", "training_args.bf16": True}))
    result = run_cli(["sft", config, "--dry-run", "training_args.learning_rate=1e-5"])
    line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if "torch_dtype" in text)
    assert result.returncode == 0, result.stderr
    assert f"warning: {config}:{line}:" in result.stderr
    assert "weights are trained in bfloat16" in result.stderr


def test_the_data_type_of_4_bit_weights_is_said_unless_it_is_set(plan: Any) -> None:
    four_bit = {"quantization_type": "bits-and-bytes", "load_in_4bit": True}
    for conf, expected in ((four_bit, ["nf4"]), (four_bit | {"bnb_4bit_quant_type": "fp4"}, [])):
        context, planned = plan("bfloat16", {"peft_conf": LORA, "quant_conf": conf})
        assert [decision.value for decision in planned.decisions if decision.name == "4-bit weights"] == expected
        assert context.experiment.quant_conf.bnb_4bit_quant_type == (expected or ["fp4"])[0]
