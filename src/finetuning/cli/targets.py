"""`finetuning targets`: the names that `target_modules` may hold, with their sizes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from finetuning.cli.errors import run
from finetuning.errors import ConfigError

if TYPE_CHECKING:
    from finetuning.config.sections.experiment import Experiment
    from finetuning.config.yaml.document import Document
    from finetuning.model.module_summary import Inventory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    return run(_show, argv)


def _show(argv: Sequence[str]) -> int:
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document

    parser = argparse.ArgumentParser(
        prog="finetuning targets",
        description="List a model's modules by the last part of their names, with counts, shapes and sizes, and what"
        " peft_conf trains in each. No weight is loaded.",
    )
    parser.add_argument("config", help="path of the experiment's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the file's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_intermixed_args(argv)
    experiment = read_experiment(apply_overrides(read_document(options.config), options.overrides))

    from finetuning.algorithms import METHODS
    from finetuning.cli.status import quiet_libraries
    from finetuning.model.heads import LANGUAGE, SCORE
    from finetuning.model.module_summary import take_inventory

    quiet_libraries()
    head = SCORE if METHODS[experiment.method_name].gives_scores else LANGUAGE
    inventory = take_inventory(experiment.run_conf, experiment.peft_conf, head=head)
    if options.json:
        print(json.dumps(asdict(inventory), indent=2))
    else:
        for line in lines_of(inventory):
            print(line)
    return 0


def read_experiment(document: Document) -> Experiment:
    """The experiment of the method that the file names, or of the first one whose YAML it is.

    Raises:
        ConfigError: it is no method's YAML; with what is wrong with it as its own method's, or as one of sft.
    """
    from finetuning.config.sections.experiment import EXPERIMENTS
    from finetuning.config.validation.validate import validate

    named = document.values.get("method")
    classes = [EXPERIMENTS[named]] if named in EXPERIMENTS else list(EXPERIMENTS.values())
    first: ConfigError | None = None
    for experiment in classes:
        try:
            return validate(document, experiment).experiment
        except ConfigError as error:
            first = first or error
    raise first or ConfigError("there is no method")


def lines_of(inventory: Inventory) -> list[str]:
    """The inventory as a table for people."""
    header = ("module", "class", "count", "shape", "parameters", "size", "all-linear", "trained by peft_conf")
    rows = [header]
    for group in inventory.groups:
        shapes = " ".join("x".join(map(str, shape)) for shape in group.shapes[:3])
        trained = f"{group.trained:,}" if group.trained else "-"
        if group.trained and group.adapted < group.count:
            trained += f" in {group.adapted} of {group.count}"
        rows.append(
            (
                group.name,
                group.kind,
                str(group.count),
                shapes + (" …" if len(group.shapes) > 3 else ""),
                f"{group.parameters:,}" if group.parameters else "tied",
                "-" if group.bytes is None else _human(group.bytes),
                "yes" if group.all_linear else "-",
                trained,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    told = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = f"{inventory.model}: {inventory.architecture}, {inventory.parameters:,} parameters"
    if inventory.trained is not None:
        share = 100 * inventory.trained / max(inventory.parameters, 1)
        total += f"; peft_conf trains {inventory.trained:,} ({share:.3g} %)"
    return [total, "", *told]


def _human(count: int) -> str:
    from finetuning.plan.plan import human_bytes

    return human_bytes(count)
