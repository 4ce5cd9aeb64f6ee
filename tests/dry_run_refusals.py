"""Compare every run that a test sees refused before its first step with a dry run of it, which has to refuse it too.

`conftest.py` installs the comparison for all tests that start runs in their own process. A refusal that needs the
weights, or the processes of a distributed run, is listed in `NEEDS_MORE` with what it needs: a dry run names that as
not checked.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from functools import cache
from types import TracebackType
from typing import Any

from finetuning.errors import EXIT_USER, FinetuningError, Interrupted

NEEDS_MORE = {
    r"is missing weights that its config requires|has weights whose shapes differ": "the weights",
    r"EVA initialization failed|the weights of .* cannot be loaded": "the weights",
    r"run_conf\.model: .* cannot be loaded: ": "the weights",
    r"is not a causal language model|cannot be trained on rows of any length": "the logits",
    r"states of .* cannot be loaded|was not loaded as it was saved": "the states of the checkpoint",
    r"does not contain the position in the stream|has no reference/weights.safetensors": "the states of the checkpoint",
    r"the KTO trainer rejects this config: Applying a PEFT adapter to `lm_head`": "the trainer, built on the model",
    r"auto is not supported for this loss: the rows of a batch depend on each other": "the trainer, built on the model",
    r"has no method that a trainer has|is a subclass of TRL's": "the class of the trainer",
    r"rows cannot be packed: attention eager": "the attention that the loaded model has",
    r"\.jsonl:(20[1-9]|2[1-9]\d|[3-9]\d\d|\d{4,}): ": "rows after the first 200",
    r"Using fsdp only works in distributed training": "the processes of a distributed run; a dry run warns",
}
"""Patterns of messages, each with what the refusal needs that a dry run does not have."""
_AFTER_THE_START = ("training_step", "evaluate", "_save_checkpoint", "save_final_model", "on_step_end", "on_train_end")

missed: list[str] = []
"""Runs that were refused, and whose dry run was not."""


def starts(trace: TracebackType | None) -> bool:
    """Return whether a traceback goes through a step of training, or what comes after it."""
    while trace is not None:
        if trace.tb_frame.f_code.co_name in _AFTER_THE_START:
            return True
        trace = trace.tb_next
    return False


@cache
def install() -> None:
    """Compare each refusal of `run_training` with that of a dry run, from now on in this process."""
    from finetuning.training import run

    original = run.run_training

    def run_training(job: Any) -> Any:
        try:
            return original(job)
        except FinetuningError as error:
            is_refusal = error.exit_code == EXIT_USER and not isinstance(error, Interrupted)
            if is_refusal and not starts(error.__traceback__) and not job.topology.is_distributed:
                compare(job, error)
            raise

    run.run_training = run_training


def compare(job: Any, error: FinetuningError) -> None:
    """Note the run in `missed` unless its dry run is refused for the same reason."""
    text = str(error)
    if any(re.search(pattern, text) for pattern in NEEDS_MORE):
        return
    try:
        with _quiet():
            dry_run(job)
    except FinetuningError as refusal:
        messages = {problem.message for problem in error.problems}
        if messages & {problem.message for problem in refusal.problems}:
            return
        missed.append(f"refused: {text}\n  but the dry run: {refusal}")
    else:
        missed.append(f"refused: {text}\n  but the dry run found nothing")


def dry_run(job: Any) -> Any:
    from finetuning.config.sections.model import NewPeft
    from finetuning.model.load import CAUSAL_LM, SEQUENCE_CLASSIFICATION
    from finetuning.model.module_summary import look_up_modules
    from finetuning.tracking.settings import TrackingOptions, resolve_tracking
    from finetuning.training.dry_run import check_before_training
    from finetuning.training.preflight import check_new_tokens
    from finetuning.training.setup import find_new_ids

    experiment, algorithm = job.experiment, job.algorithm
    tracking = resolve_tracking(TrackingOptions(), None, {})

    def check_adapter() -> None:
        assert isinstance(experiment.peft_conf, NewPeft)
        new_ids = find_new_ids(experiment) if algorithm.trainer_adds_adapter else []
        head = SEQUENCE_CLASSIFICATION if algorithm.has_score_head else CAUSAL_LM
        lookup = look_up_modules(experiment.run_conf, experiment.peft_conf, head=head, new_ids=new_ids)
        check_new_tokens(lookup.trained_rows, len(new_ids), algorithm)

    return check_before_training(experiment, algorithm, job.plan, job.topology, tracking, check_adapter)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
