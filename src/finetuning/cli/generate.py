"""`generate`: generate answers with a model or an adapter."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from finetuning import __version__
from finetuning.cli.errors import Parser, positive_int, run_command
from finetuning.config.validation.suggestions import near_file
from finetuning.errors import ConfigError, Interrupted, Location

if TYPE_CHECKING:
    from finetuning.cli.named_model import NamedModel, TrainingRow
    from finetuning.config.sections.experiment import GenerationModel
    from finetuning.config.sections.model import NoQuantization, Quantized
    from finetuning.config.yaml.document import ConfigDocument
    from finetuning.inference.generate import EncodedPrompt, Generation
    from finetuning.inference.output import Record
    from finetuning.inference.prompts import GenerationPrompt
    from finetuning.inference.runner import GenerationJob, GenerationProgress, ProgressCallback, RecordMaker
    from finetuning.inference.scoring import ScoreName
    from finetuning.inference.vllm import VllmBackend

_DESCRIPTION = """\
Generate answers with a model or an adapter.

  generate CONFIG OUT [key.path=value ...]      from a YAML file; OUT ends in .yaml, .json or .jsonl
  generate RUN [OUT]                            answer the first training prompt of a run
  generate RUN [OUT] --text T                   answer a text; RUN may be a model or an adapter as well
  generate --model M --text T                   the same; also writes inference_result.json
  generate --model M --text_file F              answer each line of a file

