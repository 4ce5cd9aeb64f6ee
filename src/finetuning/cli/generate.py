"""`generate`: generate answers with a model or an adapter."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning import __version__
from finetuning.cli.errors import run_command
from finetuning.errors import ConfigError, Location

if TYPE_CHECKING:
    from finetuning.config.sections.experiment import GenerationModel
    from finetuning.config.sections.model import NoQuantization, Quantized
    from finetuning.config.yaml.document import ConfigDocument
    from finetuning.inference.output import Record
    from finetuning.inference.prompts import GenerationPrompt
    from finetuning.inference.runner import GenerationJob, GenerationProgress, ProgressCallback, RecordMaker
    from finetuning.inference.scoring import ScoreName

_DESCRIPTION = """\
Generate answers with a model or an adapter.

  generate CONFIG OUT [key.path=value ...]      from a YAML file; OUT ends in .yaml, .json or .jsonl
  generate --model M --text T                   continue one text
  generate --model M --text_file F              continue each line of a file
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of both forms of the command."""
    from finetuning.inference.scoring import METRICS

    parser = argparse.ArgumentParser(
        prog="generate", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="path of the YAML file")
    parser.add_argument("out", nargs="?", metavar="OUT", help="file to write the answers to")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="values that override the file's, such as model_conf.model=M",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive_int,
        help="maximum number of prompts per batch (default: limited by --batch-tokens)",
    )
    parser.add_argument(
        "--batch-tokens",
        type=_positive_int,
        help="maximum number of tokens per batch, prompts and answers (default: 32768)",
    )
    parser.add_argument("--seed", type=int, default=42, help="random seed for sampling (default: 42)")
    parser.add_argument(
        "--score", choices=list(METRICS), help="compare answers with correct_answers, and write OUT.scores.json"
    )
    parser.add_argument("--version", action="version", version=f"generate {__version__}")
    short = parser.add_argument_group("without a YAML file")
    short.add_argument("--model", help="path or hub id of a model, or path of an adapter")
    text = short.add_mutually_exclusive_group()
    text.add_argument("--text", help="text to continue")
    text.add_argument("--text_file", "--text-file", help="file with one text to continue per line")
    short.add_argument("--out_file", "--out-file", help="JSON file to write (default: inference_result.json)")
    short.add_argument(
        "--max_new_tokens",
        "--max-new-tokens",
        type=_positive_int,
        help="maximum number of tokens to generate (default: 20)",
    )
    short.add_argument(
        "--base_model_name_or_path",
        "--base-model-name-or-path",
        help="base model; overrides the one in the adapter's config",
    )
    short.add_argument("--use_flash_attn", "--use-flash-attn", action="store_true", help="use FlashAttention 2")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script and return its exit code."""
    return run_command(_generate, argv)


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _generate(argv: Sequence[str]) -> int:
    options = build_parser().parse_intermixed_args(argv)
    _check_form(options)
    return _from_flags(options) if options.model is not None else _from_config(options)


def _check_form(options: argparse.Namespace) -> None:
    flags = ("text", "text_file", "out_file", "max_new_tokens", "base_model_name_or_path", "use_flash_attn")
    used = ["--" + name for name in flags if getattr(options, name)]
    if options.model is not None:
        if options.config is not None:
            raise ConfigError(f"--model cannot be combined with a config ({options.config})")
        if options.text is None and options.text_file is None:
            raise ConfigError("--model requires --text or --text_file")
        if options.score:
            raise ConfigError("--score requires prompts with correct_answers: use a config with eval-data")
    elif used:
        raise ConfigError(f"{', '.join(used)}: only valid with --model")
    elif options.out is None:
        raise ConfigError("expected CONFIG and OUT, or --model with --text or --text_file; see generate --help")


def _from_config(options: argparse.Namespace) -> int:
    from finetuning.cli.errors import locate_errors
    from finetuning.config.sections.experiment import GenerationConfig
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.inference.generation_params import check_parameters
    from finetuning.inference.output import check_output
    from finetuning.inference.prompts import read_prompts
    from finetuning.inference.scoring import check_scorable

    output = Path(options.out)
    document = apply_overrides(read_document(options.config), options.overrides)
    validated = validate(document, GenerationConfig)
    for warning in validated.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    config = validated.experiment
    check_output(output)
    with locate_errors(validated.document):
        check_parameters(config.hf_gen_params)
        prompts = read_prompts(config.prompt_conf)
        if options.score:
            check_scorable(options.score, [prompt.correct_answers for prompt in prompts])
        job = _job(options, prompts, config.model_conf, config.quant_conf, config.hf_gen_params)
        from finetuning.inference.runner import answer_record

        records = _run(job, output, answer_record)
    if options.score:
        _score(records, options.score, output)
    return 0


