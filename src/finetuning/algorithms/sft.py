"""Supervised fine-tuning: the next token of the rows' trained text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import Algorithm, TrainingParts
from finetuning.config.sections.experiment import SFTExperiment

if TYPE_CHECKING:
    import torch
    import transformers

    from finetuning.data.prepared import PreparedData


def prepare(
    experiment: SFTExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """Token ids and labels of the training and validation rows."""
    from finetuning.data.pipeline import prepare_sft

    args = experiment.training_args
    seed = (args.model_extra or {}).get("data_seed") or args.seed
    return prepare_sft(
        experiment.data_conf, experiment.sft_args, tokenizer, workers, stop_tokens=stop_tokens, seed=seed
    )


def build_trainer(parts: TrainingParts) -> transformers.Trainer:
    """A Trainer whose rows come with their labels.

    It is transformers' own and not TRL's `SFTTrainer`: the rows are ready, so that TRL would add nothing, and it
    refuses adapters on `lm_head`, replaces the model's forward, takes no collator beside its own for rows without
    padding, and measures entropy and accuracy over all logits at every step.
    """
    from finetuning.data.collators import FlatteningCollator, PaddingCollator
    from finetuning.trainer.hooks import as_dataset
    from finetuning.trainer.peft_methods import init_eva

    tokenizer = parts.tokenizer
    collate = (
        PaddingCollator.for_tokenizer(tokenizer.tokenizer, tokenizer.pad_input_id)
        if parts.layout.padded
        else FlatteningCollator()
    )
    init_eva(parts.model, parts.data.train, collate, parts.arguments.per_device_train_batch_size)
    trainer = _trainer_class(parts)(
        model=parts.model,
        args=parts.arguments,
        train_dataset=as_dataset(parts.data.train, parts.experiment.sft_args.max_seq_length),
        eval_dataset=parts.data.validation,
        processing_class=tokenizer.tokenizer,
        data_collator=collate,
        callbacks=list(parts.callbacks),
    )
    if trainer.selects_logits:
        # The Trainer asks the model's signature whether the loss takes a token count; this loss does.
        trainer.model_accepts_loss_kwargs = True
    return trainer


def _trainer_class(parts: TrainingParts) -> type:
    import transformers

    from finetuning.trainer.chunked_cross_entropy import ChunkedCrossEntropyMixin
    from finetuning.trainer.ddp import BatchRebalanceSampler, TokenBalancedSampler
    from finetuning.trainer.mixin import TrainerMixin

    offloads = _offloading(parts)
    at_once = parts.experiment.sft_args.logits_at_once

    class SFTTrainer(TrainerMixin, transformers.Trainer):
        """Computes logits only where there is a label, and the validation loss as a mean over tokens."""

        selects_logits = divides_batches = computes_alone = _selects_logits(parts)
        collated_columns = ("lengths",)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._slices = ChunkedCrossEntropyMixin(self.model, at_once, _forbids_slices(self))

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            sampler = super()._get_train_sampler(*args, **kwargs)
            if isinstance(sampler, BatchRebalanceSampler) and not parts.layout.padded:
                seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
                return TokenBalancedSampler.in_place_of(sampler, seed)
            return sampler

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            with offloads() if offloads else nullcontext():
                return super().training_step(*args, **kwargs)

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            inputs = dict(inputs)
            targets = inputs.pop("shift_labels")
            wanted = targets.ne(-100)
            if not self.selects_logits:
                if not model.training:
                    # The mean over this batch, whatever the other processes have.
                    num_items_in_batch = None
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                self._note_evaluation((loss[0] if return_outputs else loss) * wanted.sum(), wanted.sum())
                return loss
            inputs.pop("labels")
            inputs |= {"logits_to_keep": wanted, "use_cache": False}
            outputs, total = self._slices.total(model, inputs, targets[wanted]) or _total(
                model, inputs, targets[wanted]
            )
            if num_items_in_batch is None:
                loss = total / wanted.sum().clamp(min=1)
            else:
                # Gradients are averaged over processes; the token count is already that of all of them.
                loss = total / num_items_in_batch * self._gradient_processes()
            self._note_evaluation(total, wanted.sum())
            return (loss, outputs) if return_outputs else loss

    return SFTTrainer


def _total(model: Any, inputs: dict[str, Any], targets: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The model's outputs and the loss summed over the labels, from all their logits at once."""
    from torch.nn.functional import cross_entropy

    outputs = model(**inputs)
    logits = outputs.logits.reshape(-1, outputs.logits.shape[-1])
    return outputs, cross_entropy(logits.float(), targets, reduction="sum")


def _forbids_slices(trainer: transformers.Trainer) -> str | None:
    """Why a run computes its loss from all logits at once, as far as it can be told before the first batch."""
    if not trainer.selects_logits:
        return "the loss is the model's own"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "under sharding the processes would gather the head as often as each has slices"
    if trainer.args.torch_compile:
        return "a compiled model does not stop at its head"
    return None


def _offloading(parts: TrainingParts) -> Callable[[], AbstractContextManager[Any]] | None:
    """What keeps activations in main memory during a step; None when they stay where they are."""
    if not getattr(getattr(parts.experiment, "training_args", None), "activation_offloading", False):
        return None
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    context = get_act_offloading_ctx_manager(model=parts.model)
    return lambda: context


def _liger_computes_the_loss(parts: TrainingParts) -> bool:
    """Whether Liger replaces the model's forward by one that takes labels and makes no logits, its default."""
    wanted = parts.arguments.use_liger_kernel
    return wanted and (parts.arguments.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)


def _selects_logits(parts: TrainingParts) -> bool:
    """Whether the model computes logits only at the positions that it is told.

    Not under prompt learning, whose virtual tokens shift the positions, nor where the model's own loss holds more
    than the cross-entropy (label smoothing, a mixture of experts' balance).
    """
    model = parts.model
    active = getattr(model, "peft_config", {}).values()
    base = model.get_base_model() if active else model
    return (
        # A mask of positions is understood by what slices so; other code, a model's own above all, may not.
        hasattr(inspect.getmodule(type(base)), "slice_logits_to_keep")
        and "logits_to_keep" in inspect.signature(base.forward).parameters
        and not any(config.is_prompt_learning or config.peft_type.value == "CPT" for config in active)
        and not getattr(base.config.get_text_config(), "output_router_logits", False)
        and not parts.arguments.label_smoothing_factor
        and not _liger_computes_the_loss(parts)
    )


METHOD = Algorithm(
    name="sft",
    title="supervised fine-tuning",
    experiment=SFTExperiment,
    arguments="transformers.training_args:TrainingArguments",
    prepare=prepare,
    build_trainer=build_trainer,
    lays_end_to_end=True,
)
