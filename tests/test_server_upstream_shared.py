"""One folder's datastore, changed by two processes and read by threads at once."""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from filelock import FileLock
from monailabel.datastore.dicom import DICOMWebDatastore

from monailabel_dfqsam.server.upstream.folder import FolderStore
from monailabel_dfqsam.server.upstream.shared import share_datastore

CHANGES = 30
PATIENCE = 60.0  # seconds, far more than needed; one that waits would wait for ever


def change(folder: Path, label: Path, ready: Event | threading.Event, names: tuple[str, str]) -> None:
    """Infos of 'a', and labels of one image of its own, over and over, as scoring and a batch write them."""
    who, image = names
    store = FolderStore(str(folder))
    ready.set()
    for n in range(CHANGES):
        store.update_image_info("a", {f"{who}{n}": n})
        store.save_label(image, str(label), f"tag{n}", {"n": n})
        store.refresh()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    share_datastore()
    share_datastore()  # once is enough
    studies = tmp_path / "studies"
    studies.mkdir()
    for name in ("a", "b", "c"):
        (studies / f"{name}.nii.gz").write_bytes(b"image")
    (tmp_path / "label.nii.gz").write_bytes(b"label")
    return studies


def test_nothing_that_two_processes_write_is_lost(folder: Path) -> None:
    label = folder.parent / "label.nii.gz"
    store = FolderStore(str(folder))
    seen, end = set(), threading.Event()

    def read() -> None:
        while not end.is_set():
            seen.add(len(store.list_images()))
            seen.add(store.get_image_uri("c") == str(folder / "c.nii.gz"))
            store.refresh()

    # Forked, since another interpreter would first load all of the server for many seconds.
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    other = fork.Process(target=change, args=(folder, label, ready, ("theirs", "b")))
    other.start()
    assert ready.wait(60)
    reader = threading.Thread(target=read)
    reader.start()
    change(folder, label, threading.Event(), ("ours", "c"))
    other.join(120)
    assert other.exitcode == 0
    end.set()
    reader.join()
    assert seen == {3, True}
    objects = json.loads((folder / "datastore_v2.json").read_text())["objects"]
    infos = objects["a"]["image"]["info"]
    assert {key for key in infos if key.startswith(("ours", "theirs"))} == {
        f"{who}{n}" for who in ("ours", "theirs") for n in range(CHANGES)
    }
    for image in ("b", "c"):
        assert {tag: found["info"]["n"] for tag, found in objects[image]["labels"].items()} == {
            f"tag{n}": n for n in range(CHANGES)
        }


def test_what_has_no_file_any_more_goes(folder: Path) -> None:
    store = FolderStore(str(folder))
    for image in ("a", "b"):
        store.save_label(image, str(folder.parent / "label.nii.gz"), "final", {})
    (folder / "labels" / "final" / "a.nii.gz").unlink()
    (folder / "c.nii.gz").unlink()
    store.refresh()
    assert sorted(store.list_images()) == ["a", "b"]
    assert store.get_labeled_images() == ["b"]
    assert FolderStore(str(folder)).get_labeled_images() == ["b"]


def test_a_damaged_record_is_told_at_the_start_and_ignored_later(folder: Path) -> None:
    store = FolderStore(str(folder))
    (folder / "datastore_v2.json").write_text('{"name": ')
    store.refresh()
    assert len(store.list_images()) == 3
    (folder / "datastore_v2.json").write_text('{"name": ')
    with pytest.raises(ValueError, match="JSON"):
        FolderStore(str(folder))


class Archive(DICOMWebDatastore):  # type: ignore[misc]
    """A store on a folder, whose archive is never asked."""

    def __init__(self, folder: Path) -> None:
        FolderStore.__init__(self, str(folder))
        self._convert_to_nifti = True


def test_a_series_that_is_here_waits_for_no_other(folder: Path) -> None:
    (folder / "1.2.3.nii.gz").write_bytes(b"image")
    store = Archive(folder)
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(store.get_image_uri("1.2.3")), daemon=True)
    with FileLock(f"{store._lock_file}-fetch"):
        asking.start()
        asking.join(PATIENCE)
        assert found == [str(folder / "1.2.3.nii.gz")]


def test_who_reads_a_record_is_not_disturbed_by_changes(folder: Path) -> None:
    store = FolderStore(str(folder))
    record = store._datastore
    before = record.model_dump()
    (folder.parent / "d.nii.gz").write_bytes(b"image")
    for change in (
        lambda: store.add_image("d", str(folder.parent / "d.nii.gz"), {}),
        lambda: store.save_label("a", str(folder.parent / "label.nii.gz"), "final", {}),
        lambda: store.update_image_info("a", {"n": 1}),
        lambda: store.remove_image("b"),
    ):
        change()
        # A walk through it that had begun would go on.
        assert record.model_dump() == before
    assert sorted(store.list_images()) == ["a", "c", "d"]
    assert store.get_labeled_images() == ["a"]


def test_a_change_that_fails_leaves_no_trace(folder: Path) -> None:
    store = FolderStore(str(folder))
    before = store.json()
    with pytest.raises(FileNotFoundError):
        store.save_label("a", str(folder / "nothing.nii.gz"), "final", {})
    assert store.json() == before


def test_writers_at_once_lose_nothing(folder: Path) -> None:
    """Images come and go, labels are submitted, all lists are read."""
    store = FolderStore(str(folder))
    failed: list[BaseException] = []

    def run(work: Callable[[int], object]) -> None:
        try:
            for n in range(CHANGES):
                work(n)
        except BaseException as error:
            failed.append(error)

    new = folder.parent / "new.nii.gz"
    new.write_bytes(b"image")
    label = str(folder.parent / "label.nii.gz")

    def come_and_go(n: int) -> None:
        store.add_image(f"x{n}", str(new), {})
        store.remove_image(f"x{n}")

    threads = [
        threading.Thread(target=run, args=(work,))
        for work in (
            come_and_go,
            lambda n: store.add_image(f"y{n}", str(new), {}),
            lambda n: store.save_label("a", label, f"tag{n}", {"n": n}),
            lambda n: store.save_label("a", label, "final", {"n": n}),
            lambda n: (store.status(), store.json(), store.datalist(), store.get_unlabeled_images()),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    again = FolderStore(str(folder))
    assert sorted(again.list_images()) == sorted(["a", "b", "c", *(f"y{n}" for n in range(CHANGES))])
    assert set(again.get_labels_by_image_id("a")) == {"final", *(f"tag{n}" for n in range(CHANGES))}
