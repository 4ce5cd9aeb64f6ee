"""The algorithms: one file each, and one line here."""

from __future__ import annotations

from finetuning.algorithms import dpo, sft
from finetuning.algorithms.method import Method

METHODS: dict[str, Method] = {
    "sft": sft.METHOD,
    "dpo": dpo.METHOD,
}
