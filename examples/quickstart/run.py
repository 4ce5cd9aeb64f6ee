"""The quickstart: make a tiny base model, measure it, tune it, merge it, measure it again.

    python examples/quickstart/run.py [--dpo] [--where DIRECTORY]

Everything is made in `quickstart-run/`. The steps are the console scripts that a user types; each is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RUN = "quickstart-run"
MARK = ".made-by-quickstart"
# One thread is nearly as fast as two on matrices this small, and many times faster on a machine that is busy.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
LEAST_GAIN = 0.5
SAMPLES = 3


@dataclass(frozen=True)
class Measured:
    """A model's answers to the test orders, and the share of them that is right."""

    title: str
    accuracy: float
    answers: list[dict]


class Failed(Exception):
    """A step did not do what it is here to show."""


class Steps:
    """Runs commands in a directory, showing each as a user would type it."""

    def __init__(self, where: Path):
        self.where = where
        self.times: list[tuple[str, float]] = []

    def python(self, title: str, script: str, *arguments: str) -> None:
        path = HERE / script
        self._run(title, [sys.executable, str(path), *arguments], ["python", self._displayed(path), *arguments])

    def tool(self, title: str, name: str, *arguments: str | Path) -> None:
        program = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if program is None:
            raise Failed(f"{name} is not installed here; run: pip install -e .")
        displayed = [self._displayed(argument) for argument in arguments]
        self._run(title, [program, *map(str, arguments)], [name, *displayed])

    def _displayed(self, argument: str | Path) -> str:
        if isinstance(argument, Path) and argument.is_relative_to(self.where):
            return str(argument.relative_to(self.where))
        return str(argument)

    def _run(self, title: str, command: list[str], displayed: list[str]) -> None:
        print(f"\n== {title}\n$ {shlex.join(displayed)}", flush=True)
        started = time.monotonic()
        result = subprocess.run(command, cwd=self.where, env={**ENVIRONMENT, **os.environ}, check=False)
        self.times.append((title, time.monotonic() - started))
        if result.returncode != 0:
            raise Failed(f"{displayed[0]} ended with exit code {result.returncode}")

    def measure(self, title: str, model: str, config: Path = HERE / "generate.yaml", run: str = RUN) -> Measured:
        """Generates with the model and reads what `generate` wrote."""
        name = f"{run}/{Path(model).name}-answers.json"
        self.tool(
            f"measure {title}",
            "generate",
            config,
            name,
            f"model_conf.model={model}",
            "--score",
            "exact",
        )
        out = self.where / name
        scores = json.loads(out.with_name(f"{out.name}.scores.json").read_text(encoding="utf-8"))
        return Measured(title, scores["accuracy"], json.loads(out.read_text(encoding="utf-8")))


def fresh_folder(where: Path, name: str = RUN) -> None:
    """An empty folder for the run; one of an earlier run is removed, one of anybody else is not."""
    run = where / name
    if run.exists():
        if not (run / MARK).exists():
            raise Failed(f"{run} is not from a quickstart; move it away, or give another --where")
        shutil.rmtree(run)
    run.mkdir(parents=True)
    (run / MARK).touch()


def order_of(answer: dict) -> str:
    """The order that an answer was given to, out of its prompt."""
    return answer["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]


def show(results: list[Measured]) -> None:
    """Prints some answers side by side, then the table of accuracies."""
    width = max(len(result.title) for result in results)
    print("\n== the same orders, answered by each model")
    for number in range(SAMPLES):
        print(f"\n  {'order':<{width}}  {order_of(results[0].answers[number])}")
        for result in results:
            answer = result.answers[number]
            mark = "right" if answer["answer"].strip() in answer["correct_answers"] else "wrong"
            print(f"  {result.title:<{width}}  {answer['answer'].strip()}  ({mark})")
    count = len(results[0].answers)
    print(f"\n== {count} orders that were in no training data, answered exactly right\n")
    for result in results:
        print(f"  {result.title:<{width}}  {result.accuracy:>6.1%}")


def run(where: Path, with_dpo: bool) -> None:
    """All steps.

    Raises:
        Failed: a command failed, or the fine-tuned model is not far better than the base model.
    """
    fresh_folder(where)
    steps = Steps(where)
    steps.python("make a base model from nothing", "make_base_model.py", f"{RUN}/base")
    steps.python("make data", "make_data.py", f"{RUN}/data")
    results = [steps.measure("base model", f"{RUN}/base")]
    steps.tool("tune it", "finetuning", "sft", REPOSITORY / "configs/sft/quickstart.yaml")
    final = f"{RUN}/tuned/checkpoint-final"
    steps.tool("merge the adapter into the base model", "merge_adapter", f"{RUN}/base", final, f"{RUN}/merged")
    results.append(steps.measure("fine-tuned model", f"{RUN}/merged"))
    if with_dpo:
        steps.tool("prefer right to wrong", "finetuning", "dpo", REPOSITORY / "configs/dpo/quickstart.yaml")
        final = f"{RUN}/tuned-dpo/checkpoint-final"
        steps.tool("merge again", "merge_adapter", f"{RUN}/merged", final, f"{RUN}/merged-dpo")
        results.append(steps.measure("tuned, then DPO", f"{RUN}/merged-dpo"))
    show(results)
    print(f"\n  {sum(seconds for _, seconds in steps.times):.0f} s in all, everything is in {where / RUN}")
    gain = results[1].accuracy - results[0].accuracy
    if gain < LEAST_GAIN:
        raise Failed(
            f"the fine-tuned model is only {gain:.1%} better than the base model; expected {LEAST_GAIN:.0%} or more"
        )
    if with_dpo and results[2].accuracy < results[1].accuracy - 0.05:
        raise Failed("the model answers worse after DPO than before it")


def main() -> int:
    parser = argparse.ArgumentParser(description="Tune a tiny model and see it answer better.")
    parser.add_argument("--dpo", action="store_true", help="go on with preference optimization")
    parser.add_argument("--where", type=Path, default=REPOSITORY, help=f"directory to make {RUN}/ in")
    arguments = parser.parse_args()
    try:
        run(arguments.where.resolve(), arguments.dpo)
    except Failed as error:
        print(f"\nquickstart failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
