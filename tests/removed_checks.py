"""A pytest plugin: each check of the engine is removed, and its tests have to fail.

    python -m pytest -p removed_checks        # or make test-removed-checks

A test of a check may pass for another reason than the check, or because a second check sees the same fault. Here the
function that checks is replaced by one that finds nothing; a test that still passes shows neither, and is reported as
failed. Checks that keep a process from an endless loop or from exhausting the memory are not removed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

Replacement = Callable[..., object]


@dataclass(frozen=True)
class RemovedCheck:
    """Functions that check something, by dotted path, each with what replaces it, and the tests that have to fail."""

    name: str
    replacements: dict[str, Replacement]
    tests: tuple[str, ...]
    """Parts of test ids, as after `tests/`: `export/test_merge.py::test_an_adapter_lost_to_rounding`."""


def returns(value: object) -> Replacement:
    return lambda *args, **kwargs: value


def no_differences(*args: object, **kwargs: object) -> list[str]:
    return []


def no_context(*args: object, **kwargs: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def no_difference_of_reference(*args: object) -> object:
    from finetuning.trainer.reference import Difference

    return Difference(0.0, 0, 1)


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
        ),
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
    ),
    RemovedCheck(
        "isolation of rows",
        {_ISOLATION + "_gradient_leak": returns(0.0), _ISOLATION + "_logit_tolerance": returns(math.inf)},
        (
            _VARLEN + "test_a_leak_into_another_row_is_caught",
            _VARLEN + "test_isolation_is_verified_in_the_dtype_of_autocast",
        ),
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
        {_ISOLATION + "_gradient_leak": returns(0.0), _ISOLATION + "_logit_tolerance": returns(math.inf)},
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
    ),
    RemovedCheck(
        "secrets in text",
        {"finetuning.config.redaction._redact_text": lambda text, secrets: text},
        (
            "fault_injection/test_secrets.py::test_secrets_are_recognized_by_their_form",
            "fault_injection/test_secrets.py::test_a_value_of_the_environment_is_found",
        ),
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
    ),
]


def check_of(test_id: str) -> RemovedCheck | None:
    """Return the check that a test is about: only one may be removed at a time."""
    checks = [check for check in REMOVED_CHECKS if any(part in test_id for part in check.tests)]
    if len(checks) > 1:
        raise pytest.UsageError(f"{test_id} is listed for {checks[0].name} and {checks[1].name}")
    return checks[0] if checks else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the table, and require that each of its entries selects one in the files that are collected."""
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
        return (yield)


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
