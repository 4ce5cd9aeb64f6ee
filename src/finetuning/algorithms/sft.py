"""Supervised fine-tuning: predict the next token of the text that each row trains on."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from finetuning.algorithms.algorithm import Algorithm, TrainerInputs, check_images, images_of
from finetuning.config.sections.experiment import SFTExperiment
from finetuning.data.collators import IMAGE_ROWS

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import nn
    from transformers.utils.generic import ModelOutput

    from finetuning.data.collators import Rows
    from finetuning.data.prepared import PreparedData
    from finetuning.data.preprocessor import Inspector
    from finetuning.trainer.chunked_cross_entropy import ChunkedCrossEntropy
    from finetuning.trainer.mixin import TrainerMixin

    class Trainer(TrainerMixin, transformers.Trainer):
        pass
else:
    Trainer = object

logger = logging.getLogger("finetuning")

CHUNKING_THRESHOLD = 1 << 28
"""Logits of a batch above which `auto` computes them in chunks: 1 GiB in float32."""
LOGITS_PER_CHUNK = 1 << 27
"""Logits that `auto` holds at a time: 512 MiB in float32."""


def prepare(
    experiment: SFTExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
    inspector: Inspector | None = None,
) -> PreparedData:
    """Return token ids and labels of the training and validation rows."""
    from finetuning.data.pipeline import prepare_sft

    args = experiment.training_args
    seed = (args.model_extra or {}).get("data_seed") or args.seed
    return prepare_sft(
        experiment.data_conf,
        experiment.sft_args,
        tokenizer,
        workers,
        stop_tokens=stop_tokens,
        seed=seed,
        inspector=inspector,
        images=images_of(
            experiment,
            tokenizer,
            {
                "data_conf.streaming: true": experiment.data_conf.streaming,
                "sft_args.packing: true": experiment.sft_args.packing,
                "sft_args.batching: padding-free": experiment.sft_args.batching == "padding-free",
            },
        ),
    )


class SelectedLogitsMixin(Trainer):
    """Compute logits only at positions with a label, and the validation loss as a mean over tokens."""

    collator_columns = ("lengths",)
    uses_logits_to_keep = False
    """Whether the model computes logits at the labels only."""
    uses_model_loss = True
    """Whether the loss is the one that the model computes, because it has other terms than the cross-entropy."""
    takes_use_cache = True
    is_padded = True
    max_labels_at_once: float = math.inf
    """Batches with more labels have their loss computed in chunks, where the run supports it."""
    labels_per_chunk = 0
    fuses_loss = False
    """Whether chunks compute their gradients together with the loss."""
    _chunked_loss: ChunkedCrossEntropy | None = None
    offload_activations: Callable[[], AbstractContextManager[object]] = nullcontext

    def _get_train_sampler(
        self, train_dataset: torch.utils.data.Dataset[object] | None = None
    ) -> torch.utils.data.Sampler[int] | None:
        from finetuning.trainer.data_loading import BatchRebalanceSampler, TokenBalancedSampler

        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, BatchRebalanceSampler) and not self.is_padded:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return TokenBalancedSampler.from_sampler(sampler, seed)
        return sampler

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        with self.offload_activations():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        inputs = dict(inputs)
        inputs.pop(IMAGE_ROWS, None)
        targets = inputs.pop("shift_labels").flatten()
        positions, num_labels = inputs.pop("label_positions"), inputs.pop("num_labels")
        if self.args.torch_compile:
            # A graph for each combination of lengths would be compiled.
            inputs.pop("row_lengths", None)
        if self.uses_model_loss:
            if not model.training:
                # The mean over this batch; the token counts of other processes do not matter.
                num_items_in_batch = None
            output = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = output[0] if isinstance(output, tuple) else output
            self._add_eval_loss(loss * num_labels, num_labels)
            return output
        inputs.pop("labels")
        if self.takes_use_cache:
            inputs["use_cache"] = False
        if self.uses_logits_to_keep:
            outputs, total = self._sum_loss(model, inputs, targets, positions)
        else:
            outputs, total = _sum_loss_at_once(model, inputs, targets)
        if num_items_in_batch is None:
            loss = total / max(num_labels, 1)
        else:
            # Gradients are averaged over processes, but the token count is the sum over all of them.
            loss = total / num_items_in_batch * self._num_averaging_processes()
        self._add_eval_loss(total, num_labels)
        return (loss, outputs) if return_outputs else loss

    def _sum_loss(
        self, model: nn.Module, inputs: dict[str, Any], targets: torch.Tensor, positions: torch.Tensor
    ) -> tuple[ModelOutput, torch.Tensor]:
        """Return the model's outputs and the loss summed over the labels, in chunks where there are many labels.

        Args:
            targets: shape (positions,); -100 where a position has no label.
            positions: shape (labels,), the positions that have one.
        """
        from torch.nn.functional import cross_entropy

        from finetuning.trainer.hooks import select_head_input

        labels = targets.index_select(0, positions)
        if len(labels) > self.max_labels_at_once:
            in_chunks = self.chunked_loss()(model, inputs, labels, positions)
            if in_chunks is not None:
                return in_chunks
        head: nn.Module | None = _base_of(self.model).get_output_embeddings()
        if head is None or self.args.torch_compile:
            # Compiled graphs bypass hooks.
            inputs["logits_to_keep"] = targets.ne(-100).view_as(inputs["input_ids"])
            return _sum_loss_at_once(model, inputs, labels)
        with select_head_input(head, positions) as calls:
            outputs = model(**inputs)
        logits = outputs.logits.reshape(-1, outputs.logits.shape[-1])
        if not calls:
            logits = logits.index_select(0, positions)
        return outputs, cross_entropy(logits.float(), labels, reduction="sum")

    def chunked_loss(self) -> ChunkedCrossEntropy:
        """Return the loss in chunks. Log a warning, the first time, where this run cannot compute it."""
        if self._chunked_loss is None:
            from finetuning.trainer.chunked_cross_entropy import ChunkedCrossEntropy

            self._chunked_loss = ChunkedCrossEntropy(
                self.model, self.labels_per_chunk, _why_not_chunked(self), fused=self.fuses_loss
            )
        return self._chunked_loss


def build_trainer(inputs: TrainerInputs) -> transformers.Trainer:
    """Return a transformers Trainer for rows that come with their labels.

    TRL's `SFTTrainer` is not used. The rows are already tokenized, so it would add nothing, and it rejects adapters on
    `lm_head`, replaces the model's forward, allows no other collator for padding-free batches, and computes entropy and
    accuracy over all logits at every step.
    """
    import transformers

    from finetuning.data.streaming.dataset import RowStream
    from finetuning.trainer.mixin import TrainerMixin

    has_plain_loss = _has_plain_loss(inputs)
    can_select = has_plain_loss and _supports_logits_to_keep(inputs.model)

    class SFTTrainer(SelectedLogitsMixin, TrainerMixin, transformers.Trainer):
        uses_logits_to_keep = can_select
        uses_model_loss = not has_plain_loss
        supports_batch_splitting = has_plain_loss
        loss_is_local = has_plain_loss
        collator_columns = ("images", "text") if inputs.data.has_images else ("lengths",)
        takes_use_cache = "use_cache" in inspect.signature(_base_of(inputs.model).forward).parameters
        is_padded = inputs.layout.padded

    tokenizer, sft_args = inputs.tokenizer, inputs.experiment.sft_args
    collator = _make_collator(inputs, with_constant_mask=has_plain_loss and inputs.layout.takes_constant_mask)
    rows: Any = inputs.data.train
    if getattr(getattr(inputs.model, "active_peft_config", None), "init_lora_weights", None) == "eva":
        from finetuning.trainer.peft_methods import init_eva

        init_eva(inputs.model, rows, collator, inputs.arguments.per_device_train_batch_size)
    if isinstance(rows, RowStream):
        from finetuning.trainer.data_loading import StreamedRows

        rows = StreamedRows(rows, sft_args.max_seq_length)
    trainer = inputs.extended(SFTTrainer)(
        model=inputs.model,
        args=inputs.arguments,
        train_dataset=rows,
        eval_dataset=inputs.data.validation,
        processing_class=tokenizer.tokenizer,
        data_collator=collator,
        callbacks=list(inputs.callbacks),
    )
    if inputs.data.has_images:
        check_images(trainer)
    vocab_size = inputs.model.config.get_text_config().vocab_size
    trainer.max_labels_at_once, trainer.labels_per_chunk = chunk_sizes(sft_args.logits_at_once, vocab_size)
    _fuse_loss(trainer, sft_args.logits_at_once)
    if isinstance(sft_args.logits_at_once, int):
        # The user asked for chunks: warn before training, not at the first large batch.
        trainer.chunked_loss()
    trainer.offload_activations = _activation_offloading(inputs)
    if has_plain_loss:
        # The Trainer inspects the model's signature for whether the loss takes a token count; this loss does.
        trainer.model_accepts_loss_kwargs = True
    return trainer


def _make_collator(inputs: TrainerInputs, *, with_constant_mask: bool) -> Callable[[Rows], Mapping[str, object]]:
    """Return what makes a batch of prepared rows."""
    from finetuning.data.collators import FlatteningCollator, PaddingCollator

    if not inputs.layout.padded:
        return FlatteningCollator(with_constant_mask=with_constant_mask)
    tokenizer = inputs.tokenizer
    padding = PaddingCollator.for_tokenizer(tokenizer.tokenizer, tokenizer.pad_input_id)
    if not inputs.data.has_images:
        return padding
    from finetuning.data.images.collator import image_collator

    run_conf, data_conf = inputs.experiment.run_conf, inputs.experiment.data_conf
    return image_collator(run_conf, data_conf.images, tokenizer.tokenizer, padding)


def _fuse_loss(trainer: SelectedLogitsMixin, logits_at_once: Literal["auto", "all"] | int) -> None:
    """Compute gradients together with the loss where that is faster: on GPUs, for batches of any size."""
    on_gpu = trainer.args.device.type == "cuda"
    # A sharded head is gathered once, for a loss that is computed in a single call.
    trainer.fuses_loss = on_gpu or trainer.is_fsdp_enabled
    if on_gpu and logits_at_once == "auto" and not _why_not_chunked(trainer):
        trainer.max_labels_at_once = -1


def chunk_sizes(logits_at_once: Literal["auto", "all"] | int, vocab_size: int) -> tuple[float, int]:
    """Return the number of labels above which the loss is computed in chunks, and the number of labels per chunk.

    Args:
        logits_at_once: `sft_args.logits_at_once`; a number counts labels.
    """
    if logits_at_once == "all":
        return math.inf, 0
    if isinstance(logits_at_once, int):
        return logits_at_once, logits_at_once
    return CHUNKING_THRESHOLD // vocab_size, max(LOGITS_PER_CHUNK // vocab_size, 1)


def _sum_loss_at_once(
    model: nn.Module, inputs: Mapping[str, Any], targets: torch.Tensor
) -> tuple[ModelOutput, torch.Tensor]:
    """Return the model's outputs and the loss summed over the labels, computed from all logits at once."""
    from torch.nn.functional import cross_entropy

    outputs = model(**inputs)
    logits = outputs.logits.reshape(-1, outputs.logits.shape[-1])
    return outputs, cross_entropy(logits.float(), targets, reduction="sum")


