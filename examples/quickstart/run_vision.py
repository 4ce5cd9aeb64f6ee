"""The quickstart with images: make a tiny model that knows nothing, measure it, train it on pictures, measure it again.

    python examples/quickstart/run_vision.py [--where DIRECTORY]

Everything is made in `quickstart-vision-run/`. The steps are the console scripts that a user types; each is shown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from run import HERE, REPOSITORY, Failed, Measured, Steps, fresh_folder

RUN = "quickstart-vision-run"
CONFIG = HERE / "generate-vision.yaml"
LEAST_GAIN = 0.5
SAMPLES = 5


def show(results: list[Measured]) -> None:
    """Prints what each model sees in some pictures, then the table of accuracies."""
    width = max(len(result.title) for result in results)
    print("\n== the same pictures, seen by each model")
    count = len(results[0].answers)
    for number in range(0, count, count // SAMPLES):
        print(f"\n  {'picture ' + str(number):<{width}}  {results[0].answers[number]['correct_answers'][0]}")
        for result in results:
            text = result.answers[number]["answer"].strip()
            mark = "right" if text in result.answers[number]["correct_answers"] else "wrong"
            print(f"  {result.title:<{width}}  {text[:40]!r}  ({mark})")
    print(f"\n== {count} pictures that were in no training data, named exactly right\n")
    for result in results:
        print(f"  {result.title:<{width}}  {result.accuracy:>6.1%}")


def run(where: Path) -> None:
    """All steps.

    Raises:
        Failed: a command failed, or the trained model is not far better than the one before.
    """
    fresh_folder(where, RUN)
    steps = Steps(where)
    steps.python("make a model that knows nothing", "make_vision_model.py", f"{RUN}/base")
    steps.python("draw pictures", "shapes.py", f"{RUN}/data")
    results = [steps.measure("before training", f"{RUN}/base", CONFIG, RUN)]
    steps.tool("train it", "finetuning", "sft", HERE / "sft-vision.yaml")
    results.append(steps.measure("after training", f"{RUN}/tuned/checkpoint-final", CONFIG, RUN))
    show(results)
    print(f"\n  {sum(seconds for _, seconds in steps.times):.0f} s in all, everything is in {where / RUN}")
    gain = results[1].accuracy - results[0].accuracy
    if gain < LEAST_GAIN:
        raise Failed(f"the trained model is only {gain:.1%} better; expected {LEAST_GAIN:.0%} or more")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a tiny model on pictures and see it answer better.")
    parser.add_argument("--where", type=Path, default=REPOSITORY, help=f"directory to make {RUN}/ in")
    arguments = parser.parse_args()
    try:
        run(arguments.where.resolve())
    except Failed as error:
        print(f"\nquickstart failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
