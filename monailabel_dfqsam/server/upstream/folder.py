"""MONAI Label's datastore of a folder, put right; also what an archive's datastore keeps its copies in.

The record, `datastore_v2.json`, stays upstream's, see `record`. What upstream gets wrong is right here:

- An ending is taken off the end of a name alone, in any case, and only what is read is listed. Of images that
  share a stem one has it as its id, the others their whole names.
- The record is changed under one lock of the folder, as it is on disk then: the server, a batch and scoring
  do so at once. It and every label are written beside the old ones and renamed. Those who read in between see
  one whole state, and nothing is written when nothing changed.
- An image never takes the place of another one, to which labels belong.
- A label leaves no older one in another format behind, which would come back when it is removed.
- Links are listed, read and removed as the names they are.
"""

from __future__ import annotations

import filecmp
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from monailabel.config import settings
from monailabel.datastore.local import ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.datastore import DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.polling import PollingObserver

from monailabel_dfqsam.files import is_image_name, replacing, split_name
from monailabel_dfqsam.segmentation.volume import ImageError, load_volume
from monailabel_dfqsam.server.gate.guard import Refusal
from monailabel_dfqsam.server.serve import ServeError
from monailabel_dfqsam.server.upstream.disk import copy_whole
from monailabel_dfqsam.server.upstream.record import (
    Objects,
    file_name,
    is_plain,
    new_data,
    new_entry,
    possible_ids,
    reconcile,
    with_labels,
)
from monailabel_dfqsam.server.upstream.threads import holding

logger = logging.getLogger(__name__)

_SAME_MILLIMETRES = 1e-3
_POLL_SECONDS = 0.005  # a change takes about as long
# Files often come by the hundred, and the record is written anew for each look at the folder.
_GATHERING_SECONDS = 0.2
_COMING_AND_GOING = frozenset({"created", "deleted", "moved"})


