"""What a person sees of an image: its name and size, and a small picture of it for pages."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from finetuning.data.images.files import open_image
from finetuning.data.samples import ImageReference

_EDGE = 160
"""Longest edge of a small picture, in pixels."""
_MOST_BYTES = 1 << 26
_LABEL = re.compile(r"(?P<path>.+) \(\d+ x \d+ pixels\)")


def image_label(image: ImageReference) -> str:
    """Return the file of an image, or that the row holds it, and its size."""
    where = image.path or f"in the row, SHA-256 {image.digest[:12]}"
    return f"{where} ({image.width} x {image.height} pixels)"


def thumbnail(image: ImageReference) -> str:
    """Return a small picture of an image that a row holds as a `data:` URI; empty for a file, which has its own."""
    return "" if image.data is None else _thumbnail_of(base64.b64decode(image.data))


def thumbnail_of_label(label: str) -> str:
    """Return a small picture of the image that `image_label` describes; empty if there is no such file any more."""
    match = _LABEL.fullmatch(label)
    path = Path(match["path"]) if match else None
    return _thumbnail_of_file(path) if path is not None and path.is_absolute() else ""


def _thumbnail_of_file(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return ""
        return _thumbnail_of(path.read_bytes())
    except OSError:
        return ""


def _thumbnail_of(content: bytes) -> str:
    try:
        image = open_image(content)
    except ValueError:
        return ""
    image.thumbnail((_EDGE, _EDGE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