def _why_not_chunked(trainer: SelectedLogitsMixin) -> str | None:
    """Return why this run cannot compute its logits in chunks, as far as known before the first batch."""
    if trainer.uses_model_loss:
        return "the model computes its loss itself"
    if not trainer.uses_logits_to_keep:
        return "the model's class computes logits at all positions only"
    if _is_partitioned(trainer) or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
        # Each process would gather the head once per chunk, and processes may have different numbers of chunks.
        return "the model is sharded"
    if trainer.is_fsdp_enabled and trainer.max_labels_at_once > 0 and trainer.args.device.type != "cuda":
        return "the model is sharded, and only some processes may have so many labels"
    if trainer.args.torch_compile:
        return "the model is compiled, which bypasses hooks on its head"
    return None


def _is_partitioned(trainer: SelectedLogitsMixin) -> bool:
    """Return whether DeepSpeed partitions the weights: ZeRO-1 and 2 leave them whole on each process."""
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return plugin is not None and plugin.zero_stage == 3


def _activation_offloading(inputs: TrainerInputs) -> Callable[[], AbstractContextManager[object]]:
    """Return a context for training steps that keeps activations in main memory, if the config asks for it."""
    if not getattr(getattr(inputs.experiment, "training_args", None), "activation_offloading", False):
        return nullcontext
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    context = get_act_offloading_ctx_manager(model=inputs.model)
    return lambda: context


