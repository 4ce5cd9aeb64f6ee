"""The base class of every section of the YAML."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints


def _reject_dots(name: str) -> str:
    if set(name) == {"."}:
        raise ValueError("must be the name of a folder")
    return name


PathName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$"), AfterValidator(_reject_dots)]
"""The name of a single file or folder, so that a value cannot point outside of its parent directory."""


class ConfigSection(BaseModel):
    """A section of the user's config. Instances are immutable; unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_default=False,
        # Build validators on first use: a run needs the sections of one algorithm only, and a typo in the config is
        # then reported in a third of the time.
        defer_build=True,
    )
