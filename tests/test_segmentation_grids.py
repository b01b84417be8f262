"""A label map on another grid than its image's, by where both lie in space."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from monailabel_dfqsam.segmentation.grids import covers, on_grid
from monailabel_dfqsam.segmentation.volume import Volume, load_volume

SHAPE = (9, 7, 5)
EYE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def matrix() -> np.ndarray:
    """[4, 4] RAS, turned about every axis."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (0.3, -0.2, 0.5)).as_matrix() @ np.diag([0.8, 1.1, 4.0])
    affine[:3, 3] = (-31, 17, 250)
    return affine


def nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Volume:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return load_volume(path)


def labels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations([0, 1, 2]), flips=st.tuples(*[st.sampled_from([1, -1])] * 3))
def test_any_order_and_sense_of_the_axes_comes_back(
    tmp_path: Path, order: list[int], flips: tuple[int, ...]
) -> None:
    turn = np.stack([np.argsort(order), flips], axis=1)
    turned = nibabel.Nifti1Image(labels(), matrix()).as_reoriented(turn)
    label = nifti(tmp_path / "label.nii", np.asarray(turned.dataobj), turned.affine)
    image = nifti(tmp_path / "image.nii", np.zeros(SHAPE, np.int16), matrix())
    assert covers(label, image)
    found = on_grid(label, image)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, labels())


def test_a_finer_map_gives_its_nearest_voxels(tmp_path: Path) -> None:
    half = matrix() @ np.diag([0.5, 0.5, 0.5, 1])
    half[:3, 3] -= (matrix()[:3, :3] * 0.25).sum(axis=1)  # the same box around it
    fine = labels().repeat(2, 0).repeat(2, 1).repeat(2, 2)
    label = nifti(tmp_path / "label.nii", fine, half)
    image = nifti(tmp_path / "image.nii", np.zeros(SHAPE, np.int16), matrix())
    assert covers(label, image)
    np.testing.assert_array_equal(on_grid(label, image), labels())


def test_what_a_map_does_not_reach_is_told_and_0(tmp_path: Path) -> None:
    image = nifti(tmp_path / "image.nii", np.zeros(SHAPE, np.int16), matrix())
    label = nifti(tmp_path / "label.nii", labels()[:5], matrix())
    assert not covers(label, image)
    found = on_grid(label, image)
    np.testing.assert_array_equal(found[:5], labels()[:5])
    assert not found[5:].any()


def test_a_picture_has_no_place_and_its_size_counts() -> None:
    array = np.ones((6, 4, 1), np.uint8)
    picture = Volume(array, (0.0, 0.0), (1.0, 1.0), (1.0, 0.0, 0.0, 1.0), None, None)
    label = Volume(array, (5.0, 5.0, 5.0), (2.0, 2.0, 2.0), EYE, None, None)
    assert covers(label, picture)
    np.testing.assert_array_equal(on_grid(label, picture), array)
    small = Volume(array[:5], (5.0, 5.0, 5.0), (2.0, 2.0, 2.0), EYE, None, None)
    with pytest.raises(ValueError, match=r"the label's size is \[5, 4, 1\], the image's \[6, 4, 1\]"):
        on_grid(small, picture)