def _from_flags(options: argparse.Namespace) -> int:
    from finetuning.cli.errors import locate_errors
    from finetuning.config.sections.model import NoQuantization
    from finetuning.inference.load import model_conf_of
    from finetuning.inference.prompts import read_lines, text_prompts

    output = Path(options.out_file or "inference_result.json")
    texts = [options.text] if options.text is not None else read_lines(options.text_file, "--text_file")
    prompts = text_prompts(texts, Location(key="--text" if options.text is not None else "--text_file"))
    attention = "flash_attention_2" if options.use_flash_attn else None
    with locate_errors(_flag_document(options)):
        model_conf = model_conf_of(options.model, options.base_model_name_or_path, attention)
        parameters = {"max_new_tokens": options.max_new_tokens or 20}
        job = _job(options, prompts, model_conf, NoQuantization(), parameters)
        from finetuning.inference.runner import input_output_record

        _run(job, output, input_output_record)
    return 0


def _flag_document(options: argparse.Namespace) -> ConfigDocument:
    """Return a config without values that maps each key to the flag, or the file, that its value comes from."""
    from finetuning.config.yaml.document import ConfigDocument, KeyPath, SourceSpan
    from finetuning.inference.load import ADAPTER_CONFIG

    model = Location(key="--model")
    adapter_config = Path(options.model).expanduser() / ADAPTER_CONFIG
    base = (
        Location(key="--base_model_name_or_path")
        if options.base_model_name_or_path is not None
        else Location(file=str(adapter_config), key="base_model_name_or_path")
        if adapter_config.is_file()
        else model
    )
    locations: dict[KeyPath, Location] = {
        ("model_conf",): model,
        ("model_conf", "model"): base,
        ("model_conf", "adapter"): model,
        ("model_conf", "model_args", "attn_implementation"): Location(key="--use_flash_attn"),
        ("hf_gen_params",): Location(key="--max_new_tokens"),
        ("hf_gen_params", "max_new_tokens"): Location(key="--max_new_tokens"),
        ("OUT",): Location(key="--out_file"),
    }
    return ConfigDocument({}, {path: SourceSpan(source=location) for path, location in locations.items()})


def _job(
    options: argparse.Namespace,
    prompts: Sequence[GenerationPrompt],
    model_conf: GenerationModel,
    quant_conf: NoQuantization | Quantized,
    gen_params: Mapping[str, object],
) -> GenerationJob:
    from finetuning.inference.batching import DEFAULT_BATCH_TOKENS
    from finetuning.inference.runner import GenerationJob

    return GenerationJob(
        prompts=prompts,
        model_conf=model_conf,
        quant_conf=quant_conf,
        gen_params=gen_params,
        seed=options.seed,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens or DEFAULT_BATCH_TOKENS,
    )


def _run(job: GenerationJob, output: Path, make_record: RecordMaker) -> list[Record]:
    """Generate the records of a job, and display progress on the terminal."""
    from finetuning.report.console import quiet_libraries

    quiet_libraries(bars=sys.stderr.isatty())
    from finetuning.inference.runner import ProgressCallback, generate_records

    if len(job.prompts) == 1 and sys.stdout.isatty():
        records = generate_records(job, output, ProgressCallback(on_text=_print_text, on_note=_print_note), make_record)
        print()
    else:
        with _progress() as progress:
            records = generate_records(job, output, progress, make_record)
    print(f"{len(records)} answer{'s'[: len(records) != 1]} in {output}", file=sys.stderr)
    return records


def _print_text(text: str) -> None:
    print(text, end="", flush=True)


def _print_note(note: str) -> None:
    print(f"note: {note}", file=sys.stderr, flush=True)


@contextmanager
def _progress() -> Iterator[ProgressCallback]:
    """Yield a callback that updates a progress bar on a terminal, or else prints a line for every 10%."""
    from finetuning.inference.runner import ProgressCallback

    if not sys.stderr.isatty():
        yield ProgressCallback(on_progress=_ProgressLines(), on_note=_print_note)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("generate", total=None, speed="")

        def update(progress: GenerationProgress) -> None:
            bar.update(task, total=progress.prompts_total, completed=progress.prompts_done, speed=_speed(progress))

        yield ProgressCallback(on_progress=update, on_note=_print_note)


class _ProgressLines:
    """Prints a line for every 10% of the prompts."""

    def __init__(self) -> None:
        self._tenths = 0

    def __call__(self, progress: GenerationProgress) -> None:
        tenths = progress.prompts_done * 10 // max(progress.prompts_total, 1)
        if tenths > self._tenths:
            self._tenths = tenths
            done = f"{progress.prompts_done} of {progress.prompts_total} prompts"
            print(f"{done}  {_speed(progress)}".rstrip(), file=sys.stderr, flush=True)


def _speed(progress: GenerationProgress) -> str:
    return f"{progress.tokens / progress.seconds:,.0f} tokens/s" if progress.seconds else ""


def _score(records: Sequence[Record], name: ScoreName, output: Path) -> None:
    from finetuning.inference.output import write_atomically
    from finetuning.inference.scoring import score

    scores = score(records, name)
    path = output.with_name(f"{output.name}.scores.json")
    text = json.dumps(scores.as_dict(), indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda stream: stream.write(text))
    print(scores.table())


if __name__ == "__main__":
    sys.exit(main())
