"""The phantom study: volumes whose geometry hides no mistake, masks that belong to them, ideal clicks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from monailabel_dfqsam.phantom_study import (
    LABELS,
    StudyItem,
    click_for,
    find_pairs,
    write_phantom_study,
)
from monailabel_dfqsam.segmentation.prompts import read_prompts
from monailabel_dfqsam.segmentation.volume import load_volume, slice_rgb

# Grey levels of 255 between an object's mean and that of its surroundings.
CONTRAST = 20


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[StudyItem]:
    return write_phantom_study(tmp_path_factory.mktemp("study"))


def test_names_are_those_that_pairs_are_found_by(study: list[StudyItem]) -> None:
    assert [item.modality for item in study] == ["CT", "MR", "US"]
    folder = study[0].image.parent
    assert find_pairs(folder) == [(item.image, item.mask) for item in study]
    assert all(item.mask.parent == folder / LABELS for item in study)
    assert all(item.mask.name == f"{item.image.name[:-7]}_{item.label}.nii.gz" for item in study)


def test_geometry_hides_no_mistake(study: list[StudyItem]) -> None:
    directions = []
    for item in study:
        image, mask = sitk.ReadImage(str(item.image)), sitk.ReadImage(str(item.mask))
        for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(image, get)() == getattr(mask, get)()
        assert len(set(image.GetSize())) == 3
        assert image.GetSpacing()[2] > image.GetSpacing()[0]
        directions.append(np.array(image.GetDirection()).reshape(3, 3))
        truth = load_volume(item.mask).array
        assert set(np.unique(truth)) == {0, 1}
        for axis in range(3):
            assert not np.array_equal(truth, np.flip(truth, axis))
            assert not np.array_equal(
                load_volume(item.image).array, np.flip(load_volume(item.image).array, axis)
            )
    assert any(np.linalg.det(d) < 0 for d in directions)
    assert any(np.abs(d[np.abs(d) < 0.9]).max() > 0.1 for d in directions)


def test_objects_stand_out_and_clicks_hit_them(study: list[StudyItem]) -> None:
    for item in study:
        volume, truth = load_volume(item.image), load_volume(item.mask).array
        click = click_for(truth)
        plane = truth[:, :, click.k] != 0
        grey = slice_rgb(volume, click.k)[..., 0].astype(float)
        x0, y0, x1, y1 = (int(v) for v in click.box)
        around = np.zeros_like(plane)
        around[max(y0 - 4, 0) : y1 + 4, max(x0 - 4, 0) : x1 + 4] = True
        assert abs(grey[plane].mean() - grey[around & ~plane].mean()) > CONTRAST
        assert plane[click.point_ij]
        assert plane.sum() == (truth != 0).sum(axis=(0, 1)).max()
        k, prompts = read_prompts({"roi": click.roi, "slice": click.k}, volume.shape)
        assert k == click.k
        assert prompts.box is not None
        assert prompts.box.tolist() == list(click.box)
    assert load_volume(study[0].image).modality == "CT"


def test_the_seed_decides_the_voxels(tmp_path: Path, study: list[StudyItem]) -> None:
    again, other = write_phantom_study(tmp_path / "a"), write_phantom_study(tmp_path / "b", seed=1)
    for first, second, third in zip(study, again, other, strict=True):
        voxels = [load_volume(item.image).array for item in (first, second, third)]
        assert np.array_equal(voxels[0], voxels[1])
        assert not np.array_equal(voxels[0], voxels[2])


def test_pairs_are_found_beside_and_below_whatever_the_suffix(tmp_path: Path) -> None:
    (tmp_path / LABELS).mkdir()
    for name in (
        "a_ct.nii.gz",
        "a_ct_liver.nrrd",
        "a_ct_liver_left.nii.gz",
        "b.nrrd",
        "a_ctx.nrrd",
        "notes.txt",
    ):
        (tmp_path / name).touch()
    for name in ("b_cyst.nrrd", "c_cyst.nrrd"):
        (tmp_path / LABELS / name).touch()
    found = [(image.name, mask.name) for image, mask in find_pairs(tmp_path)]
    assert found == [
        ("a_ct.nii.gz", "a_ct_liver.nrrd"),
        ("a_ct.nii.gz", "a_ct_liver_left.nii.gz"),
        ("b.nrrd", "b_cyst.nrrd"),
    ]


def test_an_empty_mask_cannot_be_clicked() -> None:
    with pytest.raises(ValueError, match="empty"):
        click_for(np.zeros((3, 4, 5)))
