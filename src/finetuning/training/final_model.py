"""The tuned model: saved whole, opened again, and told about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from finetuning.atomic_io import is_full, staged
from finetuning.errors import GuardStopped, Place, StorageError
from finetuning.export.verify import verify_saved
from finetuning.model.save import is_adapted, save_model
from finetuning.model.stop_tokens import align
from finetuning.training.resume.find import checkpoints_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from finetuning.model.embeddings import Vocabulary
    from finetuning.model.fingerprint import Fingerprint

_REFERENCE_ADAPTER = "ref"
_SAMPLE = "The quick brown fox, 12 × 7 = 84: déjà vu."


@dataclass(frozen=True)
class Artifact:
    """What a run made, where it lies, and what was checked about it."""

    kind: str
    """`model` or `adapter`."""
    folder: str
    base: str | None
    """The model that an adapter goes with."""
    num_bytes: int
    checks: tuple[str, ...]
    stop_tokens: str | None
    """What generation stops at; None for a model that gives scores."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def publish_final(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    end_of_turn: str | None,
    base_fingerprint: Fingerprint | None,
    initial: Mapping[str, str],
    vocabulary: Vocabulary,
) -> Artifact | None:
    """The tuned model or adapter in `folder`, where it appears once it is opened again and found sound; None on all
    processes but the main one.

    Every process calls this: a sharded model is gathered by all.

    Raises:
        StorageError: it cannot be written.
        GuardStopped: what was written is not sound.
    """
    trainer.settle_weights()
    state_dict = _gathered(trainer)
    if not trainer.is_world_process_zero():
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapted = is_adapted(model)
    if adapted and _REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(_REFERENCE_ADAPTER)
    base = model.get_base_model() if adapted else model
    writes = base.can_generate()
    stop_tokens = align(tokenizer, base.generation_config, end_of_turn) if writes else None
    with _room_for(folder), staged(folder) as candidate:
        save_model(
            model,
            tokenizer,
            candidate,
            stop_tokens=stop_tokens,
            base_fingerprint=base_fingerprint if adapted else None,
            state_dict=state_dict,
            vocabulary=vocabulary,
        )
        with _named(folder):
            verified = verify_saved(
                candidate,
                initial=initial if adapted and state_dict is None else None,
                sample_texts={_SAMPLE: tokenizer.encode(_SAMPLE, add_special_tokens=False)},
            )
    return Artifact(
        kind=verified.kind,
        folder=str(folder),
        base=base.name_or_path if adapted else None,
        num_bytes=verified.num_bytes,
        checks=verified.checks,
        stop_tokens=stop_tokens.report if stop_tokens else None,
    )


def _gathered(trainer: Trainer) -> dict[str, Any] | None:
    """The weights that processes hold parts of; None where this process has them all."""
    if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """What is not sound is told of the folder that was to be, not of the one beside it where it was put together."""
    try:
        yield
    except GuardStopped as error:
        place = Place(file=str(folder))
        problems = [replace(problem, place=place, hint="It was not published.") for problem in error.problems]
        raise GuardStopped(problems) from error


@contextmanager
def _room_for(folder: Path) -> Iterator[None]:
    """Says what is safe when there is no room for the tuned model.

    Raises:
        StorageError: the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full(error, folder.parent):
            raise
        newest = next((path.name for path in checkpoints_of(folder.parent)), None)
        raise StorageError(
            f"no room for the tuned model in {folder}: {str(error).partition(chr(10))[0]}",
            hint=f"{newest} is whole: free some space and run again with run_conf.resume_from_checkpoint: auto."
            if newest
            else "Free some space; there is no checkpoint to go on from.",
        ) from error
