"""Errors that name a key of a config, told by where the user gave it: a line of the file, an override, a flag."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from finetuning.config.yaml.document import Document, dotted
from finetuning.errors import FinetuningError, Problem


@contextmanager
def located(document: Document) -> Iterator[None]:
    """Errors of the block that name a key of the config say its line, too, or what stands for the key."""
    try:
        yield
    except FinetuningError as error:
        error.problems = tuple(_located(problem, document) for problem in error.problems)
        raise


def _located(problem: Problem, document: Document) -> Problem:
    """The problem with the place that its key was given at; as it is, when it says its file itself."""
    if problem.place.key is None or problem.place.file is not None:
        return replace(problem, hint=_said(problem.hint, document))
    parts = problem.place.key.replace("[", ".").replace("]", "").split(".")
    path = tuple(int(part) if part.isdecimal() else part for part in parts)
    return replace(problem, place=document.place_of(path), hint=_said(problem.hint, document))


def _said(hint: str | None, document: Document) -> str | None:
    """The hint with the flag in place of each key that a flag stands for."""
    for path, mark in document.marks.items():
        if hint and mark.stands_for is not None and len(path) > 1:
            hint = re.sub(rf"(?<![\w.]){re.escape(dotted(path))}(?!\w|\.\w)", str(mark.stands_for), hint)
    return hint
