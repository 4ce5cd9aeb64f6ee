"""The final model: saved, reopened and verified, copied to `save_model_dir`, and what to do with it next."""

from __future__ import annotations

import filecmp
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from finetuning.atomic_io import atomic_directory, is_disk_full, staging_path
from finetuning.config.pretrained_config import quantization_method
from finetuning.config.redaction import redact_text
from finetuning.config.sections.experiment import Experiment
from finetuning.distributed import announce_wait
from finetuning.errors import ConfigError, GuardStopped, Location, StorageError, first_line
from finetuning.export.verify import verify_saved
from finetuning.model.peft.adapter_files import adapter_digests, is_peft_model
from finetuning.model.save import find_stop_tokens, save_model
from finetuning.model.saved_weights import changed_share, convert_weights, sample_matrices, sampled_digests
from finetuning.plan.plan import zero_rate_reason
from finetuning.report.run_folder import COMPLETE_MARKER, RECORD_NAME
from finetuning.report.terminal import NextCommand
from finetuning.training.resume.find import checkpoints_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetuning.trainer.mixin import TrainerMixin
    from finetuning.training.setup import LoadedModel

logger = logging.getLogger("finetuning")

_KEY = "save_model_dir"
_REFERENCE_ADAPTER = "ref"
_HUB_TIMEOUT_S = 60.0
"""How long the Hub may take to take or send the next part of a request or an answer."""
# Text with accents, digits and punctuation, for the round trip of the tokenizer.
_SAMPLE_TEXT = "The quick brown fox, 12 × 7 = 84: déjà vu."
_SMALL_SHARE = 0.5
"""A share of changed values below it is reported for weights of 16 bits. In float32 nearly all change."""


@dataclass(frozen=True)
class FinalModel:
    """A saved model or adapter, and what was verified about it."""

    kind: str
    """`model` or `adapter`."""
    folder: str
    base: str | None
    """The base model of an adapter."""
    num_bytes: int
    checks: tuple[str, ...]
    stop_tokens: str | None
    """What generation stops at; None for a model with a score head."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class InitialWeights:
    """What is trained as it was before training, by the names of the tensors; empty if the weights are sharded."""

    digests: Mapping[str, str]
    """Of an adapter's tensors as they are saved, otherwise of samples of the weights."""
    samples: Mapping[str, torch.Tensor]
    """A few values of each weight matrix; empty for an adapter."""
    saved_dtype: torch.dtype | None = None
    """The dtype that the weights of a full fine-tune are converted to when they are saved; None for their own."""


def initial_weights(trainer: TrainerMixin, loaded: LoadedModel) -> InitialWeights:
    """Return what to compare the weights with after training, to verify that they changed."""
    if loaded.initial:
        return InitialWeights(loaded.initial, {})
    if is_peft_model(trainer.model):
        # The trainer has added the adapter.
        return InitialWeights(adapter_digests(trainer.model), {})
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return InitialWeights(sampled_digests(trained), sample_matrices(trained), loaded.saved_dtype)


def save_final_model(
    trainer: TrainerMixin,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    initial: InitialWeights,
) -> FinalModel | None:
    """Save the model or adapter, and rename it to `folder` after it was reopened and verified.

    Collective, because a sharded model is gathered by all processes. Returns None except on the main process.

    Args:
        initial: what `initial_weights` returned before training.

    Raises:
        StorageError: the disk is full.
        GuardStopped: what was written is not valid or not what is in memory, or nothing changed in training.
    """
    trainer.use_eval_weights()
    state_dict = _gather_state_dict(trainer)
    if not trainer.is_world_process_zero():
        return None
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    adapted = is_peft_model(model)
    if adapted and _REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(_REFERENCE_ADAPTER)
    base: Any = model.get_base_model() if adapted else model
    stop_tokens = find_stop_tokens(model, tokenizer, trainer.end_of_turn)
    checks = ["all files equal what is in memory"]
    rate_is_zero = _rate_is_zero(trainer)
    if rate_is_zero is not None:
        logger.warning("%s: the model is saved as it was before training", rate_is_zero)
        initial = replace(initial, digests={}, samples={})
    with _explain_full_disk(folder), _name_target(folder), atomic_directory(folder) as candidate:
        if not adapted:
            checks += _check_full_weights(model, initial, state_dict)
        save_model(
            model,
            tokenizer,
            candidate,
            stop_tokens=stop_tokens,
            base_fingerprint=trainer.base_fingerprint,
            state_dict=state_dict,
            embeddings=trainer.embeddings,
        )
        with _without_zero3(trainer):
            verified = verify_saved(
                candidate,
                initial=initial.digests if adapted else None,
                is_trained=rate_is_zero is None,
                sample_texts={_SAMPLE_TEXT: tokenizer.encode(_SAMPLE_TEXT, add_special_tokens=False)},
            )
    return FinalModel(
        kind=verified.kind,
        folder=str(folder),
        base=base.name_or_path if adapted else None,
        num_bytes=verified.num_bytes,
        checks=(*checks, *verified.checks),
        stop_tokens=stop_tokens.report if stop_tokens else None,
    )


