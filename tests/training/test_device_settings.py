"""A GPU gets bfloat16, a fused optimizer and TF32 where the config does not set them, and nothing else changes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate import DistributedDataParallelKwargs

from finetuning.config.sections.experiment import EXPERIMENTS, Experiment
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.dump import dump_yaml
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import ProcessTopology, has_gpu_driver
from finetuning.report.run_folder import CONFIG_NAME
from finetuning.trainer.ddp import use_bucket_views
from finetuning.training import device_settings
from finetuning.training.device_settings import (
    bfloat16_speed,
    configure_allocator,
    gpu_defaults,
    with_faster_dtype,
    with_gpu_defaults,
)


@pytest.fixture
def experiment_of(sft_values: Any, write_config: Any) -> Any:
    def read(changes: dict[str, Any]) -> Experiment:
        values = sft_values({"training_args.use_cpu": None, **changes})
        return validate(read_document(write_config(values)), EXPERIMENTS["sft"]).experiment

    return read


def chosen(before: Experiment, **device: bool) -> dict[str, Any]:
    """What was changed in training_args."""
    after, _ = gpu_defaults(before, **{"has_bfloat16": True, "has_tf32": True, **device})
    old, new = (experiment.training_args.model_dump() for experiment in (before, after))
    return {name: value for name, value in new.items() if old.get(name) != value}


def test_what_the_config_leaves_open_is_chosen_for_the_gpu(experiment_of: Any) -> None:
    experiment = experiment_of({})
    assert chosen(experiment) == {
        "bf16": True,
        "optim": "adamw_torch_fused",
        "tf32": True,
        "accelerator_config": {"non_blocking": True},
    }
    _, decisions = gpu_defaults(experiment, has_bfloat16=True, has_tf32=True)
    assert [(decision.name, decision.value) for decision in decisions] == [
        ("bf16", "true"),
        ("optim", "adamw_torch_fused"),
        ("tf32", "true"),
    ]
    assert all(decision.reason for decision in decisions)


def test_liger_leaves_the_loss_to_us_unless_its_config_says_otherwise(experiment_of: Any) -> None:
    liger = {"training_args.use_liger_kernel": True}
    ours = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    assert chosen(experiment_of(liger))["liger_kernel_config"] == ours
    configured = {**liger, "training_args.liger_kernel_config": {"rope": False}}
    assert "liger_kernel_config" not in chosen(experiment_of(configured))


@pytest.mark.parametrize(
    ("changes", "device", "kept"),
    [
        ({"training_args.bf16": False}, {}, "bf16"),
        ({"training_args.fp16": True}, {}, "bf16"),
        ({}, {"has_bfloat16": False}, "bf16"),
        ({"training_args.optim": "adamw_torch"}, {}, "optim"),
        ({"training_args.optim": "adafactor"}, {}, "optim"),
        ({"training_args.tf32": False}, {}, "tf32"),
        ({"run_conf.determinism": "half"}, {}, "tf32"),
        ({}, {"has_tf32": False}, "tf32"),
        ({"training_args.accelerator_config": {"even_batches": True}}, {}, "accelerator_config"),
    ],
)
def test_what_is_set_or_not_supported_is_left_alone(
    experiment_of: Any, changes: dict[str, Any], device: dict[str, bool], kept: str
) -> None:
    result = chosen(experiment_of(changes), **device)
    assert kept not in result
    assert len(result) == 3


def test_nothing_is_chosen_for_a_cpu_or_deepspeed(experiment_of: Any) -> None:
    for changes in ({"training_args.use_cpu": True}, {"training_args.deepspeed": {"zero_optimization": {"stage": 2}}}):
        assert chosen(experiment_of(changes)) == {}
    experiment = experiment_of({})
    assert with_gpu_defaults(experiment, ProcessTopology()) == (experiment, [])


def test_4_bit_weights_are_computed_in_bfloat16(experiment_of: Any) -> None:
    four_bits = {"quantization_type": "bits-and-bytes", "load_in_4bit": True}
    lora = {"peft_type": "LORA", "peft_kwargs": {"r": 4}}
    for more, expected in (({}, "bfloat16"), ({"bnb_4bit_compute_dtype": "float16"}, "float16")):
        experiment = experiment_of({"peft_conf": lora, "quant_conf": {**four_bits, **more}})
        updated, _ = gpu_defaults(experiment, has_bfloat16=True, has_tf32=True)
        assert updated.quant_conf.bnb_4bit_compute_dtype == expected


def test_the_allocator_grows_its_blocks_unless_it_is_configured() -> None:
    for environ, is_rocm, expected in (
        ({}, False, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({}, True, {}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            False,
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
        ),
    ):
        environ = dict(environ)
        configure_allocator(environ, is_rocm=is_rocm)
        assert environ == expected


def test_the_driver_of_a_gpu_is_found_without_torch(tmp_path: Path) -> None:
    assert not has_gpu_driver(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not has_gpu_driver(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert has_gpu_driver(tmp_path)


def test_gradients_are_views_of_the_buckets() -> None:
    handler = DistributedDataParallelKwargs()
    assert use_bucket_views({"kwargs_handlers": [handler]}) == {"kwargs_handlers": [handler]}
    assert handler.gradient_as_bucket_view is True


@pytest.fixture
def wide_model_dir(tmp_path: Path) -> Path:
    """A config whose sizes a probe takes, without weights."""
    folder = tmp_path / "wide"
    folder.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    return folder


def test_a_cpu_computes_in_the_faster_type_and_says_why(
    experiment_of: Any, wide_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratio = bfloat16_speed({"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}, True)
    assert ratio is not None
    assert ratio > 0
    assert bfloat16_speed({"hidden_size": 64}, True) is None

    def choose(**changes: Any) -> tuple[bool, list[str]]:
        experiment = experiment_of(
            {
                "run_conf.model": str(wide_model_dir),
                "training_args.use_cpu": True,
                "training_args.bf16": None,
                **changes,
            }
        )
        experiment, decisions = with_faster_dtype(experiment, ProcessTopology())
        return experiment.training_args.bf16, [decision.reason for decision in decisions]

    # The least ratio that decides for bfloat16.
    monkeypatch.setattr(device_settings, "_CLEARLY_FASTER", 0.0)
    is_bf16, (reason,) = choose()
    assert is_bf16
    assert re.match(r"bfloat16 is \d+\.\d\d times as fast on this CPU", reason)
    monkeypatch.setattr(device_settings, "_CLEARLY_FASTER", 1e9)
    assert choose()[0] is False
    assert choose(**{"training_args.bf16": True}) == (True, [])
    monkeypatch.setattr(device_settings, "_CLEARLY_FASTER", 0.0)
    assert choose(**{"training_args.bf16": False}) == (False, [])
    assert "run_conf.determinism" in choose(**{"run_conf.determinism": "full"})[1][0]


@pytest.mark.parametrize("earlier", [True, False])
def test_a_resumed_run_computes_as_the_run_that_it_continues(
    experiment_of: Any, wide_model_dir: Path, tmp_path: Path, earlier: bool
) -> None:
    before = experiment_of({"training_args.bf16": earlier})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CONFIG_NAME).write_text(dump_yaml(before))
    for source in ("auto", str(tmp_path / "out" / "checkpoint-4")):
        changes = {"run_conf.resume_from_checkpoint": source, "training_args.output_dir": str(tmp_path / "out")}
        changes |= {"run_conf.model": str(wide_model_dir), "training_args.bf16": None}
        after, (decision,) = with_faster_dtype(
            experiment_of({**changes, "training_args.use_cpu": True}), ProcessTopology()
        )
        assert after.training_args.bf16 is earlier
        assert decision.reason.startswith("as the run that it continues")
