"""The cases that telemetry has to pass, each with the tests that show it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES: dict[str, tuple[str, ...]] = {
    "1 spans nest under one application": (
        "test_engine::test_the_spans_of_a_run",
        "test_library::test_the_spans_nest_as_the_code_does",
    ),
    "2 each span has one start and one stop": (
        "test_library::test_each_span_has_one_start_and_one_stop_at_its_own_times",
    ),
    "3 updates every N steps, and for the rest; none is lost": (
        "test_library::test_updates_come_every_n_steps_and_for_the_rest",
        "test_library::test_no_update_is_lost_in_a_long_loop",
    ),
    "4 the sums are those of the spans": ("test_library::test_the_sums_are_those_of_the_spans",),
    "5 throughput, worked out again": (
        "test_library::test_throughput_can_be_worked_out_again_from_the_file",
        "test_engine::test_tokens_and_loss_are_those_of_training",
        "test_flops::test_the_work_of_a_run_is_counted",
    ),
    "6 an exception": (
        "test_engine::test_an_exception_in_a_step_is_told",
        "test_library::test_an_exception_is_told_once_where_it_arose",
    ),
    "7 signals": (
        "test_processes::test_an_interrupted_run_closes_its_spans",
        "test_processes::test_a_killed_run_leaves_its_events_and_a_resumed_one_goes_on_with_the_session",
        "test_library::test_an_interrupt_marks_the_spans_too",
    ),
    "8 a checkpoint that fails": ("test_engine::test_a_failed_checkpoint_is_no_success",),
    "9 checkpoints, counted and measured": (
        "test_engine::test_checkpoints_of_a_run",
        "test_library::test_checkpoints_are_counted_and_measured",
        "test_library::test_an_asynchronous_save_succeeds_later",
    ),
    "10 resumed after a kill": (
        "test_processes::test_a_killed_run_leaves_its_events_and_a_resumed_one_goes_on_with_the_session",
        "test_library::test_a_resumed_loop_counts_from_where_it_began",
        "test_library::test_files_are_appended_to",
        "test_goodput::test_every_second_has_one_place",
    ),
    "11 tags": (
        "test_tags::test_scenario_1_another_model_changes_both",
        "test_tags::test_scenario_2_other_resources_change_both",
        "test_tags::test_scenario_3_the_same_again_is_another_session_of_the_same_speed",
        "test_tags::test_scenario_4_a_resumed_run_keeps_both",
        "test_tags::test_scenario_5_a_faster_resumed_run_keeps_the_session_alone",
        "test_tags::test_the_default_tag_is_that_of_what_moves_the_speed",
    ),
    "12 a retry after running out of memory": ("test_engine::test_a_retry_after_running_out_of_memory",),
    "13 places that cannot be written": (
        "test_library::test_a_folder_that_cannot_be_written_is_one_warning",
        "test_library::test_a_full_disk_is_one_warning",
        "test_library::test_what_fails_inside_is_marked_and_training_goes_on",
        "test_engine::test_whatever_fails_inside_the_model_is_trained",
        "test_processes::test_a_dead_collector_delays_nothing",
    ),
    "14 the same bits with it and without": (
        "test_engine::test_the_losses_are_the_same_with_telemetry_off_on_and_all_on",
        "test_library::test_the_random_streams_are_not_touched",
    ),
    "15 several processes": (
        "test_processes::test_two_processes_share_a_trace",
        "test_library::test_every_rank_has_a_file_of_its_own",
        "test_library::test_stragglers_are_named",
    ),
    "16 filters": (
        "test_engine::test_by_default_there_is_nothing_for_each_step",
        "test_engine::test_an_unknown_span_in_the_config_names_the_valid_ones",
        "test_library::test_the_filter_leaves_out_spans_but_no_metrics",
    ),
    "17 time never runs backwards": ("test_library::test_time_never_runs_backwards",),
    "18 off is off; the cost is in benchmarks/telemetry.py": (
        "test_engine::test_switched_off_it_writes_nothing",
        "test_processes::test_switched_off_its_packages_are_not_loaded",
    ),
    "19 nothing is sent, no secret is written": (
        "test_processes::test_nothing_is_sent_anywhere_and_no_secret_is_written",
        "test_engine::test_headers_never_reach_a_file",
    ),
    "20 methods, several validation sets, a test set": (
        "test_engine::test_preferences_are_measured_too",
        "test_engine::test_several_validation_sets_and_a_test_set",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_case_has_its_tests(case: str) -> None:
    for test in CASES[case]:
        module, _, name = test.partition("::")
        tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_all_twenty_are_there() -> None:
    assert [int(case.split()[0]) for case in CASES] == list(range(1, 21))
