"""Image files: which ones a row may name, and how they are read.

A row of a dataset is not trusted. It may name files below one folder only, links followed; only formats that Pillow
decodes by itself are opened; and the size of an image is read from its header before any pixel is decoded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import stat
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from finetuning.data.formats.row_format import FieldError
from finetuning.data.samples import ImageReference, JsonValue, json_type
from finetuning.errors import DataError, Location

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are opened. Pillow calls other programs for some of the others."""
_MAX_FILE_BYTES = 1 << 28
_CONTENT_KEYS = ("image", "image_url", "url", "path", "bytes", "base64", "source", "data")
"""Keys of an object that say where an image is, in the order in which they are looked for."""
# What Pillow raises about data that is no image, or is damaged.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, OverflowError, MemoryError)


@dataclass(frozen=True)
class ImageFolder:
    """The folder below which the images of a dataset are, and how large an image may be."""

    folder: Path | None
    """None for the folder of each data file."""
    max_pixels: int

    def read(self, value: JsonValue | bytes, key: str, data_file: str | None) -> ImageReference:
        """Return where an image is, after decoding it once, so that it can be decoded again.

        Args:
            value: a path, a `file:` or `data:` URI, or an object with one of these or with the bytes of a file.
            key: the key of the value in its row.
            data_file: the file that the row is in.

        Raises:
            FieldError: there is no such image, it is outside of the folder, is too large, or cannot be decoded.
        """
        if isinstance(value, dict):
            return self._of_object(value, key, data_file)
        if isinstance(value, bytes):
            return self._decoded(value, key, None)
        if not isinstance(value, str) or not value:
            raise FieldError(key, f"expected an image, got {json_type(value) if value != '' else 'an empty text'}")
        if value.startswith("data:"):
            return self._decoded(_data_uri(value, key), key, None)
        path = self._path(value, key, data_file)
        return self._decoded(_read_file(path, key), key, str(path))

    def _of_object(self, value: Mapping[str, JsonValue], key: str, data_file: str | None) -> ImageReference:
        # `datasets` stores the bytes of an image with the name that its file had.
        content = value.get("bytes")
        if isinstance(content, bytes):
            return self._decoded(content, key, None)
        name = next((name for name in _CONTENT_KEYS if value.get(name) is not None), None)
        if name is None:
            raise FieldError(key, f"has none of the keys {', '.join(_CONTENT_KEYS)}, which say where an image is")
        inner = value[name]
        if name in ("base64", "data") and isinstance(inner, str):
            inner = f"data:;base64,{inner}"
        return self.read(inner, f"{key}.{name}", data_file)

    def _path(self, name: str, key: str, data_file: str | None) -> Path:
        scheme = urlsplit(name).scheme
        if scheme == "file":
            name = unquote(urlsplit(name).path)
        elif scheme and "://" in name:
            raise FieldError(key, f"is an address ({scheme}://): images are not downloaded; save them as files")
        root = self.folder or Path(data_file or ".").parent
        if "\0" in name:
            raise FieldError(key, "is no path: it holds a null character")
        try:
            path, real_root = (root / name).resolve(), root.resolve()
        except (OSError, RuntimeError) as error:
            raise FieldError(key, f"is no usable path: {error}") from None
        if not path.is_relative_to(real_root):
            setting = "data_conf.images.folder" if self.folder is None else "the folder"
            raise FieldError(
                key, f"{name} is outside of {root}, below which the images of these rows are: set {setting} to theirs"
            )
        return path

    def _decoded(self, content: bytes, key: str, path: str | None) -> ImageReference:
        try:
            with open_image(content, self.max_pixels) as image:
                width, height = image.size
        except ValueError as error:
            raise FieldError(key, f"{path or 'the image'} {error}") from None
        return ImageReference(
            path=path,
            data=None if path else base64.b64encode(content).decode(),
            digest=hashlib.sha256(content).hexdigest(),
            width=width,
            height=height,
        )


def open_image(content: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode an image to RGB, turned as its metadata says.

    Raises:
        ValueError: it has more pixels than `max_pixels`, or cannot be decoded. The message is the end of a sentence.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images. The limit here is the configured one, and is checked before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise _TooLarge(
                f"has {image.width} x {image.height} pixels; at most {max_pixels:,} are decoded"
                " (data_conf.images.max_file_pixels)"
            )
        return ImageOps.exif_transpose(image).convert("RGB")
    except _TooLarge:
        raise
    except Image.DecompressionBombError:
        raise ValueError("has more pixels than are decoded (data_conf.images.max_file_pixels)") from None
    except UnidentifiedImageError:
        raise ValueError(f"is not an image of the formats {', '.join(_FORMATS)}") from None
    except _BROKEN as error:
        raise ValueError(f"cannot be decoded: {str(error) or type(error).__name__}") from None


class _TooLarge(ValueError):
    pass


def load_image(reference: ImageReference) -> Image.Image:
    """Decode the image of a prepared row.

    Raises:
        DataError: its file is gone, cannot be decoded, or has another content than when the row was prepared.
    """
    location = Location(file=reference.path)
    try:
        content = base64.b64decode(reference.data) if reference.data else _read_file(Path(reference.path or ""), "")
    except FieldError as error:
        raise DataError(f"an image of a prepared row cannot be read: {error}", location=location) from None
    check_digest(content, reference)
    try:
        return open_image(content)
    except ValueError as error:
        raise DataError(f"an image of a prepared row {error}", location=location) from None


def check_digest(content: bytes, reference: ImageReference) -> None:
    """Check that the file of an image is the one that it was when its row was prepared.

    Raises:
        DataError: it is another.
    """
    if hashlib.sha256(content).hexdigest() != reference.digest:
        raise DataError(
            "an image was changed after its row was prepared",
            location=Location(file=reference.path),
            hint="Set data_conf.cache: off, or remove the cached rows, to prepare them again.",
        )


def read_references(text: str) -> list[ImageReference]:
    """Return the images of a prepared row, from its column `images`."""
    return [ImageReference(**fields) for fields in json.loads(text)] if text else []


def changed_image(images: Iterable[ImageReference], made: float) -> str | None:
    """Return the file of the first image that is not what it was; None if all are.

    Args:
        made: time after which files may have changed, in seconds since the epoch. Older ones are not read: any change
            of a file, and any other file in its place, gives it a new change time.
    """
    seen: set[str] = set()
    for image in images:
        if image.path is None or image.path in seen:
            continue
        seen.add(image.path)
        try:
            if Path(image.path).stat().st_ctime >= made:
                check_digest(_read_file(Path(image.path), ""), image)
        except (OSError, DataError, FieldError):
            return image.path
    return None


def _read_file(path: Path, key: str) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FieldError(key, f"{path} is not a file")
        if status.st_size > _MAX_FILE_BYTES:
            raise FieldError(key, f"{path} has {status.st_size:,} bytes; at most {_MAX_FILE_BYTES:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise FieldError(key, f"{path} cannot be read: {error.strerror or error}") from None


def _data_uri(uri: str, key: str) -> bytes:
    head, separator, content = uri.partition(",")
    if not separator:
        raise FieldError(key, "is no data: URI: it has no comma")
    try:
        return base64.b64decode(content, validate=True) if head.endswith(";base64") else unquote_to_bytes(content)
    except binascii.Error as error:
        raise FieldError(key, f"is not valid base64: {error}") from None
