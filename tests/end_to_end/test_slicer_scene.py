"""Real MRML on both sides of the real server: what is clicked in Slicer, and where the answer appears there.

Places are millimetres in RAS, as Slicer shows them; each test knows by the phantom's own affine, and not by
the scene or the server, where the object is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import requests
import SimpleITK as sitk
from numpy.typing import NDArray

from monailabel_dfqsam.server.answers.request import FILE_ORDER, SLICER_ORDER
from tests.end_to_end.slicer_mrml import (
    Node,
    Scene,
    array,
    ijk_to_ras,
    point_indices,
    roi_indices,
)
from tests.end_to_end.slicer_plugin import DEFAULT_EXTENSION, Panel, voxels
from tests.server_fixtures import Running
from tests.server_fixtures import affine as oblique

SHAPE = (72, 56, 7)
OBJECT = (44, 20, 2)  # voxel in the middle of the ball; no axis has its middle there
IMAGE = "slicers"  # name in the datastore, for as long as a test takes
RADIUS = 10.0  # voxels on its middle slice
MOSTLY = 0.6  # of the mask in the object, or IoU; a mask with an axis turned would not meet the object
NEAR = 5.0  # pixels from the object's middle to the mask's
TINY = 1e-3  # millimetres, float32 headers


def grid(*axes: tuple[float, float, float], origin: tuple[float, float, float]) -> NDArray[np.float64]:
    """[4, 4] affine to RAS with these steps along i, j and k."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(axes).T
    matrix[:3, 3] = origin
    return matrix


@dataclass(frozen=True)
class Phantom:
    """A ball at `OBJECT` on a grid of its own, the ending of its files, and how Slicer loads it."""

    affine: NDArray[np.float64]
    extension: str = DEFAULT_EXTENSION
    right_handed: bool = True

    @property
    def place(self) -> NDArray[np.float64]:
        """[3] the ball's middle, RAS."""
        return (self.affine @ [*OBJECT, 1])[:3]

    @property
    def pixel(self) -> float:
        """Millimetres of one, the longer side."""
        return float(np.linalg.norm(self.affine[:3, :2], axis=0).max())

    def write(self, path: Path) -> Path:
        """A NIfTI, or an NRRD by way of SimpleITK."""
        i, j, k = np.indices(SHAPE)
        radius = np.sqrt((i - OBJECT[0]) ** 2 + (j - OBJECT[1]) ** 2 + (4 * (k - OBJECT[2])) ** 2)
        values = np.where(radius < RADIUS, 320, 60) + np.random.default_rng(3).normal(0, 8, SHAPE)
        nifti = path.with_name("written.nii.gz")
        nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), self.affine), nifti)
        sitk.WriteImage(sitk.ReadImage(str(nifti)), str(path))
        nifti.unlink()
        return path

    def object_at(self, places: NDArray[np.float64]) -> NDArray[np.bool_]:
        """[N] whether places, [N, 3] RAS, lie in the disc that the ball is on its middle slice."""
        homogeneous = np.c_[places, np.ones(len(places))]
        i, j, k = (np.linalg.inv(self.affine) @ homogeneous.T)[:3]
        inside = np.hypot(i - OBJECT[0], j - OBJECT[1]) < RADIUS
        return np.asarray(inside & (np.abs(k - OBJECT[2]) < 0.5))


LEFT_HANDED = grid((-0.9, 0, 0), (0, 0.9, 0), (0, 0, 4), origin=(31, -26, -11))
PHANTOMS = {
    "axial": Phantom(grid((-0.9, 0, 0), (0, -0.9, 0), (0, 0, 4), origin=(31, 26, -11))),
    "oblique": Phantom(oblique()),
    "oblique nrrd": Phantom(oblique(), ".nrrd"),
    "reversed": Phantom(grid((0.9, 0, 0), (0, -0.9, 0), (0, 0, -4), origin=(-31, 26, 40)), ".nrrd"),
    "left-handed": Phantom(LEFT_HANDED),
    "left-handed before 5.8": Phantom(LEFT_HANDED, right_handed=False),
    "sagittal": Phantom(grid((0, -0.8, 0), (0, 0, -1.1), (6, 0, 0), origin=(-15, 40, 55))),
}


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture
def panel(running: Running, tmp_path: Path) -> Panel:
    return Panel(running.server.url, tmp_path)


def set_places(labels: NDArray[Any], to_ras: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, 3] RAS of the voxels set in [I, J, K]."""
    where = np.argwhere(labels)
    places: NDArray[np.float64] = (to_ras @ np.c_[where, np.ones(len(where))].T)[:3].T
    return places


def check_on_object(labels: Node, phantom: Phantom) -> NDArray[np.float64]:
    """[N, 3] the places segmented, on the object where Slicer shows it, and all on its middle slice."""
    found = set_places(array(labels), ijk_to_ras(labels))
    assert phantom.object_at(found).mean() > MOSTLY
    assert np.linalg.norm(found.mean(axis=0) - phantom.place) < NEAR * phantom.pixel
    across = np.linalg.inv(phantom.affine) @ np.c_[found, np.ones(len(found))].T
    np.testing.assert_allclose(across[2], OBJECT[2], atol=TINY)
    return found


def exported(scene: Scene, mask: sitk.Image, volume: Node, folder: Path) -> Node:
    """A reply imported into a segmentation, and that exported again on the volume's grid."""
    file, segmentation = folder / "reply.nrrd", scene.segmentation(volume)
    sitk.WriteImage(mask, str(file))
    scene.import_mask(file, segmentation, "organ")
    labels, names = scene.export_labels(segmentation, volume)
    assert names == [{"name": "organ", "idx": 1}]
    np.testing.assert_allclose(ijk_to_ras(labels), ijk_to_ras(volume), atol=TINY)
    assert set(np.unique(array(labels))) <= {0, 1}
    return labels


