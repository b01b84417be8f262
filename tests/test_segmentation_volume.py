"""Images from files as MONAI reads them, their slices, and masks back on the same grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from monai.transforms import LoadImage
from PIL import Image as Picture
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from monailabel_dfqsam.segmentation.volume import (
    SOFT_TISSUE,
    ImageError,
    Window,
    load_volume,
    slice_rgb,
    write_mask,
)
from tests.dicom_series import Series

REALDATA = Path(__file__).parents[2] / "shared" / "realdata"
SHAPE = (5, 7, 3)
MILLIMETRES = 1e-4


def oblique(flip: bool = False) -> np.ndarray:
    """[4, 4] RAS: turned about two axes, anisotropic; left-handed when flipped."""
    a, b = 0.3, -0.2
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn_z @ turn_x @ np.diag([0.8, 1.1, -4.0 if flip else 4.0])
    affine[:3, 3] = (-31, 17, 250)
    return affine


def sheared() -> np.ndarray:
    affine = oblique()
    affine[0, 1] += 0.4
    return affine


def values(dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 900, SHAPE).astype(dtype)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, oblique() if affine is None else affine), path)
    return path


def write_itk(path: Path, array: np.ndarray) -> Path:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing((0.8, 1.1, 4.0))
    image.SetOrigin((3, 4, 5))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))
    return path


def write_dicom(folder: Path, modality: str = "CT", series: str | None = None) -> Path:
    """Slices whose file names run against their positions."""
    folder.mkdir(exist_ok=True)
    study, series = generate_uid(), series or generate_uid()
    for k in range(SHAPE[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.is_little_endian, data.is_implicit_VR = True, False
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = study, series, modality
        data.InstanceNumber = k + 1
        data.ImagePositionPatient, data.ImageOrientationPatient = [3, 4, 5 + 4 * k], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [1.1, 0.8], 4
        data.Rows, data.Columns = SHAPE[1], SHAPE[0]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.RescaleIntercept, data.RescaleSlope = -1000, 1
        data.PixelData = values(np.uint16)[:, :, k].T.tobytes()
        pydicom.dcmwrite(folder / f"{9 - k}_{series[-4:]}.dcm", data, write_like_original=False)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "oblique.nii.gz": lambda p: write_nifti(p, values()),
    "flipped.nii": lambda p: write_nifti(p, values(np.float32), oblique(flip=True)),
    "sheared.nii.gz": lambda p: write_nifti(p, values(), sheared()),
    "trailing.nii.gz": lambda p: write_nifti(p, values()[..., None]),
    "turned.nrrd": lambda p: write_itk(p, values()),
    "turned.mha": lambda p: write_itk(p, values(np.uint8)),
    "series": write_dicom,
}


@pytest.mark.parametrize("name", WRITERS)
def test_array_and_affine_are_those_of_monai(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name)
    volume = load_volume(path)
    # MONAI's ITK reader takes MetaImage and DICOM, and its own readers the rest.
    expected = LoadImage(image_only=True)(str(path))
    assert volume.shape == SHAPE
    assert np.array_equal(volume.array, np.asarray(expected).reshape(SHAPE))
    assert np.allclose(volume.affine, np.asarray(expected.affine), atol=MILLIMETRES)


@pytest.mark.parametrize("suffix", [".nrrd", ".nii.gz", ".nii"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_mask_comes_back_on_the_grid_of_its_image(tmp_path: Path, name: str, suffix: str) -> None:
    volume = load_volume(WRITERS[name](tmp_path / name))
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[1:3, 4:6, 1] = 2
    mask[4, 0, 2] = 1
    path = tmp_path / f"mask{suffix}"
    write_mask(mask, volume, path)
    again = load_volume(path)
    assert again.array.dtype == np.uint8
    assert np.array_equal(again.array, mask)
    assert np.allclose(again.affine, volume.affine, atol=MILLIMETRES)
    if suffix == ".nrrd":
        stored = sitk.ReadImage(str(path))
        assert stored.GetSpacing() == pytest.approx(volume.spacing)
        assert stored.GetOrigin() == pytest.approx(volume.origin)
        assert stored.GetDirection() == pytest.approx(volume.direction)


def test_a_mask_is_compressed_or_not_as_told(tmp_path: Path) -> None:
    volume = load_volume(write_itk(tmp_path / "a.nrrd", values()))
    mask = np.zeros(SHAPE, dtype=np.uint8)
    for compress, word in ((True, b"encoding: gzip"), (False, b"encoding: raw")):
        write_mask(mask, volume, tmp_path / "m.nrrd", compress)
        assert word in (tmp_path / "m.nrrd").read_bytes()[:400]


def test_a_mask_of_a_picture_is_as_flat_as_the_picture(tmp_path: Path) -> None:
    Picture.fromarray(values(np.uint8)[:, :, 0]).save(tmp_path / "a.png")
    volume = load_volume(tmp_path / "a.png")
    mask = (volume.array > 100).astype(np.uint8)
    write_mask(mask, volume, tmp_path / "m.nrrd")
    assert sitk.ReadImage(str(tmp_path / "m.nrrd")).GetSize() == (SHAPE[1], SHAPE[0])
    assert np.array_equal(load_volume(tmp_path / "m.nrrd").array, mask)


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (np.zeros((5, 7, 2), dtype=np.uint8), "m.nrrd"),
        (np.zeros(SHAPE, dtype=np.int16), "m.nrrd"),
        (np.zeros(SHAPE, dtype=np.uint8), "m.png"),
    ],
)
def test_other_masks_are_refused(tmp_path: Path, mask: np.ndarray, name: str) -> None:
    volume = load_volume(write_itk(tmp_path / "a.nrrd", values()))
    with pytest.raises(ValueError, match="mask"):
        write_mask(mask, volume, tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("L", (40, 40, 40)),
        ("RGB", (10, 20, 30)),
        ("RGBA", (10, 20, 30)),
        ("P", (10, 20, 30)),
    ],
)
def test_pictures_are_shown_as_they_are(tmp_path: Path, mode: str, expected: tuple[int, int, int]) -> None:
    colour = {"L": 40, "RGB": (10, 20, 30), "RGBA": (10, 20, 30, 99), "P": 0}[mode]
    picture = Picture.new(mode, (6, 4), 0)
    if mode == "P":
        picture.putpalette([10, 20, 30, 200, 200, 200])
        picture.putpixel((0, 0), 1)
    else:
        picture.paste(colour, (2, 1, 6, 4))  # type: ignore[arg-type]
    picture.save(tmp_path / "a.png")
    rgb = slice_rgb(load_volume(tmp_path / "a.png"), 0)
    # A picture's columns are its first axis, as MONAI reads it.
    assert rgb.shape == (6, 4, 3)
    assert tuple(rgb[3, 2]) == expected
    assert tuple(rgb[0, 0]) != expected


def test_a_slice_has_i_down_and_j_to_the_right(tmp_path: Path) -> None:
    array = np.zeros(SHAPE, dtype=np.int16)
    array[4, 2, 1] = 500
    volume = load_volume(write_nifti(tmp_path / "a.nii.gz", array))
    rgb = slice_rgb(volume, 1, Window(0, 500))
    assert rgb.shape == (5, 7, 3)
    assert np.argwhere(rgb[..., 0]).tolist() == [[4, 2]]
    assert slice_rgb(volume, 2, Window(0, 500)).max() == 0
    for k in (-1, 3):
        with pytest.raises(ValueError, match="no slice"):
            slice_rgb(volume, k)


def test_a_window_maps_its_ends_to_black_and_white(tmp_path: Path) -> None:
    array = np.tile(np.array([-200, -160, 40, 240, 300], dtype=np.int16)[:, None, None], (1, 7, 3))
    volume = load_volume(write_nifti(tmp_path / "a.nii.gz", array))
    grey = slice_rgb(volume, 0, Window.of_level(40, 400))[:, 0, 0]
    assert grey.tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("window", [(5, 5), (6, 5), (float("nan"), 1), (0, float("inf"))])
def test_an_impossible_window_is_refused(window: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="low < high"):
        Window(*window)


def test_hounsfield_units_are_known_by_their_values_and_dicom_by_its_tag(tmp_path: Path) -> None:
    hounsfield = load_volume(write_nifti(tmp_path / "ct.nii.gz", values() - 1000))
    assert (hounsfield.modality, hounsfield.window) == ("CT", SOFT_TISSUE)
    other = load_volume(write_nifti(tmp_path / "mr.nii.gz", values()))
    assert other.modality is None
    assert load_volume(write_dicom(tmp_path / "ct")).modality == "CT"
    tagged = load_volume(write_dicom(tmp_path / "mr", "MR"))
    assert (tagged.modality, tagged.window == SOFT_TISSUE) == ("MR", False)


@pytest.mark.parametrize(
    ("dark", "bright", "padded", "is_soft_tissue"),
    [
        (1500, 2600, False, False),  # cone beam: without Hounsfield units
        (1500, 2600, True, False),  # the same with a corner of padding, whose black tells nothing
        (-990, -700, False, False),  # lung alone
        (-1000, 40, False, True),
        (30, 70, False, True),
    ],
)
def test_a_preset_of_ct_is_used_where_it_shows_something(
    tmp_path: Path, dark: int, bright: int, padded: bool, is_soft_tissue: bool
) -> None:
    random = np.random.default_rng(0)
    array = random.normal(np.where(np.indices((30, 30, 4))[0] < 10, bright, dark), 5)
    array[25:, 25:] = -1000 if padded else array[25:, 25:]
    volume = replace(load_volume(write_nifti(tmp_path / "a.nii", array.astype(np.int16))), modality="CT")
    assert volume.is_shown_by(SOFT_TISSUE) == is_soft_tissue
    path = tmp_path / "a.dcm"
    Series().write(path, array[:, :, 0].T.astype(np.int16), 0)
    read = load_volume(path)
    assert (read.modality, read.window == SOFT_TISSUE) == ("CT", is_soft_tissue)
    shown = slice_rgb(read, 0)[..., 0].astype(int)
    assert shown[:10, :20].mean() - shown[12:22, :20].mean() > 20


def test_background_does_not_count_for_the_window(tmp_path: Path) -> None:
    array = np.zeros((40, 40, 10), dtype=np.float32)
    array[:8] = np.random.default_rng(0).uniform(100, 200, (8, 40, 10))
    window = load_volume(write_nifti(tmp_path / "a.nii.gz", array)).window
    assert window is not None
    assert 100 < window.low < 102
    assert 198 < window.high < 200


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_image_has_a_window(tmp_path: Path, value: int) -> None:
    volume = load_volume(write_nifti(tmp_path / "a.nii.gz", np.full(SHAPE, value, dtype=np.int16)))
    assert len(np.unique(slice_rgb(volume, 0))) == 1


def test_what_is_no_number_becomes_the_least(tmp_path: Path) -> None:
    array = values(np.float32)
    least = array.min()
    array[0, 0, 0], array[1, 1, 1], array[2, 2, 2] = np.nan, np.inf, -np.inf
    volume = load_volume(write_nifti(tmp_path / "a.nii.gz", array))
    assert [float(volume.array[n, n, n]) for n in range(3)] == [least] * 3
    assert slice_rgb(volume, 0).dtype == np.uint8


def _damaged(path: Path) -> Path:
    write_itk(path, np.random.default_rng(0).integers(0, 900, (50, 50, 20)).astype(np.int16))
    path.write_bytes(path.read_bytes()[:2000])
    return path


def _two_series(folder: Path) -> Path:
    write_dicom(folder)
    return write_dicom(folder)


def _elsewhere(path: Path) -> Path:
    secret = path.with_name("secret.bin")
    secret.write_bytes(bytes(range(24)))
    text = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 3 4\nencoding: raw\ndata file: {secret}\n\n"
    path.write_text(text)
    return path


def _elsewhere_mha(path: Path) -> Path:
    secret = path.with_name("secret.raw")
    secret.write_bytes(bytes(range(24)))
    fields = ("ObjectType = Image", "NDims = 3", "DimSize = 2 3 4", "ElementType = MET_UCHAR")
    path.write_text("\n".join([*fields, f"ElementDataFile = {secret}", ""]))
    return path


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "name", "sentence"),
    [
        (lambda p: p, "a.nii.gz", "there is no image"),
        (lambda p: _written(p, b""), "a.nii.gz", "is empty"),
        (lambda p: _written(p, b"no image" * 99), "a.nii.gz", "cannot be read"),
        (lambda p: _written(p, b"no image" * 99), "a.png", "cannot be read"),
        (lambda p: _written(p, b"no image" * 99), "a.txt", "not an image of a known kind"),
        (_damaged, "a.nrrd", "cannot be read"),
        (lambda p: write_nifti(p, np.zeros((4, 5, 6, 2), np.int16)), "a.nii.gz", "4 dimensions, 4×5×6×2"),
        (lambda p: write_nifti(p, np.zeros((4, 5, 6, 1, 3), np.int16)), "a.nii.gz", "dimensions"),
        (lambda p: write_nifti(p, np.zeros((4, 5, 6), np.complex64)), "a.nii.gz", "complex"),
        (lambda p: write_nifti(p, np.full((4, 5, 6), np.nan, np.float32)), "a.nii.gz", "no finite value"),
        (_two_series, "series", "one DICOM series, not 2"),
        (lambda p: p.mkdir() or p, "series", "one DICOM series, not 0"),
        (_elsewhere, "a.nrrd", "voxels in another file"),
        (_elsewhere_mha, "a.mha", "voxels in another file"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_sentence(
    tmp_path: Path, make: Callable[[Path], Path], name: str, sentence: str
) -> None:
    with pytest.raises(ImageError, match=sentence) as caught:
        load_volume(make(tmp_path / name))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.skipif(not REALDATA.is_dir(), reason="../shared/realdata is absent")
@pytest.mark.parametrize(
    "name",
    [
        "volumes/brain_mr.nrrd",
        "volumes/sarcoma_pet.nii.gz",
        "volumes/spine_mr_t2.nii.gz",
        "volumes/spleen_ct.nii.gz",
        "dicom/sarcoma_ct/image",
    ],
)
def test_real_images_are_read_as_monai_reads_them(name: str) -> None:
    volume = load_volume(REALDATA / name)
    expected = LoadImage(image_only=True)(str(REALDATA / name))
    assert np.array_equal(volume.array, np.asarray(expected))
    assert np.allclose(volume.affine, np.asarray(expected.affine), atol=MILLIMETRES)
    assert (volume.modality == "CT") == ("ct" in name)
