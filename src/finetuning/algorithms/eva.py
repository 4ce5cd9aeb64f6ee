"""EVA: a LoRA that begins in the directions in which the rows' activations vary most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from finetuning.errors import ModelError, Place

if TYPE_CHECKING:
    import datasets

_INIT = "eva"


def begin_from_rows(model: Any, rows: datasets.Dataset, collate: Any, rows_at_once: int) -> None:
    """Sets the A matrices of a LoRA that asks for it; nothing for other models.

    Rows are read in their order until the directions stay what they are (`eva_config.tau`), so that a run that goes on
    begins from the same ranks. B stays zero: the model is the base until the first step. Source: arXiv 2410.07170.

    Raises:
        ModelError: the rows are too few to tell.
    """
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "init_lora_weights", None) != _INIT:
        return
    from peft import initialize_lora_eva_weights

    device = next(model.parameters()).device
    was_training = model.training

    def placed(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: value.to(device) if hasattr(value, "to") else value for name, value in collate(batch).items()}

    try:
        initialize_lora_eva_weights(
            model.eval(),
            torch.utils.data.DataLoader(rows, batch_size=rows_at_once, collate_fn=placed, drop_last=True),
            forward_fn=_forward,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    except (ValueError, RuntimeError) as error:
        text = f"EVA finds no beginning in {len(rows):,} rows: {str(error).partition(chr(10))[0]}"
        raise ModelError(text, place=Place(key="peft_conf.peft_kwargs.init_lora_weights")) from error
    finally:
        model.train(was_training)


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**{name: value for name, value in inputs.items() if "labels" not in name}, use_cache=False)
