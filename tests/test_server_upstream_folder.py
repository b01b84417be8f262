"""A folder's datastore: ids by names, labels by files, and records of and for unpatched MONAI Label."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monailabel_dfqsam.files import is_image_name, split_name
from monailabel_dfqsam.server.serve import ServeError
from monailabel_dfqsam.server.upstream.folder import FolderStore, open_studies
from monailabel_dfqsam.server.upstream.record import name_images
from tests.fresh import printed

# Stems and endings that run into each other.
PARTS = st.sampled_from(["a", "b", ".nii", ".gz", ".png", ".nii.gz", " ", "."])
NAMES = st.builds(
    lambda parts, end: "".join(parts) + end,
    st.lists(PARTS, min_size=1, max_size=4),
    st.sampled_from([".nii.gz", ".nii", ".NII.GZ", ".png", ".PNG"]),
).filter(is_image_name)


@given(st.sets(NAMES, max_size=8), st.randoms(use_true_random=False))
def test_every_image_has_an_id_of_its_own_whatever_the_order(names: set[str], order: random.Random) -> None:
    listing = sorted(names)
    order.shuffle(listing)
    ids = name_images(listing, ())
    assert sorted(ids.values()) == sorted(names)
    assert ids == name_images(sorted(names), ())
    stems = [split_name(name)[0] for name in names]
    for image, name in ids.items():
        assert image
        assert name.startswith(image)
        if stems.count(split_name(name)[0]) == 1 and split_name(name)[0] not in names:
            assert image == split_name(name)[0]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"c.png", "c.nii.gz", "c.nii"}, {"c": "c.nii.gz", "c.nii": "c.nii", "c.png": "c.png"}),
        ({"c.PNG", "c.png"}, {"c": "c.PNG", "c.png": "c.png"}),
        (
            {"c.png", "c.nii.gz", "c.png.nii.gz"},
            {"c": "c.nii.gz", "c.png": "c.png", "c.png.nii.gz": "c.png.nii.gz"},
        ),
    ],
)
def test_of_images_that_share_a_stem_the_volume_has_it(names: set[str], expected: dict[str, str]) -> None:
    assert name_images(names, ()) == expected


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    (tmp_path / "label.nii.gz").write_bytes(b"label")
    (tmp_path / "label.nrrd").write_bytes(b"other")
    return folder


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(name.encode())


def images(store: FolderStore) -> dict[str, str]:
    return {image: Path(store.get_image_uri(image)).name for image in store.list_images()}


def test_an_image_keeps_its_id_when_another_one_with_its_stem_comes(studies: Path) -> None:
    put(studies, "case.png")
    assert images(FolderStore(str(studies))) == {"case": "case.png"}
    put(studies, "case.nii.gz", "case.PNG")
    for _ in range(3):
        assert images(FolderStore(str(studies))) == {
            "case": "case.png", "case.nii.gz": "case.nii.gz", "case.PNG": "case.PNG",
        }  # fmt: skip


def test_a_full_name_that_is_taken_is_no_obstacle(studies: Path) -> None:
    put(studies, "c.nii.gz", "c.png.nii.gz")
    assert images(FolderStore(str(studies))) == {"c": "c.nii.gz", "c.png": "c.png.nii.gz"}
    put(studies, "c.png")
    assert sorted(images(FolderStore(str(studies))).values()) == ["c.nii.gz", "c.png", "c.png.nii.gz"]


def test_nothing_is_written_when_nothing_changed(studies: Path) -> None:
    put(studies, "T1.nii.gz_Warped.nii.gz", "twice.nii.gz.nii.gz", "a.nii", "a.nii.gz")
    store = FolderStore(str(studies))
    store.save_label("T1.nii.gz_Warped", str(studies.parent / "label.nii.gz"), "final", {})
    before = os.stat(studies / "datastore_v2.json")
    for _ in range(3):
        store.refresh()
        FolderStore(str(studies))
    after = os.stat(studies / "datastore_v2.json")
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


UPSTREAM = """
import json
from monailabel.datastore.local import LocalDatastore
from monailabel.config import settings
store = LocalDatastore({studies!r}, extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT)
for image, label, info in {labels!r}:
    store.save_label(image, label, "final", info)
print(json.dumps({{image: [store.get_image_uri(image), store.get_label_uri(image, "final"),
                          store.get_label_info(image, "final")] for image in store.list_images()}}))
