"""Group relative policy optimization: sample several completions per prompt, and learn from the better ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from finetuning.algorithms.algorithm import (
    Algorithm,
    TrainerInputs,
    check_images,
    images_of,
    load_reference_if_needed,
    reraise_as_config_error,
    trainer_kwargs,
)
from finetuning.config.sections.experiment import GRPOExperiment
from finetuning.errors import ConfigError, Location

if TYPE_CHECKING:
    import datasets
    import torch
    import transformers
    from torch import nn
    from torch.utils.data import Sampler
    from transformers import PreTrainedModel, TrainerState
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import RepeatSampler

    from finetuning.data.collators import Row
    from finetuning.data.images.processor import ImageTextProcessor
    from finetuning.data.prepared import PreparedData
    from finetuning.data.preprocessor import Inspector
    from finetuning.trainer.image_completions import ImageCompletionsMixin
    from finetuning.trainer.mixin import TrainerMixin
    from finetuning.trainer.reference import ReferenceMixin

    class GRPOBase(ReferenceMixin, GRPOTrainer):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
        """The trainer that the mixin below is typed against."""

        args: GRPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
        model: nn.Module  # pyright: ignore[reportIncompatibleVariableOverride]
        _token_count: torch.Tensor | int
        reward_funcs: list[Any]  # pyright: ignore[reportIncompatibleVariableOverride]

        def run_state(self) -> dict[str, Any]: ...
        def load_run_state(self, state: Mapping[str, Any]) -> None: ...
        def batch_split(self) -> list[int]: ...
else:
    GRPOBase = object

logger = logging.getLogger("finetuning")

Message = dict[str, object]


def prepare(
    experiment: GRPOExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
    inspector: Inspector | None = None,
) -> PreparedData:
    """Return token ids of the prompts, and the columns that reward functions use.

    Raises:
        ConfigError: a reward function does not exist. Checked before any row is read.
    """
    from finetuning.data.pipeline import prepare_prompts
    from finetuning.trainer.reward_functions import build_rewards, needed_columns, read_columns

    args = experiment.grpo_args
    build_rewards(args)
    return prepare_prompts(
        experiment.data_conf,
        args.max_prompt_length,
        needed_columns(args),
        tokenizer,
        workers,
        inspector=inspector,
        read_columns=read_columns(args),
        images=_images_of(experiment, tokenizer),
    )


def _images_of(experiment: GRPOExperiment, tokenizer: transformers.PreTrainedTokenizerBase) -> ImageTextProcessor | str:
    more = experiment.training_args.model_extra or {}
    keys = ("use_vllm", "use_transformers_continuous_batching")
    return images_of(experiment, tokenizer, {f"training_args.{key}: true": bool(more.get(key)) for key in keys})


class TokenizedPrompt(list[Message]):
    """The messages of a prompt, with their token ids."""

    def __init__(self, messages: list[Message], ids: list[int]):
        super().__init__(messages)
        self.ids = ids


class ResumedOrder:
    """The order of TRL's sampler, which starts at the epoch that the run resumes in.

    The sampler draws each epoch's order from a generator of its own, which starts again with the process.
    """

    def __init__(self, sampler: RepeatSampler, state: Callable[[], TrainerState]):
        self._sampler, self._state, self._has_started = sampler, state, False

    def __iter__(self) -> Iterator[int]:
        import torch

        if not self._has_started and self._sampler.shuffle:
            for _ in range(int(self._state().epoch or 0)):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)
        self._has_started = True
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


class TokenizedPromptsMixin(GRPOBase):
    """Use tokenized prompts and our own reference model, and compare it with the policy before the first update."""

    reward_columns: Sequence[str] = ()
    """The columns of all rows. A reward function gets each of them at every call, None where a row lacks it."""
    _has_warned = False

    def set_reference(self, reference: PreTrainedModel, beta: float, *, sync: bool) -> None:
        """Set the reference model and the weight of the divergence from it, as TRL 1.16 does in its constructor."""
        from trl.trainer.callbacks import SyncRefModelCallback
        from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

        self.args.beta = self.beta = beta
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        add_fused_lm_head(reference, self.temperature, self.args.cast_lm_head_to_fp32)
        self.ref_model = prepared = _prepare_reference(reference, self)
        if sync:
            self.args.sync_ref_model = True
            self.add_callback(SyncRefModelCallback(ref_model=prepared, accelerator=self.accelerator))

    def run_state(self) -> dict[str, Any]:
        """Return the state with the completions that later steps still train on."""
        buffered = None if self._buffered_inputs is None else [dict(batch) for batch in self._buffered_inputs]
        return {**super().run_state(), "micro_step": self._step, "buffered_inputs": buffered}

    def load_run_state(self, state: Mapping[str, Any]) -> None:
        """Restore the completions that later steps still train on, where the batch is split as it was."""
        super().load_run_state(state)
        if state["split"] != self.batch_split():
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            return
        self._step = state["micro_step"]
        if state["buffered_inputs"] is not None:
            from accelerate.utils import send_to_device

            self._buffered_inputs = send_to_device(state["buffered_inputs"], self.args.device)

    def _get_train_sampler(self, dataset: datasets.Dataset | None = None) -> Sampler[int]:
        order = ResumedOrder(cast("RepeatSampler", super()._get_train_sampler(dataset)), lambda: self.state)
        return cast("Sampler[int]", order)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "row", "images", "text"]

    def _count_tokens(self, inputs: object) -> int:
        return 0  # There are no completions yet; they are counted below.

    def _tokenize_prompts(self, prompts: list[TokenizedPrompt]) -> tuple[list[list[int]], None, dict[str, object]]:
        return [prompt.ids for prompt in prompts], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        output = super()._generate_and_score_completions([_as_trl_row(row, self.reward_columns) for row in inputs])
        if not self._has_warned and not any(reward.has_judged for reward in self.reward_funcs):
            self._has_warned = True
            logger.warning(
                "no reward function has returned a reward for a completion of the first batch, only None: nothing is"
                " learned from it. Check grpo_args.rewards and the columns that they read"
            )
        if self.model.training:
            self._token_count = self._token_count + output["prompt_mask"].sum() + output["completion_mask"].sum()
        return output

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.beta and self.state.global_step == 0 and self.model.training:
            with self.evaluation_pass(model):
                policy = self._completion_log_probs(model, inputs)
                reference = self._reference_log_probs(model, inputs)
            self.compare_with_reference([policy], [reference], lambda fresh: [self._fresh_log_probs(fresh, inputs)])
            with self.evaluation_pass(model):
                now = self._recomputed_reference(model, inputs)
                self.check_independence([now], lambda: ([], [self._recomputed_reference(model, inputs)]))
        return super()._compute_loss(model, inputs)

    def _completion_log_probs(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the log-probabilities of the completions, (rows, tokens), 0 at padding."""
        import torch

        log_probs, _, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
        )
        return log_probs.float() * inputs["completion_mask"]

    def _reference_log_probs(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the log-probabilities that the loss compares with; computed again where they contain dropout."""
        from finetuning.trainer.reference import has_dropout

        if self.ref_model is not None or not has_dropout(self.model):
            return inputs["ref_per_token_logps"].float() * inputs["completion_mask"]
        return self._recomputed_reference(model, inputs)

    def _recomputed_reference(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from trl.trainer.utils import use_adapter

        if self.ref_model is not None:
            return self._completion_log_probs(self.ref_model, inputs)
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        with use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None):
            return self._completion_log_probs(model, inputs)

    def _fresh_log_probs(self, fresh: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch
        from trl.trainer.utils import add_fused_lm_head

        model: Any = fresh
        add_fused_lm_head(model, self.temperature, self.args.cast_lm_head_to_fp32)
        with torch.no_grad():
            return self._completion_log_probs(model.to(self.args.device).eval(), inputs)


def build_trainer(inputs: TrainerInputs) -> transformers.Trainer:
    """Return TRL's GRPOTrainer on tokenized prompts.

    Completions end where the chat template ends a turn, as they will when the model is served. The reference is loaded
    like the model, and must equal it before the first update.

    Raises:
        ConfigError: TRL rejects the combination of model and options, or there are fewer prompts than a batch needs.
    """
    from trl.trainer.grpo_trainer import GRPOTrainer

    from finetuning.model.stop_tokens import align_stop_tokens
    from finetuning.trainer.image_completions import ImageCompletionsMixin
    from finetuning.trainer.mixin import TrainerMixin
    from finetuning.trainer.reference import CompleteReferenceMixin, ReferenceMixin
    from finetuning.trainer.reward_functions import build_rewards

    class TokenizedGRPOTrainer(  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
        TokenizedPromptsMixin, TrainerMixin, ReferenceMixin, CompleteReferenceMixin, GRPOTrainer
    ):
        reward_columns = _reward_columns(inputs.data)
        load_reference = staticmethod(inputs.load_reference) if inputs.load_reference else None

    args, grpo_args = inputs.arguments, inputs.experiment.grpo_args
    check_num_prompts(inputs.data.rows or 0, args.generation_batch_size // args.num_generations)
    base = inputs.model.get_base_model() if hasattr(inputs.model, "get_base_model") else inputs.model
    base.generation_config = align_stop_tokens(
        inputs.tokenizer.tokenizer, base.generation_config, inputs.end_of_turn
    ).generation_config
    args.reward_weights = [conf.weight for conf in grpo_args.rewards]
    reference = load_reference_if_needed(inputs) if args.beta else None
    beta, sync = args.beta, args.sync_ref_model
    if reference is not None:
        # With beta TRL would load the reference by the model's name, in another dtype and without our options.
        args.beta, args.sync_ref_model = 0.0, False
    trainer_class = TokenizedGRPOTrainer
    if inputs.data.has_images:
        made = type("ImageGRPOTrainer", (ImageCompletionsMixin, TokenizedGRPOTrainer), {})
        trainer_class = cast("type[TokenizedGRPOTrainer]", made)
    with reraise_as_config_error("GRPO"):
        trainer = inputs.extended(trainer_class)(
            reward_funcs=list(build_rewards(grpo_args)), peft_config=inputs.peft_config, **trainer_kwargs(inputs)
        )
    if reference is not None:
        trainer.set_reference(reference, beta, sync=sync)
    if inputs.data.has_images:
        _read_images(cast("ImageCompletionsMixin", trainer), inputs)
    return trainer


def _read_images(trainer: ImageCompletionsMixin, inputs: TrainerInputs) -> None:
    """Have the data loader read the images of prompts, and check those of the first rows.

    Raises:
        ConfigError: TRL does not pass on all that the processor makes of images.
        GuardStopped: a row has another number of image tokens than of features.
    """
    from finetuning.data.images.collator import prompt_collator
    from finetuning.trainer.image_completions import IMAGE_INPUTS, check_inputs

    experiment, rows = inputs.experiment, cast("Iterable[Row]", trainer.train_dataset)
    collator = prompt_collator(
        experiment.run_conf, experiment.data_conf.images, inputs.tokenizer.tokenizer, IMAGE_INPUTS
    )
    trainer.data_collator = collator  # pyright: ignore[reportAttributeAccessIssue]
    trainer.suppress_image_tokens(sorted(collator.processor.token_ids))
    first = next(row for row in rows if row["images"])
    check_inputs(collator([first])[0][IMAGE_INPUTS], collator.processor.name)
    check_images(cast("TrainerMixin", trainer), collator.as_batch)


def _prepare_reference(reference: PreTrainedModel, trainer: transformers.Trainer) -> Any:
    """Return the reference on the trainer's device, or sharded like the trainer's model."""
    from trl.models.utils import prepare_deepspeed, prepare_fsdp

    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(reference, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(reference, trainer.accelerator)
    return trainer.accelerator.prepare_model(reference, evaluation_mode=True)


def _as_trl_row(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, object]:
    """Return a prepared row as TRL takes it: the prompt, and the columns of the reward functions."""
    values = json.loads(row["row"])
    return {
        "prompt": TokenizedPrompt(values["prompt"], row["prompt_ids"]),
        **{name: values["columns"].get(name) for name in columns},
    }


def _reward_columns(data: PreparedData) -> list[str]:
    columns: dict[str, None] = {}
    splits: list[Any] = [data.train, data.validation]
    for split in splits:
        for text in split["row"] if split is not None else ():
            columns |= dict.fromkeys(json.loads(text)["columns"])
    return list(columns)


def check_num_prompts(num_prompts: int, needed: int) -> None:
    """Raise ConfigError if there are fewer prompts than a generation batch needs."""
    if num_prompts < needed:
        raise ConfigError(
            f"a batch needs {needed} prompts, but there are {num_prompts}",
            location=Location(key="batchsize_conf.total_train_batch_size"),
            hint="It counts completions: lower it, or raise training_args.num_generations.",
        )


ALGORITHM = Algorithm(
    title="group relative policy optimization, on rewards of sampled completions",
    experiment=GRPOExperiment,
    prepare=prepare,
    build_trainer=build_trainer,
    trainer_adds_adapter=True,
)
