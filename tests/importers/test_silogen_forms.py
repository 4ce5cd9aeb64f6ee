"""Each key and form of a Silogen YAML file runs, differs or is refused, as its page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from silogen_table import BASES, DIFFERS, REFUSED, RUNS, judge, read_forms, table

from finetuning.config.sections.training import DPOTrainingArgs, TrainingArgs
from finetuning.config.validation.renamed_keys import MODEL_ARGS, TRAINING_ARGS

ROOT = Path(__file__).resolve().parents[2]
FORMS = [(method, form) for _, forms in read_forms() for method, form in forms]
NOT_SILOGENS = {
    "deepspeed",  # its package is not in the tested set
    "dispatch_batches", "split_batches", "xpu_backend", "include_tokens_per_second", "push_to_hub_token",
    "tpu_metrics_debug", "per_gpu_train_batch_size", "per_gpu_eval_batch_size", "max_target_length",
    "base_model_attribute_name", "use_logits_to_keep",
}  # fmt: skip
"""Old and present names that its releases of the libraries did not have, or that need a secret or a package."""


def keys_of(form: dict[str, Any], section: str) -> set[str]:
    written = {path.removeprefix(f"{section}.") for path in form if path.startswith(f"{section}.")}
    return written | set(form[section] if isinstance(form.get(section), dict) else {})


def test_the_page_is_up_to_date() -> None:
    page = ROOT / "docs" / "moving-from" / "silogen-keys.md"
    assert page.read_text(encoding="utf-8") == table(), "run: make docs"


@pytest.mark.parametrize(
    ("method", "form"), FORMS, ids=lambda part: part if isinstance(part, str) else next(iter(part))
)
def test_no_value_is_changed_or_lost_in_silence(method: str, form: dict[str, Any]) -> None:
    verdict = judge(method, form)
    assert not verdict.changed, verdict
    if verdict.verdict == REFUSED:
        assert any(key.split(".")[0] in verdict.explanation for key in form), verdict
    assert bool(verdict.explanation) is (verdict.verdict != RUNS)


def test_every_key_is_on_the_page() -> None:
    written = set().union(*(keys_of(form, "training_args") for _, form in FORMS))
    expected = {*TRAINING_ARGS, *TrainingArgs.model_fields, *DPOTrainingArgs.model_fields}
    assert expected - written - NOT_SILOGENS == set()
    model_args = set().union(*(keys_of(form, "run_conf.model_args") for _, form in FORMS))
    assert (
        MODEL_ARGS.keys() - model_args - {"use_auth_token", "use_flash_attention_2", "from_tf", "from_flax", "mirror"}
        == set()
    )


@pytest.mark.parametrize("method", BASES)
def test_a_lost_value_and_an_unknown_key_are_noticed(method: str) -> None:
    section = "model_conf" if method == "generate" else "run_conf"
    assert judge(method, {f"{section}.model": "a", "becomes": {f"{section}.model": "b"}}).changed == (
        f"{section}.model",
    )
    assert judge(method, {f"{section}.model": "a"}).verdict == RUNS
    assert judge(method, {f"{section}.modelx": "a"}).verdict == REFUSED
    assert judge(method, {f"{section}.model_args": {"torch_dtype": "bfloat16"}}).verdict == DIFFERS
