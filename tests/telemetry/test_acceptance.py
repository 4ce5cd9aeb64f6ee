"""The acceptance cases of telemetry, each with the tests that cover it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES: dict[str, tuple[str, ...]] = {
    "1 spans nest under one application span": (
        "test_engine::test_the_spans_of_a_run",
        "test_library::test_spans_nest_like_the_code",
    ),
    "2 each span has one start and one stop event": (
        "test_library::test_each_span_has_one_start_and_one_stop_event_at_its_times",
    ),
    "3 updates every N steps and at the end; none is lost": (
        "test_library::test_updates_come_every_n_steps_and_at_the_end",
        "test_library::test_no_update_is_lost_in_a_long_loop",
    ),
    "4 totals are the sums of the spans": ("test_library::test_totals_are_the_sums_of_the_spans",),
    "5 throughput follows from the recorded values": (
        "test_library::test_throughput_follows_from_the_recorded_values",
        "test_engine::test_tokens_and_loss_match_training",
        "test_flops::test_the_flops_of_a_run_are_counted",
    ),
    "6 an exception": (
        "test_engine::test_an_exception_in_a_step_is_recorded",
        "test_library::test_an_exception_is_recorded_once_in_the_innermost_span",
    ),
    "7 signals": (
        "test_processes::test_an_interrupted_run_closes_its_spans",
        "test_processes::test_a_killed_run_keeps_its_events_and_a_resumed_run_its_session",
        "test_library::test_an_interrupt_marks_the_open_spans",
    ),
    "8 a checkpoint that fails": ("test_engine::test_a_failed_checkpoint_is_not_a_success",),
    "9 checkpoints are counted and measured": (
        "test_engine::test_checkpoints_of_a_run",
        "test_library::test_checkpoints_are_counted_and_measured",
        "test_library::test_an_asynchronous_save_succeeds_later",
    ),
    "10 resumed after a kill": (
        "test_processes::test_a_killed_run_keeps_its_events_and_a_resumed_run_its_session",
        "test_library::test_a_resumed_loop_counts_from_its_first_step",
        "test_library::test_files_are_appended_to",
        "test_goodput::test_every_second_is_in_one_category",
    ),
    "11 tags": (
        "test_tags::test_scenario_1_another_model_changes_both",
        "test_tags::test_scenario_2_other_resources_change_both",
        "test_tags::test_scenario_3_the_same_config_is_a_new_session_of_equal_speed",
        "test_tags::test_scenario_4_a_resumed_run_keeps_both",
        "test_tags::test_scenario_5_a_faster_resumed_run_keeps_the_session_alone",
        "test_tags::test_the_default_perf_tag_depends_on_what_determines_the_speed",
    ),
    "12 a retry after running out of memory": ("test_engine::test_an_out_of_memory_retry_starts_a_new_loop",),
    "13 destinations that cannot be written": (
        "test_library::test_an_unwritable_folder_is_one_warning",
        "test_library::test_a_full_disk_is_one_warning",
        "test_library::test_an_internal_error_is_marked_and_training_continues",
        "test_engine::test_training_completes_when_telemetry_fails",
        "test_processes::test_an_unreachable_collector_does_not_delay_training",
    ),
    "14 losses are identical with and without telemetry": (
        "test_engine::test_losses_are_identical_with_and_without_telemetry",
        "test_library::test_random_generators_are_not_used",
    ),
    "15 several processes": (
        "test_processes::test_two_processes_share_a_trace",
        "test_library::test_every_rank_writes_its_own_file",
        "test_library::test_the_slowest_rank_is_named",
    ),
    "16 filters": (
        "test_engine::test_by_default_no_span_is_recorded_per_step",
        "test_engine::test_an_unknown_span_in_the_config_names_the_valid_ones",
        "test_library::test_the_filter_excludes_spans_but_no_metrics",
    ),
    "17 time never goes backward": ("test_library::test_time_never_goes_backward",),
    "18 disabled telemetry does nothing; the cost is in benchmarks/telemetry.py": (
        "test_engine::test_disabled_telemetry_writes_nothing",
        "test_processes::test_disabled_telemetry_loads_no_package",
    ),
    "19 nothing is sent, no secret is written": (
        "test_processes::test_nothing_is_sent_anywhere_and_no_secret_is_written",
        "test_engine::test_otlp_headers_are_not_written_to_any_file",
    ),
    "20 all methods, several validation sets, a test set": (
        "test_engine::test_preference_training_is_measured",
        "test_engine::test_several_validation_sets_and_a_test_set",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_case_has_its_tests(case: str) -> None:
    for test in CASES[case]:
        module, _, name = test.partition("::")
        tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_all_twenty_cases_are_listed() -> None:
    assert [int(case.split()[0]) for case in CASES] == list(range(1, 21))
