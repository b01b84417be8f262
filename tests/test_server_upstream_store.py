"""The real server on a folder as people have them: names, uploads, labels, files that come and go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import pytest
import requests
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from PIL import Image

from monailabel_dfqsam.slicer_session import ServerAnswer
from tests.server_fixtures import (
    OBJECT,
    SHAPE,
    WORK_SECONDS,
    Server,
    affine,
    checkpoint,
    new_server,
    wait,
    write_volume,
)

# Seconds over which an idle server is watched, and the most of a core's that it may use in them: uvicorn and
# the look at a folder take some, writing the record over and over takes them all.
WATCHED, IDLE = 4.0, 1.0

# Names and the ids that an annotator expects.
NAMED = {
    "phantom0.nii.gz": "phantom0",
    "T1.nii.gz_Warped.nii.gz": "T1.nii.gz_Warped",
    "twice.nii.gz.nii.gz": "twice.nii.gz",
    "patient.007.v2.nii.gz": "patient.007.v2",
    "with spaces (1).nii.gz": "with spaces (1)",
    "Tête+β#1.nii.gz": "Tête+β#1",
    "1.2.840.113619.2.55.3.nii": "1.2.840.113619.2.55.3",
    "CAPITALS.NII.GZ": "CAPITALS",
    "a.nii.png": "a.nii",
    "Photo.JPG": "Photo",
    "scan.jpeg": "scan",
    "Upper.PNG": "Upper",
    "both.nii.gz": "both",
    "both.nii": "both.nii",
    "both.png": "both.png",
    "Case.nii": "Case",
    "case.nii": "case",
}
UNLISTED = (
    "._phantom0.nii.gz", ".hidden.nii.gz", ".nii.gz", "phantom0.xml", "both.xml", "slide.tif", ".DS_Store",
    "Thumbs.db", "x.nii.gz.part", "x.nii.gz.crdownload", "~x.nii.gz", "~$x.nii", "x.nii.gz~", "notes.txt",
    "datastore.json",
)  # fmt: skip


def write_image(path: Path, seed: int) -> None:
    """An image of the kind that its name says."""
    if path.name.lower().endswith((".png", ".jpg", ".jpeg")):
        pixels = np.random.default_rng(seed).integers(0, 255, (40, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    else:
        plain = path.with_name(path.name.lower())
        write_volume(plain, seed)
        plain.rename(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("folder")
    server = new_server(folder)
    for seed, name in enumerate(NAMED):
        write_image(Path(server.studies) / name, seed)
    for name in UNLISTED:
        (Path(server.studies) / name).write_bytes(b"no image")
    (Path(server.studies) / "dangling.nii.gz").symlink_to(folder / "absent.nii.gz")
    (Path(server.studies) / "folder.nii.gz").mkdir()
    try:
        server.start({"quantize": "false", "checkpoint": checkpoint(folder)})
        yield server
    finally:
        server.stop()


def listed(server: Server) -> set[str]:
    return set(record(server)["objects"])


def record(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{server.url}/datastore/?output=all", timeout=60).json()
    return found


def upload(server: Server, file: Path, **query: str) -> requests.Response:
    with file.open("rb") as content:
        files = {"file": (file.name, content)}
        return requests.put(f"{server.url}/datastore/image", params=query, files=files, timeout=60)


def labels(server: Server, image: str) -> dict[str, Any]:
    found: dict[str, Any] = record(server)["objects"][image]["labels"]
    return found


def completed(server: Server) -> int:
    return int(server.session.info()["datastore"]["completed"])


def delete_label(server: Server, image: str, tag: str = "final") -> int:
    query = {"id": image, "tag": tag}
    return requests.delete(f"{server.url}/datastore/label", params=query, timeout=60).status_code


def ball() -> NDArray[np.uint8]:
    """What `write_volume` draws."""
    i, j, k = np.indices(SHAPE)
    distance = np.sqrt((i - OBJECT[0]) ** 2 + (j - OBJECT[1]) ** 2 + (4 * (k - OBJECT[2])) ** 2)
    return (distance < 10).astype(np.uint8)


def write_label(path: Path, voxels: NDArray[Any], grid: NDArray[np.float64] | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, affine() if grid is None else grid), path)
    return path


def test_each_image_has_the_id_that_an_annotator_expects(server: Server) -> None:
    assert listed(server) == set(NAMED.values())
    for name, image in NAMED.items():
        reply = requests.get(f"{server.url}/datastore/image", params={"image": image}, timeout=60)
        assert reply.content == (Path(server.studies) / name).read_bytes(), name


def test_each_image_is_answered(server: Server) -> None:
    for name, image in NAMED.items():
        is_picture = name.lower().endswith((".png", ".jpg", ".jpeg"))
        point = [10, 10, 0] if is_picture else list(OBJECT)
        assert server.session.infer(image, [point]).image, name


def test_nothing_else_is_ever_proposed(server: Server) -> None:
    assert {server.session.next_sample("random")["id"] for _ in range(60)} <= set(NAMED.values())


def test_an_idle_server_is_idle_after_a_label(server: Server, tmp_path: Path) -> None:
    for image in ("T1.nii.gz_Warped", "twice.nii.gz", "both.nii"):
        server.session.save_label(image, write_label(tmp_path / "l.nii.gz", ball()))
        assert "final" in labels(server, image)
    path, process = Path(server.studies) / "datastore_v2.json", psutil.Process(server.pid)
    time.sleep(1)  # until what the folder's watcher was told of is through
    written, used = path.stat().st_mtime_ns, sum(process.cpu_times()[:2])
    time.sleep(WATCHED)
    assert path.stat().st_mtime_ns == written
    assert sum(process.cpu_times()[:2]) - used < IDLE
    assert listed(server) == set(NAMED.values())


def test_labels_of_images_that_share_a_stem_are_their_own(server: Server, tmp_path: Path) -> None:
    shapes = {"both": SHAPE, "both.nii": SHAPE, "both.png": (30, 40, 1)}
    for value, (image, shape) in enumerate(shapes.items(), 1):
        voxels = np.full(shape, value, np.uint8)
        server.session.save_label(image, write_label(tmp_path / "l.nii.gz", voxels))
    for value, image in enumerate(shapes, 1):
        query = {"label": image, "tag": "final"}
        reply = requests.get(f"{server.url}/datastore/label", params=query, timeout=60)
        (tmp_path / "back.nii.gz").write_bytes(reply.content)
        assert np.unique(nibabel.load(tmp_path / "back.nii.gz").dataobj).tolist() == [value]


def test_uploads_are_called_by_all_of_their_names(server: Server, tmp_path: Path) -> None:
    names = ("patient.001.nii.gz", "patient.002.nii.gz", "1.2.840.1.nii.gz", "1.2.840.2.NII.GZ", "both.JPG")
    ids = []
    for seed, name in enumerate(names):
        write_image(tmp_path / name, 100 + seed)
        reply = upload(server, tmp_path / name)
        assert reply.status_code == 200, reply.text
        ids.append(reply.json()["image"])
    assert ids == ["patient.001", "patient.002", "1.2.840.1", "1.2.840.2", "both.JPG"]
    for name, image in zip(names, ids, strict=True):
        assert (Path(server.studies) / name).read_bytes() == (tmp_path / name).read_bytes()
        assert requests.delete(f"{server.url}/datastore/image?id={image}", timeout=60).status_code == 200
        assert not (Path(server.studies) / name).exists()
    assert listed(server) == set(NAMED.values())


def test_an_upload_never_gets_another_images_label(server: Server, tmp_path: Path) -> None:
    write_volume(tmp_path / "new.nii.gz", 50)
    assert upload(server, tmp_path / "new.nii.gz").json() == {"image": "new"}
    server.session.save_label("new", write_label(tmp_path / "l.nii.gz", ball()))
    stored = Path(server.studies) / "new.nii.gz"
    before = stored.read_bytes()
    # The same image again, as Slicer sends it when a label is submitted: also in another format.
    assert upload(server, tmp_path / "new.nii.gz", image="new").json() == {"image": "new"}
    sitk.WriteImage(sitk.ReadImage(str(stored)), str(tmp_path / "new.nrrd"))
    assert upload(server, tmp_path / "new.nrrd", image="new").json() == {"image": "new"}
    write_volume(tmp_path / "new.nii.gz", 51)
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "new.nii.gz")), str(tmp_path / "new.nrrd"))
    for refused in (
        upload(server, tmp_path / "new.nii.gz"),
        upload(server, tmp_path / "new.nii.gz", image="new"),
        upload(server, tmp_path / "new.nrrd", image="new"),
    ):
        assert refused.status_code == 409
        assert "another image called 'new'" in refused.json()["detail"]
    assert stored.read_bytes() == before
    assert "final" in labels(server, "new")
    requests.delete(f"{server.url}/datastore/image?id=new", timeout=60)
    assert upload(server, tmp_path / "new.nii.gz").json() == {"image": "new"}
    assert labels(server, "new") == {}
    requests.delete(f"{server.url}/datastore/image?id=new", timeout=60)


def test_uploads_that_would_not_be_listed_are_refused(server: Server, tmp_path: Path) -> None:
    for name in ("._x.nii.gz", "~x.nii.gz", ".nii.gz"):
        write_volume(tmp_path / "x.nii.gz")
        (tmp_path / "x.nii.gz").rename(tmp_path / name)
        reply = upload(server, tmp_path / name)
        assert reply.status_code == 400
        assert "dot" in reply.json()["detail"]


def test_a_label_in_another_format_takes_the_first_ones_place(server: Server, tmp_path: Path) -> None:
    before, first = completed(server), write_label(tmp_path / "first.nii.gz", ball())
    server.session.save_label("CAPITALS", first)
    sitk.WriteImage(sitk.ReadImage(str(first)), str(tmp_path / "second.nrrd"))
    server.session.save_label("CAPITALS", tmp_path / "second.nrrd")
    kept = sorted(path.name for path in (Path(server.studies) / "labels" / "final").glob("CAPITALS*"))
    assert kept == ["CAPITALS.nrrd"]
    assert completed(server) == before + 1
    assert delete_label(server, "CAPITALS") == 200
    time.sleep(1.5)  # what the folder's watcher makes of it
    assert labels(server, "CAPITALS") == {}
    assert completed(server) == before
    assert delete_label(server, "CAPITALS") == 404


def shifted(*millimetres: float) -> NDArray[np.float64]:
    grid = affine()
    grid[:3, 3] += millimetres
    return grid


def layered(path: Path) -> Path:
    """As Slicer saves overlapping segments."""
    layers = sitk.JoinSeries([sitk.GetImageFromArray(ball().T)] * 2)
    array = np.moveaxis(sitk.GetArrayFromImage(layers), 0, -1)
    image = sitk.GetImageFromArray(array, isVector=True)
    sitk.WriteImage(image, str(path))
    return path


def garbage(path: Path) -> Path:
    path.write_bytes(b"\x1f\x8bno label at all" * 40)
    return path


def cut(path: Path) -> Path:
    write_label(path, ball())
    path.write_bytes(path.read_bytes()[:-200])
    return path


BAD_LABELS: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "four dimensions": (lambda p: write_label(p, np.stack([ball()] * 2, -1)), "x.nii.gz", "2 layers"),
    "layers of Slicer": (layered, "x.seg.nrrd", "2 layers"),
    "a vector a voxel": (
        lambda p: write_label(p, np.stack([ball()] * 3, -1)[..., None, :]), "x.nii.gz", "3 layers",
    ),
    "another size": (lambda p: write_label(p, ball()[:-1]), "x.nii.gz", "71×56×7 voxels"),
    "fewer slices": (lambda p: write_label(p, ball()[:, :, 1:]), "x.nii.gz", "72×56×6 voxels"),
    "exchanged axes": (lambda p: write_label(p, ball().transpose(1, 0, 2)), "x.nii.gz", "56×72×7 voxels"),
    "no affine": (lambda p: write_label(p, ball(), np.eye(4)), "x.nii.gz", "lies elsewhere"),
    "another place": (lambda p: write_label(p, ball(), shifted(0, 0, 3)), "x.nii.gz", "up to 1.0 voxels"),
    "another spacing": (
        lambda p: write_label(p, ball(), affine() @ np.diag([1.01, 1, 1, 1])), "x.nii.gz", "lies elsewhere",
    ),
    "flipped without its affine": (
        lambda p: write_label(p, ball(), affine() @ np.diag([-1, 1, 1, 1])), "x.nii.gz", "lies elsewhere",
    ),
    "empty": (lambda p: write_label(p, ball() * 0), "x.nii.gz", "add a segment named 'empty'"),
    "garbage": (garbage, "x.nii.gz", "'x.nii.gz'"),
    "garbage as NRRD": (garbage, "x.nrrd", "'x.nrrd'"),
    "no bytes": (lambda p: p.touch() or p, "x.nii.gz", "'x.nii.gz' is empty"),
    "cut off": (cut, "x.nii.gz", "'x.nii.gz'"),
    "probabilities": (lambda p: write_label(p, ball() * np.float32(0.7)), "x.nii.gz", "whole numbers"),
    "below 0": (lambda p: write_label(p, -ball().astype(np.int16)), "x.nii.gz", "whole numbers"),
    "NaN": (lambda p: write_label(p, np.where(ball(), 1, np.nan)), "x.nii.gz", "whole numbers"),
    "infinite": (lambda p: write_label(p, np.where(ball(), np.inf, 0)), "x.nii.gz", "whole numbers"),
    "a table": (garbage, "x.bin", "must be a"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_what_is_no_label_of_the_image_is_refused_and_the_old_one_stays(
    server: Server, tmp_path: Path, kind: str
) -> None:
    make, name, sentence = BAD_LABELS[kind]
    bad = make(tmp_path / name)
    before = completed(server)
    with pytest.raises(ServerAnswer) as refused:
        server.session.save_label("Case", bad)
    assert refused.value.status == 400
    assert sentence in refused.value.detail
    assert str(server.temporary) not in refused.value.detail
    assert labels(server, "Case") == {}
    assert completed(server) == before
    server.session.save_label(
        "case", write_label(tmp_path / "good.nii.gz", ball()), [{"name": "organ", "idx": 1}]
    )
    stored = Path(server.studies) / "labels" / "final" / "case.nii.gz"
    kept, info = stored.read_bytes(), labels(server, "case")
    with pytest.raises(ServerAnswer):
        server.session.save_label("case", bad)
    assert (stored.read_bytes(), labels(server, "case")) == (kept, info)
    assert delete_label(server, "case") == 200


def test_an_empty_label_counts_when_it_is_said(server: Server, tmp_path: Path) -> None:
    empty = write_label(tmp_path / "empty.nii.gz", ball() * 0)
    server.session.save_label("case", empty, [{"name": "organ", "idx": 1}, {"name": "empty", "idx": 2}])
    assert "final" in labels(server, "case")
    assert delete_label(server, "case") == 200
    with empty.open("rb") as file:
        reply = requests.put(
            f"{server.url}/datastore/label?image=case",
            files={"params": (None, json.dumps({"empty": True})), "label": ("empty.nii.gz", file)},
            timeout=60,
        )
    assert reply.status_code == 200
    assert labels(server, "case")["final"]["info"]["empty"] is True
    assert delete_label(server, "case") == 200


def reoriented(codes: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        image = nibabel.Nifti1Image(ball(), affine())
        turn = ornt_transform(io_orientation(affine()), axcodes2ornt(codes))
        nibabel.save(image.as_reoriented(turn), path)
        return path

    return make


GOOD_LABELS: dict[str, Callable[[Path], Path]] = {
    "the same grid": lambda p: write_label(p, ball()),
    "floating": lambda p: write_label(p, ball().astype(np.float64)),
    "32 bit": lambda p: write_label(p, ball().astype(np.int32)),
    "canonical axes": reoriented("RAS"),
    "slices from above": reoriented("LPI"),
    "exchanged axes": reoriented("SLA"),
    "a hundredth of a voxel away": lambda p: write_label(p, ball(), shifted(0.008, 0, 0)),
    "four dimensions, one layer": lambda p: write_label(p, ball()[..., None]),
}


@pytest.mark.parametrize("kind", GOOD_LABELS)
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_a_label_of_the_same_voxels_is_kept_on_the_images_grid(
    server: Server, tmp_path: Path, kind: str, ending: str
) -> None:
    sent = GOOD_LABELS[kind](tmp_path / "sent.nii.gz")
    if ending == ".nrrd":
        image = sitk.ReadImage(str(sent))
        image = image[..., 0] if image.GetDimension() == 4 else image
        sent = tmp_path / "sent.nrrd"
        sitk.WriteImage(image, str(sent))
    server.session.save_label("case", sent)
    stored = sitk.ReadImage(str(Path(server.studies) / "labels" / "final" / f"case{ending}"))
    stored = stored[..., 0] if stored.GetDimension() == 4 else stored
    found = sitk.GetArrayFromImage(stored).T != 0
    truth = ball() != 0
    assert (found & truth).sum() / (found | truth).sum() == 1
    source = sitk.ReadImage(str(Path(server.studies) / "case.nii"))
    np.testing.assert_allclose(stored.GetOrigin(), source.GetOrigin(), atol=0.01)
    np.testing.assert_allclose(stored.GetDirection(), source.GetDirection(), atol=1e-4)
    assert delete_label(server, "case") == 200


def test_a_pictures_label_need_only_have_its_size(server: Server, tmp_path: Path) -> None:
    voxels = np.zeros((30, 40), np.uint8)
    voxels[4:9, 20:30] = 3
    sitk.WriteImage(sitk.GetImageFromArray(voxels.T), str(tmp_path / "flat.nrrd"))
    server.session.save_label("Upper", tmp_path / "flat.nrrd")
    sitk.WriteImage(sitk.GetImageFromArray(voxels.T[None]), str(tmp_path / "volume.nrrd"))
    server.session.save_label("Upper", tmp_path / "volume.nrrd")
    with pytest.raises(ServerAnswer, match="40×30×1 voxels and its image 30×40×1"):
        server.session.save_label("Upper", write_label(tmp_path / "turned.nii.gz", voxels.T))
    assert delete_label(server, "Upper") == 200


def test_files_that_come_and_go_are_noticed_and_keep_their_labels(server: Server, tmp_path: Path) -> None:
    studies = Path(server.studies)
    write_volume(tmp_path / "late.nii.gz", 77)
    (studies / "late.nii.gz").write_bytes((tmp_path / "late.nii.gz").read_bytes())
    wait(lambda: "late" in listed(server), WORK_SECONDS)
    label = write_label(tmp_path / "l.nii.gz", ball())
    server.session.save_label("late", label, [{"name": "organ", "idx": 1}])
    (studies / "late.nii.gz").rename(tmp_path / "away.nii.gz")
    wait(lambda: "late" not in listed(server), WORK_SECONDS)
    (tmp_path / "away.nii.gz").rename(studies / "late.nii.gz")
    wait(lambda: "late" in listed(server), WORK_SECONDS)
    assert labels(server, "late")["final"]["info"]["label_info"] == [{"name": "organ", "idx": 1}]
    # A link to a file whose name says nothing, and which outlives the image.
    (tmp_path / "object-5f3a").write_bytes((tmp_path / "late.nii.gz").read_bytes())
    (studies / "linked.nii.gz").symlink_to(tmp_path / "object-5f3a")
    wait(lambda: "linked" in listed(server), WORK_SECONDS)
    assert server.session.infer("linked", [OBJECT]).image
    for image in ("late", "linked"):
        requests.delete(f"{server.url}/datastore/image?id={image}", timeout=60)
        assert not (studies / f"{image}.nii.gz").exists()
    assert (tmp_path / "object-5f3a").is_file()
    assert not (studies / "labels" / "final" / "late.nii.gz").exists()
    (studies / "labels" / "final" / "nobody.nii.gz").write_bytes(label.read_bytes())
    assert listed(server) == set(NAMED.values())
