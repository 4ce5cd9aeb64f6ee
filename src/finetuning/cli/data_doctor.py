"""`finetuning data doctor`: all rows of a run, examined without its model."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetuning.cli.errors import Parser, check_output_file, run_command
from finetuning.errors import EXIT_OK, EXIT_USER, ConfigError, Location, MissingPackageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from finetuning.algorithms.algorithm import Algorithm
    from finetuning.config.sections.experiment import Experiment
    from finetuning.data.doctor.doctor_page import DataReport
    from finetuning.data.doctor.findings import Verdict
    from finetuning.data.doctor.measures import Scan
    from finetuning.data.statistics import DatasetStatistics
    from finetuning.model.tokenizer import LoadedTokenizer

_LIMITS = {"sft": "sft_args.max_seq_length", "grpo": "grpo_args.max_prompt_length"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning data` and return its exit code."""
    return run_command(_run, argv)


def _parser() -> argparse.ArgumentParser:
    from finetuning.algorithms import ALGORITHMS

    parser = Parser(
        prog="finetuning data",
        description="Examine all rows of a run as they are trained on: lengths, duplicates, leaks, pairs, labels, tool"
        " calls, ends of answers. Reads the data and the tokenizer; loads no model. Ends with exit code 1 if the data"
        " should not be trained on as it is.",
    )
    parser.add_argument("action", choices=("doctor",), help="doctor: a verdict on each property of the data")
    parser.add_argument("config", help="path of the experiment's YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="values that override the file's"
    )
    parser.add_argument("--method", choices=list(ALGORITHMS), help="the method, if the file names none (default: sft)")
    parser.add_argument("--html", type=Path, help="also write an HTML page")
    parser.add_argument("--pii", action="store_true", help="count strings that look like personal data")
    parser.add_argument("--workers", type=int, default=4, help="processes that share the work (default: 4)")
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="use colors (default: auto)"
    )
    return parser


def _run(argv: Sequence[str]) -> int:
    options = _parser().parse_intermixed_args(argv)
    from finetuning.algorithms import ALGORITHMS
    from finetuning.cli.errors import locate_errors
    from finetuning.config.validation.validate import validate
    from finetuning.config.yaml.overrides import apply_overrides
    from finetuning.config.yaml.reader import read_document
    from finetuning.data.doctor.doctor_page import to_html, to_text
    from finetuning.data.doctor.findings import Verdict
    from finetuning.training.setup import load_tokenizer

    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: must be at least 1")
    if options.html is not None:
        check_output_file(options.html, "--html")
    scan = _pii_scan() if options.pii else None
    document = apply_overrides(read_document(options.config), options.overrides)
    name = str(options.method or document.values.get("method") or "sft")
    method = ALGORITHMS.get(name) or ALGORITHMS["sft"]
    with locate_errors(document):
        experiment = validate(document, method.experiment).experiment
        report = examine(experiment, method, load_tokenizer(experiment), options.workers, options.config, scan)
    if options.html is not None:
        options.html.write_text(to_html(report), encoding="utf-8")
    color = sys.stdout.isatty() if options.color == "auto" else options.color == "always"
    print(to_text(report, color=color))
    return EXIT_USER if report.verdict is Verdict.STOP else EXIT_OK


