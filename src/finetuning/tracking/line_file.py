"""A file of lines that is added to, never rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import IO


class LineFile:
    """Appends lines, each flushed. The file is made with the first line; a line that a killed writer left torn is
    ended first."""

    def __init__(self, path: Path):
        self.path = path
        self._stream: IO[str] | None = None

    def write(self, line: str) -> None:
        """Appends one line, given without its end."""
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = _ends_torn(self.path)
            self._stream = self.path.open("a", encoding="utf-8")
            line = "\n" + line if torn else line
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def _ends_torn(path: Path) -> bool:
    """Whether the last line lacks its end."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as stream:
        stream.seek(-1, 2)
        return stream.read(1) != b"\n"
