"""The values of DICOM files: each by its own transform, in every way that its pixels may be stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.pixel_data_handlers.util import convert_color_space
from pydicom.uid import ExplicitVRBigEndian, RLELossless

from monailabel_dfqsam.segmentation.reading import read_image
from monailabel_dfqsam.segmentation.volume import ImageError, Window, load_volume, slice_rgb
from tests.dicom_series import Series, implicit_without_preamble
from tests.test_segmentation_reading import write_frames

SHAPE = (8, 6, 4)  # (I, J, K)
HOUNSFIELD = np.random.default_rng(0).integers(-900, 900, SHAPE)
NOISE = np.random.default_rng(1).integers(0, 16, SHAPE)

Change = Callable[[FileDataset, int], None]


def write(folder: Path, change: Change = lambda data, k: None) -> Path:
    """A CT series of `HOUNSFIELD`, each file changed."""
    folder.mkdir()
    series = Series()
    for k in range(SHAPE[2]):
        path = folder / f"{9 - k}.dcm"
        series.write(path, HOUNSFIELD[:, :, k].T, k)
        data = pydicom.dcmread(path)
        change(data, k)
        data.save_as(path, write_like_original=False)
    return folder


def store(data: FileDataset, plane: NDArray[Any], kind: str, **tags: Any) -> None:
    """Puts [I, J] stored numbers of a type in place of what is there."""
    dtype = np.dtype(kind)
    data.BitsAllocated = data.BitsStored = dtype.itemsize * 8
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(dtype.kind == "i")
    data.PixelData = plane.T.astype(dtype).tobytes()
    for name, value in tags.items():
        setattr(data, name, value)


def _slopes(data: FileDataset, k: int) -> None:
    slope = (1, 0.25, 2, 0.001)[k]
    store(data, np.rint((HOUNSFIELD[:, :, k] + 1000) / slope), "<u4", RescaleSlope=slope)


def _signs(data: FileDataset, k: int) -> None:
    signed, intercept = k % 2, (-1000, 0)[k % 2]
    plane = HOUNSFIELD[:, :, k] - intercept
    store(data, plane, "<i2" if signed else "<u2", RescaleIntercept=intercept)


def _big_endian(data: FileDataset, k: int) -> None:
    store(data, HOUNSFIELD[:, :, k] + 1000, ">u4" if k % 2 else ">u2")
    data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    data.is_little_endian, data.is_implicit_VR = False, False


def _overlay_above(data: FileDataset, k: int) -> None:
    plane = (HOUNSFIELD[:, :, k] + 1000) | NOISE[:, :, k] << 12
    store(data, plane, "<u2", BitsStored=12, HighBit=11)


def _overlay_above_a_sign(data: FileDataset, k: int) -> None:
    plane = (HOUNSFIELD[:, :, k] & 0xFFF) | NOISE[:, :, k] << 12
    store(data, plane, "<u2", BitsStored=12, HighBit=11, PixelRepresentation=1, RescaleIntercept=0)


def _overlay_below(data: FileDataset, k: int) -> None:
    plane = (HOUNSFIELD[:, :, k] + 1000) << 4 | NOISE[:, :, k]
    store(data, plane, "<u2", BitsStored=12, HighBit=15)


def _run_lengths(data: FileDataset, k: int) -> None:
    data.compress(RLELossless)


def _no_slope(data: FileDataset, k: int) -> None:
    data.RescaleSlope = 0


@pytest.mark.parametrize(
    "change",
    [
        _slopes, _signs, _big_endian, _overlay_above, _overlay_above_a_sign, _overlay_below, _run_lengths,
        _no_slope,
    ],
)  # fmt: skip
def test_hounsfield_units_come_out_however_they_are_stored(tmp_path: Path, change: Change) -> None:
    volume = load_volume(write(tmp_path / "series", change))
    # A slope of 2 rounds.
    np.testing.assert_allclose(volume.array, HOUNSFIELD, atol=1 if change is _slopes else 1e-6)


def test_bits_are_read(tmp_path: Path) -> None:
    def change(data: FileDataset, k: int) -> None:
        store(data, HOUNSFIELD[:, :, k], "<u1", BitsAllocated=1, BitsStored=1, HighBit=0)
        data.PixelData = np.packbits((HOUNSFIELD[:, :, k].T > 0).ravel(), bitorder="little").tobytes()
        del data.RescaleSlope, data.RescaleIntercept

    volume = load_volume(write(tmp_path / "series", change))
    np.testing.assert_array_equal(volume.array, HOUNSFIELD > 0)


def test_floating_pixels_are_read(tmp_path: Path) -> None:
    def change(data: FileDataset, k: int) -> None:
        del data.PixelData, data.BitsStored, data.HighBit
        data.FloatPixelData = (HOUNSFIELD[:, :, k].T / 7).astype("<f4").tobytes()
        data.BitsAllocated, data.RescaleIntercept = 32, 0

    volume = load_volume(write(tmp_path / "series", change))
    np.testing.assert_allclose(volume.array, HOUNSFIELD / 7, rtol=1e-6)


def test_without_preamble_by_content_and_named_when_cut(tmp_path: Path) -> None:
    folder = write(tmp_path / "series")
    for path in list(folder.iterdir()):
        implicit_without_preamble(path)
        path.rename(path.with_suffix(""))
    (folder / "notes.txt").write_text("not an image")
    np.testing.assert_array_equal(load_volume(folder).array, HOUNSFIELD)
    np.testing.assert_array_equal(load_volume(folder / "9").array, HOUNSFIELD[:, :, :1])
    (folder / "8").write_bytes((folder / "8").read_bytes()[:-20])
    with pytest.raises(ImageError, match="'8' cannot be read"):
        load_volume(folder)


def test_each_frame_has_its_own_transform(tmp_path: Path) -> None:
    path = tmp_path / "frames.dcm"
    write_frames(path, range(3))
    data = pydicom.dcmread(path)
    del data.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    transforms = [(1, 0), (0.5, -3), (3, -1000)]
    for groups, (slope, intercept) in zip(data.PerFrameFunctionalGroupsSequence, transforms, strict=True):
        own = Dataset()
        own.RescaleSlope, own.RescaleIntercept, own.RescaleType = slope, intercept, "US"
        groups.PixelValueTransformationSequence = [own]
    data.save_as(path)
    stored = data.pixel_array.astype(float)
    wanted = [stored[n].T * slope + intercept for n, (slope, intercept) in enumerate(transforms)]
    np.testing.assert_allclose(load_volume(path).array, np.stack(wanted, axis=-1))


def test_low_values_are_shown_white_and_kept(tmp_path: Path) -> None:
    def change(data: FileDataset, k: int) -> None:
        data.PhotometricInterpretation = "MONOCHROME1"

    volume = load_volume(write(tmp_path / "series", change))
    np.testing.assert_array_equal(volume.array, HOUNSFIELD)
    white = slice_rgb(volume, 0, Window(-200, 100))[..., 0] == 255
    np.testing.assert_array_equal(white, HOUNSFIELD[:, :, 0] <= -200)


def test_a_series_of_both_kinds_of_grey_is_refused(tmp_path: Path) -> None:
    def change(data: FileDataset, k: int) -> None:
        data.PhotometricInterpretation = "MONOCHROME1" if k == 2 else "MONOCHROME2"

    with pytest.raises(ImageError, match="'series' mixes slices"):
        load_volume(write(tmp_path / "series", change))


COLOUR = np.random.default_rng(2).integers(30, 220, (*SHAPE[:2], 3)).astype(np.uint8)


def _colour(data: FileDataset, kind: str) -> None:
    store(data, HOUNSFIELD[:, :, 0], "<u1", Modality="US", PhotometricInterpretation=kind)
    del data.RescaleSlope, data.RescaleIntercept


@pytest.mark.parametrize(("kind", "planes"), [("RGB", 0), ("RGB", 1), ("YBR_FULL", 0)])
def test_colour_is_red_green_and_blue(tmp_path: Path, kind: str, planes: int) -> None:
    path = write(tmp_path / "series") / "9.dcm"
    data = pydicom.dcmread(path)
    _colour(data, kind)
    stored = COLOUR.transpose(1, 0, 2)
    stored = convert_color_space(stored, "RGB", kind) if kind != "RGB" else stored
    data.SamplesPerPixel, data.PlanarConfiguration = 3, planes
    data.PixelData = (stored.transpose(2, 0, 1) if planes else stored).tobytes()
    data.save_as(path)
    found = load_volume(path).array[:, :, 0].astype(int)
    assert np.abs(found - COLOUR).max() <= 2 * (kind != "RGB")  # two roundings


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    path = write(tmp_path / "series") / "9.dcm"
    data = pydicom.dcmread(path)
    _colour(data, "PALETTE COLOR")
    index = np.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE[:2]) % 5
    palette = COLOUR[0, :5]
    data.PixelData = index.T.astype(np.uint8).tobytes()
    for n in range(3):
        data.add_new(0x00281101 + n, "US", [5, 0, 16])
        data.add_new(0x00281201 + n, "OW", (palette[:, n] * 257).astype("<u2").tobytes())
    data.save_as(path)
    np.testing.assert_array_equal(load_volume(path).array[:, :, 0], palette[index])


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_bigendian.dcm", "MR_small.dcm"),
        ("rtdose_expb.dcm", "rtdose.dcm"),
        ("rtdose_rle.dcm", "rtdose.dcm"),
        ("liver_expb_1frame.dcm", "liver_1frame.dcm"),
    ],
)
def test_pydicoms_own_files_are_the_same_in_every_packing(name: str, reference: str) -> None:
    paths = [get_testdata_file(n, download=False) for n in (name, reference)]
    stored = pydicom.dcmread(str(paths[1])).pixel_array
    wanted = stored.reshape(-1, *stored.shape[-2:]).transpose(2, 1, 0)
    np.testing.assert_array_equal(load_volume(str(paths[0])).array, wanted)


def _packed(uid: str) -> Callable[[FileDataset], None]:
    def change(data: FileDataset) -> None:
        data.file_meta.TransferSyntaxUID = uid
        data.PixelData = encapsulate([b"12345678"])
        data["PixelData"].is_undefined_length = True

    return change


def _without_pixels(data: FileDataset) -> None:
    del data.PixelData


def _without_size(data: FileDataset) -> None:
    del data.PixelData, data.Rows, data.Columns


def _twelve(data: FileDataset) -> None:
    data.BitsAllocated = data.BitsStored = 12
    data.HighBit = 11


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_packed("1.2.840.10008.1.2.4.102"), r"packed in a way unknown here \(MPEG-4"),
        (_without_pixels, "cannot be read"),
        (_without_size, "is a DICOM file without an image"),
        (_twelve, "cannot be read"),
    ],
)
def test_what_holds_no_pixels_that_can_be_read_is_refused(
    tmp_path: Path, change: Callable[[FileDataset], None], sentence: str
) -> None:
    path = write(tmp_path / "series") / "9.dcm"
    data = pydicom.dcmread(path)
    change(data)
    data.save_as(path)
    with pytest.raises(ImageError, match=sentence) as caught:
        load_volume(path)
    assert str(caught.value).startswith("'9.dcm' ")


def test_a_copy_in_nifti_says_what_dicom_said(tmp_path: Path) -> None:
    """As the server keeps an archive's series: a viewer's window then means the same values."""
    series = Series(tags={"PhotometricInterpretation": "MONOCHROME1", "Modality": "DX"})
    (tmp_path / "series").mkdir()
    for k in range(3):
        series.write(tmp_path / "series" / f"{k}.dcm", np.arange(42).reshape(7, 6) + k, k)
    sitk.WriteImage(read_image(tmp_path / "series").to_itk(), str(tmp_path / "copy.nii.gz"))
    direct, copied = load_volume(tmp_path / "series"), load_volume(tmp_path / "copy.nii.gz")
    assert np.array_equal(copied.array, direct.array)
    assert (copied.modality, copied.inverted) == (direct.modality, direct.inverted) == ("DX", True)
    assert np.array_equal(slice_rgb(copied, 1, Window(0, 50)), slice_rgb(direct, 1, Window(0, 50)))
