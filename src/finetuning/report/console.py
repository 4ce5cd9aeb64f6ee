"""The console of a command, logging of libraries, and the formatting of numbers."""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from rich.console import Console


def open_console(*, is_main: bool = True, file: IO[str] | None = None) -> Console:
    """Return a console on stdout or `file`, which is silent on processes other than the main one.

    In a log file it writes plain lines of any length. Colors follow NO_COLOR and FORCE_COLOR.
    """
    return Console(file=file or sys.stdout, highlight=False, quiet=not is_main, soft_wrap=True, emoji=False)


def is_live(console: Console) -> bool:
    """Return whether lines can be redrawn: on a terminal that is not dumb, and in a notebook with ipywidgets."""
    if console.is_jupyter:
        return find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


_LIBRARIES = (
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "torch",
    "torch.utils._pytree",
    "torchao",
    "huggingface_hub",
    "httpx",
)
# Read by the libraries when they are imported: no usage reports, no code from the hub.
_ENVIRONMENT = {"HF_HUB_DISABLE_TELEMETRY": "1", "USE_HUB_KERNELS": "0"}
_QUIET_ENVIRONMENT = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def configure_logging(level: str, *, is_main: bool) -> None:
    """Log to stderr: our messages from `level`, those of libraries from ERROR, and everything at DEBUG.

    Call this before a library is imported. Processes other than the main one log errors only.
    """
    own_level = level if is_main else "ERROR"
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("finetuning").setLevel(own_level)
    environment = _ENVIRONMENT | _substitute_caches(os.environ)
    if level != "DEBUG":
        environment |= _QUIET_ENVIRONMENT
        warnings.simplefilter("ignore")
        for name in _LIBRARIES:
            logging.getLogger(name).setLevel(logging.ERROR)
    for name, value in environment.items():
        os.environ.setdefault(name, value)


_HOME_CACHES = {"HF_HOME": "huggingface", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def _substitute_caches(environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables that give libraries what they miss where the user has no name, or no home to write to.

    Containers with arbitrary user ids have no entry in passwd, and a home that is missing or not writable.
    """
    variables = {} if _has_passwd_entry() else {"USER": str(os.getuid())}
    home = os.path.expanduser("~")
    root = Path(environ.get("XDG_CACHE_HOME") or Path(home, ".cache"))
    if home != "~" and _is_usable(root):
        return variables
    folder = Path(tempfile.gettempdir(), f"finetuning-{os.getuid()}")
    if home == "~":
        variables["HOME"] = str(folder)
    # Downloads that can be read are kept in use.
    names = [name for name in _HOME_CACHES if not environ.get(name)]
    names = [name for name in names if name != "HF_HOME" or not os.path.isdir(root / "huggingface")]
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        logging.getLogger("finetuning").warning("libraries have no folder for their caches: %s", error)
        return variables
    if names:
        logging.getLogger("finetuning").warning(
            "%s is not writable: libraries keep their caches in %s. Set HF_HOME to keep downloads", root, folder
        )
    return variables | {name: str(folder / _HOME_CACHES[name]) for name in names}


def _has_passwd_entry() -> bool:
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _is_usable(folder: Path) -> bool:
    """Return whether a folder can be written to, or created."""
    existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def quiet_libraries(bars: bool = False) -> None:
    """Silence the warnings that libraries address to programmers and, unless `bars`, their progress bars."""
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not bars:
        transformers_logging.disable_progress_bar()


def wrap_words(text: str, width: int, indent: int = 0) -> str:
    """Return a line wrapped at spaces; a word that is longer than a line, such as a path, stays whole.

    >>> wrap_words("error: a long message", 12)
    'error: a\\nlong message'
    """
    return textwrap.fill(
        text,
        max(width, indent + 20),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )


UNKNOWN = "–"


def duration(seconds: float | None) -> str:
    """
    >>> duration(0.34), duration(42), duration(185), duration(7384), duration(200000)
    ('0.3s', '42s', '3m 05s', '2h 03m', '2d 07h')
    """
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 60:
        return f"{whole}s"
    if minutes < 60:
        return f"{minutes}m {whole % 60:02d}s"
    if hours < 24:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{days}d {hours % 24:02d}h"


def loss(value: float | None) -> str:
    """
    >>> loss(2.34567), loss(0.00012345), loss(float("nan")), loss(None)
    ('2.3457', '0.000123', 'nan', '–')
    """
    if value is None:
        return UNKNOWN
    return f"{value:.4f}" if not math.isfinite(value) or abs(value) >= 0.01 or value == 0 else f"{value:.3g}"


def rate(value: float | None) -> str:
    """
    >>> rate(12.34), rate(1234.5), rate(1_234_567), rate(None)
    ('12.3', '1,234', '1,234,567', '–')
    """
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def shortened(text: str, most: int = 240) -> str:
    """
    >>> shortened("a long story", 8), shortened("short", 8)
    ('a long …', 'short')
    """
    return text if len(text) <= most else text[: most - 1].rstrip() + " …"


def small(value: float | None) -> str:
    """
    >>> small(5e-5), small(1.23456e-4), small(0), small(None)
    ('5e-05', '0.000123', '0', '–')
    """
    return UNKNOWN if value is None else f"{value:.3g}"
