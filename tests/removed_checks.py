"""A pytest plugin: each check of the engine is removed, and its tests have to fail.

    python -m pytest -p removed_checks        # or make test-removed-checks

A test of a check may pass for another reason than the check, or because a second check sees the same fault. Here the
function that checks is replaced by one that finds nothing; a test that still passes shows neither, and is reported as
failed. Checks that keep a process from an endless loop or from exhausting the memory are not removed.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import dry_run_refusals
import pytest

Replacement = Callable[..., object] | tuple[object, ...]


@dataclass(frozen=True)
class RemovedCheck:
    """Functions that check something, by dotted path, each with what replaces it, and the tests that have to fail."""

    name: str
    replacements: dict[str, Replacement]
    tests: tuple[str, ...]
    """Parts of test ids, as after `tests/`: `export/test_merge.py::test_an_adapter_lost_to_rounding`."""
    row: str = ""
    """The row of the table in `docs/concepts/verification.md`; by default the one of the same name, if there is one."""


def returns(value: object) -> Replacement:
    return lambda *args, **kwargs: value


def no_differences(*args: object, **kwargs: object) -> list[str]:
    return []


def no_context(*args: object, **kwargs: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def no_difference_of_reference(*args: object) -> object:
    from finetuning.trainer.reference import Difference

    return Difference(0.0, 0, 1)


def all_equal(server: object, model: object, adapter: object, samples: list[object], max_tokens: int) -> object:
    from finetuning.export.gguf import Comparison

    return Comparison(len(samples), len(samples), len(samples), None)


def no_end_of_turn(tokenizer: Any, generation_config: Any, end_of_turn: object) -> object:
    from finetuning.model.stop_tokens import align_stop_tokens

    return align_stop_tokens(tokenizer, generation_config, None)


def arguments_as_they_are(renderer: object) -> object:
    from finetuning.data.chat.tool_calls import ToolCallStyle

    return ToolCallStyle(takes_text=False, needs_content=False)


def always_pass(name: str, compared: str, difference: float, tolerance: float, reason: str = "") -> object:
    from finetuning.selftest.checks import Result

    return Result(name, compared, difference, tolerance, "pass", reason)


def unlimited_noise(*args: object) -> object:
    from finetuning.export.merge.verification import LogitDifference

    return LogitDifference(math.inf, math.inf, math.inf, 0.0)


_SAVED = "trainer/test_saved_checkpoints.py::"
_FULL, _ADAPTER = _SAVED + "test_a_full_model_that_is_not", _SAVED + "test_an_adapter_that_is_not"
_STATE, _VARLEN = "trainer/test_run_state.py::", "model/test_varlen_attention.py::"
_RUN_STATE = "finetuning.trainer.loaded_state.RunStateMixin."
_ISOLATION = "finetuning.model.varlen_attention."

REMOVED_CHECKS = [
    RemovedCheck(
        "tensors of a save",
        {"finetuning.model.saved_weights.compare_tensors": no_differences},
        (
            *(f"{_FULL}_what_is_in_memory_is_named[checkpoint-{fault}" for fault in ("a zeroed", "noise", "one bit")),
            *(f"{_FULL}_what_is_in_memory_is_named[final model-{fault}" for fault in ("swapped tensors", "another sh")),
            *(f"{_FULL}_what_is_in_memory_is_named[checkpoint-{fault}" for fault in ("renamed", "another dtype")),
            *(f"{_ADAPTER}_what_is_in_memory_is_named[checkpoint-{fault}" for fault in ("all lora_B", "one lora_B")),
            *(f"{_ADAPTER}_what_is_in_memory_is_named[final model-{fault}" for fault in ("a missing pair", "noise")),
            _SAVED + "test_the_base_models_weights_in_place",
            _SAVED + "test_whole_embeddings_that_are_saved",
            _SAVED + "test_a_checkpoint_that_fails_is_not_published_and_earlier_ones_stay[a zeroed tensor]",
        ),
        row="saved model",
    ),
    RemovedCheck(
        "configs of a save",
        {"finetuning.model.save._compare_json": no_differences},
        (
            _FULL + "_what_is_in_memory_is_named[checkpoint-a config",
            _FULL + "_what_is_in_memory_is_named[checkpoint-a wrong end token",
            _FULL + "_what_is_in_memory_is_named[checkpoint-no generation config",
            _ADAPTER + "_what_is_in_memory_is_named[final model-lora_alpha",
            _ADAPTER + "_what_is_in_memory_is_named[checkpoint-target_modules",
            _ADAPTER + "_what_is_in_memory_is_named[checkpoint-another fingerprint",
        ),
    ),
    RemovedCheck(
        "tokenizer of a save",
        {"finetuning.model.save.compare_tokenizer": no_differences},
        (
            _FULL + "_what_is_in_memory_is_named[checkpoint-no chat template",
            _FULL + "_what_is_in_memory_is_named[final model-another chat template",
            _FULL + "_what_is_in_memory_is_named[checkpoint-another end token",
            _ADAPTER + "_what_is_in_memory_is_named[checkpoint-swapped tokens",
            _ADAPTER + "_what_is_in_memory_is_named[checkpoint-a missing merge",
            _FULL + "_what_is_in_memory_is_named[final model-texts that are cut",
        ),
    ),
    RemovedCheck(
        "settings of a tokenizer",
        {"finetuning.model.stop_tokens._setting_differences": no_differences},
        (
            _ADAPTER + "_what_is_in_memory_is_named[final model-a token before",
            _ADAPTER + "_what_is_in_memory_is_named[final model-a shorter limit",
        ),
    ),
    RemovedCheck(
        "the files of a tokenizer",
        {"finetuning.model.stop_tokens._file_differences": no_differences},
        (
            _ADAPTER + "_what_is_in_memory_is_named[final model-texts that are cut",
            _ADAPTER + "_what_is_in_memory_is_named[final model-an end that is text",
            _ADAPTER + "_what_is_in_memory_is_named[final model-two chat templates",
            _ADAPTER + "_what_is_in_memory_is_named[final model-an end token after",
        ),
    ),
    RemovedCheck(
        "weights of another model",
        {"finetuning.model.save._stray_weights": no_differences},
        (_FULL + "_what_is_in_memory_is_named[final model-another file of weights",),
    ),
    RemovedCheck(
        "processor of a save",
        {"finetuning.model.vision.processor_differences": no_differences},
        ("vision/test_checkpoints.py::test_a_processor_that_is_not_the_base_models",),
    ),
    RemovedCheck(
        "state that PEFT does not save",
        {"finetuning.trainer.peft_methods.compare_adapter_state": no_differences},
        (_SAVED + "test_state_that_peft_does_not_save_is_compared",),
    ),
    RemovedCheck(
        "weights that moved",
        {"finetuning.training.final_model._check_changed": no_differences},
        (_SAVED + "test_a_full_model_that_never_moved_is_not_published",),
    ),
    RemovedCheck(
        "adapters that moved",
        {"finetuning.export.verify._not_trained": no_differences},
        ("export/test_verify.py::test_an_adapter_that_was_not_trained_is_caught",),
    ),
    RemovedCheck(
        "models that load",
        {"finetuning.export.verify._loading_failures": no_differences},
        ("export/test_verify.py::test_experts_that_are_saved_apart_pass_and_missed_when_gone",),
    ),
    RemovedCheck(
        "reference before the first update",
        {"finetuning.trainer.reference.largest_difference": no_difference_of_reference},
        (
            "algorithms/test_dpo.py::test_a_wrong_reference_stops_the_run[ipo]",
            "algorithms/test_dpo.py::test_a_wrong_reference_stops_the_run[apo_zero]",
            "algorithms/test_kto.py::test_a_wrong_reference_stops_the_run",
            "algorithms/test_grpo.py::test_a_wrong_reference_stops_the_run",
            "algorithms/test_grpo.py::test_an_adapter_that_changes_the_base_is_caught",
        ),
        row="reference",
    ),
    RemovedCheck(
        "a reference that does not depend on the policy",
        {"finetuning.trainer.reference.ReferenceMixin.check_independence": returns(None)},
        (
            "algorithms/test_reference.py::test_a_reference_that_follows_the_policy_is_caught[make_it",
            "algorithms/test_reference.py::test_a_reference_that_follows_the_policy_is_caught[keep_the",
        ),
    ),
    RemovedCheck(
        "isolation of rows",
        {_ISOLATION + "_gradient_leak": returns(0.0), _ISOLATION + "logit_tolerance": returns(math.inf)},
        (
            _VARLEN + "test_a_leak_into_another_row_is_caught",
            _VARLEN + "test_isolation_is_verified_in_the_dtype_of_autocast",
        ),
        row="padding-free isolation",
    ),
    RemovedCheck(
        "isolation of gradients",
        {_ISOLATION + "_gradient_leak": returns(0.0)},
        (_VARLEN + "test_a_leak_below_the_rounding_of_logits_is_caught_by_its_gradient",),
    ),
    RemovedCheck(
        "rows beyond every window",
        {_ISOLATION + "_reach": returns(8), _ISOLATION + "_large_windows": no_differences},
        (
            _VARLEN + "test_a_leak_of_rows_longer_than_the_window_is_caught",
            _VARLEN + "test_a_window_that_cannot_be_reduced",
            _VARLEN + "test_a_convolution_over_rows_is_caught",
        ),
    ),
    RemovedCheck(
        "causality",
        {_ISOLATION + "_gradient_leak": returns(0.0), _ISOLATION + "logit_tolerance": returns(math.inf)},
        (
            _VARLEN + "test_bidirectional_models_are_refused",
            _VARLEN + "test_a_look_ahead_is_refused",
            _VARLEN + "test_a_look_ahead_without_gradient_is_refused",
            _VARLEN + "test_a_run_refuses_a_bidirectional_model",
        ),
    ),
    RemovedCheck(
        "sums of large files",
        {"finetuning.atomic_io.block_sums": returns(b"")},
        ("test_atomic_io.py::test_one_changed_byte_of_a_large_file_is_found[1060921]",),
    ),
    RemovedCheck(
        "every value of a base model",
        {"finetuning.model.fingerprint.content_digest": returns("")},
        ("model/test_fingerprint.py::test_one_changed_value_of_a_tensor",),
    ),
    RemovedCheck(
        "fingerprint of an adapter",
        {
            "finetuning.export.inputs.check_adapter_fingerprint": returns(False),
            "finetuning.model.peft.adapter_files.check_adapter_fingerprint": returns(False),
        },
        ("model/test_fingerprint.py::test_an_adapter_that_changed_after",),
        row="base and adapter",
    ),
    RemovedCheck(
        "what rounding loses in a merge",
        {"finetuning.export.merge.merge._check_surviving_share": returns(None)},
        ("export/test_merge.py::test_an_adapter_lost_to_rounding",),
    ),
    RemovedCheck(
        "merged against unmerged",
        {"finetuning.export.merge.verification.logit_tolerance": returns(math.inf)},
        ("export/test_merge_bad_input.py::test_a_merge_that_is_not_the_trained_model_is_not_published",),
        row="merge",
    ),
    RemovedCheck(
        "optimizer in memory",
        {"finetuning.trainer.checkpointing.optimizer_differences": no_differences},
        (
            "trainer/test_loaded_state.py::test_an_optimizer_that_loads_other_values_stops_the_run",
            "trainer/test_loaded_state.py::test_a_schedule_that_loads_another_step_stops_the_run",
        ),
    ),
    RemovedCheck(
        "weights in memory",
        {"finetuning.trainer.checkpointing.CheckpointMixin._differences_from_files": no_differences},
        ("training/test_resume_architectures.py::test_weights_that_differ_from_the_file_after_loading",),
        row="loaded checkpoint",
    ),
    RemovedCheck(
        "metrics between two logs",
        {_RUN_STATE + "_run_state_difference": returns(None), _RUN_STATE + "load_run_state": returns(None)},
        (
            _STATE + "test_metrics_that_are_not_restored_stop_the_run",
            _STATE + "test_logs_between_two_checkpoints",
            _STATE + "test_a_patient_rule_acts_at_the_same_step",
            _STATE + "test_a_split_after_running_out_of_memory",
        ),
    ),
    RemovedCheck(
        "a reference that moves",
        {_RUN_STATE + "_load_reference": returns(None)},
        (_STATE + "test_a_moving_reference_resumes_where_it_was", _STATE + "test_a_reference_that_is_missing"),
    ),
    RemovedCheck(
        "reference of a save",
        {"finetuning.trainer.loaded_state.compare_tensors": no_differences},
        (_STATE + "test_a_reference_that_is_not_written",),
    ),
    RemovedCheck(
        "copy of the final model",
        {"filecmp.cmp": returns(True)},
        ("training/test_checkpoints.py::test_a_copy_of_the_final_model",),
    ),
    RemovedCheck(
        "loss guard after a resume",
        {"finetuning.callbacks.loss_guard.LossGuardCallback.on_train_begin": returns(None)},
        (_STATE + "test_the_guard_knows_the_spike",),
    ),
    RemovedCheck(
        "nothing to learn",
        {"finetuning.callbacks.loss_guard.NoSignalCallback.on_log": returns(None)},
        (
            "callbacks/test_loss_guard.py::test_a_loss_that_collapses_to_0",
            "callbacks/test_loss_guard.py::test_gradients_of_0",
            "callbacks/test_loss_guard.py::test_rewards_that_never_vary",
            "algorithms/test_grpo.py::test_rewards_that_never_vary_are_reported[True]",
        ),
        row="training signal",
    ),
    RemovedCheck(
        "secrets in text",
        {"finetuning.config.redaction._redact_text": lambda text, secrets: text},
        (
            "fault_injection/test_secrets.py::test_secrets_are_recognized_by_their_form",
            "fault_injection/test_secrets.py::test_a_value_of_the_environment_is_found",
        ),
        row="secrets",
    ),
    RemovedCheck(
        "secrets by key",
        {"finetuning.config.redaction.is_secret_key": returns(False)},
        ("fault_injection/test_secrets.py::test_values_of_secret_keys_are_removed_at_any_depth",),
    ),
    RemovedCheck(
        "initial loss of a mixture of experts",
        {"finetuning.trainer.reference.check_initial_loss": returns(None)},
        (
            "algorithms/test_reference.py::test_the_first_loss_of_a_mixture_of_experts_is_checked_without_the_routers_loss[dpo-wrong]",
        ),
        row="initial loss",
    ),
    RemovedCheck(
        "padding rows that loading zeroes",
        {
            "finetuning.model.load.restore_padding_rows": no_differences,
            "finetuning.model.saved_weights.restore_padding_rows": no_differences,
        },
        ("zoo/test_faults.py::test_the_padding_row_that_transformers_zeroes_is_restored",),
    ),
    RemovedCheck(
        "merges beyond rounding noise",
        {"finetuning.export.merge.verification._rounding_noise": unlimited_noise},
        ("zoo/test_faults.py::test_a_merge_of_experts_that_leaves_something_out_is_refused",),
    ),
    RemovedCheck(
        "what vLLM serves",
        {"finetuning.model.peft.adapter_files.is_servable": returns(True)},
        ("export/test_suggested_commands.py::test_suggested_commands_succeed[dora]",),
    ),
    RemovedCheck(
        "models without a score",
        {"finetuning.model.load.check_score_head": returns(None)},
        ("algorithms/test_reward.py::test_a_model_without_a_class_with_a_score",),
    ),
    RemovedCheck(
        "errors of parsers",
        {"finetuning.errors.is_input_error": returns(False)},
        ("fault_injection/test_foreign_input.py::test_any_error_of_a_parser_is_one_of_the_input",),
        row="untrusted input",
    ),
    RemovedCheck(
        "keys that pass through",
        {"finetuning.config.validation.passthrough._check_keys": no_differences},
        (
            "config/test_passthrough.py::test_wrong_training_args[{dataloader_num_worker: 2}",
            "config/test_passthrough.py::test_wrong_peft_conf[{peft_type: LORA, peft_kwargs: {rank: 8}}",
        ),
        row="config",
    ),
    RemovedCheck(
        "module names",
        {"finetuning.model.peft.module_names.check_module_names": no_differences},
        ("cli/test_module_lookup.py::test_a_name_that_matches_nothing_is_a_warning_at_plan_time",),
    ),
    RemovedCheck(
        "biases that no weights can hold",
        {"finetuning.model.peft.module_names.fields_that_add_biases": returns({})},
        ("cli/test_module_lookup.py::test_a_lora_bias_that_no_weights_can_hold_is_refused",),
        row="biases of LoRA",
    ),
    RemovedCheck(
        "first rows",
        {"finetuning.training.dry_run._check_rows": returns((None, None, False))},
        (
            "training/test_dry_run.py::test_of_many_rows_the_first_are_read",
            "training/test_dry_run.py::test_each_fault_is_found_by_the_dry_run[wrong_template",
        ),
    ),
    RemovedCheck(
        "loss mask",
        {"finetuning.data.chat.loss_mask.AssistantMaskBuilder._check_span": returns(None)},
        ("data/test_loss_mask.py::test_templates_that_read_contents",),
    ),
    RemovedCheck(
        "what a template prints",
        {
            "finetuning.data.processors.sft.find_unprinted": returns(None),
            "finetuning.data.processors.preference.find_unprinted": returns(None),
            "finetuning.data.processors.prompt.find_unprinted": returns(None),
        },
        (
            "data/test_unused_columns.py::test_what_the_template_does_not_print_is_refused",
            "data/test_unused_columns.py::test_a_system_message_that_is_not_printed_is_refused",
        ),
        row="unused columns",
    ),
    RemovedCheck(
        "columns that are not used",
        {"finetuning.data.open_dataset._with_unused": lambda parsed, values: parsed},
        ("data/test_unused_columns.py::test_unused_columns_and_keys_are_counted",),
    ),
    RemovedCheck(
        "tool calls",
        {"finetuning.data.chat.tool_calls.detect_style": arguments_as_they_are},
        ("data/test_tool_calls.py::test_a_template_that_prints_texts_gets_texts",),
    ),
    RemovedCheck(
        "row statistics",
        {"finetuning.data.statistics.RowCounts.check": returns(None)},
        ("data/test_statistics.py::test_too_many_faults_stop_the_run",),
    ),
    RemovedCheck(
        "padded batches",
        {"finetuning.model.padding.describe_padding_error": returns(None)},
        ("zoo/test_faults.py::test_a_padded_run_warns_where_padding_changes_its_rows[left",),
    ),
    RemovedCheck(
        "batched generation",
        {"finetuning.inference.runner.describe_batch_error": returns(None)},
        (
            "zoo/test_faults.py::test_a_batch_answers_like_each_prompt_alone[bart",
            "zoo/test_faults.py::test_a_batch_answers_like_each_prompt_alone[rwkv",
        ),
    ),
    RemovedCheck(
        "adapter values",
        {
            "finetuning.model.peft.adapter_files.restore_lora_tensors": returns(None),
            "finetuning.export.merge.with_peft.restore_lora_tensors": returns(None),
        },
        ("zoo/test_faults.py::test_a_merge_has_the_tensors_that_peft_drops",),
    ),
    RemovedCheck(
        "logits of a kernel for padding-free batches",
        {_ISOLATION + "_gradient_leak": returns(0.0), _ISOLATION + "logit_tolerance": returns(math.inf)},
        (
            _VARLEN + "test_a_class_without_sdpa_takes_another_implementation_with_its_logits[_ignores_the_cap",
            _VARLEN + "test_an_implementation_that_fails_leaves_the_model_to_sdpa[leaks",
            "model/test_gpu_attention.py::test_a_kernel_that_ignores_the_window",
        ),
        row="attention kernel",
    ),
    RemovedCheck(
        "gradient of a kernel for padding-free batches",
        {_ISOLATION + "_has_finite_gradient": returns(True), _ISOLATION + "_gradient_leak": returns(0.0)},
        (_VARLEN + "test_an_implementation_that_fails_leaves_the_model_to_sdpa[cannot_learn",),
    ),
    RemovedCheck(
        "causal attention without masks",
        {"finetuning.model.gpu_attention.logit_tolerance": returns(math.inf)},
        ("model/test_gpu_attention.py::test_a_bidirectional_model_is_not_made_causal",),
    ),
    RemovedCheck(
        "answers of llama.cpp",
        {"finetuning.export.gguf.compare_with_server": all_equal},
        ("export/test_gguf.py::test_a_server_that_answers_otherwise_is_caught",),
        row="GGUF",
    ),
    RemovedCheck(
        "adapters that llama.cpp computes otherwise",
        {"finetuning.export.gguf.used_options": no_differences},
        tuple(
            f"export/test_gguf.py::test_an_adapter_that_llama_cpp_computes_differently_is_refused[config{index}"
            for index in range(3)
        ),
    ),
    RemovedCheck(
        "Modelfile",
        {"finetuning.export.gguf._CONVERSATIONS": ()},
        ("export/test_gguf.py::test_a_template_that_cannot_be_expressed_is_left_out",),
    ),
    RemovedCheck(
        "hanging process",
        {"finetuning.training.heartbeat.HeartbeatMonitor.find_hang": returns(None)},
        ("training/test_stopping.py::test_who_hangs_is_the_one",),
    ),
    RemovedCheck(
        "stop tokens",
        {"finetuning.model.save.align_stop_tokens": no_end_of_turn},
        ("end_to_end/test_stopping_at_checkpoints.py::test_a_checkpoint_stops_in_plain_transformers[lora",),
    ),
    RemovedCheck(
        "finite values",
        {"finetuning.trainer.late_guard.skip_update": returns(True)},
        ("trainer/test_late_guard.py::test_a_step_that_is_not_finite_leaves_the_weights",),
    ),
    RemovedCheck(
        "steps that are not finite",
        {"finetuning.trainer.mixin.TrainerMixin._not_finite_error": returns(None)},
        ("trainer/test_late_guard.py::test_the_last_step_is_checked_before_the_model_is_saved",),
    ),
    RemovedCheck(
        "checkpoint",
        {"finetuning.training.resume.find.find_manifest_mismatch": returns(None)},
        (
            "fault_injection/test_damaged_checkpoints.py::test_every_file_of_a_checkpoint_is_compared",
            "training/test_resume.py::test_a_file_that_the_manifest_does_not_list_is_not_trusted",
        ),
    ),
    RemovedCheck(
        "cache of prepared rows",
        {"finetuning.data.cache.find_manifest_mismatch": returns(None)},
        (
            "data/test_cache.py::test_rows_that_the_manifest_does_not_list_are_not_read",
            "data/test_cache.py::test_a_damaged_entry_is_prepared_again[train-00000-of-00001.arrow-flip_a_bit",
        ),
    ),
    RemovedCheck(
        "resume",
        {"finetuning.training.resume.config_changes.differences": no_differences},
        ("training/test_config_changes.py::test_changed_rows_need_leave",),
    ),
    RemovedCheck(
        "embeddings that vLLM serves",
        {
            "finetuning.export.vllm.checks.unservable_modules": no_differences,
            "finetuning.model.peft.adapter_files.unservable_modules": no_differences,
        },
        (
            "export/test_vllm.py::test_lora_on_embeddings_is_served_by_architecture[MistralForCausalLM-targets2",
            "export/test_vllm.py::test_lora_on_embeddings_is_served_by_architecture[GPTJForCausalLM",
        ),
        row="LoRA on embeddings",
    ),
    RemovedCheck(
        "what was trained against what is merged",
        {"finetuning.export.merge.merge._trained_quantization": returns(None)},
        ("export/test_merge_with_peft.py::test_a_merge_is_compared_with_the_quantized_base_of_training",),
    ),
    RemovedCheck(
        "tensors that PEFT's function leaves out",
        {"finetuning.model.saved_weights.live_lora_tensors": returns({})},
        (_SAVED + "test_a_tensor_that_peft_leaves_out",),
    ),
    RemovedCheck(
        "optimizer of a save",
        {"finetuning.trainer.checkpointing.saved_optimizer_differences": no_differences},
        (_SAVED + "test_an_optimizer_that_is_not_saved_as_it_is",),
    ),
    RemovedCheck(
        "self-test",
        {"finetuning.selftest.checks.within": always_pass},
        ("selftest/test_selftest.py::test_a_resumed_run_with_one_other_weight_fails",),
    ),
    RemovedCheck(
        "checkpoint class",
        {"finetuning.model.load.check_class": returns(None)},
        ("vision/test_checkpoints.py::test_other_classes_are_refused_by_name",),
    ),
    RemovedCheck(
        "image files",
        {"finetuning.data.images.files.check_digest": returns(None)},
        ("vision/test_rows.py::test_an_image_that_changes_after_preparation_is_noticed",),
    ),
    RemovedCheck(
        "images of a row",
        {"finetuning.trainer.image_check.why_not_split": returns(None)},
        ("vision/test_training.py::test_a_batch_whose_tensors_depend_on_its_rows",),
    ),
    RemovedCheck(
        "image tokens",
        {"finetuning.trainer.image_check.check_image_tokens": returns("")},
        ("vision/test_training.py::test_too_few_features_stop_the_run_before_its_first_step",),
    ),
]

NOT_REMOVED = {
    "templates": "keeps a process from an endless loop",
    "model size": "keeps a process from exhausting the memory",
    "batch size": "the computation of the batch, not a check of it",
    "same optimization for any split": "a property of the loss; tests/training/test_invariants.py compares splits",
}
"""Rows of the table in `docs/concepts/verification.md` without an entry, with the reason."""


def missing_functions() -> list[str]:
    """Return the paths in the table that lead to nothing: replacing them would fail every test."""
    return [path for check in REMOVED_CHECKS for path in check.replacements if not _exists(path)]


def _exists(path: str) -> bool:
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            target: object = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for name in parts[length:]:
            target = getattr(target, name, None)
        return target is not None
    return False


def check_of(test_id: str) -> RemovedCheck | None:
    """Return the check that a test is about: only one may be removed at a time."""
    checks = [check for check in REMOVED_CHECKS if any(part in test_id for part in check.tests)]
    if len(checks) > 1:
        raise pytest.UsageError(f"{test_id} is listed for {checks[0].name} and {checks[1].name}")
    return checks[0] if checks else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the table, and require that each of its entries selects one in the files that are collected."""
    if missing := missing_functions():
        raise pytest.UsageError(f"there is no {', '.join(missing)}")
    selected = [item for item in items if check_of(item.nodeid)]
    for check in REMOVED_CHECKS if not config.option.keyword else ():
        for part in check.tests:
            file = part.partition("::")[0]
            if any(file in item.nodeid for item in items) and not any(part in item.nodeid for item in selected):
                raise pytest.UsageError(f"no test is called {part} (removed check: {check.name})")
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        check = check_of(item.nodeid)
        for path, replacement in check.replacements.items() if check else ():
            patch.setattr(path, replacement)
        try:
            return (yield)
        finally:
            # What is refused because a check is removed need not be refused by a dry run.
            dry_run_refusals.missed.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report: pytest.TestReport = yield
    if report.when != "call" or report.skipped:
        return report
    if report.failed:
        report.outcome, report.longrepr = "passed", None
    else:
        check = check_of(item.nodeid)
        report.outcome = "failed"
        report.longrepr = f"passes although the check is removed: {check.name if check else 'none'}"
    return report
