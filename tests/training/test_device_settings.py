"""A GPU gets bfloat16, a fused optimizer and TF32 where the config does not set them, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import DistributedDataParallelKwargs

from finetuning.config.sections.experiment import EXPERIMENTS, Experiment
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import ProcessTopology, has_gpu_driver
from finetuning.trainer.ddp import use_bucket_views
from finetuning.training.device_settings import configure_allocator, gpu_defaults, with_gpu_defaults


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
