"""File names of images, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".dcm", ".png", ".jpg", ".jpeg")
"""Of the images that are read, in any case; where two images share a stem, the first comes first."""


def split_name(name: str) -> tuple[str, str]:
    """The stem of an image's file name and its ending, which is one of `IMAGE_ENDINGS` in any case, or ''."""
    ending = next((end for end in IMAGE_ENDINGS if name.lower().endswith(end)), "")
    stem = name[: len(name) - len(ending)]
    return stem, name[len(stem) :]


def is_image_name(name: str) -> bool:
    """Whether a file is called like an image that is read, and is none of those that programs leave behind.

    These begin with a dot, as what macOS puts beside each file on a foreign disk does, or with a tilde.
    """
    return bool(split_name(name)[1]) and name[0] not in ".~"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place when the block ends without an error.

    A reader sees the old file or the whole new one; after an error nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
