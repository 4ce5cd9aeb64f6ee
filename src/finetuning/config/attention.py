"""The attention implementations that a package of their own computes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class FlashPackage:
    """What is imported, the distribution that holds it, and the line that installs it."""

    module: str
    distribution: str
    install: str

    @property
    def is_installed(self) -> bool:
        """By its distribution: two of them hold a module of one name."""
        try:
            return bool(version(self.distribution))
        except PackageNotFoundError:
            return False


FLASH = {
    "flash_attention_2": FlashPackage("flash_attn", "flash-attn", "pip install 'finetuning[flash-attention]'"),
    "flash_attention_3": FlashPackage("flash_attn_interface", "flash-attn-3", "pip install flash-attn-3"),
    "flash_attention_4": FlashPackage("flash_attn", "flash-attn-4", "pip install flash-attn-4"),
}
"""By transformers' names for `run_conf.model_args.attn_implementation`."""
