"""The algorithms: one file each, and one line here."""

from __future__ import annotations

from finetuning.algorithms import dpo, grpo, kto, orpo_cpo, reward, sft
from finetuning.algorithms.algorithm import Algorithm

METHODS: dict[str, Algorithm] = {
    "sft": sft.METHOD,
    "dpo": dpo.METHOD,
    "kto": kto.METHOD,
    "reward": reward.METHOD,
    "grpo": grpo.METHOD,
    "orpo": orpo_cpo.ORPO,
    "cpo": orpo_cpo.CPO,
}
