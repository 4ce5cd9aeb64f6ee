"""`finetuning chat`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from finetuning.cli.errors import Parser, run_command
from finetuning.errors import ConfigError, FinetuningError, Location

if TYPE_CHECKING:
    from finetuning.inference.chat import Chat, Turn

_COMMANDS = """\
/again            answer the last question again, in place of its answer
/adapter on|off   answer with or without the adapter, to compare
/system [TEXT]    show the system prompt, or set it; /system none removes it
/reset            begin a new conversation
/help             list the commands
/exit             end; so does Ctrl-D. Ctrl-C ends an answer"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `finetuning chat`."""
    parser = Parser(
        prog="finetuning chat",
        description=textwrap.fill(
            "Talk to a model. Each line is a question; its answer is printed while it is generated. If the input is not"
            " a terminal, only answers go to standard output.",
            79,
        ),
        epilog=f"commands in the conversation:\n{_COMMANDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODEL|RUN",
        help="path or hub id of a model, path of an adapter, or output directory of a run",
    )
    parser.add_argument("--system", help="system prompt (default: that of the run's training data)")
    parser.add_argument(
        "--base-model-name-or-path", metavar="BASE", help="base model; overrides the one in the adapter's config"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="maximum number of tokens of an answer (default: 512)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sampling temperature; 0 for greedy answers (default: the model's)",
    )
    parser.add_argument("--seed", type=int, default=42, help="random seed for sampling (default: 42)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand and return its exit code."""
    return run_command(_chat, argv)


def _chat(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {options.max_new_tokens}: must be at least 1")
    if options.temperature is not None and options.temperature < 0:
        raise ConfigError(f"--temperature {options.temperature}: must be at least 0")

    def on_note(note: str) -> None:
        _say(f"note: {note}")

    base, system = options.base_model_name_or_path, options.system
    chat = open_chat(options.model, base, _parameters(options), system, options.seed, on_note)
    if chat.system is not None:
        _say(f"system prompt: {chat.system}")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _say("/help lists the commands, /exit ends.")
    for line in _typed_lines() if is_terminal else sys.stdin:
        text = line.strip()
        if text in ("/exit", "/quit"):
            break
        if text and _respond(chat, text) and not is_terminal:
            raise KeyboardInterrupt
    return 0


def open_chat(
    name: str,
    base: str | None = None,
    gen_params: Mapping[str, object] | None = None,
    system: str | None = None,
    seed: int = 42,
    on_note: Callable[[str], None] = lambda note: None,
) -> Chat:
    """Load a model for a conversation.

    Args:
        name: of a run, a model or an adapter.
        base: the base model of an adapter, instead of the one in its config.
        system: the system prompt; by default that of the run's training data, none for an empty text.
        on_note: receives what was chosen.

    Raises:
        FinetuningError: there is no such model, or it has no chat template.
    """
    from finetuning.cli.errors import locate_errors
    from finetuning.cli.named_model import find_model
    from finetuning.config.yaml.document import ConfigDocument, SourceSpan

    with locate_errors(ConfigDocument({}, {("model_conf",): SourceSpan(source=Location(key=name))})):
        model = find_model(name, base)
        for note in model.notes:
            on_note(note)
        from finetuning.report.console import quiet_libraries

        quiet_libraries(bars=sys.stderr.isatty())
        from finetuning.inference.chat import Chat
        from finetuning.inference.load import load_generator

        generator = load_generator(model.conf, model.quant_conf)
    for note in generator.notes:
        on_note(note)
    prompt = model.system_prompt if system is None else system
    return Chat(generator, gen_params or {}, system=prompt or None, seed=seed)


def _parameters(options: argparse.Namespace) -> dict[str, object]:
    values: dict[str, object] = {"max_new_tokens": options.max_new_tokens}
    if options.temperature is not None:
        values["do_sample"] = options.temperature > 0
        values["temperature"] = options.temperature or None
    return values


def _say(text: str) -> None:
    """Print what is no answer of the model."""
    print(text, file=sys.stderr, flush=True)


def _typed_lines() -> Iterator[str]:
    """Yield the lines that are typed, until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401  gives `input` a history and keys to edit
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _respond(chat: Chat, text: str) -> bool:
    """Answer a question, or do what a command says. Errors are printed, and the conversation goes on.

    Returns:
        Whether the answer was interrupted.
    """
    try:
        if not text.startswith("/"):
            return _print_answer(lambda on_text: chat.ask(text, on_text))
        name, _, argument = text.partition(" ")
        return _run_chat_command(chat, name, argument.strip())
    except FinetuningError as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        return False


def _print_answer(ask: Callable[[Callable[[str], None]], Turn]) -> bool:
    """Print an answer while it is generated; return whether it was interrupted."""
    turn = ask(_print_text)
    print(flush=True)
    if turn.dropped:
        _say(f"note: the conversation is too long for the model: its first {turn.dropped} questions were left out")
    if turn.was_interrupted:
        _say("note: the answer was interrupted")
    return turn.was_interrupted


def _print_text(text: str) -> None:
    print(text, end="", flush=True)


def _run_chat_command(chat: Chat, name: str, argument: str) -> bool:
    """Run a command of the conversation; return whether an answer was interrupted.

    Raises:
        ConfigError: there is no such command, or it does not take this argument.
    """
    if name == "/again":
        return _print_answer(chat.ask_again)
    if name == "/adapter":
        if argument not in ("", "on", "off"):
            raise ConfigError("/adapter takes on or off")
        if argument:
            chat.set_adapter(argument == "on")
        state = "on" if chat.uses_adapter else "off: the base model answers"
        _say(f"adapter: {state}" if chat.has_adapter else "adapter: the model has none")
    elif name == "/system":
        if argument:
            chat.system = None if argument == "none" else argument
        _say(f"system prompt: {chat.system if chat.system is not None else 'none'}")
    elif name == "/reset":
        chat.reset()
        _say("a new conversation begins")
    elif name == "/help":
        _say(_COMMANDS)
    else:
        from finetuning.config.validation.suggestions import did_you_mean

        hint = did_you_mean(name, ["/again", "/adapter", "/system", "/reset", "/help", "/exit"])
        raise ConfigError(f"there is no command {name}", hint=hint or "/help lists the commands.")
    return False