@pytest.mark.parametrize("name", PHANTOMS)
def test_a_clicks_mask_lies_on_the_object(panel: Panel, scene: Scene, tmp_path: Path, name: str) -> None:
    phantom = PHANTOMS[name]
    file = phantom.write(tmp_path / f"volume{phantom.extension}")
    volume = scene.load(file, right_handed=phantom.right_handed)
    (click,) = point_indices(scene.points(phantom.place), volume)
    with panel.session(scene.save(volume, tmp_path / f"upload{phantom.extension}")) as session:
        mask, reply = panel.click("volume", [click], session_id=session)
    assert reply["slice"] == click[2]
    labels = exported(scene, mask, volume, tmp_path)
    assert np.array_equal(array(labels), voxels(mask))
    check_on_object(labels, phantom)


@pytest.mark.parametrize("name", PHANTOMS)
def test_a_rois_mask_is_the_object(panel: Panel, scene: Scene, tmp_path: Path, name: str) -> None:
    """The plugin sends the voxels of two of its corners, and the millimetres where the red view stands."""
    phantom = PHANTOMS[name]
    file = phantom.write(tmp_path / f"volume{phantom.extension}")
    volume = scene.load(file, right_handed=phantom.right_handed)
    size = 2 * RADIUS * np.linalg.norm(phantom.affine[:3, :2], axis=1)
    roi = roi_indices(scene.roi(phantom.place, size), volume)
    with panel.session(scene.save(volume, tmp_path / f"upload{phantom.extension}")) as session:
        mask, _ = panel.update_with_roi("volume", roi, scene.red_offset(phantom.place), session_id=session)
    labels = exported(scene, mask, volume, tmp_path)
    assert np.array_equal(array(labels), voxels(mask))
    hits = phantom.object_at(check_on_object(labels, phantom)).sum()
    whole = phantom.object_at(set_places(np.ones(SHAPE), phantom.affine)).sum()
    assert hits / (whole + array(labels).sum() - hits) > MOSTLY


@contextmanager
def stored(running: Running, panel: Panel, file: Path) -> Iterator[Path]:
    """An image given to the server's datastore for a while; where it lies there."""
    panel.client.upload_image(str(file), IMAGE)
    try:
        yield Path(running.server.studies) / f"{IMAGE}{DEFAULT_EXTENSION}"
    finally:
        url = f"{running.server.url}/datastore/image?id={IMAGE}"
        assert requests.delete(url, timeout=60).status_code == 200


def test_slices_add_up_to_one_segment_which_is_saved(
    running: Running, panel: Panel, scene: Scene, tmp_path: Path
) -> None:
    """An image of the server's: two slices clicked, the segment submitted and read again."""
    phantom = PHANTOMS["oblique"]
    with stored(running, panel, phantom.write(tmp_path / f"own{DEFAULT_EXTENSION}")) as image:
        volume = scene.load(image)
        segmentation, expected = scene.segmentation(volume), np.zeros(SHAPE, dtype=np.uint8)
        above = (phantom.affine @ [OBJECT[0], OBJECT[1], OBJECT[2] + 1, 1])[:3]
        for click in point_indices(scene.points(phantom.place, above), volume):
            mask, _ = panel.click(IMAGE, [click])
            expected |= voxels(mask)
            sitk.WriteImage(mask, str(tmp_path / "reply.nrrd"))
            scene.import_mask(tmp_path / "reply.nrrd", segmentation, "organ")
        assert set(np.flatnonzero(expected.any(axis=(0, 1)))) == {OBJECT[2], OBJECT[2] + 1}
        labels, names = scene.export_labels(segmentation, volume)
        assert np.array_equal(array(labels), expected)
        file = scene.save(labels, tmp_path / f"label{DEFAULT_EXTENSION}")
        panel.client.save_label(IMAGE, str(file), params={"label_info": names})
        again = scene.load_labels(Path(panel.client.download_label(IMAGE, "final")))
        assert np.array_equal(array(again), expected)
        np.testing.assert_allclose(ijk_to_ras(again), phantom.affine, atol=TINY)
        saved = panel.client.datastore()["objects"][IMAGE]["labels"]["final"]["info"]
        assert saved["label_info"] == [{"name": "organ", "idx": 1}]


@pytest.mark.parametrize("name", ["left-handed before 5.8", "left-handed"])
def test_a_left_handed_image_of_the_server(
    running: Running, panel: Panel, scene: Scene, tmp_path: Path, name: str
) -> None:
    """From 5.8 on Slicer reverses its slices when it loads it; before, its user chooses the other order."""
    phantom = PHANTOMS[name]
    with stored(running, panel, phantom.write(tmp_path / f"own{DEFAULT_EXTENSION}")) as image:
        volume = scene.load(image, right_handed=phantom.right_handed)
        (click,) = point_indices(scene.points(phantom.place), volume)
        order = SLICER_ORDER if phantom.right_handed else FILE_ORDER
        mask, reply = panel.click(IMAGE, [click], slices=order)
        assert reply["slice"] == click[2]
        check_on_object(exported(scene, mask, volume, tmp_path), phantom)
