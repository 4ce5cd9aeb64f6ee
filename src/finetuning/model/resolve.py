"""Where a model, tokenizer or adapter is: a folder of this machine, or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetuning.errors import Location, ModelError

Kind = Literal["model", "tokenizer", "adapter"]

DEFAULT_MODEL = "/local_resources/basemodel"
PROBE_TIMEOUT_S = 10.0
_NEEDED = {
    "model": ("config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model"),
    "adapter": ("adapter_config.json",),
}
_ADAPTER_GOES = {
    "run_conf.model": "Name the base model here and the adapter as peft_conf: {peft_type: PRETRAINED_PEFT,"
    " name_or_path: …}, or merge the two first.",
    "model_conf.model": "Name the base model here and the adapter as model_conf.adapter.",
}


@dataclass(frozen=True)
class ModelLocation:
    """A folder or a hub id, and the arguments with which every loader is to be called for it."""

    name: str
    """What to load: the folder as it was given, or the hub id."""
    folder: Path | None
    """The folder that holds the files; None on the hub."""
    hub_arguments: Mapping[str, Any]
    """Keyword arguments for `from_pretrained`: revision, cache folder, whether the hub may be asked."""

    def __str__(self) -> str:
        revision = self.hub_arguments.get("revision")
        return self.name if self.folder or revision in (None, "main") else f"{self.name} at {revision}"


def resolve_model(
    name: str,
    kind: Kind,
    *,
    key: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool | None = None,
    force_download: bool | None = None,
    token: str | None = None,
) -> ModelLocation:
    """The folder or hub repository that `name` stands for, looked at before anything heavy is loaded.

    A folder wins over a hub id of the same name. The hub is asked once, with a time limit; when it is out of reach
    and the files are in the cache, the cache is used and the hub is not asked again.

    Raises:
        ModelError: nothing is there, or the hub does not answer and the cache does not have it.
    """
    place = Location(key=key)
    path = Path(name).expanduser()
    inside = path / subfolder if subfolder else path
    # A folder has no revisions: the argument is dropped, not refused, so that a file works for both.
    arguments: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    if path.is_dir():
        _check_folder(inside, kind, place)
        return ModelLocation(str(path), inside, arguments | {"local_files_only": True})
    if path.exists():
        raise ModelError(f"{path} is a file; a {kind} is a folder, or an id on the hub", place=place)
    if _looks_like_path(name):
        unset = name == DEFAULT_MODEL
        raise ModelError(
            f"there is no folder {path.absolute()}, where the {kind} should be"
            + (" (the default; set run_conf.model to another folder or to an id on the hub)" if unset else ""),
            place=place,
        )
    wanted = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, "token": token}
    arguments |= {key: value for key, value in wanted.items() if value is not None}
    offline = _reach_hub(name, kind, place, arguments, bool(local_files_only))
    return ModelLocation(name, None, arguments | {"local_files_only": True} if offline else arguments)


def is_local(name: str) -> bool:
    """True for what is here or looks like a path, and so is not asked of the hub."""
    return Path(name).expanduser().exists() or _looks_like_path(name)


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~", ".")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def _check_folder(folder: Path, kind: Kind, place: Location) -> None:
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}", place=place)
    found = any((folder / name).is_file() for name in _NEEDED[kind])
    if kind == "model" and (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter, not a base model",
            place=place,
            hint=_ADAPTER_GOES.get(place.key, "Name the model that it was trained on."),
        )
    if not found:
        names = " or ".join(_NEEDED[kind][:2])
        raise ModelError(f"{folder} holds no {kind}: {names} is missing", place=place)


def _reach_hub(name: str, kind: Kind, place: Location, arguments: Mapping[str, Any], local_files_only: bool) -> bool:
    """True when the files must come from the cache because the hub may not be, or cannot be, asked."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    revision = arguments.get("revision")
    try:
        cached = any(
            isinstance(try_to_load_from_cache(name, file, arguments.get("cache_dir"), revision), str)
            for file in _NEEDED[kind]
        )
        if local_files_only:
            why = "local_files_only is set"
        else:
            HfApi().model_info(name, revision=revision, timeout=PROBE_TIMEOUT_S, token=arguments.get("token"))
            return False
    except HFValidationError:
        raise ModelError(f"{name!r} is neither a folder here nor an id on the hub", place=place) from None
    except GatedRepoError:
        raise ModelError(
            f"{name} is gated on the hub",
            place=place,
            hint="Ask for access on its page, then set HF_TOKEN to a token of that account.",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name!r} is neither a folder here nor a model on the hub",
            place=place,
            hint="A private model needs HF_TOKEN.",
        ) from None
    except (HfHubHTTPError, OSError, _transport_error()) as error:
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 404:
            raise ModelError(f"{name} has no revision {revision!r} on the hub", place=place) from None
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if cached:
        return True
    cache = arguments.get("cache_dir") or "the hub's cache (HF_HOME)"
    raise ModelError(
        f"{name} is no folder here and not in {cache}, and the hub cannot be asked: {why.rstrip('.')}",
        place=place,
        hint="Give the path of a folder, or download it where the hub can be reached.",
    )


def _transport_error() -> type[Exception]:
    """The class of a failed connection in the HTTP client that huggingface_hub uses; it lets that class through."""
    try:
        import httpx2 as client
    except ImportError:
        import httpx as client
    return client.HTTPError