class FolderStore(LocalDatastore):  # type: ignore[misc]
    """A folder's images and labels; threads and processes may share it."""

    def __init__(self, datastore_path: str, auto_reload: bool = False, **options: Any) -> None:
        """As upstream's.

        Args:
            datastore_path: the folder, made when missing.
            auto_reload: whether files that come and go later are noticed.

        Raises:
            OSError: when it cannot be written to.
            ValueError: when its record is damaged.
        """
        # What was taken away may be put back: a network folder, or a program that writes by removing first.
        self._gone: Objects = {}
        self._config_ts: object = None
        self._unusable = 0
        super().__init__(datastore_path, auto_reload=False, **{"extensions": ("*",), **options})
        if auto_reload:
            self._watch()

    def add_image(self, image_id: str, image_filename: str, image_info: Mapping[str, Any] | None) -> str:
        """Copies an image into the folder, unless it is there already; its id.

        Args:
            image_id: '' takes the file's stem, or its whole name when another image has that.
            image_filename: the file, whose name ends as its kind does.

        Raises:
            Refusal: 400 for a name that is not listed, 409 when another image has the id or the name.
        """
        source = Path(image_filename)
        name = image_id + split_name(source.name)[1] if image_id else source.name
        if not self._is_listed(name):
            raise Refusal(
                400,
                "an image's name must begin with neither a dot nor a tilde, and end as listed images do",
            )
        with self._alone():
            self._reconcile_datastore()
            with self._changing() as objects:
                owner = image_id or next((one for one in objects if file_name(one, objects[one]) == name), "")
                target = self._images() / name
                if target.exists() or owner in objects:
                    if owner in objects and _is_same(
                        source, self._images() / file_name(owner, objects[owner])
                    ):
                        return owner
                    raise Refusal(
                        409,
                        f"there is another image called '{owner or name}': delete that one first, or name "
                        "this one with image=",
                    )
                image_id = image_id or next(one for one in possible_ids(name) if one not in objects)
                copy_whole(source, target)
                objects[image_id] = new_entry(image_id, name, image_info)
        return image_id

    def remove_image(self, image_id: str) -> None:
        """Removes an image and its labels; raises ImageNotFoundException."""
        with self._changing() as objects:
            entry = _known(objects, image_id)
            for tag in entry.labels:
                self._remove_files(image_id, tag, entry.labels[tag].ext)
            (self._images() / file_name(image_id, entry)).unlink(missing_ok=True)
            del objects[image_id]

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: Mapping[str, Any] | None
    ) -> str:
        """Copies a label into the folder, in the place of the one with that tag; its id, the image's.

        Raises:
            ImageNotFoundException: when there is no such image.
        """
        source = Path(label_filename)
        ending = split_name(source.name)[1] or source.suffix
        with self._alone():
            with self._changing() as objects:
                entry = _known(objects, image_id)
                target = self._labels(label_tag) / f"{image_id}{ending}"
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_whole(source, target)
                label = new_data(ending, target.name, label_info)
                objects[image_id] = with_labels(entry, {**entry.labels, label_tag: label})
            older = entry.labels.get(label_tag)
            self._remove_files(image_id, label_tag, older.ext if older else "", keep=target.name)
        return image_id

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Removes a label in whatever formats it lies there; of none nothing."""
        with self._changing() as objects:
            entry = objects.get(label_id)
            if entry is None or label_tag not in entry.labels:
                return
            self._remove_files(label_id, label_tag, entry.labels[label_tag].ext)
            others = {tag: label for tag, label in entry.labels.items() if tag != label_tag}
            objects[label_id] = with_labels(entry, others)

    def update_image_info(self, image_id: str, info: Mapping[str, Any]) -> None:
        """Adds to an image's info; raises ImageNotFoundException."""
        with self._changing() as objects:
            entry = _known(objects, image_id)
            image = entry.image.model_copy(update={"info": {**entry.image.info, **info}})
            objects[image_id] = entry.model_copy(update={"image": image})

    def update_label_info(self, label_id: str, label_tag: str, info: Mapping[str, Any]) -> None:
        """Adds to a label's info; raises LabelNotFoundException."""
        with self._changing() as objects:
            entry = objects.get(label_id)
            label = entry.labels.get(label_tag) if entry else None
            if entry is None or label is None:
                raise LabelNotFoundException(
                    f"the image '{label_id}' has no label with the tag '{label_tag}'"
                )
            label = label.model_copy(update={"info": {**label.info, **info}})
            objects[label_id] = with_labels(entry, {**entry.labels, label_tag: label})

    def get_image_uri(self, image_id: str) -> str:
        """An image's path, '' when there is none."""
        entry = self._datastore.objects.get(image_id)
        return str(self._images() / file_name(image_id, entry)) if entry else ""

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """An image's info and its `path`; empty when there is none."""
        entry = self._datastore.objects.get(image_id)
        return {**entry.image.info, "path": FolderStore.get_image_uri(self, image_id)} if entry else {}

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """A label's path, '' when there is none."""
        label = self._datastore.label(label_id, label_tag)
        return str(self._labels(label_tag) / f"{label_id}{label.ext}") if label else ""

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """`image` and `label`, the paths of each image with a finished label."""
        tag = DefaultLabelTag.FINAL
        return [
            {
                "image": str(self._images() / file_name(image, entry)),
                "label": str(self._labels(tag) / f"{image}{entry.labels[tag].ext}"),
            }
            for image, entry in self._datastore.objects.items()
            if tag in entry.labels
        ]

    def _images(self) -> Path:
        return Path(os.path.abspath(self._datastore.image_path()))

    def _labels(self, tag: str) -> Path:
        return Path(os.path.abspath(self._datastore.label_path(tag)))

    def lock(self, what: str) -> FileLock:
        """The folder's lock of a kind; of each thread its own, and one that holds it may take it again."""
        found: FileLock = self.__dict__.setdefault(f"_dfqsam_{what}", FileLock(f"{self._lock_file}-{what}"))
        return found

    def _alone(self) -> AbstractContextManager[None]:
        return holding(self.lock("change"), "the record of the images", poll_seconds=_POLL_SECONDS)

    @contextmanager
    def _changing(self) -> Iterator[Objects]:
        """The entries to change, as they are on disk; written when the block ends, if it changed any."""
        with self._alone():
            self._init_from_datastore_file()
            objects = dict(self._datastore.objects)
            yield objects
            if objects != self._datastore.objects:
                self._write(self._datastore.model_copy(update={"objects": objects}))

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Reads the record if it is another one than was read or written last."""
        path = Path(self._datastore_config_path)
        with self._alone():
            if not path.exists() or (version := _version(path)) == self._config_ts:
                return
            try:
                record = LocalDatastoreModel.model_validate_json(path.read_text())
            except ValueError:
                if throw_exception:
                    raise
                return
            record.base_path = self._datastore_path
            self._datastore, self._config_ts = record, version

    def _update_datastore_file(self, lock: bool = True) -> None:
        self._write(self._datastore)

    def _write(self, record: LocalDatastoreModel) -> None:
        path = Path(self._datastore_config_path)
        # Python's encoder is 20 times as slow with an indent, a second for some thousand images.
        text = json.dumps(record.model_dump(exclude={"base_path"}), default=str)
        with replacing(path) as partial:
            partial.write_text(text)
        self._datastore, self._config_ts = record, _version(path)

    def _reconcile_datastore(self) -> None:
        with self._changing() as objects:
            files = {entry.name for entry in os.scandir(self._images()) if entry.is_file()}
            labels = {tag: _label_files(self._labels(tag)) for tag in self._tags()}
            found = reconcile(objects, self._gone, files, labels, self._is_listed)
            self._tell(sum(is_image_name(name) and not is_plain(split_name(name)[0]) for name in files))
            objects.clear()
            objects.update(found)

    def _tags(self) -> list[str]:
        folders = os.scandir(self._datastore.label_path(None))
        return sorted(entry.name for entry in folders if entry.is_dir() and entry.name[0] != ".")

    def _is_listed(self, name: str) -> bool:
        chosen = any(fnmatch(name.lower(), one.lower()) for one in self._extensions)
        return chosen and is_image_name(name) and is_plain(split_name(name)[0])

    def _tell(self, unusable: int) -> None:
        if unusable != self._unusable:
            self._unusable = unusable
            logger.warning("%d images are left out, whose names no request can hold: rename them", unusable)

    def _remove_files(self, image: str, tag: str, ending: str, keep: str = "") -> None:
        """Removes an image's label files of a tag: of every kind that is read, and the one of `ending`."""
        folder = self._labels(tag)
        names = [path.name for path in folder.iterdir() if split_name(path.name)[0] == image]
        for name in {f"{image}{ending}", *names} - {image, keep}:
            (folder / name).unlink(missing_ok=True)

    def _watch(self) -> None:
        handler = FileSystemEventHandler()
        handler.on_any_event = self._on_any_event  # type: ignore[method-assign]
        self._observer = PollingObserver() if self._is_on_mount(self._datastore.image_path()) else Observer()
        self._observer.schedule(handler, self._datastore_path)
        self._observer.schedule(handler, self._datastore.label_path(None), recursive=True)
        try:
            self._observer.start()
        except OSError as error:
            logger.error("Images and labels that come or go are not noticed: %s", error)

    def _on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in _COMING_AND_GOING:
            return
        paths = [Path(os.fsdecode(path)) for path in (event.src_path, event.dest_path) if path]
        try:
            if any(path.name == Path(self._datastore_config_path).name for path in paths):
                self._init_from_datastore_file()
            elif event.is_directory or any(self._is_news(path) for path in paths):
                time.sleep(_GATHERING_SECONDS)
                self.refresh()
        except (OSError, Refusal) as error:  # which would end the watching; the next look may succeed
            logger.warning("A change of the folder was not read (%s)", type(error).__name__)

    def _is_news(self, path: Path) -> bool:
        """Whether the record may not know yet that a file is there, or is not."""
        stem, ending = split_name(path.name)
        if not is_image_name(path.name):
            return False
        objects = self._datastore.objects
        if Path(os.path.abspath(path.parent)) == self._images():
            known = any(
                one in objects and file_name(one, objects[one]) == path.name for one in (stem, path.name)
            )
        else:
            label = self._datastore.label(stem, path.parent.name)
            known = label is not None and label.ext == ending
        return known != path.exists()


