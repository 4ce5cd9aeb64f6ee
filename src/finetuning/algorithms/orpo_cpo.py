"""ORPO and CPO (with SimPO and AlphaPO): preferences without a reference model, by TRL's experimental trainers."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import Algorithm, TrainerInputs, reraise_as_config_error, trainer_kwargs
from finetuning.config.sections.experiment import CPOExperiment, ORPOExperiment

if TYPE_CHECKING:
    import datasets
    import torch
    import transformers

    from finetuning.data.prepared import PreparedData

logger = logging.getLogger("finetuning")


def prepare(
    experiment: ORPOExperiment | CPOExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """Return token ids of prompts, chosen and rejected answers."""
    from finetuning.data.pipeline import prepare_dpo

    logger.warning("%s is experimental: TRL may change or remove its trainer in any release", experiment.method_name)
    # TRL's own warning names neither the method nor a file.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return prepare_dpo(
        experiment.data_conf, experiment.training_args.max_length, tokenizer, workers, stop_tokens=stop_tokens
    )


@dataclass(frozen=True)
class PairCollator:
    """Pads preference pairs for the experimental trainers.

    Returns `{chosen,rejected}_{input_ids,attention_mask,labels}`, int64, of shape (rows, longest of that kind); labels
    are -100 on prompts and padding.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        from finetuning.data.collators import UNTRAINED, PaddingCollator

        pad = PaddingCollator(self.pad_token_id)
        batch = {}
        for kind in ("chosen", "rejected"):
            padded = pad(
                [
                    {
                        "input_ids": [*row["prompt_ids"], *row[f"{kind}_ids"]],
                        "labels": [*([UNTRAINED] * len(row["prompt_ids"])), *row[f"{kind}_ids"]],
                    }
                    for row in rows
                ]
            )
            batch |= {f"{kind}_{name}": padded[name] for name in ("input_ids", "attention_mask", "labels")}
        return batch


def build_trainer(inputs: TrainerInputs, trainer: str, *, includes_prompt: bool) -> transformers.Trainer:
    """Return an experimental trainer on tokenized rows.

    Args:
        trainer: its class, as `module:class`.
        includes_prompt: whether its loss on the chosen answers is on the prompts too.

    Raises:
        ConfigError: TRL rejects the combination of model and options.
    """
    from finetuning.trainer.deferred_metrics import CountingCollator, DeferredMetricsMixin
    from finetuning.trainer.mixin import TrainerMixin
    from finetuning.trainer.row_mean import ChosenTokenMeanMixin

    module, _, name = trainer.partition(":")
    trainer_class: Any = getattr(importlib.import_module(module), name)

    class PairTrainer(ChosenTokenMeanMixin, TrainerMixin, DeferredMetricsMixin, trainer_class):
        nll_includes_prompt = includes_prompt
        # TRL's evaluation checks that batches come from its own collator; those of `PairCollator` have the same form.
        use_dpo_data_collator = property(lambda self: True, lambda self, value: None)

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids"]

        def _count_tokens(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return inputs["chosen_attention_mask"].sum() + inputs["rejected_attention_mask"].sum()

    kwargs = trainer_kwargs(inputs)
    kwargs |= {
        key: as_tokenized_dataset(kwargs[key]) for key in ("train_dataset", "eval_dataset") if kwargs[key] is not None
    }
    pad_token_id: Any = inputs.tokenizer.tokenizer.pad_token_id
    with reraise_as_config_error(inputs.experiment.method_name.upper()):
        return inputs.extended(PairTrainer)(data_collator=CountingCollator(PairCollator(pad_token_id)), **kwargs)


def as_tokenized_dataset(dataset: datasets.Dataset) -> datasets.Dataset:
    """Return the rows as a dataset whose `map` does nothing, so that the trainer does not tokenize them again."""
    import datasets

    class TokenizedDataset(datasets.Dataset):
        def map(self, *args: object, **kwargs: object) -> datasets.Dataset:
            return self

    return TokenizedDataset(dataset.data, info=dataset.info)


ORPO = Algorithm(
    title="odds ratio preference optimization (experimental)",
    experiment=ORPOExperiment,
    prepare=prepare,
    build_trainer=lambda inputs: build_trainer(inputs, "trl.experimental.orpo:ORPOTrainer", includes_prompt=True),
    pads_right=True,
    is_experimental=True,
)
CPO = Algorithm(
    title="contrastive preference optimization, with SimPO among its losses (experimental)",
    experiment=CPOExperiment,
    prepare=prepare,
    build_trainer=lambda inputs: build_trainer(inputs, "trl.experimental.cpo:CPOTrainer", includes_prompt=False),
    pads_right=True,
    is_experimental=True,
)
