"""What libraries may say while a run tells its own story."""

from __future__ import annotations

import logging
import os
import warnings

_LIBRARIES = (
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "torch",
    "huggingface_hub",
    "httpx",
)
# Read by the libraries when they are imported. Nobody is called home, and no code is fetched from a hub.
_ENVIRONMENT = {"HF_HUB_DISABLE_TELEMETRY": "1", "USE_HUB_KERNELS": "0"}
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def configure_logging(level: str, *, is_main: bool) -> None:
    """Our log lines on stderr from `level` on; the libraries' from ERROR on, and all of them at DEBUG.

    To be called before a library is imported. Processes other than the main one log errors only.
    """
    ours = level if is_main else "ERROR"
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("finetuning").setLevel(ours)
    wanted = dict(_ENVIRONMENT)
    if level != "DEBUG":
        wanted |= _QUIET
        warnings.simplefilter("ignore")
        for name in _LIBRARIES:
            logging.getLogger(name).setLevel(logging.ERROR)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
