"""A terminal or a pipe that is gone ends no run, and a closed standard stream damages no file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetuning.cli.errors import RedactedStream

PROGRAM = """
import sys
from finetuning.cli.errors import run_command, survive_lost_output

def work(argv):
    if argv == ["run"]:
        survive_lost_output()
    # More than a pipe holds.
    for number in range(8000):
        print("line", number)
    with open(sys.argv[2], "w") as file:
        file.write("done")
    return 0

sys.exit(run_command(work, sys.argv[1:2]))
"""


def start(kind: str, target: Path, redirection: str) -> subprocess.CompletedProcess[str]:
    command = f'"$0" -c "$1" {kind} {target} {redirection}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, sys.executable, PROGRAM], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "redirection", ["| head -1", ">&-", ">&- 2>&- <&-", "> /dev/full", "> /dev/full 2>&1", "2> /dev/full"]
)
def test_a_run_goes_on_when_nobody_can_read_its_output(tmp_path: Path, redirection: str) -> None:
    result = start("run", tmp_path / "file", redirection)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "file").read_text() == "done", "what is printed must not end up in a file"
    warning = "warning: standard output cannot be written (No space left on device): the run goes on without it\n"
    assert result.stderr == (warning if redirection == "> /dev/full" else "")


def test_a_command_that_only_prints_ends_with_its_reader(tmp_path: Path) -> None:
    result = start("preview", tmp_path / "file", "| head -1")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "file").exists()


def test_other_errors_of_a_stream_are_raised() -> None:
    class Broken:
        def write(self, text: str) -> int:
            raise OSError(22, "Invalid argument")

    stream = RedactedStream(Broken())  # pyright: ignore[reportArgumentType]
    stream.survives_lost_reader = True
    with pytest.raises(OSError, match="Invalid argument"):
        stream.write("a")


def test_what_is_written_after_a_loss_is_discarded(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as file:
        stream = RedactedStream(file)
        with pytest.raises(BrokenPipeError):
            stream.write("a\n")
        stream.survives_lost_reader = True
        stream.write("b\n")
        stream.write("c\n")
        stream.flush()
