"""Group relative policy optimisation: a model answers each prompt several times and learns from its better answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetuning.algorithms.algorithm import (
    Algorithm,
    TrainingParts,
    load_reference_model,
    reraise_as_config_error,
    trainer_kwargs,
)
from finetuning.config.sections.experiment import GRPOExperiment
from finetuning.errors import ConfigError, Location
from finetuning.trainer.initial_loss import CompleteReferenceMixin, ExpectedLoss, check_initial_loss, drops_values
from finetuning.trainer.reward_functions import build_rewards, needed_columns

if TYPE_CHECKING:
    import transformers

    from finetuning.data.prepared import PreparedData


def prepare(
    experiment: GRPOExperiment,
    tokenizer: transformers.PreTrainedTokenizerFast,
    workers: int,
    stop_tokens: Sequence[str] = (),
) -> PreparedData:
    """Token ids of the prompts, and what rewards are told about them.

    Raises:
        ConfigError: a reward's function is not there; said before any row is read.
    """
    from finetuning.data.pipeline import prepare_prompts

    args = experiment.grpo_args
    build_rewards(args)
    return prepare_prompts(experiment.data_conf, args.max_prompt_length, needed_columns(args), tokenizer, workers)


class TokenizedPrompt(list):  # type: ignore[type-arg]
    """A prompt's messages, which know their token ids."""

    ids: list[int]

    @classmethod
    def of(cls, messages: list[dict[str, Any]], ids: list[int]) -> TokenizedPrompt:
        made = cls(messages)
        made.ids = ids
        return made


def build_trainer(parts: TrainingParts) -> transformers.Trainer:
    """TRL's GRPOTrainer on prompts that are tokenised already.

    Completions end where the chat template ends a turn, as they will when the model is served. The reference is loaded
    as the model was, not read again by name, and the first divergence from it must be 0.

    Raises:
        ConfigError: TRL refuses the combination of model and options, or the prompts do not fill one batch.
    """
    from finetuning.model.stop_tokens import align_stop_tokens

    args, rewards = parts.arguments, parts.experiment.grpo_args
    _check_enough_prompts(len(parts.data.train), args.generation_batch_size // args.num_generations)
    base = parts.model.get_base_model() if hasattr(parts.model, "get_base_model") else parts.model
    base.generation_config = align_stop_tokens(
        parts.tokenizer.tokenizer, base.generation_config, parts.end_of_turn
    ).generation_config
    args.reward_weights = [conf.weight for conf in rewards.rewards]
    reference = load_reference_model(parts) if args.beta else None
    beta, syncs = args.beta, args.sync_ref_model
    if reference is not None:
        # TRL would read the model again by its name; it is given ours below.
        args.beta, args.sync_ref_model = 0.0, False
    with reraise_as_config_error("GRPO"):
        trainer = _trainer_class(_columns(parts.data))(
            reward_funcs=list(build_rewards(rewards)), peft_config=parts.peft_config, **trainer_kwargs(parts)
        )
    if reference is not None:
        trainer.take_reference(reference, beta, syncs=syncs)
    return trainer


def _trainer_class(columns: list[str]) -> type:
    import trl
    from trl.trainer.callbacks import SyncRefModelCallback
    from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

    from finetuning.trainer.mixin import TrainerMixin

    class GRPOTrainer(TrainerMixin, CompleteReferenceMixin, trl.GRPOTrainer):
        """TRL's GRPOTrainer with the mixin, ready prompts, our reference and the check of the first divergence."""

        _divergence_checked = False

        def take_reference(self, reference: Any, beta: float, *, syncs: bool) -> None:
            """Holds the policy near this model, with this weight."""
            self.args.beta = self.beta = beta
            if self.args.disable_dropout:
                disable_dropout_in_model(reference)
            add_fused_lm_head(reference, self.temperature, self.args.cast_lm_head_to_fp32)
            self.ref_model = _placed(reference, self)
            if syncs:
                self.args.sync_ref_model = True
                self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["prompt_ids", "row"]

        def _count_tokens(self, inputs: Any) -> int:
            return 0  # The completions are not there yet.

        def _tokenize_prompts(self, prompts: list[TokenizedPrompt]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [prompt.ids for prompt in prompts], None, {}

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            output = super()._generate_and_score_completions([_told_row(one, columns) for one in inputs])
            if self.model.training:
                self._token_count = self._token_count + output["prompt_mask"].sum() + output["completion_mask"].sum()
            return output

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(model, inputs)
            if self.beta and self.state.global_step == 0 and self.model.training and not self._divergence_checked:
                self._divergence_checked = True
                known = ExpectedLoss(0.0, "the divergence from the reference")
                found = self._metrics["train"]["kl"][-1]
                check_initial_loss(found, known, drops=drops_values(self.model))
            return loss

    return GRPOTrainer


def _placed(reference: Any, trainer: Any) -> Any:
    """The reference where the trainer's model is: on its device, or shared out like it."""
    from trl.models import prepare_deepspeed, prepare_fsdp

    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(reference, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(reference, trainer.accelerator)
    return trainer.accelerator.prepare_model(reference, evaluation_mode=True)


def _told_row(row: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    """A prepared row as TRL reads one: its prompt, which needs no tokenising, and the columns that rewards look at."""
    told = json.loads(row["row"])
    return {
        "prompt": TokenizedPrompt.of(told["prompt"], row["prompt_ids"]),
        **{name: told["columns"].get(name) for name in columns},
    }


def _columns(data: PreparedData) -> list[str]:
    """The columns of all rows: a reward is given each of them at every call, None where a row has it not."""
    found: dict[str, None] = {}
    for part in (data.train, data.validation):
        for text in part["row"] if part is not None else ():
            found |= dict.fromkeys(json.loads(text)["columns"])
    return list(found)


def _check_enough_prompts(prompts: int, wanted: int) -> None:
    if prompts < wanted:
        raise ConfigError(
            f"a batch takes {wanted} prompts, and there are {prompts}",
            place=Location(key="batchsize_conf.total_train_batch_size"),
            hint="It counts completions: lower it, or raise training_args.num_generations.",
        )


METHOD = Algorithm(
    name="grpo",
    title="group relative policy optimisation",
    experiment=GRPOExperiment,
    arguments=GRPOExperiment.trainer_config,
    prepare=prepare,
    build_trainer=build_trainer,
    wraps_model=True,
)
