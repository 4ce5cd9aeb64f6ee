"""`finetuning init`: write a config for a model and data, after looking at both."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from finetuning.algorithms import ALGORITHMS
from finetuning.cli.errors import Parser, check_output_file, method_argument, run_command
from finetuning.errors import ConfigError, DataError, FinetuningError, Location

if TYPE_CHECKING:
    from finetuning.data.samples import JsonObject
    from finetuning.model.tokenizer import LoadedTokenizer

T = TypeVar("T")
_HEAD_ROWS = 1000
_MIN_ROWS_TO_SPLIT = 20
_RARE_FORMATS = ("tokens", "segments", "response_template", "input_output")
"""Formats that are not proposed to somebody whose rows have none."""
_KINDS = {"dpo": "preference", "reward": "preference", "orpo": "preference", "cpo": "preference"}
_KINDS |= {"sft": "sft", "kto": "unpaired", "grpo": "prompt"}
# Learning rates of an adapter and of all weights.
_RATES = {
    "sft": ("1.0e-4", "1.0e-5"),
    "dpo": ("5.0e-6", "5.0e-7"),
    "kto": ("5.0e-6", "5.0e-7"),
    "orpo": ("8.0e-6", "5.0e-6"),
    "cpo": ("1.0e-6", "5.0e-7"),
    "reward": ("1.0e-4", "1.0e-5"),
    "grpo": ("1.0e-5", "1.0e-6"),
}
_REWARD = """
grpo_args:
  max_prompt_length: {length}
  rewards:
    - type: exact_match          # 1 where the completion equals the answer; docs/reference/config.md has others
      column: {answers}
