"""`finetuning completion`: a script with which a shell completes subcommands, options, config keys and files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from finetuning.cli.errors import Parser, run_command

_BASH = r"""# bash: eval "$(finetuning completion bash)"; zsh: eval "$(finetuning completion zsh)"
_finetuning() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} first=${{COMP_WORDS[1]}}
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W "{subcommands}" -- "$word"))
    elif [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "{options}" -- "$word"))
    elif [[ $word == *.* && $word != */* && $word != *=* && ! -e $word ]]; then
        # Keys of the config, as in training_args.max_steps=3.
        COMPREPLY=($(compgen -S = -W "{keys}" -- "$word"))
        type compopt > /dev/null 2>&1 && compopt -o nospace
    fi
    if (( ${{#COMPREPLY[@]}} == 0 )); then
        case $first in
            {with_method})
                (( COMP_CWORD == 2 )) && COMPREPLY=($(compgen -W "{methods}" -- "$word")) ;;
        esac
    fi
}}
complete -o default -o bashdefault -F _finetuning finetuning
"""
_ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"
_FISH = """# fish: finetuning completion fish | source
complete -c finetuning -n '__fish_is_nth_token 1' -f -a '{subcommands}'
complete -c finetuning -n '__fish_seen_subcommand_from {with_method_words}; and __fish_is_nth_token 2' -f -a '{methods}'
complete -c finetuning -n 'not __fish_is_nth_token 1' -F -a '{assignments}'
"""
_WITH_METHOD = ("preview", "prepare", "schema", "selftest", "launch")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `finetuning completion` and return its exit code."""
    return run_command(_completion, argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `finetuning completion`."""
    parser = Parser(
        prog="finetuning completion",
        description="Print a script that completes subcommands, methods, options, keys of the config and files."
        ' Put eval "$(finetuning completion bash)" into ~/.bashrc.',
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")
    return parser


def _completion(argv: Sequence[str]) -> int:
    print(script(build_parser().parse_args(argv).shell), end="")
    return 0


def script(shell: str) -> str:
    """Return the script for a shell."""
    from finetuning.algorithms import ALGORITHMS
    from finetuning.cli import main as cli
    from finetuning.config.validation.section_tree import walk

    keys = {
        ".".join((*path, name))
        for algorithm in ALGORITHMS.values()
        for path, name, _ in walk(algorithm.experiment)
        if path and "datasets" not in path
    }
    values = {
        "subcommands": " ".join([*ALGORITHMS, *cli.SUBCOMMANDS]),
        "methods": " ".join(ALGORITHMS),
        "options": " ".join(option for action in cli.build_parser()._actions for option in action.option_strings),
        "keys": " ".join(sorted(keys)),
        "assignments": " ".join(f"{key}=" for key in sorted(keys)),
        "with_method": "|".join(_WITH_METHOD),
        "with_method_words": " ".join(_WITH_METHOD),
    }
    if shell == "fish":
        return _FISH.format(**values)
    return (_ZSH if shell == "zsh" else "") + _BASH.format(**values)
