"""Whole epochs, whose last step is not full, on one, two, four and eight processes: the same curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "target_modules": "all-linear"}}
EVALUATED = {
    "data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.25},
    "training_args.eval_strategy": "epoch",
}
EPOCHS: dict[str, Any] = {
    "training_args.max_steps": None,
    "training_args.num_train_epochs": 2,
    "peft_conf": LORA,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", EVALUATED),
    "packed": ("sft", {"sft_args.packing": True, "sft_args.max_seq_length": 90}),
    "dpo": ("dpo", EVALUATED),
    "dpo+sft": ("dpo", {**EVALUATED, "training_args.loss_type": ["sigmoid", "sft"]}),
    "precomputed": ("dpo", {"training_args.precompute_ref_log_probs": True}),
    "ipo": ("dpo", {"training_args.loss_type": ["ipo"]}),
    "reward": ("reward", EVALUATED),
    "kto": ("kto", EVALUATED),
    "kto precomputed": ("kto", {**EVALUATED, "training_args.precompute_ref_log_probs": True}),
    "apo": ("kto", {"training_args.loss_type": "apo_zero_unpaired"}),
    "orpo": ("orpo", EVALUATED),
    "cpo": ("cpo", EVALUATED),
}
MOST_DIFFERENCE = 2e-5
WORLD_SIZES = (1, 2, 4, 8)


# KTO needs two rows at a time.
@pytest.mark.parametrize(
    ("case", "rows_at_once"),
    [(case, rows) for case in CASES for rows in (1, 2) if rows > 1 or not case.startswith("kto")],
)
def test_the_split_of_whole_epochs_does_not_show(
    sft_values: Any,
    dpo_values: Any,
    sft_rows: Any,
    dpo_rows: Any,
    write_jsonl: Any,
    write_config: Any,
    torchrun: Any,
    losses: Any,
    tmp_path: Path,
    case: str,
    rows_at_once: int,
    record_property: Any,
) -> None:
    kind, changes = CASES[case]
    total = 8 * rows_at_once
    make = sft_values if kind == "sft" else dpo_values
    # A prime number of rows, so that no epoch ends with a full step.
    rows = write_jsonl(tmp_path / "rows.jsonl", (sft_rows if kind == "sft" else dpo_rows)(37))
    curves = {}
    for processes in WORLD_SIZES:
        out = tmp_path / f"on-{processes}"
        values = make(
            {
                **EPOCHS,
                "data_conf.training_data.datasets": [{"path": str(rows)}],
                **changes,
                "training_args.output_dir": str(out),
                "batchsize_conf": {"total_train_batch_size": total, "max_per_device_train_batch_size": rows_at_once},
            }
        )
        torchrun(kind, write_config(values, f"on-{processes}.yaml"), processes)
        curves[processes] = losses(out)
    assert len(curves[1]) >= 4
    for processes in WORLD_SIZES[1:]:
        assert curves[processes].keys() == curves[1].keys()
        most = max(abs(curves[processes][key] - value) for key, value in curves[1].items())
        record_property(f"{processes} processes", f"{most:.1e}")
        assert most < MOST_DIFFERENCE, processes
