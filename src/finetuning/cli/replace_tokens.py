"""`replace_tokens`: rename tokens of a tokenizer and keep their ids."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetuning.cli.errors import Parser, run_command


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `replace_tokens`."""
    parser = Parser(
        prog="replace_tokens",
        description="Copy a tokenizer and rename some of its tokens; their ids stay the same. Intended for reserved"
        " tokens: <|reserved_special_token_0|> becomes <|im_start|>, and the embeddings need not be resized.",
    )
    parser.add_argument("tokenizer", help="hub id or path of the tokenizer")
    parser.add_argument("outpath", help="folder for the new tokenizer, which must be empty or new")
    parser.add_argument(
        "--from", dest="old", nargs="+", action="extend", required=True, metavar="TOKEN", help="tokens to rename"
    )
    parser.add_argument(
        "--to",
        dest="new",
        nargs="+",
        action="extend",
        required=True,
        metavar="TOKEN",
        help="their new names, in the same order",
    )
    parser.add_argument("--keep-template", action="store_true", help="do not rename the tokens in chat templates")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script and return its exit code."""
    return run_command(_replace, argv)


def _replace(argv: list[str]) -> int:
    options = build_parser().parse_args(argv)
    from finetuning.export.rename_tokens import pair_token_names, replace_tokens

    renames = pair_token_names(options.old, options.new)
    done = replace_tokens(options.tokenizer, Path(options.outpath), renames, keep_template=options.keep_template)
    for old, new in renames.items():
        print(f"{old} -> {new} (id {done.ids[new]})")
    if done.skipped_files:
        print(f"not copied: {', '.join(done.skipped_files)}", file=sys.stderr)
    print(f"tokenizer: {options.outpath}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
