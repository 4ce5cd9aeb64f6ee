"""Datasets on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from finetuning.data.samples import Row
from finetuning.data.sources.tables import without_nulls
from finetuning.errors import DataError, Location


@dataclass(frozen=True)
class HubShard:
    """A split of a dataset on the hub, downloaded into the hub's cache, or found there."""

    path: str
    split: str
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    """Whether rows are fetched as they are read, and not kept."""

    @property
    def name(self) -> str:
        return f"{self.path}/{self.subset}/{self.split}" if self.subset else f"{self.path}/{self.split}"

    def rows(self) -> Iterator[Row]:
        """The rows in order; `line` is the number of the row, from 1.

        Raises:
            DataError: there is no such dataset or split, or the hub cannot be reached.
        """
        dataset = self._load()
        with self._faults():
            for number, values in enumerate(dataset, start=1):
                yield Row(without_nulls(values), Location(file=self.name, line=number))

    def unparsed(self) -> Iterator[Row]:
        """The rows: those of a hub dataset have nothing to parse."""
        return self.rows()

    def feed(self, digest: hashlib._Hash) -> None:
        """Feeds what the rows depend on: the dataset's fingerprint; of one that is streamed, its name and revision."""
        if self.streaming:
            digest.update(f"{self.name}@{self.revision}".encode())
            return
        digest.update(self._load()._fingerprint.encode())

    def _load(self) -> Any:
        import datasets

        with self._faults():
            return datasets.load_dataset(
                self.path, self.subset, split=self.split, revision=self.revision, streaming=self.streaming
            )

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Says what the hub refuses in words for people."""
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            yield
        except (OfflineModeIsEnabled, ConnectionError) as error:
            raise DataError(
                f"{self.path}: no such file or folder here, and as a dataset on the Hugging Face Hub it cannot be"
                f" fetched: {_first_line(error)}",
                hint="Download it first, or give the path of a file.",
            ) from None
        except DatasetNotFoundError as error:
            raise DataError(
                f"{self.path}: no such file or folder here, and no such dataset on the Hugging Face Hub, or no right"
                f" to read it: {_first_line(error)}"
            ) from None
        except (DatasetsError, HfHubHTTPError, ValueError, OSError) as error:
            raise DataError(f"{self.name} cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
