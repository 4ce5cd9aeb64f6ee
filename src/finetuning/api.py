"""The engine from Python: `run`, `prepare`, `generate` and `merge`, which check and write what console scripts do.

    import finetuning

    result = finetuning.run("config.yaml", {"training_args.max_steps": 100})
    answers = finetuning.generate(result.folder, ["Where is my order?"])

Rows may come from Python: `run(config, train_rows=dataset)` for a `datasets.Dataset` or a list of dictionaries.

Errors are those of `finetuning.errors`, and nothing ends the process. Each function may be called several times in one
process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from finetuning.errors import ConfigError, Location, StorageError

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from finetuning.config.yaml.document import ConfigDocument
    from finetuning.data.prepared import PreparedData
    from finetuning.export.merge.merge import MergeResult
    from finetuning.training.output_dir import RunResult

Config: TypeAlias = str | Path | Mapping[str, Any]
"""The path of a YAML file, or its content."""
Overrides: TypeAlias = Mapping[str, object] | Sequence[str]
"""Values by dotted key, or texts `key.path=value` as on the command line."""
Rows: TypeAlias = Iterable[Mapping[str, object]]
"""Rows of any format that files may have: a list of dictionaries, or a `datasets.Dataset`."""
Chat: TypeAlias = Sequence[Mapping[str, str]]
"""Messages with `role` and `content`."""


def run(
    config: Config,
    overrides: Overrides = (),
    *,
    method: str | None = None,
    train_rows: Rows | None = None,
    validation_rows: Rows | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    trainer_mixin: type | None = None,
    workers: int = 4,
    logging_level: str = "INFO",
) -> RunResult:
    """Train a model. Progress is printed as on the command line.

    Args:
        config: of the run.
        overrides: values that take the place of those in the config.
        method: the method, such as `sft`; by default the one that the config names.
        train_rows: training data in place of that of `data_conf.training_data`. Written to `rows/train.jsonl` in the
            output directory, and read from there with the other settings of the config's only dataset, if it has one.
        validation_rows: the same for `data_conf.validation_data`.
        callbacks: of the trainer, in addition to those of the run.
        trainer_mixin: a class whose methods come before those of the trainer, which `super()` is in it; see
            `run_conf.trainer_mixin`. It must have a name in its module, as the record of the run names it.
        workers: processes that tokenize the data.
        logging_level: `WARNING` for no messages but those about problems.

    Returns:
        How the run ended, with its final model and losses.

    Raises:
        FinetuningError: the run was refused or stopped; `problems` has what is wrong, where, and what to do.
    """
    from finetuning.cli.train import train

    document, method = _document(config, overrides, method)
    document = _with_rows(document, train_rows, validation_rows)
    if trainer_mixin is not None:
        document = document.with_value(("run_conf", "trainer_mixin"), _import_path(trainer_mixin))
    options = argparse.Namespace(
        method=method,
        config=document.file,
        overrides=[],
        logging_level=logging_level,
        num_preprocess_workers=workers,
        mlflow_server_uri=None,
        experiment_name=None,
        hf_mlflow_log_artifacts=None,
        dry_run=False,
    )
    results: list[RunResult] = []
    train(lambda _: options, (), callbacks, document, results.append)
    return results[0]


def prepare(
    config: Config,
    overrides: Overrides = (),
    *,
    method: str | None = None,
    train_rows: Rows | None = None,
    validation_rows: Rows | None = None,
    workers: int = 1,
) -> PreparedData:
    """Render, mask and tokenize the rows of a run, or read them from the cache. Arguments are those of `run`.

    Returns:
        The rows as `datasets.Dataset` objects, their statistics, and a preview of the first ones.

    Raises:
        FinetuningError: the config, the tokenizer, the data or the template is invalid.
    """
    from finetuning.algorithms import ALGORITHMS
    from finetuning.cli.errors import locate_errors
    from finetuning.config.validation.validate import validate

    document, method = _document(config, overrides, method)
    document = _with_rows(document, train_rows, validation_rows)
    with locate_errors(document):
        from finetuning.training.setup import load_tokenizer
        from finetuning.training.setup import prepare as prepare_rows

        experiment = validate(document, ALGORITHMS[method].experiment).experiment
        return prepare_rows(experiment, ALGORITHMS[method], load_tokenizer(experiment), workers)


def generate(
    model: str | Path,
    prompts: str | Sequence[str | Chat],
    *,
    base: str | None = None,
    system: str | None = None,
    seed: int = 42,
    **hf_gen_params: Any,
) -> list[str]:
    """Return the answers of a model, an adapter or a run to texts, which are user messages, and to chats.

    Where the tokenizer has no chat template, texts are continued.

    Args:
        model: output directory of a run, folder of a model or an adapter, or a hub id. An adapter of a run is loaded
            on the base with the dtype and the quantization of its training.
        prompts: each is a text, or messages; a single text is one prompt.
        base: the base model of an adapter, if it is not the one that the adapter names.
        system: the system prompt of texts; by default that of the run's training data, none for an empty text.
        hf_gen_params: parameters of transformers' `GenerationConfig`, such as `max_new_tokens` (default 256) and
            `do_sample` (default false).

    Raises:
        FinetuningError: the model or a parameter is invalid.
    """
    from finetuning.cli.named_model import find_model
    from finetuning.inference.batching import DEFAULT_BATCH_TOKENS, plan_batches
    from finetuning.inference.generate import encode_prompts, generate_batches
    from finetuning.inference.generation_params import build_parameters, check_parameters
    from finetuning.inference.load import load_generator
    from finetuning.inference.prompts import GenerationPrompt

    gen_params = {"max_new_tokens": 256, "do_sample": False, **hf_gen_params}
    check_parameters(gen_params)
    named = find_model(str(model), base)
    generator = load_generator(named.conf, named.quant_conf)
    has_template = bool(generator.tokenizer.chat_template)
    system = named.system_prompt if system is None else system
    start = [{"role": "system", "content": system}] if system else []
    asked: list[GenerationPrompt] = []
    for index, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        if isinstance(prompt, str) and not has_template:
            asked.append(GenerationPrompt(id=index, text=prompt))
        else:
            chat: Any = [*start, {"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            asked.append(GenerationPrompt(id=index, messages=tuple(dict(message) for message in chat)))
    parameters = build_parameters(gen_params, generator.tokenizer, generator.model, generator.pad_token_id)
    encoded = encode_prompts(asked, generator.tokenizer, parameters.max_prompt_tokens)
    lengths = [len(prompt.ids) for prompt in encoded]
    batches = plan_batches(lengths, parameters.max_new_tokens, budget=DEFAULT_BATCH_TOKENS, max_rows=1)
    answers: dict[int, str] = {}
    for batch in generate_batches(generator, encoded, batches, parameters, seed):
        answers |= {index: generations[0].text for index, generations in batch.items()}
    return [answers[index] for index in range(len(asked))]


def merge(base: str | Path, adapter: str | Path, output: str | Path, **options: Any) -> MergeResult:
    """Merge an adapter into its base model, verify the result, and save it to a new folder.

    Args:
        options: of `finetuning.export.merge.merge.merge_adapters`, such as `verify` and `force`.

    Raises:
        FinetuningError: the two do not fit together, or the merged model differs from them.
    """
    from finetuning.export.merge.merge import merge_adapters

    return merge_adapters(str(base), [str(adapter)], Path(output), **options)


def _document(config: Config, overrides: Overrides, method: str | None) -> tuple[ConfigDocument, str]:
    """Return the config with its overrides, and the method.

    Raises:
        ConfigError: the file is invalid, or no method is named.
    """
    from finetuning.algorithms import ALGORITHMS
    from finetuning.config.validation.suggestions import did_you_mean
    from finetuning.config.yaml.document import ConfigDocument
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document

    document = ConfigDocument(json.loads(json.dumps(config))) if isinstance(config, Mapping) else read_document(config)
    pairs = overrides.items() if isinstance(overrides, Mapping) else ()
    texts = [f"{key}={json.dumps(value)}" for key, value in pairs] if pairs else list(overrides)
    document = apply_overrides(document, texts)
    name = method or document.get(("method",))
    if not isinstance(name, str):
        raise ConfigError("names no method", location=Location(document.file, key="method"), hint='Such as "sft".')
    if name not in ALGORITHMS:
        raise ConfigError(f'unknown method "{name}"', hint=did_you_mean(name, ALGORITHMS))
    return document, name


def _import_path(mixin: type) -> str:
    """Return `module:Class`. Raises ConfigError unless the class is found there."""
    if getattr(sys.modules.get(mixin.__module__), mixin.__qualname__, None) is not mixin:
        raise ConfigError(
            f"trainer_mixin {mixin.__qualname__} is not found in {mixin.__module__}, so the run could not name it",
            hint="Define the class at the top level of a module or notebook.",
        )
    return f"{mixin.__module__}:{mixin.__qualname__}"


def _with_rows(document: ConfigDocument, train: Rows | None, validation: Rows | None) -> ConfigDocument:
    """Write rows to files in the output directory, and return the config that reads these.

    Raises:
        ConfigError: the section has several datasets, or a row is not a mapping of values that JSON has.
    """
    for section, name, rows in (("training_data", "train", train), ("validation_data", "validation", validation)):
        if rows is None:
            continue
        output_dir = document.get(("training_args", "output_dir"))
        if not isinstance(output_dir, str):
            raise ConfigError("rows from Python need training_args.output_dir", location=Location(document.file))
        file = Path(output_dir) / "rows" / f"{name}.jsonl"
        _write_rows(rows, file, f"{name}_rows")
        datasets = document.get(("data_conf", section, "datasets"))
        if isinstance(datasets, list) and len(datasets) > 1:
            raise ConfigError(
                f"rows from Python cannot take the place of {len(datasets)} datasets",
                location=Location(document.file, key=f"data_conf.{section}.datasets"),
                hint="Leave only the one whose settings the rows need, or none.",
            )
        source = datasets[0] if isinstance(datasets, list) and datasets else {}
        kept = source if isinstance(source, dict) else {}
        document = document.with_value(
            ("data_conf", section), {"type": "CONCATENATION", "datasets": [{**kept, "path": str(file)}]}
        )
    return document


def _write_rows(rows: Rows, file: Path, section: str) -> None:
    """Write rows as JSON lines. Under a launcher every process writes the same file, so it appears at once.

    Raises:
        ConfigError: a row is not a mapping of values that JSON has.
        StorageError: the file cannot be written.
    """
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with staging.open("w", encoding="utf-8") as stream:
            stream.writelines(_json_line(row, f"row {index} of {section}") for index, row in enumerate(rows))
        staging.replace(file)
    except OSError as error:
        raise StorageError(f"{section} cannot be written: {error}") from None
    finally:
        if staging.exists():
            staging.unlink()


def _json_line(row: object, name: str) -> str:
    """Return a row as a line of JSON. Raises ConfigError unless it is a mapping of values that JSON has."""
    if not isinstance(row, Mapping):
        raise ConfigError(
            f"{name} is a {type(row).__name__}, not a mapping",
            hint="Pass a list of dictionaries or a datasets.Dataset; for pandas, frame.to_dict('records').",
        )
    try:
        return json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        hint = "Write the rows to a Parquet file and name it in data_conf."
        raise ConfigError(f"{name} has a value that JSON does not have: {error}", hint=hint) from None
