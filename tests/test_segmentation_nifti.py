"""NIfTI files of every kind: values as nibabel has them, and a place by both of their transforms."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from monailabel_dfqsam.segmentation.volume import ImageError, load_volume, write_mask

SHAPE = (8, 6, 4)
MILLIMETRES = 1e-4


def values(dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, SHAPE).astype(dtype)


def oblique() -> np.ndarray:
    """[4, 4] RAS, turned about z by 0.3."""
    affine = np.diag([0.8, 1.1, 4.0, 1.0])
    affine[:2, :2] = [[0.8 * np.cos(0.3), -1.1 * np.sin(0.3)], [0.8 * np.sin(0.3), 1.1 * np.cos(0.3)]]
    affine[:3, 3] = (-31, 17, 250)
    return affine


def sheared() -> np.ndarray:
    affine = oblique()
    affine[0, 1] += 0.4
    return affine


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(array.dtype)
    nibabel.save(nibabel.Nifti1Image(array, oblique() if affine is None else affine, header), path)
    return path


def patched(path: Path, offset: int, layout: str, *numbers: float) -> Path:
    """A written NIfTI with numbers of its header changed."""
    content = bytearray(write(path, values()).read_bytes())
    struct.pack_into(layout, content, offset, *numbers)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("axes", [3, 4, 5])
@pytest.mark.parametrize("affine", [oblique(), sheared()])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_no_number_becomes_the_least(
    tmp_path: Path, axes: int, affine: np.ndarray, dtype: type
) -> None:
    array = values(dtype) + 10
    expected = array.copy()
    array[0, 0, 0], array[1, 1, 1], array[2, 2, 2] = np.nan, np.inf, -np.inf
    expected[[0, 1, 2], [0, 1, 2], [0, 1, 2]] = array[np.isfinite(array)].min()
    path = write(tmp_path / "a.nii.gz", array.reshape(*SHAPE, *[1] * (axes - 3)), affine)
    np.testing.assert_array_equal(load_volume(path).array, expected)


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float64]
)
def test_every_type_of_number_is_read(tmp_path: Path, dtype: type) -> None:
    np.testing.assert_array_equal(load_volume(write(tmp_path / "a.nii", values(dtype))).array, values())


NAN = float("nan")


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [(0, 7, values()), (NAN, 0, values()), (2, -5, 2 * values() - 5), (0.5, 0, values() / 2)],
)
def test_slope_and_intercept(tmp_path: Path, slope: float, intercept: float, expected: np.ndarray) -> None:
    volume = load_volume(patched(tmp_path / "a.nii", 112, "<ff", slope, intercept))
    np.testing.assert_array_equal(volume.array, expected)


def test_other_headers_of_the_same_voxels(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti2Image(values(), oblique()), tmp_path / "two.nii")
    swapped = nibabel.Nifti1Image(values(), oblique()).header.as_byteswapped()
    nibabel.save(nibabel.Nifti1Image(values(), oblique(), swapped), tmp_path / "swapped.nii")
    for name in ("two", "swapped"):
        volume = load_volume(tmp_path / f"{name}.nii")
        np.testing.assert_array_equal(volume.array, values())
        np.testing.assert_allclose(volume.affine, oblique(), atol=MILLIMETRES)


def test_colour_is_read_without_its_opacity(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (*SHAPE, 4)).astype(np.uint8)
    for channels in ("RGB", "RGBA"):
        kind = np.dtype([(channel, "u1") for channel in channels])
        packed = np.ascontiguousarray(colour[..., : len(channels)]).view(kind)[..., 0]
        path = write(tmp_path / "a.nii.gz", packed)
        np.testing.assert_array_equal(load_volume(path).array, colour[..., :3])


FORMS = [(1, 1), (2, 1), (1, 2), (4, 1), (0, 1), (2, 0), (0, 0)]


@pytest.mark.parametrize(("s_code", "q_code"), FORMS)
@pytest.mark.parametrize("units", ["mm", "micron"])
def test_a_place_is_nibabels_and_itks_and_a_mask_keeps_both(
    tmp_path: Path, s_code: int, q_code: int, units: str
) -> None:
    image = nibabel.Nifti1Image(values(), None)
    moved = oblique()
    moved[:3, 3] += (-30, -20, 10)
    image.set_qform(oblique(), q_code)
    image.set_sform(moved, s_code)
    image.header.set_xyzt_units(units)
    nibabel.save(image, tmp_path / "a.nii.gz")
    volume = load_volume(tmp_path / "a.nii.gz")
    itk, source = sitk.ReadImage(str(tmp_path / "a.nii.gz")), nibabel.load(tmp_path / "a.nii.gz")
    assert volume.origin == pytest.approx(itk.GetOrigin(), abs=MILLIMETRES)
    assert volume.spacing == pytest.approx(itk.GetSpacing(), rel=1e-5)
    assert volume.direction == pytest.approx(itk.GetDirection(), abs=1e-5)
    np.testing.assert_allclose(volume.affine, source.affine, atol=MILLIMETRES)
    for suffix in (".nii", ".nii.gz", ".nrrd"):
        write_mask(np.ones(SHAPE, np.uint8), volume, tmp_path / f"mask{suffix}")
        again = sitk.ReadImage(str(tmp_path / f"mask{suffix}"))
        assert again.GetOrigin() == pytest.approx(itk.GetOrigin(), abs=MILLIMETRES)
        if suffix != ".nrrd":
            mask = nibabel.load(tmp_path / f"mask{suffix}")
            np.testing.assert_array_equal(mask.affine, source.affine)
            np.testing.assert_array_equal(mask.get_qform(), source.get_qform())


@pytest.mark.parametrize("affine", [oblique(), sheared()])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_mask_of_a_flat_image_keeps_its_place_in_space(
    tmp_path: Path, affine: np.ndarray, suffix: str
) -> None:
    volume = load_volume(write(tmp_path / "a.nii", values()[:, :, 0], affine))
    np.testing.assert_allclose(volume.affine, affine, atol=MILLIMETRES)
    write_mask(np.ones((8, 6, 1), np.uint8), volume, tmp_path / f"mask{suffix}")
    mask = nibabel.load(tmp_path / f"mask{suffix}")
    assert mask.shape == (8, 6)
    np.testing.assert_allclose(mask.affine, affine, atol=MILLIMETRES)
    write_mask(np.ones((8, 6, 1), np.uint8), volume, tmp_path / "mask.nrrd")
    np.testing.assert_allclose(load_volume(tmp_path / "mask.nrrd").affine, affine, atol=MILLIMETRES)


def _singular(path: Path) -> Path:
    flat = oblique()
    flat[:3, 2] = 0
    image = nibabel.Nifti1Image(values(), None)
    image.set_sform(flat, 1)
    nibabel.save(image, path)
    return path


def _cut(path: Path) -> Path:
    whole = gzip.compress(write(path.with_name("b.nii"), values()).read_bytes())
    path.write_bytes(whole[: len(whole) // 3])
    return path


def _analyze(path: Path) -> Path:
    nibabel.save(nibabel.Nifti1Pair(values(), oblique()), path.with_name("pair.img"))
    path.write_bytes(path.with_name("pair.hdr").read_bytes())
    return path


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: patched(p, 280, "<f", NAN), "lies nowhere"),
        (_singular, "lies nowhere"),
        (lambda p: patched(p, 70, "<hh", 16384, 16), "cannot be read"),  # float16
        (_cut, "is incomplete"),
        (_analyze, "keeps its voxels in another file"),
        (lambda p: p.write_bytes(gzip.compress(b"text" * 200)) and p, "cannot be read"),
        (lambda p: write(p, values(np.complex64)), "complex"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_sentence(
    tmp_path: Path, make: Callable[[Path], Path], sentence: str
) -> None:
    with pytest.raises(ImageError, match=sentence) as caught:
        load_volume(make(tmp_path / "a.nii"))
    assert str(caught.value).startswith("'a.nii' ")


def _picture(path: Path) -> None:
    grey = sitk.GetImageFromArray(np.ascontiguousarray(values(np.uint8)[:, :, 0].T))
    sitk.WriteImage(grey, str(path))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.NII.GZ", "a.Nii.gz", "a.dcm", "a.png", "a.mha"])
@pytest.mark.parametrize("kind", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.png"])
def test_content_counts_and_not_the_name(tmp_path: Path, kind: str, name: str) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    expected = values()
    if kind == "a.png":
        _picture(folder / kind)
        expected = values()[:, :, :1]
    elif kind.startswith("a.nii"):
        write(folder / kind, values())
    else:
        sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(values().T)), str(folder / kind))
    (folder / kind).rename(tmp_path / name)
    np.testing.assert_array_equal(load_volume(tmp_path / name).array, expected)


def test_a_voxel_that_was_flipped_within_a_packed_file_is_noticed(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.nii", values()).read_bytes()
    packed = bytearray(gzip.compress(plain, compresslevel=0))
    packed[packed.index(plain[352:]) + 20] ^= 4
    (tmp_path / "a.nii.gz").write_bytes(packed)
    with pytest.raises(ImageError, match=r"'a\.nii\.gz' cannot be read: it is damaged"):
        load_volume(tmp_path / "a.nii.gz")


def test_what_follows_the_voxels_is_left_alone(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.nii", values()).read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(plain + b"more" * 9))
    assert np.array_equal(load_volume(tmp_path / "a.nii.gz").array, values())
