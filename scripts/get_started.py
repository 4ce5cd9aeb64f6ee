"""Follow the *Get started* pages word for word in a new environment: install, train, and talk to the model.

    python scripts/get_started.py [FOLDER]

Builds a virtual environment in FOLDER (by default a temporary one), runs the install line of docs/get-started/index.md
in the repository, and then every block of docs/get-started/first-fine-tune.md in order: files with a title are written,
`bash` blocks are run. Fails when a command fails that the page does not show failing, and unless the chat answers.
PIP_OPTIONS adds options to pip; the tests of the page compare what the commands print.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from run_tutorial import BLOCK, PAGE, REPOSITORY

INSTALL_PAGE = PAGE.with_name("index.md")
QUESTION = "where is my order of candles?"


def run(script: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Return the exit code of the last command of a block, and what it printed."""
    print(f"\n== {folder.name}\n{script.rstrip()}", flush=True)
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(result.stdout.rstrip(), flush=True)
    return result.returncode, result.stdout


def install_line() -> str:
    """Return the install command of the page."""
    (line,) = re.findall(r"^pip install .*$", INSTALL_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return line


def follow(root: Path) -> list[str]:
    """Follow the pages in a folder, and return what went wrong."""
    subprocess.run([sys.executable, "-m", "venv", root / "venv"], check=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{root / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    options = os.environ.get("PIP_OPTIONS", "")
    if run(install_line().replace("pip install", f"pip install {options}"), REPOSITORY, environment)[0]:
        return ["the package cannot be installed"]
    folder = root / "first"
    folder.mkdir()
    # The page copies the base model that the quickstart has made.
    maker = REPOSITORY / "examples" / "quickstart" / "make_base_model.py"
    if run(f"python {maker} base", folder, environment)[0]:
        return ["the base model cannot be made"]
    faults, chat = [], ""
    blocks = list(BLOCK.finditer(PAGE.read_text(encoding="utf-8")))
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        is_skipped, language, title, body = block.groups()
        if is_skipped:
            continue
        if title:
            (folder / title).write_text(body, encoding="utf-8")
        elif language == "bash":
            code, printed = run(body, folder, environment)
            shows_error = after is not None and after[4].startswith("error: ")
            if bool(code) != shows_error:
                faults.append(f"exit code {code}: {body.strip()}")
            if "finetuning chat" in body:
                chat = printed
    if "team: shipping" not in chat:
        faults.append(f"the chat did not answer {QUESTION!r}: {chat!r}")
    return faults


def main() -> int:
    if len(sys.argv) > 1:
        root = Path(sys.argv[1]).resolve()
        root.mkdir(parents=True)
        faults = follow(root)
    else:
        with tempfile.TemporaryDirectory() as name:
            faults = follow(Path(name))
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
