"""`finetuning watch`: show runs in the browser while they train."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetuning.cli.errors import Parser, print_wrapped, run_command
from finetuning.errors import ConfigError

if TYPE_CHECKING:
    from finetuning.inference.chat import Chat

PORT = 8778
TOKEN_VARIABLE = "FINETUNING_WATCH_TOKEN"
_SHORTEST_TOKEN = 16


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `finetuning watch`."""
    parser = Parser(
        prog="finetuning watch",
        description="Show runs in the browser while they train: curves, log, first rows with their\n"
        "loss masks, checks, plan and comparisons. It reads the output directories, as\n"
        "`finetuning report` does. Only this machine can open the page. Ctrl-C ends it,\n"
        "not the runs.",
        epilog=f"environment:\n  {TOKEN_VARIABLE}  the token for --control, instead of a new one at each start",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="output directories, and directories to look for runs in; they may appear later (default: here)",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="print an address with a token. Whoever has it can stop runs and chat with their models; without it the"
        " page can only be read",
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help="port on 127.0.0.1; 0 takes a free one (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    return run_command(_watch, argv)


def _watch(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    roots = list(dict.fromkeys(options.runs or [Path()]))
    for root in roots:
        if root.exists() and not root.is_dir():
            raise ConfigError(f"{root} is a file", hint="Name an output directory, or a directory of runs.")
    token = os.environ.get(TOKEN_VARIABLE) if options.control else None
    if token is not None and (len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise ConfigError(f"{TOKEN_VARIABLE} must have at least {_SHORTEST_TOKEN} printable ASCII characters")
    from finetuning.watch.server import open_socket, serve

    with open_socket(options.port) as listener:
        port = listener.getsockname()[1]
        _announce(roots, port, token, is_controlled=options.control)
        if options.control and token is None:
            token = secrets.token_urlsafe(24)
            print(f"  http://127.0.0.1:{port}/#{token}")
            _say("Who has this address can stop runs and chat. Ctrl-C ends it, not the runs.")
        sys.stdout.flush()
        try:
            serve(roots, listener, token, _open_chat)
        except KeyboardInterrupt:
            print("\nstopped; the runs go on", flush=True)
    return 0


def _announce(roots: Sequence[Path], port: int, token: str | None, *, is_controlled: bool) -> None:
    """Print where the page is."""
    print(f"watching {', '.join(shlex.quote(str(root)) for root in roots)}")
    for root in roots:
        if not root.exists():
            _say(f"note: {root} does not exist yet; it is shown once it does")
    if os.environ.get("SSH_CONNECTION"):
        print(f"  on your own machine: ssh -L {port}:127.0.0.1:{port} {os.uname().nodename}")
    if not is_controlled:
        print(f"  http://127.0.0.1:{port}/")
        _say("The page can only be read: use --control to stop runs and to chat. Ctrl-C ends it, not the runs.")
    elif token is not None:
        # It is redacted in everything that is printed.
        print(f"  http://127.0.0.1:{port}/#TOKEN")
        _say(f"with the value of {TOKEN_VARIABLE} for TOKEN. Ctrl-C ends it, not the runs.")


def _say(text: str) -> None:
    print_wrapped(text, sys.stdout)


def _open_chat(folder: Path) -> Chat:
    """Load the model of a run, as `finetuning chat` does.

    Raises:
        FinetuningError: the run has none, or it has no chat template.
    """
    from finetuning.cli.chat import open_chat

    return open_chat(str(folder))
