"""`replace_tokens`: a tokenizer in which some tokens have other names and the same ids."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetuning.cli.errors import run_command


def build_parser() -> argparse.ArgumentParser:
    """The parser of `replace_tokens`."""
    parser = argparse.ArgumentParser(
        prog="replace_tokens",
        description="Copies a tokenizer and gives some of its tokens other names; their ids stay. Made for reserved"
        " tokens: <|reserved_special_token_0|> becomes <|im_start|>, and no embedding needs to grow.",
    )
    parser.add_argument("tokenizer", help="Name or path of the tokenizer")
    parser.add_argument("outpath", help="Where to save the new tokenizer: a folder that is empty or does not exist")
    parser.add_argument("--from", dest="old", nargs="+", required=True, metavar="TOKEN", help="The tokens to rename")
    parser.add_argument("--to", dest="new", nargs="+", required=True, metavar="TOKEN", help="Their new names, in order")
    parser.add_argument("--keep-template", action="store_true", help="Leave the text of chat templates as it is")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console script; returns its exit code."""
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
