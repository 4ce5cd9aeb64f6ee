"""EVA: a LoRA that begins in the directions in which the rows' activations vary most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from finetuning.data.collators import UNTRAINED
from finetuning.errors import ModelError, Place

_INIT = "eva"
_MOST_PASSES = 20


def begin_from_rows(model: Any, rows: Iterable[dict[str, Any]], collate: Any, rows_at_once: int) -> None:
    """Sets the A matrices of a LoRA that asks for it; nothing for other models.

    Rows are read in their order until the directions stay what they are (`eva_config.tau`), so that a run that goes on
    begins from the same ranks. B stays zero: the model is the base until the first step. Source: arXiv 2410.07170.

    Raises:
        ModelError: the rows are too few to tell, or the directions never settle.
    """
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "init_lora_weights", None) != _INIT:
        return
    from peft import initialize_lora_eva_weights

    device = next(model.parameters()).device
    was_training = model.training
    ranks = (config.r, *config.rank_pattern.values())

    def placed(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: value.to(device) if hasattr(value, "to") else value for name, value in collate(batch).items()}

    try:
        initialize_lora_eva_weights(
            model.eval(),
            _Batches(rows, placed, rows_at_once, math.ceil(max(ranks) * config.eva_config.rho)),
            forward_fn=_forward,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    except (ValueError, RuntimeError) as error:
        text = f"EVA finds no beginning in these rows: {str(error).partition(chr(10))[0]}"
        raise ModelError(text, place=Place(key="peft_conf.peft_kwargs.init_lora_weights")) from error
    finally:
        model.train(was_training)


class _Batches:
    """Batches with enough trained tokens to tell so many directions, over a limited number of passes: PEFT would go on
    for ever where a batch is too small, or the directions do not settle."""

    def __init__(self, rows: Iterable[dict[str, Any]], collate: Callable[..., Any], at_once: int, directions: int):
        self._rows, self._collate, self._at_once, self._directions = rows, collate, at_once, directions

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(_MOST_PASSES):
            found = 0
            for batch in self._one_pass():
                found += 1
                yield batch
            if not found:
                raise ValueError(f"they have fewer than {self._directions} trained tokens, as many as directions")
        raise ValueError(f"in {_MOST_PASSES} passes the {self._directions} directions did not settle; lower r or rho")

    def _one_pass(self) -> Iterator[dict[str, Any]]:
        waiting: list[dict[str, Any]] = []
        tokens = 0
        for row in self._rows:
            waiting.append(row)
            # The first token of a row is no target.
            tokens += sum(label != UNTRAINED for label in row["labels"][1:])
            if len(waiting) >= self._at_once and tokens >= self._directions:
                yield self._collate(waiting)
                waiting, tokens = [], 0


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**{name: value for name, value in inputs.items() if "labels" not in name}, use_cache=False)
