"""Packs train on what their rows would train on alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetuning.config.validation.validate import validate
from finetuning.config.yaml.reader import read_document
from finetuning.data.collators import FlatteningCollator
from finetuning.errors import ConfigError
from finetuning.model.varlen_attention import enable_varlen

PACKED = {"sft_args.packing": True, "sft_args.max_seq_length": 128}
GOLDEN = [6.21706, 5.69835, 5.09148]
EAGER = {"run_conf.model_args.attn_implementation": "eager"}


def row_losses(model: Any, rows: list[dict[str, Any]]) -> list[float]:
    """The summed loss of each row by itself, whichever way the rows lie."""
    batch = FlatteningCollator()(rows)
    targets = batch.pop("shift_labels")[0]
    batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    borders = batch["cu_seq_lens_q"].tolist()
    return [float(losses[a:b].sum()) for a, b in pairwise(borders)]


def unpacked(pack: dict[str, Any]) -> list[dict[str, Any]]:
    rows, start = [], 0
    for length in pack["lengths"]:
        rows.append({name: pack[name][start : start + length] for name in ("input_ids", "labels")})
        start += length
    return rows


def test_a_row_in_a_pack_has_the_loss_of_the_row_alone(sft_values: Any, train: Any, chatml_llama_dir: Any) -> None:
    trainer = train(sft_values(PACKED)).trainer
    model = AutoModelForCausalLM.from_pretrained(chatml_llama_dir, dtype=torch.float32).eval()
    alone = AutoModelForCausalLM.from_pretrained(chatml_llama_dir, dtype=torch.float32).eval()
    assert enable_varlen(model) is None
    rows = 0
    for pack in trainer.train_dataset:
        parts = unpacked(pack)
        rows += len(parts)
        for part, together in zip(parts, row_losses(model, [pack]), strict=True):
            ids, labels = torch.tensor([part["input_ids"]]), torch.tensor([part["labels"]])
            with torch.no_grad():
                loss = float(alone(input_ids=ids, labels=labels).loss) * int((labels[0, 1:] != -100).sum())
            assert together == pytest.approx(loss, abs=1e-5, rel=1e-5)
    assert rows == 24
    assert 1 < len(trainer.train_dataset) < 24


def test_an_epoch_of_packs_has_the_loss_of_an_epoch_of_rows(sft_values: Any, train: Any, tmp_path: Path) -> None:
    whole = {"training_args.learning_rate": 1e-8, "training_args.max_steps": 1, "sft_args.max_seq_length": 128}
    batch = {"batchsize_conf.max_per_device_train_batch_size": 24, "batchsize_conf.total_train_batch_size": 24}
    apart = train(sft_values(whole | batch | {"training_args.output_dir": str(tmp_path / "apart")}))
    packs = len(train(sft_values(PACKED | {"training_args.output_dir": str(tmp_path / "count")})).trainer.train_dataset)
    batch = dict.fromkeys(batch, packs)
    packed = train(sft_values(whole | PACKED | batch | {"training_args.output_dir": str(tmp_path / "packed")}))
    assert packed.trainer.tokens_seen == apart.trainer.tokens_seen
    assert packed.losses == pytest.approx(apart.losses, rel=1e-5)


def test_packed_losses_stay_what_they_were(sft_values: Any, train: Any) -> None:
    losses = train(sft_values(PACKED)).losses
    assert losses == pytest.approx(GOLDEN, rel=1e-5)


def test_packs_grouped_by_length_train_too(sft_values: Any, train: Any, tmp_path: Path) -> None:
    grouped = {"training_args.train_sampling_strategy": "group_by_length"}
    assert len(train(sft_values(grouped | {"training_args.output_dir": str(tmp_path / "a")})).losses) == 3
    assert len(train(sft_values(grouped | PACKED)).losses) == 3


def test_rows_of_a_step_are_shared_out_by_their_tokens(sft_values: Any, train: Any, tmp_path: Path) -> None:
    def uneven(strategy: str) -> int:
        """How many tokens the parts of the steps differ by, and that no row is left out."""
        out = {"training_args.output_dir": str(tmp_path / strategy)}
        batch = {"batchsize_conf.max_per_device_train_batch_size": 4, "batchsize_conf.total_train_batch_size": 8}
        sampled = {"training_args.train_sampling_strategy": strategy, "training_args.max_steps": 1}
        parts = list(train(sft_values(batch | sampled | out)).trainer.get_train_dataloader())
        assert sum(len(part["cu_seq_lens_q"]) - 1 for part in parts) == 24
        sizes = [part["input_ids"].numel() for part in parts]
        return sum(abs(a - b) for a, b in zip(sizes[::2], sizes[1::2], strict=True))

    assert uneven("batch_rebalance") < uneven("random")


def test_a_run_whose_rows_are_shared_out_is_resumed_exactly(sft_values: Any, train: Any) -> None:
    changes = {
        "batchsize_conf.max_per_device_train_batch_size": 2,
        "batchsize_conf.total_train_batch_size": 4,
        "training_args.train_sampling_strategy": "batch_rebalance",
        "training_args.max_steps": 10,
        "training_args.save_strategy": "steps",
        "training_args.save_steps": 8,
    }
    whole = train(sft_values(changes))
    again = {"run_conf.resume_from_checkpoint": str(whole.output_dir / "checkpoint-8")}
    resumed = train(sft_values(changes | again | {"run_conf.final_checkpoint_name": "again"}))
    assert resumed.losses == whole.losses


def test_validation_rows_stay_apart(sft_values: Any, train: Any) -> None:
    split = {"data_conf.validation_data": {"type": "AUTO_SPLIT", "ratio": 0.25}, "training_args.eval_strategy": "steps"}
    trainer = train(sft_values(PACKED | split)).trainer
    assert trainer.eval_dataset.column_names == ["input_ids", "labels"]
    assert len(trainer.eval_dataset) == 6
    assert sum(len(pack["lengths"]) for pack in trainer.train_dataset) == 18


def test_packing_is_refused_where_rows_are_not_shown_to_be_kept_apart(sft_values: Any, train: Any) -> None:
    with pytest.raises(ConfigError, match=r"sft_args.packing: rows cannot be packed: attention eager has no efficient"):
        train(sft_values(PACKED | EAGER))


def test_packed_and_padded_contradict_each_other(sft_values: Any, write_config: Any) -> None:
    from finetuning.config.sections.experiment import SFTExperiment

    path = write_config(sft_values(PACKED | {"sft_args.batching": "padded"}))
    with pytest.raises(ConfigError, match=r"is true, but sft_args\.batching is padded"):
        validate(read_document(path), SFTExperiment)
