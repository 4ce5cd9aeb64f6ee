"""Datasets on the Hugging Face Hub."""

# datasets has no type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from finetuning.data.samples import Row
from finetuning.data.sources.tables import without_nulls
from finetuning.distributed import announce_wait
from finetuning.errors import DataError, Location, first_line

if TYPE_CHECKING:
    import datasets


class Digest(Protocol):
    """A hash of `hashlib`, whose type has no public name."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""
        ...


@dataclass(frozen=True)
class HubShard:
    """A split of a hub dataset, read from the local cache after a download if it is not there."""

    path: str
    split: str
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    """Whether rows are fetched while they are read, without downloading the dataset."""

    @property
    def name(self) -> str:
        return f"{self.path}/{self.subset}/{self.split}" if self.subset else f"{self.path}/{self.split}"

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order; `line` is the number of the row, from 1.

        Raises:
            DataError: the dataset or split does not exist, or the hub is unreachable.
        """
        dataset = self._load()
        with self._errors():
            for number, values in enumerate(dataset, start=1):
                yield Row(without_nulls(values), Location(file=self.name, line=number))

    def unparsed(self) -> Iterator[Row]:
        """Yield the rows; those of a hub dataset are always parsed."""
        return self.rows()

    def update_digest(self, digest: Digest) -> None:
        """Add the dataset's fingerprint to a digest, or its name and revision if it is streamed."""
        if self.streaming:
            digest.update(f"{self.name}@{self.revision}".encode())
            return
        fingerprint: str = cast("datasets.Dataset", self._load())._fingerprint  # pyright: ignore[reportPrivateUsage]
        digest.update(fingerprint.encode())

    def _load(self) -> datasets.Dataset | datasets.IterableDataset:
        import datasets

        with self._errors(), announce_wait(f"the download of {self.name}"):
            return datasets.load_dataset(
                self.path, self.subset, split=self.split, revision=self.revision, streaming=self.streaming
            )

    @contextmanager
    def _errors(self) -> Generator[None, None, None]:
        """Turn the errors of datasets and huggingface_hub into DataError."""
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            yield
        except (OfflineModeIsEnabled, ConnectionError) as error:
            raise DataError(
                f"{self.path}: no such file or folder, and as a dataset of the Hugging Face Hub it cannot be"
                f" fetched: {first_line(error)}",
                hint="Download it first, or set the path of a file.",
            ) from None
        except DatasetNotFoundError as error:
            raise DataError(
                f"{self.path}: no such file or folder, and no dataset of this name on the Hugging Face Hub, or no"
                f" access to it: {first_line(error)}"
            ) from None
        except (DatasetsError, HfHubHTTPError, ValueError, OSError) as error:
            raise DataError(f"{self.name} cannot be read: {first_line(error)}") from None
