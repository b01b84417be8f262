"""What a folder's record says of its images and labels, and what it should say by the files that are there.

The record is upstream's: an image's id and ending together are its file's name, and its labels are files of
that id in `labels/<tag>`, one a tag. An entry is replaced and never changed, for others may be reading it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Container, Iterable, Mapping, Set
from typing import Any

from monailabel.datastore.local import DataModel, ImageLabelModel

from monailabel_dfqsam.files import IMAGE_ENDINGS, is_image_name, split_name
from monailabel_dfqsam.server.gate.guard import Refusal, check_name

Objects = dict[str, ImageLabelModel]
"""Images with their labels, by id."""
LabelFiles = Mapping[str, Mapping[str, list[str]]]
"""Names of label files by tag and stem, the oldest first."""


def reconcile(
    objects: Objects, gone: Objects, files: Set[str], labels: LabelFiles, is_listed: Callable[[str], bool]
) -> Objects:
    """The entries as the files are.

    Args:
        objects: the entries before.
        gone: entries whose file was not there; those of this time are added, those that are back removed.
        files: names of all files beside the images.
        is_listed: whether a file of this name is an image for people. One with labels stays all the same.
    """
    kept = {}
    for image, entry in objects.items():
        name = file_name(image, entry)
        if name in files and (entry.labels or is_listed(name)):
            kept[image] = entry
        else:
            gone[image] = entry
    new = files - {file_name(image, entry) for image, entry in kept.items()}
    for image, name in name_images(filter(is_listed, new), kept).items():
        back = gone.pop(image, None)
        kept[image] = back if back and file_name(image, back) == name else new_entry(image, name)
    return {image: _with_found_labels(image, entry, labels) for image, entry in kept.items()}


def name_images(names: Iterable[str], taken: Container[str]) -> dict[str, str]:
    """Ids for images by their file names, whatever the order of these; {id: name}, sorted.

    Of images that share a stem the one whose ending comes first in `IMAGE_ENDINGS` has it, unless it is
    taken; the others have their whole names.
    """

    def rank(name: str) -> tuple[int, str, int, str]:
        stem, ending = split_name(name)
        # A whole name may be a longer name's stem: the shorter ones come first.
        return len(stem), stem, IMAGE_ENDINGS.index(ending.lower()), name

    ids: dict[str, str] = {}
    for name in sorted(names, key=rank):
        ids[next(one for one in possible_ids(name) if one not in ids and one not in taken)] = name
    return dict(sorted(ids.items()))


def possible_ids(name: str) -> list[str]:
    """What an image may be called, the best first: any beginning of its name, with the rest as its ending."""
    stem, _ = split_name(name)
    return [stem, *(name[:end] for end in range(len(name), len(stem), -1))]


@functools.lru_cache(maxsize=1 << 16)
def is_plain(image: str) -> bool:
    """Whether an image's id could come in a request: text, without control characters, not too long."""
    try:
        check_name(image, "image")
    except Refusal:
        return False
    return True


def file_name(image: str, entry: ImageLabelModel) -> str:
    """Of an image."""
    return f"{image}{entry.image.ext}"


def new_data(ending: str, name: str, info: Mapping[str, Any] | None = None) -> DataModel:
    """An image's or a label's part of an entry, as upstream makes it."""
    return DataModel(ext=ending, info={**(info or {}), "ts": int(time.time()), "name": name})


def new_entry(image: str, name: str, info: Mapping[str, Any] | None = None) -> ImageLabelModel:
    """Of an image without labels."""
    return ImageLabelModel(image=new_data(name[len(image) :], name, info))


def with_labels(entry: ImageLabelModel, labels: dict[str, DataModel]) -> ImageLabelModel:
    """An entry with these labels alone, by tag."""
    return entry.model_copy(update={"labels": labels})


def _with_found_labels(image: str, entry: ImageLabelModel, files: LabelFiles) -> ImageLabelModel:
    """An entry with the labels that are there: of a tag the recorded one, or else the newest file."""
    labels = {}
    for tag in {**entry.labels, **files}:
        label, names = entry.labels.get(tag), files.get(tag, {})
        recorded = f"{image}{label.ext}" if label else ""
        if label and recorded in names.get(split_name(recorded)[0], ()):
            labels[tag] = label
        elif own := [name for name in names.get(image, ()) if is_image_name(name)]:
            labels[tag] = new_data(own[-1][len(image) :], own[-1])
    return entry if labels == entry.labels else with_labels(entry, labels)