A text is answered with the model's chat template if it has one. Otherwise, or
with --raw, it is continued. RUN is the output directory of a run: generate
loads its final model, or else its newest checkpoint, with the system prompt of
training.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of both forms of the command."""
    from finetuning.inference.scoring import METRICS

    parser = Parser(prog="generate", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="path of the YAML file; or a run, a model or an adapter"
    )
    parser.add_argument("out", nargs="?", metavar="OUT", help="file to write the answers to")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key.path=value",
        help="values that override the file's, such as model_conf.model=M",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        help="maximum number of prompts per batch (default: limited by --batch-tokens)",
    )
    parser.add_argument(
        "--batch-tokens",
        type=positive_int,
        help="maximum number of tokens per batch, prompts and answers (default: 32768)",
    )
    parser.add_argument("--seed", type=int, default=42, help="random seed for sampling (default: 42)")
    parser.add_argument(
        "--score", choices=list(METRICS), help="compare answers with correct_answers, and write OUT.scores.json"
    )
    parser.add_argument("--version", action="version", version=f"generate {__version__}")
    short = parser.add_argument_group("without a YAML file")
    short.add_argument("--model", help="path or hub id of a model, path of an adapter, or output directory of a run")
    text = short.add_mutually_exclusive_group()
    text.add_argument("--text", help="text to answer")
    text.add_argument("--text_file", "--text-file", help="file with one text to answer per line")
    short.add_argument(
        "--raw", action="store_true", help="continue the texts as they are, without the model's chat template"
    )
    short.add_argument("--system", help="system prompt (default: that of the run's training data)")
    short.add_argument(
        "--out_file",
        "--out-file",
        "--output",
        help="file to write; with --model the default is inference_result.json, or a new name if that exists",
    )
    short.add_argument(
        "--max_new_tokens",
        "--max-new-tokens",
        type=positive_int,
        help="maximum number of tokens to generate (default: 512 with a chat template, 20 without)",
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


def _generate(argv: Sequence[str]) -> int:
    options = build_parser().parse_intermixed_args(argv)
    name = options.model if options.model is not None else _positional_model(options)
    _check_form(options, name)
    return _from_flags(options, name) if name is not None else _from_config(options)


def _positional_model(options: argparse.Namespace) -> str | None:
    """Return the model that the first argument names; None if it is a config."""
    name = options.config
    if name is None or Path(name).is_file():
        return None
    has_text = options.text is not None or options.text_file is not None
    return name if has_text or Path(name).expanduser().is_dir() else None


def _check_form(options: argparse.Namespace, name: str | None) -> None:
    """Raise ConfigError unless the options of one form are given, and no others."""
    if name is None and options.out is None and options.config is not None and not Path(options.config).exists():
        raise ConfigError(
            "no such run, model folder or config",
            location=Location(file=options.config),
            hint=near_file(options.config) or "With --text it may be a model of the Hub.",
        )
    flags = (
        *("text", "text_file", "raw", "system", "out_file", "max_new_tokens", "base_model_name_or_path"),
        "use_flash_attn",
    )
    used = ["--" + flag for flag in flags if getattr(options, flag)]
    if name is not None:
        from finetuning.cli.named_model import is_run

        if options.model is not None and options.config is not None:
            raise ConfigError(f"--model cannot be combined with a config ({options.config})")
        if options.text is None and options.text_file is None and not is_run(Path(name).expanduser()):
            raise ConfigError(f"{'--model' if options.model is not None else name} requires --text or --text_file")
        if options.score:
            raise ConfigError("--score requires prompts with correct_answers: use a config with eval-data")
        if options.overrides:
            raise ConfigError(f"{options.overrides[0]}: only valid with a config")
        if options.out is not None and options.out_file is not None:
            raise ConfigError(f"--out_file cannot be combined with OUT ({options.out})")
    elif used:
        raise ConfigError(f"{', '.join(used)}: only valid with --model, or a run, in place of a config")
    elif options.out is None:
        raise ConfigError("expected RUN, CONFIG and OUT, or --model with --text or --text_file; see generate --help")


def _from_config(options: argparse.Namespace) -> int:
    from finetuning.cli.errors import locate_errors
    from finetuning.config.sections.experiment import EvalData, GenerationConfig
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
        vllm = config.vllm_conf if config.backend == "vllm" else None
        backend: VllmBackend | None = None
        if vllm is not None:
            from finetuning.cli.vllm_process import running_vllm
            from finetuning.inference.vllm import VllmBackend, check_job

            backend = VllmBackend(vllm, partial(running_vllm, vllm))
            check_job(vllm, config.quant_conf, config.hf_gen_params)
        prompts = read_prompts(config.prompt_conf)
        if options.score:
            check_scorable(options.score, [prompt.correct_answers for prompt in prompts])
        job = _job(options, prompts, config.model_conf, config.quant_conf, config.hf_gen_params, backend)
        if isinstance(config.prompt_conf, EvalData):
            job = replace(job, images=config.prompt_conf.images)
        from finetuning.inference.runner import answer_record

        records = _run(job, output, answer_record)
    if options.score:
        _score(records, options.score, output)
    return 0


_DEFAULT_OUTPUT = Path("inference_result.json")
_COMPLETION_TOKENS = 20
"""Maximum number of tokens of a text without a chat template, as in fms-hf-tuning."""


def _from_flags(options: argparse.Namespace, name: str) -> int:
    from finetuning.cli.errors import locate_errors
    from finetuning.cli.named_model import find_model
    from finetuning.inference.output import check_output
    from finetuning.inference.runner import answer_record, input_output_record
    from finetuning.report.console import quiet_libraries

    output = _output_file(options)
    texts = _texts(options)
    attention = "flash_attention_2" if options.use_flash_attn else None
    with locate_errors(_flag_document(options, name)):
        model = find_model(name, options.base_model_name_or_path, attention)
        for note in model.notes:
            _print_note(note)
        if output is not None:
            check_output(output)
        quiet_libraries(bars=sys.stderr.isatty())
        row = model.first_row() if texts is None else None
        prompts = _row_prompt(row) if row is not None else _text_prompts(options, model, texts or [])
        is_chat = row is not None or bool(prompts[0].messages)
        parameters = {"max_new_tokens": options.max_new_tokens or (None if is_chat else _COMPLETION_TOKENS)}
        job = _job(options, prompts, model.conf, model.quant_conf, parameters)
        answers: list[tuple[GenerationPrompt, str]] = []

        def make_record(
            prompt: GenerationPrompt, encoded: EncodedPrompt, answer: Generation, gen_params: Mapping[str, object]
        ) -> Record:
            answers.append((prompt, answer.text))
            make = input_output_record if options.model is not None else answer_record
            return make(prompt, encoded, answer, gen_params)

        is_streamed = _is_streamed(job)
        if row is not None:
            print(f"# prompt: {row.location}\n{row.prompt}\n")
        _run(job, output, make_record, "# answer" if row is not None else "")
    if not is_streamed:
        if row is not None:
            print("# answer")
        _print_answers(answers)
    if row is not None and row.answer:
        print(f"\n# answer in the training data\n{row.answer}")
    return 0


def _output_file(options: argparse.Namespace) -> Path | None:
    """Return the file to write; None to print the answers only."""
    named = options.out_file or options.out
    if named is not None or options.model is None:
        return Path(named) if named is not None else None
    from finetuning.inference.output import journal_path

    number = 1
    path = _DEFAULT_OUTPUT
    while path.exists() and not journal_path(path).exists():
        number += 1
        path = _DEFAULT_OUTPUT.with_stem(f"{_DEFAULT_OUTPUT.stem}-{number}")
    return path


def _texts(options: argparse.Namespace) -> list[str] | None:
    """Return the texts of the flags; None if there are none.

    Raises:
        ConfigError: a text is empty, or the file cannot be read.
    """
    from finetuning.inference.prompts import read_lines

    if options.text_file is not None:
        return read_lines(options.text_file, "--text_file")
    return None if options.text is None else [options.text]


def _text_prompts(options: argparse.Namespace, model: NamedModel, texts: Sequence[str]) -> list[GenerationPrompt]:
    """Return a prompt for each text: for the model's chat template, if it has one."""
    from finetuning.inference.load import has_chat_template
    from finetuning.inference.prompts import chat_prompts, text_prompts
    from finetuning.report.console import shortened

    location = Location(key="--text" if options.text is not None else "--text_file")
    if options.raw or not has_chat_template(model.conf):
        if options.system is not None:
            raise ConfigError("needs a chat template", location=Location(key="--system"))
        return text_prompts(texts, location)
    if not all(texts):
        raise ConfigError("the prompt is empty", location=location)
    system = model.system_prompt if options.system is None else options.system
    _print_note(
        "the prompt is rendered with the chat template"
        + (f', with the system prompt "{shortened(system, 60)}"' if system else "")
        + "; --raw continues the text as it is"
    )
    return chat_prompts(texts, system or None, location)


