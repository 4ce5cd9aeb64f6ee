"""What ORPO and CPO share: trainers of TRL's experimental part that take preferences and no reference model.

Odds ratio preference optimisation: the chosen answer learnt and preferred at once, without a reference.

Contrastive preference optimisation, SimPO and AlphaPO: preferences without a reference."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import Algorithm, TrainingParts, reraise_as_config_error, trainer_kwargs
from finetuning.config.sections.experiment import CPOExperiment, ORPOExperiment

if TYPE_CHECKING:
    import datasets
    import transformers

    from finetuning.data.prepared import PreparedData

logger = logging.getLogger("finetuning")


def prepare(
    experiment: ORPOExperiment | CPOExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """Token ids of prompts, chosen and rejected answers."""
    from finetuning.data.pipeline import prepare_dpo

    logger.warning(
        "%s is experimental: its trainer is one that TRL may change or drop in any release", experiment.method_name
    )
    # The warning above stands for TRL's own, which names no method and no file.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return prepare_dpo(
        experiment.data_conf, experiment.training_args.max_length, tokenizer, workers, stop_tokens=stop_tokens
    )


@dataclass(frozen=True)
class PairCollator:
    """Pads pairs as the experimental trainers take them.

    Returns `{chosen,rejected}_{input_ids,attention_mask,labels}`, int64, of shape (rows, longest of that kind); labels
    are -100 on prompts and padding.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
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


def make_algorithm(experiment: type[ORPOExperiment | CPOExperiment], title: str, trainer: str) -> Algorithm:
    """The algorithm that trains by `trainer`, given as `module:class` of TRL's experimental part."""
    module, _, name = trainer.partition(":")

    def build_trainer(parts: TrainingParts) -> transformers.Trainer:
        found = getattr(importlib.import_module(module), name)
        return build_pair_trainer(experiment.method_name.upper(), parts, found)

    return Algorithm(
        name=experiment.method_name,
        title=title,
        experiment=experiment,
        arguments=experiment.trainer_config,
        prepare=prepare,
        build_trainer=build_trainer,
        is_experimental=True,
    )


def build_pair_trainer(name: str, parts: TrainingParts, trainer_class: type) -> transformers.Trainer:
    """An experimental trainer on rows that are tokenised already.

    Raises:
        ConfigError: TRL refuses the combination of model and options.
    """
    from finetuning.trainer.mixin import TrainerMixin

    class PairTrainer(TrainerMixin, trainer_class):
        """The trainer with the mixin and ready rows."""

        # Evaluation asks whether the collator makes batches such as the trainer's own, which it does.
        use_dpo_data_collator = property(lambda self: True, lambda self, value: None)

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids"]

        def _count_tokens(self, inputs: Any) -> Any:
            return inputs["chosen_attention_mask"].sum() + inputs["rejected_attention_mask"].sum()

    given = trainer_kwargs(parts)
    given |= {
        key: as_tokenized_dataset(given[key]) for key in ("train_dataset", "eval_dataset") if given[key] is not None
    }
    with reraise_as_config_error(name):
        return PairTrainer(data_collator=PairCollator(parts.tokenizer.tokenizer.pad_token_id), **given)


def as_tokenized_dataset(dataset: datasets.Dataset) -> datasets.Dataset:
    """The rows as a dataset that its trainer cannot tokenise again: it maps to itself."""
    import datasets

    class ReadyRows(datasets.Dataset):
        """Rows that need no preparation."""

        def map(self, *args: Any, **kwargs: Any) -> datasets.Dataset:
            return self

    return ReadyRows(dataset.data, info=dataset.info)


ORPO = make_algorithm(
    ORPOExperiment, "odds ratio preference optimisation (experimental)", "trl.experimental.orpo:ORPOTrainer"
)


CPO = make_algorithm(
    CPOExperiment,
    "contrastive preference optimisation, SimPO among it (experimental)",
    "trl.experimental.cpo:CPOTrainer",
)
