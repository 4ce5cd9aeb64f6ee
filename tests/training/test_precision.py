"""A number type that the device lacks is refused before the weights are loaded; what it has trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from finetuning.algorithms import ALGORITHMS
from finetuning.config.sections.experiment import EXPERIMENTS
from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.distributed import ProcessTopology
from finetuning.errors import ConfigError, FinetuningError
from finetuning.model.hardware import Device, DtypeSupport
from finetuning.plan.features import RunContext
from finetuning.plan.memory_estimate import estimate_memory
from finetuning.training.preflight import check_precision, choose_dtype, compute_precision

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


@pytest.fixture
def half_precision_dir(chatml_llama_dir: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that makes a checkpoint of 16 bits."""

    def convert(dtype: str) -> Path:
        folder = Path(shutil.copytree(chatml_llama_dir, tmp_path / dtype))
        weights = load_file(folder / "model.safetensors")
        save_file(
            {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        return folder

    return convert


def dtypes(weights: Iterable[torch.Tensor]) -> set[torch.dtype]:
    return {weight.dtype for weight in weights}


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize(("dtype", "autocast"), [("bfloat16", True), ("float16", True), ("float16", False)])
def test_weights_of_16_bits_are_trained_in_float32_and_saved_as_they_were(
    method: str, dtype: str, autocast: bool, train: Any, sft_values: Any, dpo_values: Any, half_precision_dir: Any
) -> None:
    seen: list[set[torch.dtype]] = []
    algorithm = ALGORITHMS[method]

    def build(inputs: Any) -> Any:
        class Watch(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
                seen.append(dtypes(model.parameters()))

        trainer = algorithm.build_trainer(inputs)
        trainer.add_callback(Watch())
        return trainer

    base = half_precision_dir(dtype)
    changes = {"run_conf.model": str(base), "training_args.bf16": autocast, "training_args.learning_rate": 1e-3}
    values = (sft_values if method == "sft" else dpo_values)(changes)
    run = train(values, replace(algorithm, build_trainer=build))
    assert seen == [{torch.float32}] * 3
    final, before = load_file(run.final / "model.safetensors"), load_file(base / "model.safetensors")
    assert dtypes(final.values()) == {getattr(torch, dtype)}
    assert json.loads((run.final / "config.json").read_text())["dtype"] == dtype
    assert any(not torch.equal(final[name], before[name]) for name in final)


def test_float32_keeps_the_updates_that_bfloat16_rounds_off(
    train: Any, sft_values: Any, half_precision_dir: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = str(half_precision_dir("bfloat16"))
    common = {"run_conf.model": base, "training_args.bf16": True, "training_args.learning_rate": 1e-5}
    shares: dict[str, str] = {}
    for dtype in ("bfloat16", "float32"):
        caplog.clear()
        folder = str(tmp_path / f"out-{dtype}")
        run = train(sft_values({**common, "run_conf.model_args.dtype": dtype, "training_args.output_dir": folder}))
        checks = json.loads((run.output_dir / "run.json").read_text())["artifact"]["checks"]
        shares[dtype] = next(check for check in checks if check.startswith("training changed"))
        warned = "the other changes are too small for bfloat16" in caplog.text
        assert warned is (dtype == "bfloat16"), caplog.text
    percent = {dtype: float(share.split()[2].rstrip("%")) for dtype, share in shares.items()}
    assert percent["bfloat16"] < 30
    assert percent["float32"] > 99


def test_a_device_too_small_for_float32_trains_in_bfloat16(
    asking: Any, half_precision_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = asking(bf16=True)
    base = half_precision_dir("bfloat16")
    experiment = experiment.model_copy(update={"run_conf": experiment.run_conf.model_copy(update={"model": str(base)})})
    context = RunContext(experiment, ProcessTopology(), 1)
    need = estimate_memory(experiment, "float32").total
    arguments = SimpleNamespace(fp16=False, use_cpu=False)
    for memory, expected in ((need, "float32"), (need - 1, "bfloat16"), (need // 2 - 1, "float32"), (None, "float32")):
        device = replace(NEW_GPU, memory=memory)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("finetuning.training.preflight.training_device", lambda use_cpu, device=device: device)
            dtype, saved, notes = choose_dtype(context, arguments)
        assert (dtype, saved) == (expected, torch.bfloat16 if expected == "float32" else None)
        assert len(notes) == 1
    assert caplog.text.count("weights are trained in bfloat16") == 1