def _row_prompt(row: TrainingRow) -> list[GenerationPrompt]:
    from finetuning.inference.prompts import text_prompts

    return text_prompts([row.prompt], row.location)


def _print_answers(answers: Sequence[tuple[GenerationPrompt, str]]) -> None:
    for prompt, answer in sorted(answers, key=lambda item: int(item[0].id)):
        if len(answers) > 1:
            said = prompt.messages[-1]["content"] if prompt.messages else prompt.text
            print(f"> {said}")
        print(answer)


def _flag_document(options: argparse.Namespace, name: str) -> ConfigDocument:
    """Return a config without values that maps each key to the flag, or the file, that its value comes from."""
    from finetuning.config.yaml.document import ConfigDocument, KeyPath, SourceSpan
    from finetuning.inference.load import ADAPTER_CONFIG

    model = Location(key="--model" if options.model is not None else name)
    adapter_config = Path(name).expanduser() / ADAPTER_CONFIG
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
        ("OUT",): Location(key="--out_file" if options.out_file is not None else "OUT"),
    }
    return ConfigDocument({}, {path: SourceSpan(source=location) for path, location in locations.items()})


def _job(
    options: argparse.Namespace,
    prompts: Sequence[GenerationPrompt],
    model_conf: GenerationModel,
    quant_conf: NoQuantization | Quantized,
    gen_params: Mapping[str, object],
    vllm: VllmBackend | None = None,
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
        vllm=vllm,
    )


def _run(job: GenerationJob, output: Path | None, make_record: RecordMaker, title: str = "") -> list[Record]:
    """Generate the records of a job, and display progress on the terminal. They are written to `output`, if given.

    Args:
        title: line before an answer that is printed while it is generated: after the bars of loading the model.
    """
    from finetuning.report.console import quiet_libraries

    quiet_libraries(bars=sys.stderr.isatty())
    from finetuning.inference.runner import ProgressCallback, generate_records

    replaced = ", in place of an earlier file" if output is not None and output.exists() else ""
    with TemporaryDirectory() as scratch:
        target = output or Path(scratch, "answers.jsonl")
        try:
            if _is_streamed(job):
                progress = ProgressCallback(on_text=_text_printer(title), on_note=_print_note)
                records = generate_records(job, target, progress, make_record)
                print()
            else:
                with _progress() as progress:
                    records = generate_records(job, target, progress, make_record)
        except Interrupted as error:
            if output is None:
                raise Interrupted("interrupted", error.exit_code - 128) from None
            raise
    if output is not None:
        print(f"{len(records)} answer{'s'[: len(records) != 1]} in {output}{replaced}", file=sys.stderr)
    return records


def _is_streamed(job: GenerationJob) -> bool:
    """Return whether the answer is printed while it is generated."""
    return len(job.prompts) == 1 and sys.stdout.isatty()


def _text_printer(title: str) -> Callable[[str], None]:
    """Return a function that prints pieces of a text, and the title before the first one."""
    titles = [f"{title}\n"] if title else []

    def print_text(text: str) -> None:
        print((titles.pop() if titles else "") + text, end="", flush=True)

    return print_text


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
