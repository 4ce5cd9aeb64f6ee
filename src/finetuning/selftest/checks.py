"""What the self-test compares, and how much two results may differ."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetuning.config.sections.experiment import Experiment
from finetuning.errors import FinetuningError
from finetuning.selftest.trials import WORKER, Trial, TrialRunner, rows_per_step, weight_files

LOSS_TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
"""Largest difference of two losses, relative to the larger one if that is above 1, by the dtype of the computation.
About 1000 unit roundoffs in float32, and 5 in the others, whose sums over tokens are in float32."""
GRADIENT_TOLERANCE = {"float32": 1e-2, "float16": 0.05, "bfloat16": 0.1}
"""Largest difference of two gradient norms, relative to the largest of a trial. Steps of Adam hide a wrong factor of
all gradients from the losses. Norms differ by more than losses, as later steps start from slightly other weights."""
_NOISE_FACTOR = 10
"""A resumed run may differ from an uninterrupted one by this much more than a repeated run does."""


@dataclass(frozen=True)
class Result:
    """The outcome of a check."""

    name: str
    compared: str
    """What was compared, and the unit of the difference."""
    difference: float | None
    tolerance: float | None
    verdict: str
    """`pass`, `FAIL`, or `skipped`."""
    reason: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict == "FAIL"


def skipped(name: str, reason: str) -> Result:
    return Result(name, "", None, None, "skipped", reason)


def within(name: str, compared: str, difference: float, tolerance: float, reason: str = "") -> Result:
    """Return `pass` if the difference is at most the tolerance; NaN fails."""
    return Result(name, compared, difference, tolerance, "pass" if difference <= tolerance else "FAIL", reason)


@dataclass(frozen=True)
class SelfTest:
    """All checks of one config."""

    experiment: Experiment
    runner: TrialRunner
    world_size: int
    dtype: str
    """The dtype of the computation."""

    def run(self) -> Iterator[Result]:
        """Yield the results in the order of the checks. A trial that fails is the failure of its check."""
        first = self.runner.run("reference")
        for name, check in self._checks().items():
            try:
                result = check(name, first)
            except FinetuningError as error:
                result = Result(name, "", None, None, "FAIL", str(error))
            yield result

    def _checks(self) -> Mapping[str, Callable[[str, Trial], Result]]:
        rows = rows_per_step(self.experiment, self.world_size) // self.world_size
        splits = {
            f"micro-batches {rows // size} x {size}": self._split(size)
            for size in (rows // 2, rows // 4)
            if size and rows % size == 0
        }
        return {
            "repeated run": self._repeat,
            **splits,
            "out-of-memory retry": self._out_of_memory,
            "killed and resumed": self._resume,
            "batch layouts": self._layouts,
            "merged adapter": self._merge,
            "sampling and training": self._sampling,
        }

    @property
    def _tolerance(self) -> float:
        return LOSS_TOLERANCE[self.dtype]

    def _compare_steps(self, name: str, first: Trial, second: Trial) -> Result:
        """Return the check of every step's loss and gradient norm, and remove the second trial."""
        loss, gradient = loss_difference(first, second), gradient_difference(first, second)
        self.runner.remove(second)
        limit = GRADIENT_TOLERANCE[self.dtype]
        if gradient is not None and not gradient <= limit:
            return within(name, "gradient norm, every step", gradient, limit, f"the losses differ by {loss:.1e}")
        reason = "" if gradient is None else f"gradient norm {gradient:.1e} of {limit:.1e}"
        return within(name, "loss, every step", loss, self._tolerance, reason)

    def _repeat(self, name: str, first: Trial) -> Result:
        return self._compare_steps(name, first, self.runner.run("repeated"))

    def _split(self, size: int) -> Callable[[str, Trial], Result]:
        def check(name: str, first: Trial) -> Result:
            trial = self.runner.run(f"micro-batch-{size}", f"batchsize_conf.max_per_device_train_batch_size={size}")
            return self._compare_steps(name, first, trial)

        return check

    def _out_of_memory(self, name: str, first: Trial) -> Result:
        if self.runner.launch:
            return skipped(name, "only with a single process")
        try:
            trial = self.runner.run("out-of-memory", entry=(WORKER, "out-of-memory"))
        except FinetuningError as error:
            if "simulated by the self-test" in str(error):
                return skipped(name, f"the loss of this {self.experiment.method_name} run cannot be split")
            raise
        log = (self.runner.folder / "out-of-memory.log").read_text(encoding="utf-8", errors="replace")
        result = self._compare_steps(name, first, trial)
        if "out of memory at micro-batch" not in log:
            return Result(name, "", None, None, "FAIL", "the simulated error did not lead to a retry")
        return result

    def _resume(self, name: str, first: Trial) -> Result:
        resumed = self.runner.run_interrupted("resumed")
        difference = weight_difference(first.final, resumed.final)
        self.runner.remove(resumed)
        if difference == 0:
            return within(name, "final weights", 0.0, 0.0, "bit for bit")
        # Kernels that add in no fixed order differ between two runs, too. What a repetition changes is the yardstick.
        again = self.runner.run("repeated-for-noise")
        noise = weight_difference(first.final, again.final)
        self.runner.remove(again)
        reason = f"a repeated run differs by {noise:.2g}" if noise else "a repeated run is equal bit for bit"
        return within(name, "final weights", difference, _NOISE_FACTOR * noise, reason)

    def _layouts(self, name: str, first: Trial) -> Result:
        if self.experiment.method_name != "sft":
            return skipped(name, f"{self.experiment.method_name} pads its batches; only sft has other layouts")
        return self._measured(name, "layouts", "loss of a row in a batch, pack or alone", first)

    def _sampling(self, name: str, first: Trial) -> Result:
        if self.experiment.method_name != "grpo":
            return skipped(name, "only grpo samples completions")
        return self._measured(name, "sampling", "log probability of a sampled token", first)

    def _measured(self, name: str, measurement: str, compared: str, first: Trial) -> Result:
        """Return the check that a process of its own measures, so that the device's memory is free again after it."""
        output = self.runner.folder / f"{measurement}.json"
        overrides = [*self.runner.overrides, f"training_args.output_dir={json.dumps(str(first.folder))}"]
        command = [sys.executable, "-m", WORKER, measurement, str(output)]
        result = subprocess.run(
            [*command, self.runner.method, str(self.runner.config), *overrides],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
            return Result(name, compared, None, None, "FAIL", (lines or result.stderr.splitlines()[-1:] or ["?"])[0])
        measured = json.loads(output.read_text(encoding="utf-8"))
        if measured["difference"] is None:
            return skipped(name, measured["reason"])
        return within(name, compared, measured["difference"], self._tolerance, measured["reason"])

    def _merge(self, name: str, first: Trial) -> Result:
        if not first.is_adapter:
            return skipped(name, "this run trains no adapter")
        if self.experiment.quant_conf.quantization_type != "no-quantization":
            return skipped(name, "the base model is quantized; a merge goes into the full-precision base")
        merged = self.runner.folder / "merged"
        result = subprocess.run(
            [sys.executable, "-m", "finetuning.cli.merge_adapter", self.experiment.run_conf.model, first.final, merged],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
            return Result(name, "logits", None, None, "FAIL", (errors or ["the merge failed"])[0])
        verification = json.loads((merged / "merge_verification.json").read_text(encoding="utf-8"))
        return within(
            name,
            "logits, rms relative to their spread",
            verification["merged_against_adapter"]["rms_relative"],
            verification["max_allowed"]["rms_relative"],
            f"top-1 agreement {verification['merged_against_adapter']['top1_agreement']:.1%}",
        )


def loss_difference(first: Trial, second: Trial) -> float:
    """Return the largest difference of the losses of a step, relative where losses are above 1."""
    pairs = zip(first.losses, second.losses, strict=True)
    return largest(abs(a - b) / max(1.0, abs(a), abs(b)) for a, b in pairs)


def largest(differences: Iterable[float]) -> float:
    """Return the largest difference; NaN if any is. `max` would drop it, depending on the order."""
    values = list(differences)
    return math.nan if any(map(math.isnan, values)) else max(values)


def gradient_difference(first: Trial, second: Trial) -> float | None:
    """Return the largest difference of the gradient norms of a step, relative to the largest; None if not logged."""
    pairs = list(zip(first.grad_norms, second.grad_norms, strict=True))
    if not pairs:
        return None
    return largest(abs(a - b) for a, b in pairs) / max(*first.grad_norms, *second.grad_norms, 1e-12)


def weight_difference(first: Path, second: Path) -> float:
    """Return the largest difference of a weight in two folders; infinity if their tensors are not the same."""
    import torch
    from safetensors import safe_open

    names = [file.name for file in weight_files(first)]
    if not names or names != [file.name for file in weight_files(second)]:
        return float("inf")
    differences = [0.0]
    for name in names:
        with safe_open(first / name, framework="pt") as ours, safe_open(second / name, framework="pt") as theirs:
            if sorted(ours.keys()) != sorted(theirs.keys()):
                return float("inf")
            for key in ours.keys():  # noqa: SIM118 - not a mapping
                a, b = ours.get_tensor(key), theirs.get_tensor(key)
                if a.shape != b.shape or a.dtype != b.dtype:
                    return float("inf")
                if not torch.equal(a, b):
                    differences.append((a.double() - b.double()).abs().max().item())
    return largest(differences)
