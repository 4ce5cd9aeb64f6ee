"""What a model's name on the command line means: the output directory of a run, a folder, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.errors import ConfigError, Location, ModelError, read_json_object, reading

if TYPE_CHECKING:
    from finetuning.config.sections.experiment import GenerationModel
    from finetuning.config.sections.model import NoQuantization, Quantized
    from finetuning.data.preview import PreviewRow
    from finetuning.data.samples import JsonObject

_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
# What decides on the values of the weights. The others place them on the devices of the training machine.
_BASE_ARGUMENTS = (
    "dtype", "revision", "code_revision", "subfolder", "variant", "use_safetensors", "cache_dir", "local_files_only",
    "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class NamedModel:
    """A model or an adapter, and what its run remembers of it."""

    conf: GenerationModel
    quant_conf: NoQuantization | Quantized
    run: Path | None = None
    """Output directory of the run that trained it; None if it is not in one."""
    notes: tuple[str, ...] = ()
    """What was chosen."""

    @property
    def folder(self) -> Path:
        """The folder of the adapter, else of the model; of a model on the hub it does not exist."""
        return Path(self.conf.adapter or self.conf.model).expanduser()

    @property
    def system_prompt(self) -> str | None:
        """The system prompt that the first training rows share; None if they share none."""
        from finetuning.report.run_folder import read_run_record

        record = read_run_record(self.run) if self.run is not None else None
        return ((record or {}).get("data") or {}).get("system_prompt")

    def first_row(self) -> TrainingRow:
        """Return the first training row, as the model has seen it.

        Raises:
            ConfigError: the run has no preview.
        """
        rows = self._preview()
        if not rows or self.run is None:
            raise ConfigError(
                "no training prompt is known",
                location=Location(file=str(self.run or self.folder)),
                hint="Set the prompt with --text.",
            )
        return _split_row(rows[0])

    def _preview(self) -> tuple[PreviewRow, ...]:
        if self.run is None:
            return ()
        from finetuning.report.run_folder import read_preview

        return read_preview(self.run)


@dataclass(frozen=True)
class TrainingRow:
    """A row of training data, split where the model begins to write."""

    prompt: str
    """With the tokens of the chat template."""
    answer: str
    """Empty for a row that has a prompt only."""
    location: Location


def _split_row(row: PreviewRow) -> TrainingRow:
    text = "".join(text for text, _ in row.segments)
    answer = next((text for text, trained in row.segments if trained), "")
    prompt = next((text for text, trained in row.segments[:1] if not trained), "")
    if not prompt:
        # Plain text, all of which is trained on: its first half is the prompt.
        words = text.split(" ")
        prompt = " ".join(words[: max(1, len(words) // 2)])
        answer = text[len(prompt) :]
    return TrainingRow(prompt, answer, row.location)


def is_run(path: Path) -> bool:
    """Return whether a folder is the output directory of a run, and no model itself."""
    from finetuning.report.run_folder import RECORD_NAME

    return (path / RECORD_NAME).is_file() and not any((path / name).is_file() for name in (_ADAPTER_CONFIG, *_WEIGHTS))


def find_model(name: str, base: str | None = None, attn_implementation: str | None = None) -> NamedModel:
    """Return the model that a name means.

    Of a run it is the final model, or else the newest complete checkpoint. An adapter of a run is loaded on the base,
    with the dtype and the quantization, of its training.

    Args:
        base: the base model of an adapter, instead of the one in its config.

    Raises:
        ConfigError: `base` is set, but the model is not an adapter; or the run's config cannot be read.
        ModelError: the run has nothing to load, or trained a reward model; or nothing names the base of an adapter.
    """
    from finetuning.config.sections.model import ModelArgs, NoQuantization
    from finetuning.inference.load import model_conf_of
    from finetuning.report.run_folder import RECORD_NAME, read_run_record

    path = Path(name).expanduser()
    notes: list[str] = []
    folder, run = path, None
    if is_run(path):
        run = path
        folder, note = _finished_model(path)
        notes.append(note)
    elif (path.parent / RECORD_NAME).is_file() and path.is_dir():
        run = path.parent
    record = read_run_record(run) if run is not None else None
    if record is not None and record.get("method") == "reward":
        raise ModelError(
            "is a run of a reward model, which scores texts and generates none", location=Location(file=str(run))
        )
    path_or_id = str(folder) if run is not None else name
    conf = model_conf_of(path_or_id, base or _moved_base(folder, run), attn_implementation)
    config = resolved_config(run) if run is not None else {}
    if run is None or conf.adapter is None or not config:
        return NamedModel(conf, NoQuantization(), run, tuple(notes))
    is_base = conf.model == (config.get("run_conf") or {}).get("model")
    values = {**base_arguments(config, is_base=is_base), "attn_implementation": attn_implementation}
    conf = conf.model_copy(update={"model_args": ModelArgs.model_validate(values)})
    quantization = _quantization(config)
    if quantization.quantization_type != "no-quantization":
        notes.append(f"the base model is quantized as in training ({quantization.quantization_type})")
    return NamedModel(conf, quantization, run, tuple(notes))


def _finished_model(run: Path) -> tuple[Path, str]:
    """Return the folder of the latest finished model of a run, and which one it is.

    Raises:
        ModelError: there is none.
    """
    from finetuning.atomic_io import find_manifest_mismatch
    from finetuning.report.run_folder import read_run_record
    from finetuning.training.resume.find import checkpoints_of

    record = read_run_record(run) or {}
    # The recorded path is relative to where the run was started.
    recorded = Path(str((record.get("artifact") or {}).get("folder") or "")).name
    final = run / (recorded or "checkpoint-final")
    if _has_weights(final):
        return final, f"{run}: the final model, {final.name}"
    skipped: list[str] = []
    for checkpoint in checkpoints_of(run):
        problem = "it has no weights" if not _has_weights(checkpoint) else None
        problem = problem or find_manifest_mismatch(checkpoint, ("*.safetensors", "config.json", _ADAPTER_CONFIG))
        if problem is None:
            status = record.get("status") or "incomplete"
            return checkpoint, "; ".join([f"{run}: no final model ({status}); {checkpoint.name}", *skipped])
        skipped.append(f"{checkpoint.name} skipped: {problem}")
    raise ModelError(
        "; ".join(["the run has neither a final model nor a checkpoint with weights", *skipped]),
        location=Location(file=str(run)),
    )


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)


def _moved_base(adapter: Path, run: Path | None) -> str | None:
    """Return the base of an adapter that was saved into the run's folder, if the run has moved since; else None."""
    config = adapter / _ADAPTER_CONFIG
    if run is None or not config.is_file():
        return None
    with reading(f"cannot read {config}"):
        name = str(read_json_object(config).get("base_model_name_or_path") or "")
    moved = run / Path(name).name
    return str(moved) if name and not Path(name).expanduser().exists() and (moved / "config.json").is_file() else None


def resolved_config(run: Path) -> JsonObject:
    """Return the values of the config that a run wrote, with all defaults; empty if there is none."""
    from finetuning.config.yaml.reader import read_document
    from finetuning.report.run_folder import CONFIG_NAME

    path = run / CONFIG_NAME
    return {str(key): value for key, value in read_document(path).values.items()} if path.is_file() else {}


def base_arguments(config: JsonObject, *, is_base: bool) -> dict[str, object]:
    """Return the arguments that the base was loaded with.

    Args:
        is_base: whether it is the very base of training; those of another one are not known.
    """
    arguments = (config.get("run_conf") or {}).get("model_args") or {}
    names = _BASE_ARGUMENTS if is_base else ("dtype", "trust_remote_code")
    return {name: arguments[name] for name in names if arguments.get(name) is not None}


def _quantization(config: JsonObject) -> NoQuantization | Quantized:
    from pydantic import TypeAdapter

    from finetuning.config.sections.model import NoQuantization, QuantConfig

    values = config.get("quant_conf")
    if not values:
        return NoQuantization()
    validated: NoQuantization | Quantized = TypeAdapter(QuantConfig).validate_python(values)
    return validated
