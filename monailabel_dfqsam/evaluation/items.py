"""What there is to evaluate, out of the forms in which such data lies on disk.

A folder with `manifest.jsonl`, a row {image, mask, modality} a line, paths relative to it. SAM-Med2D's JSON,
by itself or in a folder under its usual name: {mask: image} of its test set or {image: [mask, …]} of its
training set. A folder with volumes and their masks as `find_pairs` finds them. A folder with `imagesTr` and
`labelsTr`, as the Medical Segmentation Decathlon and nnU-Net have it, where each label is an object.

Of a volume the slice counts that holds most of the object. What files are missing is said before any is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monailabel_dfqsam.phantom_study import click_for, find_pairs
from monailabel_dfqsam.segmentation.volume import load_volume, slice_rgb

Mask = NDArray[np.bool_]

_SAM_MED2D = "label2image_test.json"
_SUFFIXES = (".nii.gz", ".nii", ".nrrd")
# SA-Med2D-20M calls its files like ct_00--MSD_Liver--…, mr_t1--…, x_ray--….
_PREFIX = re.compile(r"(?P<kind>x_ray|[a-z]+)(_[a-z0-9]+)*--|(?P<short>ct|mr|us|pet|x_ray)_")
_FOR_PEOPLE = {"ct": "CT", "mr": "MR", "us": "US", "ultrasound": "US", "pet": "PET", "x_ray": "X-ray"}
_OTHER = "other"


class EvaluationError(ValueError):
    """Data or prompts that cannot be evaluated; the message says why."""


@dataclass(frozen=True, eq=False)
class Item:
    """One object in one image: rgb [H, W, 3] uint8, mask [H, W] bool not empty, modality as for people."""

    rgb: NDArray[np.uint8]
    mask: Mask
    modality: str


Reader = Callable[[], Item]
"""Reads one item; raises `EvaluationError` for files that are damaged, or a mask that does not fit."""


def read_items(data: Path) -> list[Reader]:
    """What there is to evaluate, each item read when its reader is called.

    Args:
        data: a folder or a JSON file in one of the forms above.

    Raises:
        EvaluationError: when it is none of them, a row is damaged, or a file it names is not there.
    """
    if data.is_file():
        return _from_json(data)
    if not data.is_dir():
        raise EvaluationError(f"there is no folder and no file '{data}'")
    if (data / "manifest.jsonl").is_file():
        return [_picture(data, line, number) for number, line in _lines(data / "manifest.jsonl")]
    if (data / _SAM_MED2D).is_file():
        return _from_json(data / _SAM_MED2D)
    readers = [partial(_volume_item, image, mask, None) for image, mask in find_pairs(data)]
    readers += [partial(_volume_item, *one) for one in _decathlon(data)]
    if not readers:
        raise EvaluationError(
            f"'{data.name}' has neither a manifest.jsonl, nor a {_SAM_MED2D}, nor volumes with masks named "
            "<image>_<label>, nor imagesTr and labelsTr"
        )
    return [*readers]


def modality_of(name: str) -> str:
    """The modality in a file name of SA-Med2D-20M, as for people; 'other' when it names none."""
    found = _PREFIX.match(name)
    kind = found and (found["kind"] or found["short"])
    return _FOR_PEOPLE.get(kind, kind) if kind else _OTHER


def _lines(manifest: Path) -> Iterator[tuple[int, str]]:
    with manifest.open(encoding="utf-8") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def _picture(data: Path, line: str, number: int) -> Reader:
    where = f"line {number} of manifest.jsonl"
    try:
        row = json.loads(line)
        image, mask, modality = data / row["image"], data / row["mask"], str(row["modality"])
    except (ValueError, KeyError, TypeError):
        raise EvaluationError(f"{where} must be a JSON object with image, mask and modality") from None
    for path in (image, mask):
        if not path.is_file():
            raise EvaluationError(f"{where}: '{path.name}' is missing")
    return partial(_picture_item, image, mask, modality)


def _from_json(file: Path) -> list[Reader]:
    """SAM-Med2D's pairs; its paths start at the file's folder, at that one's parent, or where one works."""
    bases = (file.parent, file.parent.parent, Path())

    def resolve(name: str) -> Path:
        found = next((base / name for base in bases if (base / name).is_file()), None)
        if found is None:
            raise EvaluationError(f"{file.name} names '{name}', which is missing")
        return found

    pairs = [(resolve(image), resolve(mask)) for image, mask in _named_pairs(file)]
    if not pairs:
        raise EvaluationError(f"{file.name} names no images")
    return [partial(_picture_item, image, mask, modality_of(image.name)) for image, mask in pairs]