"""


def upstream(studies: Path, *labels: tuple[str, str, dict[str, Any]]) -> dict[str, list[Any]]:
    """What unpatched MONAI Label makes of a folder once it has saved labels: both paths, and the info."""
    code = UPSTREAM.format(studies=str(studies), labels=labels)
    found: dict[str, list[Any]] = json.loads(printed(code).splitlines()[-1])
    return found


def test_records_go_from_upstream_to_here_and_back(studies: Path) -> None:
    put(studies, "a.nii.gz", "b.png", "b.nrrd", "slide.tif", "other.tif", "._a.nii.gz", "table.xml")
    label = str(studies.parent / "label.nii.gz")
    info = {"label_info": [{"name": "organ", "idx": 1}], "client_id": "somebody"}
    before = upstream(studies, ("a", label, info), ("b", label, info), ("slide", label, info))
    store = FolderStore(str(studies))
    # What has a label stays, whatever it is; what would only be proposed and cannot be read goes.
    assert {"a", "b", "slide"} <= set(store.list_images())
    assert sorted(images(store).values()) == ["a.nii.gz", "b.nrrd", "b.png", "slide.tif"]
    for image in ("a", "b", "slide"):
        assert [store.get_image_uri(image), store.get_label_uri(image, "final")] == before[image][:2]
        assert store.get_label_info(image, "final") == before[image][2]
        assert store.get_label_info(image, "final")["label_info"] == info["label_info"]
    for image in store.get_unlabeled_images():
        store.save_label(image, str(studies.parent / "label.nrrd"), "final", {"label_info": []})
    back = upstream(studies)
    for image in store.list_images():
        assert back[image][:2] == [store.get_image_uri(image), store.get_label_uri(image, "final")]
        assert Path(back[image][1]).is_file()


def test_names_that_no_request_can_hold_are_left_out_and_told(
    studies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(studies, "a.nii.gz", "line\nbreak.nii.gz", "x%2fy.nii.gz", "back\\slash.nii", "n" * 230 + ".nii.gz")
    # As an archive from an older Windows unpacks.
    (studies / os.fsdecode(b"caf\xe9.nii.gz")).write_bytes(b"image")
    for _ in range(2):
        assert images(FolderStore(str(studies))) == {"a": "a.nii.gz"}
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "5 images are left out, whose names no request can hold: rename them"
    ] * 2


def test_a_lost_record_is_made_anew_by_the_files(studies: Path) -> None:
    put(studies, "a.nii.gz", "a.png", "b.c.nii")
    store = FolderStore(str(studies))
    for image in store.list_images():
        store.save_label(image, str(studies.parent / "label.nii.gz"), "final", {})
        store.save_label(image, str(studies.parent / "label.nrrd"), "draft", {})
    before = {image: store.get_labels_by_image_id(image) for image in store.list_images()}
    assert set(before) == {"a", "a.png", "b.c"}
    (studies / "datastore_v2.json").unlink()
    again = FolderStore(str(studies))
    assert {image: again.get_labels_by_image_id(image) for image in again.list_images()} == before


def test_of_two_label_files_of_a_tag_the_newest_counts_and_all_are_removed(studies: Path) -> None:
    put(studies, "a.nii.gz")
    folder = studies / "labels" / "final"
    folder.mkdir(parents=True)
    for age, name in enumerate(("a.nrrd", "a.nii.gz", "._a.nii", "~a.nii")):
        put(folder, name)
        os.utime(folder / name, (1_000_000 - age, 1_000_000 - age))
    store = FolderStore(str(studies))
    assert Path(store.get_label_uri("a", "final")).name == "a.nrrd"
    store.remove_label("a", "final")
    assert sorted(path.name for path in folder.iterdir()) == ["._a.nii", "~a.nii"]
    store.refresh()
    assert store.get_labeled_images() == []


def test_a_removed_image_takes_its_labels_along_and_no_others(studies: Path) -> None:
    put(studies, "a.nii.gz", "a.png", "ab.nii.gz")
    store = FolderStore(str(studies))
    for image in ("a", "a.png", "ab"):
        store.save_label(image, str(studies.parent / "label.nii.gz"), "final", {})
    store.remove_image("a")
    assert sorted(path.name for path in (studies / "labels" / "final").iterdir()) == [
        "a.png.nii.gz", "ab.nii.gz",
    ]  # fmt: skip
    assert images(store) == {"a.png": "a.png", "ab": "ab.nii.gz"}


def test_a_folder_that_can_be_no_datastore_is_said_in_a_sentence(studies: Path) -> None:
    (studies / "datastore_v2.json").write_text('{"name": ')
    with pytest.raises(ServeError, match=r"record datastore_v2\.json in .* is damaged"):
        open_studies(str(studies))
    (studies / "datastore_v2.json").unlink()
    (studies / "labels").write_text("a file")
    with pytest.raises(ServeError, match="cannot hold the labels"):
        open_studies(str(studies))
