"""Compare the logits of rows alone with those in a padded batch.

Some classes count positions from the start of the padding, or mask only some of their layers. Plain transformers
computes the same, so a run says it and goes on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import torch

from finetuning.model.peft.adapters import base_model_of
from finetuning.model.varlen_attention import evaluation_mode, logit_tolerance, logits_of, probe_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from finetuning.model.tokenizer import LoadedTokenizer

logger = logging.getLogger(__name__)


def warn_of_padding(model: PreTrainedModel | PeftModel, tokenizer: LoadedTokenizer) -> None:
    """Log a warning if the logits of this model depend on the padding of a batch."""
    side, pad_id = tokenizer.tokenizer.padding_side, tokenizer.pad_input_id
    if pad_id is None:
        pad_id = cast("int", tokenizer.tokenizer.pad_token_id)
    error = describe_padding_error(model, side, pad_id)
    if error is None:
        return
    advice = "max_per_device_train_batch_size: 1 trains without padding"
    if side == "left" and describe_padding_error(model, "right", pad_id) is None:
        advice = "set data_conf.padding_side: right, which leaves them as they are"
    logger.warning("%s, in plain transformers as well; %s", error, advice)


@torch.no_grad()
def describe_padding_error(model: PreTrainedModel | PeftModel, side: str, pad_token_id: int) -> str | None:
    """Return how padding changes the logits of the rows of a batch; None if they are those of the rows alone.

    Args:
        side: `left` or `right`, where rows are padded.
    """
    base = base_model_of(model)
    rows = probe_rows(base, (5, 9, 1))
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_token_id, device=rows[0].device)
    mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        input_ids[index, span], mask[index, span] = row, 1
    with evaluation_mode(base):
        alone = torch.cat([logits_of(base, row[None])[0] for row in rows])
        padded = logits_of(base, input_ids, attention_mask=mask)[mask.bool()]
    difference, tolerance = float((alone - padded).abs().max()), logit_tolerance(model, alone, None)
    if difference <= tolerance:
        return None
    return f"padding on the {side} changes the logits by {difference:.1e} (tolerance {tolerance:.1e})"
