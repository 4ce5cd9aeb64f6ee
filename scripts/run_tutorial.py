"""Run the commands of docs/get-started/first-fine-tune.md, and write what they print into the page or compare it.

    python scripts/run_tutorial.py BASE_MODEL            # write the output blocks
    python scripts/run_tutorial.py BASE_MODEL --check    # fail when they no longer match

Files with a title are written, `bash` blocks are run in order, and the `text` block after one holds what it printed.
Numbers and temporary paths are ignored in the comparison: they vary between machines.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "get-started" / "first-fine-tune.md"
BLOCK = re.compile(r'(<!-- docs-test: not run[^\n]*-->\n)?^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
WIDTH = 100
# What libraries print at import, by the packages that happen to be installed, and their progress bars.
NOISE = re.compile(r"^Failed to load .*\.so|^W\d{4} .* torch/|it/s\]$")


Shell = Callable[[str, Path, Mapping[str, str]], str]
"""Runs commands in a folder with these variables added to the environment, and returns what they print."""


def bash(script: str, folder: Path, variables: Mapping[str, str]) -> str:
    """Return what the commands print, stderr included."""
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.stdout


def run(script: str, folder: Path, shell: Shell) -> list[str]:
    """Return the lines that the commands print, as a terminal of 100 columns would show them."""
    variables = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY / "src"),
        "FINETUNING_CACHE": str(folder / ".cache"),
        "COLUMNS": str(WIDTH),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    lines = shell(script, folder, variables).replace(f"{folder}/", "").splitlines()
    lines = "\n".join(line for line in lines if not NOISE.search(line)).strip("\n").splitlines()
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 2].rstrip()} …" for line in map(str.rstrip, lines)]


def shape(line: str) -> str:
    """Return a line without its numbers, digests, spacing and truncated end."""
    line = re.sub(r"\b[0-9a-f]{16,}\b", "#", line)
    line = re.sub(r"\d[\d.,]*(?:e[+-]?\d+)?", "#", line.removesuffix("…").strip())
    return re.sub(r"\s+", " ", re.sub(r"# [KMG]iB", "# MiB", line))[:60]


def missing(expected: list[str], printed: list[str]) -> list[str]:
    """Return the lines of the page that the commands no longer print."""
    shapes = {shape(line) for line in printed}
    return [line for line in expected if line.strip() and shape(line) not in shapes]


def follow(base: Path, shell: Shell = bash) -> tuple[str, list[str]]:
    """Do what the page says, and return the page with what was printed, and its lines that were not.

    Args:
        base: folder of the base model
        shell: runs the commands
    """
    page, faults = PAGE.read_text(encoding="utf-8"), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(base, folder / "base")
        parts, end, printed = [], 0, None
        for match in BLOCK.finditer(page):
            is_skipped, language, title, body = match.groups()
            text = match[0]
            if not is_skipped and title:
                (folder / title).write_text(body, encoding="utf-8")
            elif not is_skipped and language == "bash":
                printed = run(body, folder, shell)
            elif language == "text" and printed is not None:
                faults += missing(body.splitlines(), printed)
                text, printed = "\n".join(["```text", *printed, "```"]), None
            parts += [page[end : match.start()], text]
            end = match.end()
    return "".join([*parts, page[end:]]), faults


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tutorial and write or compare its output.")
    parser.add_argument("base", type=Path, help="folder of the base model, such as quickstart-run/base")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()
    page, faults = follow(options.base)
    if not options.check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    for line in faults:
        print(f"no longer printed: {line}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
