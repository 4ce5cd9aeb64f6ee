"""What a check has found wrong, before it is known where in the file that stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finetuning.config.yaml.document import Document, KeyPath
from finetuning.errors import Problem

Kind = Literal["unknown key", "missing", "type", "value", "warning"]

MOST_FINDINGS = 50


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong at a path of the document, and what to do about it."""

    path: KeyPath
    message: str
    hint: str | None = None
    kind: Kind = "value"
    meant: str | None = None
    """For an unknown key: the key of the same section that was probably meant."""


def to_problems(findings: Sequence[Finding], document: Document) -> list[Problem]:
    """The findings as problems with their places, in the file's order, each once; a count stands for very many."""
    problems = {}
    for finding in findings:
        message = finding.message
        if finding.hint and message[-1] not in ".;:":
            message += "."
        problem = Problem(message, document.place_of(finding.path), finding.hint)
        problems.setdefault(str(problem), problem)
    ordered = sorted(problems.values(), key=lambda problem: (problem.place.line or 0, problem.place.column or 0))
    if len(ordered) <= MOST_FINDINGS:
        return ordered
    rest = len(ordered) - MOST_FINDINGS
    return [*ordered[:MOST_FINDINGS], Problem(f"and {rest} more problems", document.place_of(()))]
