"""How often Python looks for garbage while a program starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_MANY = 1_000_000
"""Objects by which a process has grown when Python looks for garbage among them; by default some hundred."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Garbage is looked for seldom in the block, and never again among what is alive when the block was gone through.

    Imports leave some hundred thousand objects that live as long as the process. Python goes through all of them
    several times while they become more, and the Trainer has it do so once more before the first step: together
    a fifth of the time until then. Rows and weights are no such objects; a model that is to go again is not loaded in
    the block, as what is alive at its end and has a cycle is never freed.
    """
    before = gc.get_threshold()
    gc.set_threshold(_MANY, *before[1:])
    try:
        yield
        gc.freeze()
    finally:
        gc.set_threshold(*before)
