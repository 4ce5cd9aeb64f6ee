"""The page that says what becomes of each key is what the translation does, and leaves out no key."""

from __future__ import annotations

from pathlib import Path

from fms_matrix import Outcome, key_rows, outcome_of_key, page

from finetuning.importers.fms.keys import SUPPORTED

PAGE = Path(__file__).parents[3] / "docs" / "moving-from" / "fms-hf-tuning-keys.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make docs writes it"


def test_every_key_has_a_row_at_a_value_that_it_accepts() -> None:
    """Keys without any such value are those that are not supported."""
    accepted: set[str] = set()
    for form, outcome in key_rows():
        if outcome.verdict != "refused":
            accepted.add(form.strip("`").partition(":")[0])
    assert SUPPORTED - accepted == {
        "additional_data_handlers", "dataset_image_field", "per_gpu_train_batch_size", "per_gpu_eval_batch_size",
    }  # fmt: skip


def test_a_verdict_is_runs_differs_or_refused() -> None:
    assert outcome_of_key("learning_rate", 1e-5) == Outcome("runs", "`training_args.learning_rate`")
    differs = outcome_of_key("resume_from_checkpoint", False)
    assert (differs.verdict, "earlier-N" in differs.text) == ("differs", True)
    refused = outcome_of_key("fast_moe", [1])
    assert (refused.verdict, refused.text.startswith("not supported: ")) == ("refused", True)
    # Not by this engine's schema alone: a check of the translation, and one of the experiment.
    assert outcome_of_key("num_train_epochs", 0).verdict == outcome_of_key("torch_dtype", "int3").verdict == "refused"
