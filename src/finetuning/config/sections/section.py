"""The base of every section of the YAML."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints


def _not_dots(name: str) -> str:
    if set(name) == {"."}:
        raise ValueError("must be the name of a folder")
    return name


PathName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$"), AfterValidator(_not_dots)]
"""The name of one file or folder: it cannot leave the directory that it is put in."""


class ConfigSection(BaseModel):
    """What the user wrote, typed: frozen, and without room for a key that it does not know."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_default=False,
        # Only the sections of the method at hand are built: a third of the time to tell a typo.
        defer_build=True,
    )
