"""Batches: what is padded is neither seen nor trained, and the first token of a row is no target."""

from __future__ import annotations

import pytest
import torch

from finetuning.data.collators import UNTRAINED, FlatteningCollator, PaddingCollator

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
    {"input_ids": [8, 9, 10, 11, 12], "labels": [-100, -100, 10, 11, 12]},
]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_masked_and_never_a_target(side: str) -> None:
    batch = PaddingCollator(pad_token_id=7, side=side)(ROWS)
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    location = slice(0, 3) if side == "right" else slice(2, 5)
    assert batch["input_ids"][0, location].tolist() == [5, 6, 7]
    assert batch["labels"][0, location].tolist() == [UNTRAINED, 6, 7]
    assert (batch["labels"][batch["attention_mask"] == 0] == UNTRAINED).all()
    targets = batch["shift_labels"]
    assert [row[row != UNTRAINED].tolist() for row in targets] == [[6, 7], [10, 11, 12]]
    # Each target is at the position of the token before it.
    for row, target in zip(batch["input_ids"], targets, strict=True):
        for at in (target != UNTRAINED).nonzero().flatten().tolist():
            assert row[at + 1] == target[at]


def test_a_token_that_pads_is_trained_where_it_is_real() -> None:
    batch = PaddingCollator(pad_token_id=12)(ROWS)
    assert batch["shift_labels"][1].tolist() == [UNTRAINED, 10, 11, 12, UNTRAINED]


def test_what_the_model_is_shown_at_padding_is_chosen(tiny_tokenizer: object) -> None:
    tiny_tokenizer.pad_token = "<unk>"
    displayed = PaddingCollator.for_tokenizer(tiny_tokenizer, tiny_tokenizer.eos_token_id)(ROWS)["input_ids"]
    assert displayed[0, 3:].tolist() == [tiny_tokenizer.eos_token_id] * 2


def test_rows_end_to_end_have_borders_positions_and_the_same_targets() -> None:
    flattened, padded = FlatteningCollator()(ROWS), PaddingCollator(0)(ROWS)
    assert flattened["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert flattened["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert flattened["cu_seq_lens_q"].tolist() == flattened["cu_seq_lens_k"].tolist() == [0, 3, 8]
    assert (flattened["max_length_q"], flattened["max_length_k"]) == (5, 5)
    assert flattened["cu_seq_lens_q"].dtype == torch.int32
    for name in ("labels", "shift_labels"):
        kept = [batch[name][batch[name] != UNTRAINED].tolist() for batch in (flattened, padded)]
        assert kept[0] == kept[1]


def test_a_packed_row_keeps_the_borders_inside_it() -> None:
    packed = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "lengths": [3, 1]}
    flattened = FlatteningCollator()([packed, ROWS[0]])
    assert flattened["cu_seq_lens_q"].tolist() == [0, 3, 4, 7]
    assert flattened["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2]]
    assert flattened["shift_labels"].tolist() == [[6, 7, -100, -100, 6, 7, -100]]
