"""`finetuning evaluate`: compare a model with its base model on held-out rows, or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import Parser, run_command
from finetuning.errors import ConfigError, FinetuningError, Interrupted, Location

if TYPE_CHECKING:
    from finetuning.cli.named_model import NamedModel
    from finetuning.config.sections.data import DatasetSource
    from finetuning.config.sections.training import FinalEvaluation
    from finetuning.data.samples import JsonObject
    from finetuning.inference.evaluation import Candidate, Evaluation
    from finetuning.inference.prompts import GenerationPrompt
    from finetuning.inference.runner import ProgressCallback
    from finetuning.inference.scoring import ScoreName

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_DATA_KEY = "--data"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `finetuning evaluate`."""
    from finetuning.inference.scoring import METRICS

    parser = Parser(
        prog="finetuning evaluate",
        usage="%(prog)s RUN|MODEL [MODEL ...] --data PATH [options]\n"
        "       %(prog)s RUN|MODEL [MODEL ...] --tasks TASK,... [options]",
        description="Evaluate the model of a run and its base model on the same held-out rows, or on tasks of"
        " lm-evaluation-harness, and print a table with 95 % confidence intervals. The results are written to"
        " `evaluations` in the run, into its report, and into its MLflow run.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="RUN|MODEL",
        help="output directory of a run, path of an adapter, or path or hub id of a model; further ones, such as a"
        " merged model, are compared with the first one's base model too",
    )
    parser.add_argument("--no-base", action="store_true", help="leave out the base model")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the results (default: in the run)")
    parser.add_argument("--seed", type=int, default=42, help="random seed (default: 42)")
    rows = parser.add_argument_group("on rows of a file")
    rows.add_argument(
        "--data",
        metavar="PATH",
        help="file, folder or hub dataset of rows with messages, prompt_messages or prompt, and correct_answers"
        " (default: the run's validation data)",
    )
    rows.add_argument("--split", help="split of a hub dataset or a folder")
    rows.add_argument(
        "--columns", action="append", default=[], metavar="FROM=TO", help="rename a column; may be repeated"
    )
    rows.add_argument("--max-rows", type=int, metavar="N", help="maximum number of rows, from the start")
    rows.add_argument(
        "--score", choices=list(METRICS), default="exact", help="how answers are compared (default: exact)"
    )
    rows.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="maximum tokens of an answer (default: 256)"
    )
    harness = parser.add_argument_group("on tasks of lm-evaluation-harness")
    harness.add_argument("--tasks", help="names of tasks, separated by commas")
    harness.add_argument("--include-path", type=Path, metavar="DIR", help="folder with YAML files of tasks")
    harness.add_argument("--limit", type=int, metavar="N", help="maximum number of rows of each task")
    harness.add_argument("--batch-size", default="8", metavar="N", help="rows per batch, or auto (default: 8)")
    harness.add_argument(
        "--lm-eval", metavar="PROGRAM", default="lm_eval", help="the program lm_eval, if it is in another environment"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    return run_command(_evaluate, argv)


def _evaluate(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    if options.data is not None and options.tasks is not None:
        raise ConfigError("--data cannot be combined with --tasks")
    from finetuning.cli.named_model import find_model

    models = [find_model(name) for name in options.models]
    for note in dict.fromkeys(note for model in models for note in model.notes):
        _note(note)
    evaluation = (_on_rows if options.tasks is None else _on_tasks)(options, models)
    print(evaluation.table())
    _keep(evaluation, models[0].run, options.output)
    return 0


def _on_rows(options: argparse.Namespace, models: Sequence[NamedModel]) -> Evaluation:
    from finetuning.config.sections.data import DatasetSource

    if options.data is not None:
        columns = dict(_pair(text) for text in options.columns)
        source = DatasetSource(path=options.data, split=options.split, columns=columns)
    else:
        source = _validation_data(models[0])
    if options.max_rows is not None:
        source = source.model_copy(update={"max_rows": options.max_rows})
    return _score_rows(
        source,
        _candidates(models, with_base=not options.no_base),
        options.score,
        options.max_new_tokens,
        folder=_folder(models[0].run, options.output),
        seed=options.seed,
        key=_DATA_KEY,
    )


def _pair(text: str) -> tuple[str, str]:
    before, equals, after = text.partition("=")
    if not (before and equals and after):
        raise ConfigError(
            "is not FROM=TO, such as completion=correct_answers", location=Location(key=f"--columns {text}")
        )
    return before, after


def _validation_data(model: NamedModel) -> DatasetSource:
    """Return the validation dataset of the run.

    Raises:
        ConfigError: it has none of its own.
    """
    from finetuning.cli.named_model import resolved_config
    from finetuning.config.sections.data import DatasetSource

    config = resolved_config(model.run) if model.run is not None else {}
    data = (config.get("data_conf") or {}).get("validation_data") or {}
    datasets = data.get("datasets") or []
    if data.get("type") != "CONCATENATION" or len(datasets) != 1:
        raise ConfigError(
            "nothing says which rows to evaluate on",
            location=Location(key=_DATA_KEY),
            hint="Name a file. Its default is the run's validation data, if that is a single dataset.",
        )
    used = {key: datasets[0][key] for key in ("path", "split", "subset", "revision", "columns") if datasets[0].get(key)}
    return DatasetSource.model_validate(used)


def _score_rows(
    source: DatasetSource,
    candidates: Sequence[Candidate],
    metric: ScoreName,
    max_new_tokens: int,
    *,
    folder: Path,
    seed: int,
    key: str,
) -> Evaluation:
    from finetuning.inference.evaluation import evaluate_answers
    from finetuning.report.console import quiet_libraries

    prompts = read_scored_rows(source, metric, key)
    path = source.path if isinstance(source.path, str) else ", ".join(source.path)
    folder.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    return evaluate_answers(
        candidates,
        prompts,
        metric,
        {"do_sample": False, "max_new_tokens": max_new_tokens},
        name=_NOT_IN_NAMES.sub("-", f"{Path(path).stem}-{metric}"),
        source=path,
        folder=folder,
        seed=seed,
        progress=_progress,
    )


def read_scored_rows(source: DatasetSource, metric: ScoreName, key: str) -> list[GenerationPrompt]:
    """Return the prompts of a dataset.

    Args:
        key: config key or flag of the dataset, for error messages.

    Raises:
        DataError: the rows are invalid, or have nothing to compare answers with.
    """
    from finetuning.config.sections.experiment import EvalData
    from finetuning.inference.prompts import read_prompts
    from finetuning.inference.scoring import check_scorable

    prompts = read_prompts(EvalData(type="eval-data", data=source), key)
    check_scorable(metric, [prompt.correct_answers for prompt in prompts])
    return prompts


def _candidates(models: Sequence[NamedModel], *, with_base: bool) -> list[Candidate]:
    """Return the models to compare, the base model of the first one before them."""
    from finetuning.inference.evaluation import Candidate

    candidates: list[Candidate] = []
    for model in models:
        label = "adapter" if model.conf.adapter is not None else "model"
        if len(models) > 1 and model.conf.adapter is None:
            label = model.folder.name or label
        labels = [candidate.label for candidate in candidates]
        label = label if label not in labels else f"{label}-{len(candidates) + 1}"
        candidates.append(Candidate(label, model.conf, model.quant_conf))
    base = _base_of(models[0]) if with_base else None
    return candidates if base is None else [base, *candidates]


def _base_of(model: NamedModel) -> Candidate | None:
    """Return the base model, with the tokenizer of the fine-tuned one, so that both are shown the same prompts.

    None, after a note, where it cannot be compared.
    """
    from finetuning.cli.named_model import base_arguments, resolved_config
    from finetuning.config.sections.experiment import GenerationModel
    from finetuning.inference.evaluation import Candidate

    tokenizer = str(model.folder) if (model.folder / "tokenizer.json").is_file() else None
    if model.conf.adapter is not None:
        conf = model.conf.model_copy(update={"adapter": None, "tokenizer": tokenizer})
        return Candidate("base", conf, model.quant_conf)
    config = resolved_config(model.run) if model.run is not None else {}
    name = (config.get("run_conf") or {}).get("model")
    if not name:
        _note("the base model is not known: only the model itself is evaluated")
        return None
    if _has_new_tokens(str(name), model.folder):
        _note(f"the base model {name} is left out: it has no rows for tokens that were added to the tokenizer")
        return None
    arguments: Mapping[str, object] = base_arguments(config, is_base=True)
    return Candidate(
        "base", GenerationModel.model_validate({"model": name, "model_args": arguments, "tokenizer": tokenizer})
    )


def _has_new_tokens(base: str, folder: Path) -> bool:
    """Return whether the tokenizer in a folder has tokens beyond the vocabulary of the base model."""
    from finetuning.config.pretrained_config import read_pretrained_config
    from finetuning.export.auxiliary_files import max_token_id

    config: JsonObject = dict(read_pretrained_config(base) or {})
    text_config: JsonObject = config.get("text_config") or config
    rows = text_config.get("vocab_size")
    largest = max_token_id(folder)
    return isinstance(rows, int) and largest is not None and largest >= rows


def _progress(candidate: Candidate) -> ProgressCallback:
    from finetuning.inference.runner import GenerationProgress, ProgressCallback

    done = 0

    def update(progress: GenerationProgress) -> None:
        nonlocal done
        tenths = progress.prompts_done * 10 // max(progress.prompts_total, 1)
        if tenths > done:
            done = tenths
            print(
                f"{candidate.label}: {progress.prompts_done} of {progress.prompts_total} rows",
                file=sys.stderr,
                flush=True,
            )

    return ProgressCallback(on_progress=update, on_note=_note)


def _on_tasks(options: argparse.Namespace, models: Sequence[NamedModel]) -> Evaluation:
    from finetuning.inference.lm_eval import HarnessOptions, evaluate_tasks

    harness = HarnessOptions(
        program=options.lm_eval,
        tasks=tuple(name.strip() for name in options.tasks.split(",") if name.strip()),
        include_path=options.include_path,
        limit=options.limit,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    folder = _folder(models[0].run, options.output)
    name = _NOT_IN_NAMES.sub("-", options.tasks)
    candidates = _candidates(models, with_base=not options.no_base)
    return evaluate_tasks(candidates, harness, name=name, folder=folder, on_note=_note)


def _folder(run: Path | None, output: Path | None) -> Path:
    from finetuning.report.run_folder import EVALUATIONS

    return output or (run / EVALUATIONS if run is not None else Path(EVALUATIONS))


def _keep(evaluation: Evaluation, run: Path | None, output: Path | None) -> None:
    """Write the results next to the run, into its report and into its MLflow run."""
    from finetuning.inference.evaluation import metrics_of

    folder = _folder(run, output)
    folder.mkdir(parents=True, exist_ok=True)
    replaced = (folder / f"{evaluation.name}.json").exists()
    path = evaluation.write(folder)
    _note(f"results in {path}" + (", in place of earlier ones" if replaced else ""))
    if run is None or output is not None:
        return
    from finetuning.report.html import write_report_or_warn
    from finetuning.report.run_folder import read_run_record
    from finetuning.tracking.mlflow.sync import add_to_run

    write_report_or_warn(run)
    record = read_run_record(run) or {}
    steps = ((record.get("plan") or {}).get("steps") or {}).get("total") or 0
    error = add_to_run(run, metrics_of(evaluation), [path], steps)
    if error is not None:
        _note(f"MLflow did not take the results ({error}); upload them with: finetuning sync {run}")


def evaluate_final_model(run: Path, conf: FinalEvaluation) -> None:
    """Evaluate the final model of a run and its base model at the end of training. An error is printed as a warning.

    Raises:
        Interrupted: SIGINT or SIGTERM was received.
    """
    from finetuning.cli.named_model import find_model

    try:
        model = find_model(str(run))
        evaluation = _score_rows(
            conf.data,
            _candidates([model], with_base=conf.compare_base),
            conf.score,
            conf.max_new_tokens,
            folder=_folder(run, None),
            seed=42,
            key="final_evaluation.data",
        )
        print(evaluation.table())
        _keep(evaluation, run, None)
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001  the run has succeeded: its model is saved
        problems = error.problems if isinstance(error, FinetuningError) else [f"{type(error).__name__}: {error}"]
        for problem in problems:
            print(f"warning: the final model was not evaluated: {problem}", file=sys.stderr)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