"""


@dataclass(frozen=True)
class DataSummary:
    """What the first rows of the data are."""

    rows: int
    """How many there are, counted up to a limit."""
    format: str
    columns: Mapping[str, str]
    """Columns to rename, so that the rows have the format."""
    first: JsonObject


@dataclass(frozen=True)
class Choices:
    """What the config is made of."""

    method: str
    model: str
    data: str
    output: Path
    adapter: str
    summary: DataSummary
    max_length: int
    bf16: bool = False
    template: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning init` and return its exit code."""
    return run_command(_init, argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `finetuning init`."""
    parser = Parser(
        prog="finetuning init",
        description="Look at a model's tokenizer and at the first rows of the data, and write a config that trains the"
        " model on them. Asks for what is not given, in a terminal.",
    )
    parser.add_argument("--model", help="folder, or id on the Hugging Face Hub")
    parser.add_argument("--data", help="file, folder or dataset id on the Hub")
    parser.add_argument(
        "--method", type=method_argument, help=f"{', '.join(ALGORITHMS)} (default: by the columns of the data)"
    )
    parser.add_argument(
        "--adapter", choices=("lora", "qlora", "none"), default="lora", help="what is trained (default: lora)"
    )
    parser.add_argument("--output", type=Path, default=Path("config.yaml"), help="file to write (default: config.yaml)")
    return parser


def _init(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    from finetuning.report.console import configure_logging, open_console, wrap_words

    configure_logging("INFO", is_main=True)
    if options.output.exists():
        raise ConfigError(f"{options.output} exists", hint="Choose another file with --output.")
    check_output_file(options.output, "--output")
    data, (method, summary) = _asked_until_valid(
        "data",
        options.data,
        "Data: a file, a folder or a dataset id on the Hub",
        lambda data: look_at_data(data, options.method),
    )
    summary = _as_chat(summary)
    print(f"{data}: {_counted(summary.rows)}, {summary.format}{_renamed(summary)}; method {method}")
    draft = Choices(method, "", data, options.output, options.adapter, summary, 0)
    model, choices = _asked_until_valid(
        "model",
        options.model,
        "Model: a folder or an id on the Hub",
        lambda model: look_at_model(replace(draft, model=model)),
    )
    text = config_text(choices)
    _check(text, choices)
    print(wrap_words(f"{model}: {choices.template}", open_console().width, 2))
    options.output.write_text(text, encoding="utf-8")
    name = options.output
    print(f"{name} is written. Next:")
    for command, purpose in (
        (f"finetuning preview {method} {name}", "look at rows with their loss mask"),
        (f"finetuning {method} {name} --dry-run", "check everything that needs no weights"),
        (f"finetuning {method} {name}", "train"),
    ):
        print(f"  # {purpose}\n  {command}")
    return 0


def _asked_until_valid(option: str, value: str | None, question: str, look: Callable[[str], T]) -> tuple[str, T]:
    """Return the value of an option and what was seen of it. In a terminal it is asked for until it is valid.

    Raises:
        FinetuningError: the option's value is invalid, or there is none and no terminal to ask on.
    """
    from finetuning.cli.errors import locate_errors
    from finetuning.config.yaml.document import ConfigDocument, SourceSpan
    from finetuning.report.console import open_console, wrap_words

    # The keys of the config that is not written yet, in the user's terms.
    sources = {("--data",): "--data", ("run_conf",): "--model"}
    options = ConfigDocument({}, {path: SourceSpan(source=Location(key=name)) for path, name in sources.items()})
    if value:
        with locate_errors(options):
            return value, look(value)
    while True:
        answer = _ask(option, question)
        try:
            with locate_errors(options):
                return answer, look(answer)
        except FinetuningError as error:
            for problem in error.problems:
                print(wrap_words(str(problem), open_console().width, 2))


def _ask(option: str, question: str) -> str:
    """Return the answer to a question on the terminal.

    Raises:
        ConfigError: there is no terminal, or no answer.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError(f"--{option} is required without a terminal")
    print(f"{question}: ", end="", flush=True)
    answer = sys.stdin.readline().strip()
    if not answer:
        raise ConfigError(f"no answer; give it with --{option}")
    return answer


def look_at_data(path: str, method: str | None) -> tuple[str, DataSummary]:
    """Return the method that the rows are for, unless one is given, and what the rows are.

    Raises:
        DataError: the data cannot be read, or no method trains on such rows.
    """
    from finetuning.config.sections.data import DatasetSource
    from finetuning.data.formats import KINDS
    from finetuning.data.formats.row_format import propose_columns
    from finetuning.data.open_dataset import unparsed_rows
    from finetuning.data.samples import Row
    from finetuning.data.sources import Line
    from finetuning.errors import Problem

    source = DatasetSource.model_validate({"path": path})
    unparsed = list(islice(unparsed_rows(source, "--data"), _HEAD_ROWS + 1))
    rows = [row.row() if isinstance(row, Line) else row for row in unparsed[:1]]
    if not rows or isinstance(rows[0], Problem):
        raise DataError([rows[0]] if rows and isinstance(rows[0], Problem) else f"{path} has no rows")
    first = rows[0]
    # Rows of pairs and labels have a prompt as well: they are tried before those of prompts.
    methods = [method] if method else ["dpo", "kto", "sft", "grpo"]
    for name in methods:
        for row_format in KINDS[_KINDS[name]]:
            if row_format.name != "response_template" and row_format.matches(first):
                return name, DataSummary(len(unparsed), row_format.name, {}, first.values)
    for name in methods:
        for row_format in KINDS[_KINDS[name]]:
            if columns := propose_columns(first.values, row_format.name):
                renamed = Row({columns.get(key, key): value for key, value in first.values.items()}, first.location)
                format_name = next((item.name for item in KINDS[_KINDS[name]] if item.matches(renamed)), None)
                if format_name:
                    return name, DataSummary(len(unparsed), format_name, columns, first.values)
    columns_there = ", ".join(first.values) or "none"
    expected = "; ".join(
        f"{name}: "
        + " or ".join(" + ".join(item.columns) for item in KINDS[_KINDS[name]] if item.name not in _RARE_FORMATS)
        for name in methods
    )
    raise DataError(
        f"{path}: no row format has the columns {columns_there}",
        hint=f"Expected are, for {expected}. docs/reference/data-formats.md has all of them.",
    )


def _as_chat(summary: DataSummary) -> DataSummary:
    """Return rows of a prompt and its completion, both texts, as questions and answers of a chat.

    As `prompt_completion` they would be joined as they are, without the chat template that the model is served with.
    """
    names = {name: column for column, name in summary.columns.items()}
    prompt, completion = (names.get(name, name) for name in ("prompt", "completion"))
    is_text = isinstance(summary.first.get(prompt), str) and isinstance(summary.first.get(completion), str)
    if summary.format != "prompt_completion" or not is_text:
        return summary
    return replace(summary, format="alpaca", columns={prompt: "instruction", completion: "output"})


def look_at_model(choices: Choices) -> Choices:
    """Return the choices with the length of the rows and the dtype, after loading the tokenizer.

    Raises:
        ModelError: the model or its tokenizer does not exist.
        DataError: the template cannot render the rows.
    """
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.reader import parse_document
    from finetuning.model.hardware import training_device
    from finetuning.training.setup import load_tokenizer

    draft = replace(choices, max_length=2048)
    experiment = validate(parse_document(config_text(draft)), ALGORITHMS[choices.method].experiment).experiment
    tokenizer = load_tokenizer(experiment)
    device = training_device(use_cpu=False)
    return replace(
        choices,
        max_length=_suggest_length(draft, tokenizer),
        bf16=device.kind != "cpu" and device.support_for("bf16").is_supported,
        template=str(tokenizer),
    )


def _suggest_length(choices: Choices, tokenizer: LoadedTokenizer) -> int:
    """Return the power of 2 that the longest of the first rows needs, at least 256 and at most 4096 tokens."""
    from finetuning.config.sections.data import DatasetSource
    from finetuning.data.open_dataset import unparsed_rows
    from finetuning.data.samples import Row
    from finetuning.data.sources import Line

    source = DatasetSource.model_validate({"path": choices.data})
    rows = (row.row() if isinstance(row, Line) else row for row in islice(unparsed_rows(source, "--data"), 100))
    texts = [json.dumps(row.values, ensure_ascii=False, default=str) for row in rows if isinstance(row, Row)]
    longest = max((len(tokenizer.tokenizer.encode(text)) for text in texts), default=0)
    return next(length for length in (256, 512, 1024, 2048, 4096) if longest <= length or length == 4096)


def config_text(choices: Choices) -> str:
    """Return the config as YAML with comments."""
    lines = [
        f"# {ALGORITHMS[choices.method].title}: written by `finetuning init`.",
        f"# All keys: docs/reference/config.md, or `finetuning schema {choices.method}`.",
        f"method: {choices.method}",
        "",
        *_data_lines(choices),
        *_training_lines(choices),
        *_adapter_lines(choices),
        "run_conf:",
        f"  model: {_quoted(choices.model)}",
        "",
        *_method_lines(choices),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _data_lines(choices: Choices) -> list[str]:
    summary = choices.summary
    columns = ", ".join(f"{_quoted(column)}: {name}" for column, name in summary.columns.items())
    lines = [
        "data_conf:",
        "  training_data:",
        "    type: CONCATENATION",
        "    datasets:",
        f"      - path: {_quoted(choices.data)}",
        f"        format: {summary.format}",
        *([f"        columns: {{{columns}}}    # the dataset's names: the engine's"] if columns else []),
        "  validation_data:",
    ]
    if _splits(choices):
        lines += ["    type: AUTO_SPLIT            # hold rows out, to see when the model starts to overfit"]
        lines += [f"    ratio: {0.1 if summary.rows <= _HEAD_ROWS else 0.02}"]
    else:
        lines += ["    type: NONE                  # too few rows to hold any out"]
    return [*lines, "  # chat_template_name: chat-ml  # by default the tokenizer's own template", ""]


def _training_lines(choices: Choices) -> list[str]:
    rate = _RATES[choices.method][choices.adapter == "none"]
    what = "all weights" if choices.adapter == "none" else "an adapter"
    epochs = 3 if choices.summary.rows <= _HEAD_ROWS else 1
    lines = [
        "training_args:",
        "  output_dir: out",
        f"  num_train_epochs: {epochs}",
        f"  learning_rate: {rate}         # usual for {what}; the first key to vary",
        "  lr_scheduler_type: cosine",
        "  warmup_steps: 0.03            # below 1: a share of all steps",
    ]
    lines += ["  bf16: true"] if choices.bf16 else []
    if choices.method == "grpo":
        lines += ["  num_generations: 8            # completions per prompt", "  max_completion_length: 256"]
    elif choices.method != "sft":
        lines += [f"  max_length: {choices.max_length}"]
    lines += ["  save_strategy: epoch", "  save_total_limit: 2"]
    if _splits(choices):
        lines += [
            "  eval_strategy: epoch",
            "  load_best_model_at_end: true  # the final model is the best on the rows held out",
        ]
    total = 64 if choices.method == "grpo" else 8 if choices.summary.rows < 500 else 32
    return [
        *lines,
        "",
        "batchsize_conf:",
        f"  total_train_batch_size: {total}      # rows per optimizer step, on any number of processes",
        f"  max_per_device_train_batch_size: {'auto' if choices.method == 'sft' else 2}   # rows per forward pass"
        + (", as many as fit" if choices.method == "sft" else "; raise it while memory lasts"),
        "",
    ]


def _adapter_lines(choices: Choices) -> list[str]:
    if choices.adapter == "none":
        return ["peft_conf:", "  peft_type: NO_PEFT            # train all weights", ""]
    lines = [
        "peft_conf:",
        "  peft_type: LORA",
        f"  task_type: {'SEQ_CLS' if choices.method == 'reward' else 'CAUSAL_LM'}",
        "  peft_kwargs: {r: 16, lora_alpha: 32, target_modules: all-linear}",
        "",
    ]
    if choices.adapter == "qlora":
        lines += [
            "quant_conf:                     # the base model in 4 bit",
            "  quantization_type: bits-and-bytes",
            "  load_in_4bit: true",
            "  bnb_4bit_quant_type: nf4",
            "  bnb_4bit_use_double_quant: true",
            "  bnb_4bit_compute_dtype: bfloat16",
            "",
        ]
    return lines


def _method_lines(choices: Choices) -> list[str]:
    if choices.method == "sft":
        # Plain text has no completions: all of it is trained.
        completions = str(choices.summary.format not in ("text", "tokens")).lower()
        return [
            "sft_args:",
            f"  max_seq_length: {choices.max_length}         # longer rows are left out, and counted",
            f"  train_on_completions_only: {completions}",
        ]
    if choices.method == "grpo":
        names = [name for name in choices.summary.first if name not in ("prompt", "prompt_messages", "messages")]
        answers = next((name for name in ("correct_answers", "answer", "solution", "target") if name in names), None)
        text = _REWARD.format(length=choices.max_length, answers=answers or (names or ["correct_answers"])[0])
        return text.strip("\n").split("\n")
    return []


def _splits(choices: Choices) -> bool:
    return choices.summary.rows >= _MIN_ROWS_TO_SPLIT and choices.method != "grpo"


def _quoted(text: str) -> str:
    """Return text as a YAML value."""
    import yaml

    return yaml.safe_dump(text, width=10_000).partition("\n")[0]


def _counted(rows: int) -> str:
    return f"more than {_HEAD_ROWS:,} rows" if rows > _HEAD_ROWS else f"{rows:,} row{'s' * (rows != 1)}"


def _renamed(summary: DataSummary) -> str:
    pairs = ", ".join(f"{column} as {name}" for column, name in summary.columns.items())
    return f" ({pairs})" if pairs else ""


def _check(text: str, choices: Choices) -> None:
    """Validate the config before it is written.

    Raises:
        ConfigError: what was made of the answers is not valid.
    """
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.reader import parse_document

    validate(parse_document(text), ALGORITHMS[choices.method].experiment)
