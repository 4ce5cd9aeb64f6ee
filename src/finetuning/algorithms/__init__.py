"""The table of algorithms. A new algorithm is one file in this package, one line here and its config section."""

from __future__ import annotations

from finetuning.algorithms import dpo, grpo, kto, orpo_cpo, reward, sft
from finetuning.algorithms.algorithm import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    "sft": sft.ALGORITHM,
    "dpo": dpo.ALGORITHM,
    "kto": kto.ALGORITHM,
    "reward": reward.ALGORITHM,
    "grpo": grpo.ALGORITHM,
    "orpo": orpo_cpo.ORPO,
    "cpo": orpo_cpo.CPO,
}
