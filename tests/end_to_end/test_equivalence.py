"""One experiment on one, two and four processes: the same loss curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
CASES = {
    "full": ("sft", {}),
    "lora": ("sft", {"peft_conf": LORA}),
    "packed": ("sft", {"peft_conf": LORA, "sft_args.packing": True, "sft_args.max_seq_length": 120}),
    "dpo": ("dpo", {"peft_conf": LORA}),
}
MOST_DIFFERENCE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_split_does_not_show(
    sft_values: Any,
    dpo_values: Any,
    write_config: Any,
    torchrun: Any,
    logged_losses: Any,
    tmp_path: Path,
    case: str,
    record_property: Any,
) -> None:
    """4 rows per step: 1 process x accumulation 4, 2 x 2 and 4 x 1, one row at a time each."""
    kind, changes = CASES[case]
    make = dpo_values if kind == "dpo" else sft_values
    curves = {}
    for processes in (1, 2, 4):
        out = tmp_path / f"on-{processes}"
        values = make(
            {
                **changes,
                "training_args.output_dir": str(out),
                "training_args.max_steps": 3,
                "batchsize_conf": {"total_train_batch_size": 4, "max_per_device_train_batch_size": 1},
            }
        )
        result = torchrun(kind, write_config(values, f"on-{processes}.yaml"), processes)
        assert f"4 = {processes} x 1 x {4 // processes}" in result.stdout
        curves[processes] = logged_losses(out)
    assert len(curves[1]) == 3
    for processes in (2, 4):
        most = max(abs(a - b) for a, b in zip(curves[1], curves[processes], strict=True))
        record_property(f"{processes} processes", f"{most:.1e}")
        assert most < MOST_DIFFERENCE
