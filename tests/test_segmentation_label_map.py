"""Label files put on their image's grid, whatever the order of their axes; all others refused."""

from __future__ import annotations

import tempfile
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from monailabel_dfqsam.segmentation.label_map import TOLERANCE, fit_label
from monailabel_dfqsam.segmentation.volume import ImageError, Volume, load_volume
from tests.server_fixtures import affine

# Every order of the axes (i, j, k), each in either direction.
ORDERS = [(axes, signs) for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]


def label_of(shape: tuple[int, ...], folder: Path, order: tuple[tuple[int, ...], tuple[int, ...]]) -> Path:
    """Voxels that differ everywhere, written in another order with the affine that says so."""
    axes, signs = order
    voxels = np.arange(1, 1 + np.prod(shape), dtype=np.int32).reshape(shape)
    turned = voxels.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]
    # Columns of the map from the turned indices to those before.
    back = np.zeros((4, 4))
    back[3, 3] = 1
    for new, (old, sign) in enumerate(zip(axes, signs, strict=True)):
        back[old, new] = sign
        back[old, 3] = shape[old] - 1 if sign < 0 else 0
    nibabel.save(nibabel.Nifti1Image(turned, affine() @ back), folder / "label.nii.gz")
    return folder / "label.nii.gz"


def image_of(shape: tuple[int, ...], folder: Path) -> Volume:
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.int16), affine()), folder / "image.nii.gz")
    return load_volume(folder / "image.nii.gz")


@given(st.tuples(*[st.integers(1, 5)] * 3), st.sampled_from(ORDERS), st.sampled_from([".nii.gz", ".nrrd"]))
def test_every_order_of_the_axes_is_turned_to_the_images(
    shape: tuple[int, int, int], order: tuple[tuple[int, ...], tuple[int, ...]], ending: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = label_of(shape, folder, order)
        if ending == ".nrrd":
            sitk.WriteImage(sitk.ReadImage(str(path)), str(folder / "label.nrrd"))
            path = folder / "label.nrrd"
        assert fit_label(path, image_of(shape, folder))
        stored = sitk.ReadImage(str(path))
        array = np.reshape(sitk.GetArrayFromImage(stored).T, shape)
        assert np.array_equal(array, np.arange(1, 1 + np.prod(shape)).reshape(shape))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize(("share", "same"), [(0.5, True), (-0.5, True), (1.5, False), (-1.5, False)])
def test_grids_are_the_same_to_a_tenth_of_a_voxel(
    tmp_path: Path, axis: int, share: float, same: bool
) -> None:
    """Both by a shift, and by a spacing whose error adds up to it at the far end."""
    shape = (9, 8, 7)
    shift, stretch = np.eye(4), np.eye(4)
    shift[axis, 3] = share * TOLERANCE
    stretch[axis, axis] = 1 + share * TOLERANCE / (shape[axis] - 1)
    volume = image_of(shape, tmp_path)
    for change in (shift, stretch):
        nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.uint8), affine() @ change), tmp_path / "l.nii.gz")
        before = (tmp_path / "l.nii.gz").read_bytes()
        if same:
            assert fit_label(tmp_path / "l.nii.gz", volume)
        else:
            with pytest.raises(ImageError, match=r"'l.nii.gz' lies elsewhere than its image"):
                fit_label(tmp_path / "l.nii.gz", volume)
        assert (tmp_path / "l.nii.gz").read_bytes() == before


def test_a_sheared_image_has_a_label_too(tmp_path: Path) -> None:
    grid = affine()
    grid[:3, 0] += 0.3 * grid[:3, 1]
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 4, 3), np.int16), grid), tmp_path / "image.nii.gz")
    volume = load_volume(tmp_path / "image.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 4, 3), np.uint8), grid), tmp_path / "l.nii.gz")
    assert fit_label(tmp_path / "l.nii.gz", volume)


def test_without_an_image_only_the_voxels_count(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 4, 3), np.uint8), np.eye(4)), tmp_path / "l.nii.gz")
    assert not fit_label(tmp_path / "l.nii.gz", None)
    nibabel.save(nibabel.Nifti1Image(np.full((5, 4, 3), 0.5), np.eye(4)), tmp_path / "l.nii.gz")
    with pytest.raises(ImageError, match="whole numbers"):
        fit_label(tmp_path / "l.nii.gz", None)
