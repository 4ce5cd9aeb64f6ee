"""A number type that the device lacks is refused before the weights are loaded; what it has trains."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.errors import ConfigError, FinetuningError
from finetuning.model.hardware import Device, DtypeSupport
from finetuning.training.preflight import check_precision, compute_precision

OLD_GPU = Device(
    "an old GPU",
    "cuda",
    None,
    None,
    (
        DtypeSupport("bf16", False, "only emulated"),
        DtypeSupport("fp16", True),
        DtypeSupport("tf32", False, "needs 8.0, this is 7.5"),
    ),
)
OLD_CPU = Device("a CPU", "cpu", None, None, (DtypeSupport("bf16", True, "emulated, slower than float32"),))
NEW_GPU = Device("a GPU", "cuda", None, None, tuple(DtypeSupport(name, True) for name in ("bf16", "fp16", "tf32")))


@pytest.fixture
def asking(sft_values: Any, write_config: Any) -> Any:
    def read(**args: Any) -> Any:
        values = sft_values({f"training_args.{key}": value for key, value in args.items()})
        return validate(read_document(write_config(values)), EXPERIMENTS["sft"]).experiment

    return read


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"bf16": True}, "training_args.bf16: is true, but an old GPU does not support bf16: only emulated"),
        ({"tf32": True}, "training_args.tf32: is true, but an old GPU does not support tf32: needs 8.0"),
        ({"bf16_full_eval": True}, "training_args.bf16_full_eval: is true, but an old GPU"),
    ],
)
def test_what_the_device_lacks_is_said(asking: Any, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_precision(asking(**args), OLD_GPU)
    assert str(caught.value).startswith(message)
    check_precision(asking(**args), NEW_GPU)


HINT = "a GPU supports bfloat16; set training_args.bf16 to use it"


@pytest.mark.parametrize(
    ("args", "weights", "device", "reported"),
    [
        ({}, torch.float32, NEW_GPU, ("float32", HINT)),
        ({}, torch.float32, OLD_GPU, ("float32", "")),
        ({}, torch.float32, OLD_CPU, ("float32", "")),
        ({}, torch.bfloat16, NEW_GPU, ("bfloat16", "")),
        ({"bf16": True}, torch.float32, NEW_GPU, ("bfloat16 by autocast, weights in float32", "")),
    ],
)
def test_a_run_reports_what_it_computes_in(
    asking: Any, args: dict[str, Any], weights: torch.dtype, device: Device, reported: tuple[str, str]
) -> None:
    assert compute_precision(asking(**args), SimpleNamespace(dtype=weights), device) == reported


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training_args.fp16", True, r"training_args.fp16: is true, but .* loss scaling needs an accelerator"),
        ("run_conf.model_args.attn_implementation", "flex_attention", "flex_attention has no backward pass on a CPU"),
        ("run_conf.model_args.attn_implementation", "sdap", r"attn_implementation: .*Did you mean sdpa\?"),
    ],
)
def test_what_a_cpu_cannot_do_stops_before_the_rows_are_read(
    train: Any, sft_values: Any, tmp_path: Any, key: str, value: Any, message: str
) -> None:
    (tmp_path / "sft.jsonl").write_text("no row")
    with pytest.raises(FinetuningError, match=message):
        train(sft_values({key: value}))


def test_bf16_trains_on_a_cpu(train: Any, sft_values: Any, tmp_path: Any) -> None:
    plain = train(sft_values())
    # Where there is no GPU, nobody has to say so.
    changes = {"training_args.bf16": True, "training_args.use_cpu": torch.accelerator.is_available() or None}
    half = train(sft_values({**changes, "training_args.output_dir": str(tmp_path / "half")}))
    assert half.losses != plain.losses
    assert half.losses == pytest.approx(plain.losses, rel=0.05)