def examine(
    experiment: Experiment,
    method: Algorithm,
    tokenizer: LoadedTokenizer,
    workers: int,
    title: str,
    scan: Scan | None = None,
) -> DataReport:
    """Prepare all rows, and return what is to be said about them."""
    from finetuning.data.doctor.doctor_page import DataReport
    from finetuning.data.doctor.findings import Examined, all_findings, histogram
    from finetuning.data.doctor.measures import RowInspector, TokenFacts, joined
    from finetuning.data.statistics import NoRowsLeftError
    from finetuning.training.setup import stop_tokens

    fast = cast("PreTrainedTokenizerFast", tokenizer.tokenizer)
    configured = stop_tokens(experiment, tokenizer)
    turn_ends, notes = _template(fast, configured)
    ends = {*configured, *turn_ends, cast("str | None", fast.eos_token)}
    vocabulary = fast.get_vocab()
    stops = tuple(vocabulary[end] for end in ends if end and end in vocabulary)
    bos, unknown = cast("tuple[int | None, int | None]", (fast.bos_token_id, fast.unk_token_id))
    inspector = RowInspector(TokenFacts(bos, unknown, stops), scan)
    changes = {"cache": "off", "prepared": None, "streaming": False, "on_bad_row": "skip", "max_lost_fraction": 1.0}
    lenient = experiment.model_copy(update={"data_conf": experiment.data_conf.model_copy(update=changes)})
    try:
        statistics = cast("DatasetStatistics", method.prepare(lenient, fast, workers, configured, inspector).statistics)
    except NoRowsLeftError as error:
        # Then most of all is there something to report.
        if error.statistics is None:
            raise
        statistics = error.statistics
    limit_key = _LIMITS.get(method.name, "training_args.max_length")
    section, _, field = limit_key.partition(".")
    limit = getattr(getattr(experiment, section), field, None)
    examined = Examined(
        experiment.data_conf,
        limit,
        limit_key,
        inspector.by_split,
        {split.split: split for split in statistics.splits},
        notes,
        scan is not None,
        _empty_datasets(experiment, inspector.by_split["training"].locations if inspector.by_split else ()),
    )
    lengths = joined(examined.training.lengths)
    facts = [("config", title), ("method", method.name), ("tokenizer", str(tokenizer))]
    facts += [
        (split, rest) for split, _, rest in (line.partition(": ") for line in statistics.lines()) if " kept, " in rest
    ]
    return DataReport(
        f"The data of {title}",
        tuple(facts),
        tuple(all_findings(examined)),
        histogram(lengths, limit) if len(lengths) else None,
    )


def _empty_datasets(experiment: Experiment, kept: Sequence[Location]) -> tuple[str, ...]:
    """Return the names of the training datasets of which no row is kept, if there are several."""
    from finetuning.data.open_dataset import source_title
    from finetuning.data.prepared import checked_sources
    from finetuning.data.sources import find_shards

    files = {location.file for location in kept}
    sources = checked_sources(experiment.data_conf.training_data, "data_conf.training_data")
    if len(sources) < 2 or experiment.data_conf.max_lost_fraction == 1:
        return ()
    return tuple(
        source_title(source)
        for key, source in sources
        if files.isdisjoint(shard.name for shard in find_shards(source, key))
    )


def _template(
    tokenizer: PreTrainedTokenizerFast, stops: Sequence[str]
) -> tuple[tuple[str, ...], Sequence[tuple[Verdict, str]]]:
    """Return the tokens that end turns, and notes on the chat template; nothing without a template."""
    from finetuning.data.chat.end_of_turn import EndOfTurnFinder
    from finetuning.data.chat.template import TemplateRenderer
    from finetuning.data.doctor.findings import lint_template

    if not tokenizer.chat_template:
        return (), ()
    renderer = TemplateRenderer(tokenizer)
    finder = EndOfTurnFinder(renderer, stops)
    return finder.stops, lint_template(finder, renderer)


_LIKE_A_NUMBER = re.compile(r"(?:\d\D{0,6}){6}\d")
"""Seven digits near each other, the fewest of a phone's number. Looking for one takes 100 times as long as all else."""


def _pii_scan() -> Scan:
    """Return a function that counts strings that look like personal data, by the patterns and checksums of presidio.

    Its recognizers of names and places need a language model and are left out.

    Raises:
        MissingPackageError: presidio-analyzer is not installed.
    """
    try:
        from presidio_analyzer.predefined_recognizers import (  # pyright: ignore[reportMissingImports]
            CreditCardRecognizer,
            EmailRecognizer,
            IbanRecognizer,
            IpRecognizer,
            PhoneRecognizer,
            UsSsnRecognizer,
        )
        from tldextract import TLDExtract  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingPackageError(
            "--pii needs the package presidio-analyzer", hint="pip install 'finetuning[pii]'"
        ) from None
    # The package's own copy of the list of public suffixes: a look at data fetches nothing.
    extract = TLDExtract(suffix_list_urls=(), cache_dir=None)

    class Email(EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return bool(extract(pattern_text).fqdn)

    phone: Any = PhoneRecognizer()
    recognizers: list[Any] = [
        *(kind() for kind in (Email, CreditCardRecognizer, IbanRecognizer, IpRecognizer, UsSsnRecognizer))
    ]

    def scan(text: str) -> Mapping[str, int]:
        counts: dict[str, int] = {}
        for recognizer in (*recognizers, phone) if _LIKE_A_NUMBER.search(text) else recognizers:
            for result in recognizer.analyze(text, recognizer.supported_entities, None) or ():
                kind = str(result.entity_type).lower().replace("_", " ")
                counts[kind] = counts.get(kind, 0) + 1
        return counts

    return scan
