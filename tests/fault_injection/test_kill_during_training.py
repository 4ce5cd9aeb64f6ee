"""A run that is killed many times, at any moment and above all while it saves, ends like one that was not."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuning.atomic_io import find_manifest_mismatch

STEPS = 12
LORA = {"peft_type": "LORA", "peft_kwargs": {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}}
# Where a kill waits for, how long after that it comes at most, and how many of a hundred are such.
MOMENTS = {
    "anywhere": (None, 1.8, 15),
    "while saving": (".checkpoint-[0-9]*.partial", 0.08, 55),
    "around the rename": ("checkpoint-[0-9]*", 0.02, 15),
    "while publishing": (".checkpoint-final.partial", 0.1, 10),
    "after publishing": ("checkpoint-final", 0.1, 5),
}


def whole(out: Path) -> set[str]:
    """The checkpoints of a directory, each of which must be whole."""
    folders = list(out.glob("checkpoint-[0-9]*"))
    for folder in folders:
        assert (folder / "manifest.json").is_file(), f"{folder} has no manifest"
        assert find_manifest_mismatch(folder) is None, f"{folder}: {find_manifest_mismatch(folder)}"
    return {folder.name for folder in folders}


def newest(names: set[str]) -> str | None:
    return max(names, key=lambda name: int(name.rpartition("-")[2]), default=None)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.full)])
def test_a_run_that_is_killed_many_times(
    fork_server: Any,
    sft_values: Any,
    write_config: Any,
    read_tensors: Any,
    losses_by_step: Any,
    tmp_path: Path,
    record_property: Any,
    kills: int,
) -> None:
    changes = {
        "peft_conf": LORA,
        "run_conf.resume_from_checkpoint": "auto",
        "training_args.max_steps": STEPS,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 1,
        "training_args.save_total_limit": 2,
    }
    config = write_config(sft_values(changes), "whole.yaml")
    assert (uncut := fork_server.start(["sft", config])).wait() == 0, uncut.output
    expected, tensors = losses_by_step(tmp_path / "out"), read_tensors(tmp_path / "out" / "checkpoint-final")
    assert set(expected) == set(range(1, STEPS + 1))

    dice, lives, seen = random.Random(7), 0, Counter()
    while sum(seen.values()) < kills:
        lives += 1
        out = tmp_path / f"life-{lives}"
        config = write_config(sft_values(changes | {"training_args.output_dir": str(out)}), f"{lives}.yaml")
        while sum(seen.values()) < kills and (moment := cut(fork_server, config, out, dice)):
            seen[moment] += 1
        last = fork_server.start(["sft", config])
        assert last.wait() == 0, last.output
        assert json.loads((out / "run.json").read_text())["status"] == "completed"
        assert not list(out.glob(".*.partial"))
        assert losses_by_step(out) == expected, (
            "each loss is that of the run that was not cut, as often as it was computed"
        )
        final = read_tensors(out / "checkpoint-final")
        assert final.keys() == tensors.keys()
        assert all(torch.equal(final[name], tensors[name]) for name in tensors)
    record_property("kills", dict(seen))
    record_property("lives", lives)
    assert seen["in a save"] >= kills / 4, seen


def cut(fork_server: Any, config: Path, out: Path, dice: random.Random) -> str | None:
    """Starts a run, kills it at some moment, and says in what; None when it had ended before."""
    pattern, longest, _ = MOMENTS[dice.choices(list(MOMENTS), [weight for *_, weight in MOMENTS.values()])[0]]
    before, delay = whole(out), dice.uniform(0, longest)
    stale = {path.name for path in out.glob(".*.partial")} if out.exists() else set()
    process = fork_server.start(["sft", config])
    if pattern:
        process.wait_for(lambda: appeared(out, pattern, before | stale), pause=0.0005)
    time.sleep(delay)
    if not process.is_running:
        assert process.wait() == 0, process.output
        return None
    process.kill()
    output = process.output
    assert "Traceback" not in output and "error:" not in output, output
    assert "skipped" not in output, output
    resumed = newest(before)
    if resumed and "training starts" in output:
        assert f"{out}/{resumed}" in output, output
    after = whole(out)
    assert not before or after, "a checkpoint that was there is lost"
    if any(out.glob(".checkpoint-[0-9]*.partial")):
        return "in a save"
    return "in the publication" if any(out.glob(".*.partial")) else "elsewhere"


def appeared(out: Path, pattern: str, before: set[str]) -> bool:
    return any(path.name not in before for path in out.glob(pattern))
