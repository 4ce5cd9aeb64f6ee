"""Resolve the name of a model, tokenizer or adapter to a local folder or a repository on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetuning.config.pretrained_config import find_excessive_size, read_pretrained_config
from finetuning.config.validation.suggestions import near_file
from finetuning.errors import Location, ModelError, first_line

RepoKind = Literal["model", "tokenizer", "adapter"]

DEFAULT_MODEL = "/local_resources/basemodel"
PROBE_TIMEOUT_S = 10.0
# A repository is of a kind when it has at least one of these files.
_REQUIRED_FILES = {
    "model": ("config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model"),
    "adapter": ("adapter_config.json",),
}
_ADAPTER_HINTS = {
    "run_conf.model": "Name the base model here and the adapter as peft_conf: {peft_type: PRETRAINED_PEFT,"
    " name_or_path: …}, or merge the two first.",
    "model_conf.model": "Name the base model here and the adapter as model_conf.adapter.",
}


@dataclass(frozen=True)
class ModelLocation:
    """A local folder or hub id, with the keyword arguments that every `from_pretrained` call needs for it."""

    name: str
    """What to load: the folder as the user wrote it, or the hub id."""
    folder: Path | None
    """The folder with the files; None on the hub."""
    hub_kwargs: Mapping[str, Any]
    """Arguments for `from_pretrained`: revision, cache_dir, local_files_only and the like."""

    def __str__(self) -> str:
        revision = self.hub_kwargs.get("revision")
        return self.name if self.folder or revision in (None, "main") else f"{self.name} at {revision}"


def resolve_model(
    name: str,
    kind: RepoKind,
    *,
    key: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool | None = None,
    force_download: bool | None = None,
    token: str | None = None,
) -> ModelLocation:
    """Return where the files of `name` are, checked before anything heavy is loaded.

    A local folder takes precedence over a hub id of the same name. The hub is queried once, with a time limit. When it
    is unreachable and the files are cached, the cache is used and the hub is not queried again.

    Raises:
        ModelError: there is no such folder or repository, or the hub is unreachable and the files are not cached.
    """
    location = Location(key=key)
    path = Path(name).expanduser()
    folder = path / subfolder if subfolder else path
    # A folder has no revisions. The argument is dropped, not refused, so that one config works for both.
    arguments: dict[str, object] = {"subfolder": subfolder} if subfolder else {}
    if path.is_dir():
        _check_folder(folder, kind, location)
        return ModelLocation(str(path), folder, arguments | {"local_files_only": True})
    if path.exists():
        raise ModelError(f"{path} is a file; expected the folder of a {kind}, or a hub id", location=location)
    if _looks_like_path(name):
        is_default = name == DEFAULT_MODEL
        raise ModelError(
            f"there is no folder {path.absolute()} to load the {kind} from"
            + (" (the default; set run_conf.model to a folder or hub id)" if is_default else ""),
            location=location,
            hint=None if is_default else near_file(path, folders_only=True),
        )
    optional = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, "token": token}
    arguments |= {key: value for key, value in optional.items() if value is not None}
    offline = _must_use_cache(
        name,
        kind,
        location,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=bool(local_files_only),
    )
    return ModelLocation(name, None, arguments | {"local_files_only": True} if offline else arguments)


def is_local_path(name: str) -> bool:
    """Whether `name` exists locally or looks like a path, so that the hub is not queried for it."""
    return Path(name).expanduser().exists() or _looks_like_path(name)


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~", ".")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def _check_folder(folder: Path, kind: RepoKind, location: Location) -> None:
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}", location=location)
    if kind == "model" and (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} contains an adapter, not a base model",
            location=location,
            hint=_ADAPTER_HINTS.get(location.key or "", "Name the base model that the adapter was trained on."),
        )
    if not any((folder / name).is_file() for name in _REQUIRED_FILES[kind]):
        names = " or ".join(_REQUIRED_FILES[kind][:2])
        raise ModelError(f"{folder} contains no {kind}: {names} is missing", location=location)
    # A tokenizer is loaded with the config of its model.
    excess = find_excessive_size(read_pretrained_config(str(folder)) or {})
    if excess:
        raise ModelError(f"{folder / 'config.json'} cannot be right: {excess}", location=location)


def _must_use_cache(
    name: str,
    kind: RepoKind,
    location: Location,
    *,
    revision: str | None,
    cache_dir: str | None,
    token: str | None,
    local_files_only: bool,
) -> bool:
    """Whether the files must come from the cache, because the hub is unreachable or `local_files_only` is set.

    Raises:
        ModelError: the hub has no such repository or revision, denies access, or is unreachable with nothing cached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    is_cached = False
    try:
        is_cached = any(
            isinstance(try_to_load_from_cache(name, file, cache_dir, revision), str) for file in _REQUIRED_FILES[kind]
        )
        if local_files_only:
            reason = "local_files_only is set"
        else:
            HfApi().model_info(name, revision=revision, timeout=PROBE_TIMEOUT_S, token=token)
            return False
    except HFValidationError:
        raise ModelError(f"{name!r} is neither a local folder nor a valid hub id", location=location) from None
    except GatedRepoError:
        raise ModelError(
            f"{name} is a gated repository on the hub",
            location=location,
            hint="Request access on its page, then set HF_TOKEN to a token of that account.",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name!r} is neither a local folder nor a model on the hub",
            location=location,
            hint=near_file(name, folders_only=True) or "A private model needs HF_TOKEN.",
        ) from None
    except (HfHubHTTPError, OSError, transport_error()) as error:
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 404:
            raise ModelError(f"{name} has no revision {revision!r} on the hub", location=location) from None
        reason = first_line(error)
    if is_cached:
        return True
    cache = cache_dir or "the hub cache (HF_HOME)"
    error = ModelError(
        f"{name} is not a local folder, is not in {cache}, and the hub is unreachable: {reason.rstrip('.')}",
        location=location,
        hint=near_file(name, folders_only=True)
        or "Set the path of a local folder, or download the model on a machine that can reach the hub.",
    )
    error.is_unreachable = not local_files_only
    raise error


def transport_error() -> type[Exception]:
    """Return the connection error of the HTTP client that huggingface_hub uses, which does not wrap it."""
    try:
        import httpx2 as client
    except ImportError:
        import httpx as client
    return client.HTTPError