def _base_of(model: Any) -> transformers.PreTrainedModel:
    """Return the model under its adapter, if there is one."""
    return model.get_base_model() if getattr(model, "peft_config", None) else model


def _has_plain_loss(inputs: TrainerInputs) -> bool:
    """Return whether the loss is the cross-entropy of the next token, computed here from the model's logits.

    The loss that a class computes itself is not always that: TrOCR's and Whisper's decoders compare each logit with the
    token that it has seen, and ProphetNet predicts several tokens. It is used where it has other terms (label
    smoothing, the load balancing of a mixture of experts), and with virtual tokens, which shift positions.
    """
    from finetuning.model.peft.adapters import peft_type_of

    adapters = getattr(inputs.model, "peft_config", {}).values()
    return (
        not any(config.is_prompt_learning or peft_type_of(config) == "CPT" for config in adapters)
        and not getattr(_base_of(inputs.model).config.get_text_config(), "output_router_logits", False)
        and not inputs.arguments.label_smoothing_factor
        and not _has_fused_liger_loss(inputs)
    )


def _supports_logits_to_keep(model: Any) -> bool:
    """Return whether the model can compute logits only at positions with a label."""
    base = _base_of(model)
    # Models that import this helper accept a mask of positions; custom code may accept a count only.
    return (
        hasattr(inspect.getmodule(type(base)), "slice_logits_to_keep")
        and "logits_to_keep" in inspect.signature(base.forward).parameters
    )


def _has_fused_liger_loss(inputs: TrainerInputs) -> bool:
    """Return whether Liger replaces the model's forward by one that computes the loss without logits, its default."""
    config = inputs.arguments.liger_kernel_config or {}
    return inputs.arguments.use_liger_kernel and config.get("fused_linear_cross_entropy", True)


ALGORITHM = Algorithm(
    title="supervised fine-tuning",
    experiment=SFTExperiment,
    prepare=prepare,
    build_trainer=build_trainer,
    supports_padding_free=True,
)