def open_studies(studies: str) -> FolderStore:
    """The datastore of a folder, by MONAI Label's settings.

    Raises:
        ServeError: when it cannot be one.
    """
    # Upstream lists less than is read unless somebody chooses.
    chosen = "MONAI_LABEL_DATASTORE_FILE_EXT" in settings.model_fields_set
    try:
        return FolderStore(
            studies,
            settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
            **({"extensions": settings.MONAI_LABEL_DATASTORE_FILE_EXT} if chosen else {}),
        )
    except OSError as error:
        raise ServeError(f"the folder '{studies}' cannot hold the labels: {error}") from None
    except ValueError:
        raise ServeError(
            f"the record datastore_v2.json in '{studies}' is damaged: put a copy of it back, or remove it; "
            "a new one is then made by the images and labels that lie there"
        ) from None


def _known(objects: Objects, image: str) -> ImageLabelModel:
    if image not in objects:
        raise ImageNotFoundException(f"there is no image '{image}' in the datastore")
    return objects[image]


def _label_files(folder: Path) -> dict[str, list[str]]:
    """Names of label files by their stems, the oldest first."""
    files = [entry for entry in os.scandir(folder) if entry.is_file() and entry.name[0] not in ".~"]
    found: dict[str, list[str]] = {}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name)):
        found.setdefault(split_name(file.name)[0], []).append(file.name)
    return found


def _version(path: Path) -> tuple[int, int]:
    """Another one for each record, since each is a file of its own."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ino


def _is_same(one: Path, other: Path) -> bool:
    """Whether two files hold the same image: their bytes, or else their voxels and grids."""
    if filecmp.cmp(one, other, shallow=False):
        return True
    try:
        a, b = load_volume(one), load_volume(other)
    except (ImageError, MemoryError):
        return False
    return np.array_equal(a.array, b.array) and np.allclose(a.affine, b.affine, atol=_SAME_MILLIMETRES)