def _check_full_weights(
    model: PreTrainedModel, initial: InitialWeights, state_dict: dict[str, torch.Tensor] | None
) -> list[str]:
    """Return what was checked of weights that were trained as a whole, which then get the dtype they are saved in.

    Raises:
        GuardStopped: nothing changed in training.
    """
    weights = dict(model.named_parameters()) if state_dict is None else state_dict
    checks = _check_changed(initial, weights)
    if initial.saved_dtype is not None:
        convert_weights(model, initial.saved_dtype)
    return [*checks, *_describe_change(initial, weights)]


def _rate_is_zero(trainer: TrainerMixin) -> str | None:
    """Return why every step had a learning rate of 0; None if that is not known."""
    from transformers.trainer_utils import SchedulerType

    args = trainer.args
    schedule = SchedulerType(args.lr_scheduler_type).value
    return zero_rate_reason(args.learning_rate, schedule, args.warmup_steps, trainer.state.global_step)


def _check_changed(initial: InitialWeights, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Check that at least one weight changed in training; return the description of the check, [] if there is none.

    Raises:
        GuardStopped: none changed.
    """
    final = sampled_digests({name: weights[name] for name in initial.digests if name in weights})
    if not final:
        return []
    if all(final[name] == initial.digests[name] for name in final):
        raise GuardStopped(f"the saved model failed verification: none of its {len(final)} weights changed in training")
    return ["weights moved from their initial values"]


def _describe_change(initial: InitialWeights, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the share of values that training changed, [] if it is unknown. Warn if 16 bits rounded most of it off."""
    share = changed_share(initial.samples, weights)
    if share is None:
        return []
    dtypes = {str(weights[name].dtype).removeprefix("torch.") for name in initial.samples if name in weights}
    if share < _SMALL_SHARE and dtypes <= {"bfloat16", "float16"}:
        logger.warning(
            "training changed only %.1f %% of the values of the saved weight matrices: the other changes are too small"
            " for %s. Set run_conf.model_args.dtype: float32, and training_args.bf16: true to compute in bfloat16",
            100 * share,
            "/".join(sorted(dtypes)),
        )
    return [f"training changed {share:.1%} of the values of the weight matrices"]


def _gather_state_dict(trainer: TrainerMixin) -> dict[str, Any] | None:
    """Return the weights of a sharded model; None when every process holds all weights."""
    if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


@contextmanager
def _without_zero3(trainer: TrainerMixin) -> Iterator[None]:
    """Let transformers load a model as in a process without DeepSpeed.

    While ZeRO-3's global config is set, `from_pretrained` partitions what it loads, and refuses a device map.
    """
    if not trainer.is_deepspeed_enabled:
        yield
        return
    from transformers.integrations import deepspeed

    plugin = trainer.accelerator.state.deepspeed_plugin if deepspeed.is_deepspeed_zero3_enabled() else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            deepspeed.set_hf_deepspeed_config(plugin.hf_ds_config)


@contextmanager
def _name_target(folder: Path) -> Iterator[None]:
    """Let verification errors name the final folder instead of the staging folder."""
    try:
        yield
    except GuardStopped as error:
        location = Location(file=str(folder))
        hint = "It was not published."
        problems = [replace(problem, location=location, hint=problem.hint or hint) for problem in error.problems]
        raise GuardStopped(problems) from error


@contextmanager
def _explain_full_disk(folder: Path) -> Iterator[None]:
    """Raise StorageError with the last valid checkpoint when the disk fills up in the block."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_full(error, folder.parent):
            raise
        newest = next((path.name for path in checkpoints_of(folder.parent)), None)
        raise StorageError(
            f"no space left for the final model in {folder}: {str(error).partition(chr(10))[0]}",
            hint=f"{newest} is valid: free some space and run again with run_conf.resume_from_checkpoint: auto."
            if newest
            else "Free some space; there is no checkpoint to resume from.",
        ) from error


def check_save_model_dir(experiment: Experiment) -> None:
    """Check before training that `save_model_dir` is writable.

    Raises:
        StorageError: it is not.
    """
    if experiment.save_model_dir is None:
        return
    existing = Path(experiment.save_model_dir).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise StorageError(f"{experiment.save_model_dir} is not writable", location=Location(key=_KEY))


def copy_to_save_model_dir(experiment: Experiment) -> Path | None:
    """Copy the final model to `save_model_dir`, if set, and create an empty file `.complete` in `output_dir`.

    A new folder appears atomically. In an existing one nothing is replaced before all files are written and compared
    with the originals; then each replaces its namesake, weights before the configs that a reader opens first. Other
    files stay.

    Raises:
        StorageError: it is not writable. The final model in `output_dir` is not affected.
    """
    output_dir = Path(experiment.training_args.output_dir)
    final = output_dir / experiment.run_conf.final_checkpoint_name
    target = Path(experiment.save_model_dir) if experiment.save_model_dir else None
    try:
        if target is not None and target.absolute() != final.absolute():
            _copy(final, target)
        (output_dir / COMPLETE_MARKER).touch()
    except OSError as error:
        raise StorageError(
            f"cannot copy the final model to {target}: {error.strerror or error}",
            location=Location(key=_KEY),
            hint=f"It is in {final}.",
        ) from error
    return target


def _copy(final: Path, target: Path) -> None:
    if not target.exists():
        with atomic_directory(target) as folder:
            shutil.copytree(final, folder, copy_function=_copy_file, dirs_exist_ok=True)
        return
    files = sorted((path for path in final.rglob("*") if path.is_file()), key=lambda path: path.suffix == ".json")
    destinations = [target / file.relative_to(final) for file in files]
    try:
        for file, destination in zip(files, destinations, strict=True):
            destination.parent.mkdir(parents=True, exist_ok=True)
            _copy_file(file, staging_path(destination))
        for destination in destinations:
            os.replace(staging_path(destination), destination)
    except OSError:
        for destination in destinations:
            staging_path(destination).unlink(missing_ok=True)
        raise


def _copy_file(source: str | Path, target: str | Path) -> None:
    """Copy a file, and compare every byte: the target may be a mounted bucket, whose program drops or delays writes.

    Raises:
        OSError: the copy is not equal.
    """
    shutil.copyfile(source, target)
    if not filecmp.cmp(source, target, shallow=False):
        raise OSError(f"{target} is not what was copied to it")


def check_hub_login(experiment: Experiment) -> None:
    """Check before training that the Hub knows the user, if the final model is to be pushed there.

    Raises:
        ConfigError: it does not, or cannot be reached.
    """
    options = experiment.training_args.model_extra or {}
    if not options.get("push_to_hub"):
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    from finetuning.model.resolve import transport_error

    try:
        with _hub_timeout():
            HfApi(token=_hub_token(options)).whoami()
    except (OSError, ValueError, LocalTokenNotFoundError, transport_error()) as error:
        raise ConfigError(
            f"the Hub cannot be reached, or rejects the token: {first_line(error)}",
            location=Location(key="training_args.push_to_hub"),
            hint="Set HF_TOKEN to a token with write access, check the network, or remove push_to_hub.",
        ) from error


def push_to_hub(experiment: Experiment, model: FinalModel) -> tuple[str | None, str | None]:
    """Upload the final model, if the config asks for it, to `hub_model_id` or a repository named as the output folder.

    Returns:
        The address of the repository, or why the upload failed: the model is saved, so that is no error of the run.
    """
    options = experiment.training_args.model_extra or {}
    if not options.get("push_to_hub"):
        return None, None
    from huggingface_hub import HfApi

    from finetuning.model.resolve import transport_error

    name = options.get("hub_model_id") or Path(experiment.training_args.output_dir).resolve().name
    try:
        api = HfApi(token=_hub_token(options))
        revision = options.get("hub_revision")
        with _hub_timeout(), announce_wait(f"the Hub to take {model.folder}", after_s=30.0):
            repository = api.create_repo(str(name), private=options.get("hub_private_repo"), exist_ok=True)
            api.upload_folder(
                repo_id=repository.repo_id,
                folder_path=model.folder,
                commit_message=f"Upload {model.kind}",
                revision=str(revision) if revision else None,
            )
    except (OSError, ValueError, RuntimeError, transport_error()) as error:
        reason = redact_text(first_line(error))
        logger.warning(
            "the final model was not pushed to the Hub: %s. Push it later with: hf upload %s %s",
            reason,
            name,
            shlex.quote(model.folder),
        )
        return None, reason
    return str(repository), None


@contextmanager
def _hub_timeout() -> Iterator[None]:
    """Limit the requests to the Hub in the block: the client of huggingface_hub waits for an answer for ever."""
    from huggingface_hub import get_session

    session = get_session()
    before, session.timeout = session.timeout, _HUB_TIMEOUT_S
    try:
        yield
    finally:
        session.timeout = before


def _hub_token(options: Mapping[str, Any]) -> str | None:
    token: Any = options.get("hub_token")
    return token.get_secret_value() if hasattr(token, "get_secret_value") else token


def next_commands(model: FinalModel) -> list[NextCommand]:
    """Return commands that try, merge, serve or evaluate a final model, without those that would be refused."""
    from finetuning.model.peft.adapter_files import is_servable, mergeable_type

    if model.stop_tokens is None:
        return []
    folder = shlex.quote(model.folder)
    tries = _try_commands(Path(model.folder))
    if model.kind != "adapter":
        return [
            *tries,
            NextCommand(f"vllm serve {folder}", "serve it with vLLM"),
            NextCommand(f"lm_eval --model hf --model_args pretrained={folder} --tasks arc_easy", "evaluate it"),
        ]
    base_folder = Path(model.base or "")
    if mergeable_type(Path(model.folder), base_folder) is None:
        return tries
    merged = shlex.quote(f"{model.folder}-merged")
    base, purpose = shlex.quote(model.base or "BASE"), "merge it into the base model"
    if quantization_method(model.base or "") == "gptq":
        # GPTQ's packed weights cannot be merged into, and the original model has another fingerprint.
        base, purpose = "--force UNQUANTIZED_BASE", "merge it into the base model before GPTQ"
    merge = NextCommand(f"merge_adapter {base} {folder} {merged}", purpose)
    if is_servable(Path(model.folder), base_folder):
        return [*tries, merge, NextCommand(f"create_vllm_compatible_adapter {folder}", "serve the adapter with vLLM")]
    return [*tries, merge, NextCommand(f"vllm serve {merged}", "serve the merged model with vLLM")]


def _try_commands(folder: Path) -> list[NextCommand]:
    """Return commands that try a model. In the output directory of a run they are short, for it remembers the rest."""
    run = shlex.quote(str(folder.parent))
    if not (folder.parent / RECORD_NAME).is_file():
        return [NextCommand(f"generate --model {shlex.quote(str(folder))} --text 'Hello'", "try it")]
    commands = [NextCommand(f"generate {run}", "answer the first training prompt")]
    if (folder / "chat_template.jinja").is_file():
        commands.append(NextCommand(f"finetuning chat {run}", "talk to it"))
    return commands