def _named_pairs(file: Path) -> list[tuple[str, str]]:
    """(image, mask) of either form."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    form = f"{file.name} must be a JSON object, mask: image or image: [mask, …], of file names"
    if not isinstance(content, dict):
        raise EvaluationError(form)
    pairs = []
    for key, value in content.items():
        pairs += [(key, mask) for mask in value] if isinstance(value, list) else [(value, key)]
    if not all(isinstance(name, str) for pair in pairs for name in pair):
        raise EvaluationError(form)
    return pairs


def _decathlon(data: Path) -> list[tuple[Path, Path, int]]:
    """(image, labels, value) for each object under `imagesTr` and `labelsTr`; of nnU-Net its channel 0000."""
    found = []
    for labels in sorted((data / "labelsTr").glob("[!.]*")):
        suffix = next((end for end in _SUFFIXES if labels.name.endswith(end)), None)
        if suffix is None:
            continue
        stem = labels.name.removesuffix(suffix)
        names = [data / "imagesTr" / f"{stem}{channel}{suffix}" for channel in ("", "_0000")]
        image = next((path for path in names if path.is_file()), None)
        if image is None:
            raise EvaluationError(f"labelsTr has '{labels.name}', but imagesTr has no image of that name")
        values = np.unique(load_volume(labels).array)
        found += [(image, labels, int(value)) for value in values if value]
    return found


def _picture_item(image: Path, mask: Path, modality: str) -> Item:
    """A picture as people see it: rows down, columns to the right."""
    from PIL import Image

    try:
        with Image.open(image) as file:
            rgb = np.array(file.convert("RGB"))
        with Image.open(mask) as file:
            truth = np.array(file.convert("L")) > 0
    except OSError:
        raise EvaluationError(f"'{image.name}' or '{mask.name}' is no picture") from None
    return _item(rgb, truth, modality, image.name, mask.name)


def _volume_item(image: Path, mask: Path, value: int | None) -> Item:
    """The slice with most of an object, i to the right: of what has a value in the mask, or is not 0."""
    volume, labels = load_volume(image), load_volume(mask).array
    truth = labels != 0 if value is None else labels == value
    if truth.shape != volume.shape:
        raise EvaluationError(
            f"'{mask.name}' has {_times(truth.shape)} voxels and '{image.name}' {_times(volume.shape)}: "
            "they must be the same"
        )
    if not truth.any():
        raise EvaluationError(f"'{mask.name}' is empty")
    k = click_for(truth).k
    seen = slice_rgb(volume, k).transpose(1, 0, 2)
    return _item(seen, truth[:, :, k].T, volume.modality or _OTHER, image.name, mask.name)


def _item(rgb: NDArray[np.uint8], mask: Mask, modality: str, image_name: str, mask_name: str) -> Item:
    if mask.shape != rgb.shape[:2]:
        raise EvaluationError(
            f"'{mask_name}' has {_times(mask.shape)} pixels and '{image_name}' {_times(rgb.shape[:2])}: "
            "they must be the same"
        )
    if not mask.any():
        raise EvaluationError(f"'{mask_name}' is empty")
    return Item(rgb, mask, modality)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
