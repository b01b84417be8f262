"""DICOM series as archives hold them: read where they lie, or refused; never read into a wrong place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage, UltrasoundMultiFrameImageStorage

from monailabel_dfqsam.segmentation.image import ImageError
from monailabel_dfqsam.segmentation.reading import read_itk
from tests.dicom_series import Series

SHAPE = (8, 6)  # (I, J)
OBLIQUE = Series((0.8, 0.6, 0.0), (0.6, -0.8, 0.0))
TINY = 1e-4  # millimetres


def plane(k: float) -> NDArray[np.int64]:
    """[J, I] a slice that shows which one it is, and whether it was turned."""
    i, j = np.indices(SHAPE)
    return np.asarray((i + 10 * j).T + round(100 * k))


def write(folder: Path, ks: Sequence[float], series: Series = OBLIQUE, **tags: Any) -> Path:
    """Slices at `ks`, their files named against their order."""
    folder.mkdir(exist_ok=True)
    for n, k in enumerate(ks):
        series.write(folder / f"{100 - n}-{series.uid[-5:]}.dcm", plane(k), k, **tags)
    return folder


def check_places(
    image: sitk.Image, ks: Sequence[float], series: Series = OBLIQUE, within: float = TINY
) -> None:
    """Every slice's voxels, and where each of its corners lies, against what was written."""
    assert image.GetSize() == (*SHAPE, len(ks))
    array = sitk.GetArrayFromImage(image)
    for n, k in enumerate(ks):
        np.testing.assert_array_equal(array[n], plane(k))
        for i, j in ((0, 0), (SHAPE[0] - 1, 0), (0, SHAPE[1] - 1)):
            found = image.TransformIndexToPhysicalPoint((i, j, n))
            np.testing.assert_allclose(found, series.world((i, j, k)), atol=within)


@pytest.mark.parametrize("ks", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_slices_are_ordered_by_place(tmp_path: Path, ks: tuple[int, ...]) -> None:
    image, modality = read_itk(write(tmp_path / "series", ks))
    check_places(image, sorted(ks))
    assert modality == "CT"


def test_a_small_jitter_passes(tmp_path: Path) -> None:
    ks = (0, 1.03, 1.97, 3)
    image, _ = read_itk(write(tmp_path / "series", ks))
    check_places(image, ks, within=0.04 * OBLIQUE.spacing[2])


def test_a_single_slice_is_as_deep_as_it_is_thick(tmp_path: Path) -> None:
    folder = write(tmp_path / "series", [4])
    for path in (folder, next(folder.iterdir())):
        image, _ = read_itk(path)
        check_places(image, [4])
        assert image.GetSpacing() == pytest.approx(OBLIQUE.spacing)


@pytest.mark.parametrize(
    ("ks", "sentence"),
    [
        ((0, 1, 2, 4, 5), r"between slices 3 and 4 of 5 lie 5\.00 mm, elsewhere 2\.50 mm; is one missing"),
        ((0, 2, 3, 4), r"between slices 1 and 2 of 4 lie 5\.00 mm"),
        ((0, 1, 2, 3.3), r"between slices 3 and 4 of 4 lie 3\.25 mm"),
        ((0, 0, 1, 1), "slices 1 and 2 of 4 are at the same place"),
        ((0, 0), "slices 1 and 2 of 2 are at the same place"),
    ],
)
def test_uneven_slices_are_refused(tmp_path: Path, ks: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        read_itk(write(tmp_path / "series", ks))


def test_two_orientations_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "series", (0, 1, 2))
    upright = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1], "ImagePositionPatient": [0, 0, 0]}
    OBLIQUE.write(folder / "overview.dcm", plane(0), 0, **upright)
    with pytest.raises(ImageError, match="different orientations"):
        read_itk(folder)


def test_two_series_in_a_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "series", (0, 1, 2))
    with pytest.raises(ImageError, match="one DICOM series, not 2"):
        read_itk(write(tmp_path / "series", (0, 1, 2), Series()))


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "series"
    folder.mkdir()
    for k in range(4):
        OBLIQUE.write(folder / f"{k}.dcm", plane(k), k, ImagePositionPatient=[0.5 * k, 0, -2.5 * k])
    with pytest.raises(ImageError, match=r"shifted against each other, up to 1\.50 mm"):
        read_itk(folder)


@pytest.mark.parametrize(
    ("tags", "sentence"),
    [
        ({"PixelSpacing": [0.9, 0.8]}, "different pixel sizes"),
        ({"ImagePositionPatient": None}, "without a place in space, 1 of 4"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "not at right angles"),
        ({"ImagePositionPatient": [0, 0]}, "cannot be read"),
    ],
)
def test_a_slice_unlike_the_others_is_refused(tmp_path: Path, tags: dict[str, Any], sentence: str) -> None:
    folder = write(tmp_path / "series", (0, 1, 2))
    OBLIQUE.write(folder / "3.dcm", plane(3), 3, **tags)
    with pytest.raises(ImageError, match=sentence):
        read_itk(folder)


def test_a_slice_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "series", (0, 1, 2))
    OBLIQUE.write(folder / "3.dcm", plane(3)[:, 1:], 3)
    with pytest.raises(ImageError, match="different sizes"):
        read_itk(folder)


def test_slices_without_places_keep_the_order_of_their_numbers(tmp_path: Path) -> None:
    nowhere: dict[str, Any] = {"ImagePositionPatient": None, "ImageOrientationPatient": None}
    image, _ = read_itk(write(tmp_path / "series", (2, 1, 0), **nowhere))
    assert [int(a[0, 0]) for a in sitk.GetArrayFromImage(image)] == [0, 100, 200]


def write_frames(path: Path, ks: Sequence[float]) -> None:
    """An enhanced CT, one file of many frames in the order given."""
    OBLIQUE.write(path, plane(0), 0)
    d = pydicom.dcmread(path)
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    measures, orientation, values, shared = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = d.PixelSpacing, d.SliceThickness
    orientation.ImageOrientationPatient = d.ImageOrientationPatient
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, d.RescaleIntercept, "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    shared.PixelValueTransformationSequence = [values]
    d.SharedFunctionalGroupsSequence, d.PerFrameFunctionalGroupsSequence = [shared], []
    for k in ks:
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = [round(float(x), 6) for x in OBLIQUE.world((0, 0, k))]
        frame.PlanePositionSequence = [place]
        d.PerFrameFunctionalGroupsSequence.append(frame)
    d.NumberOfFrames = len(ks)
    d.PixelData = b"".join((plane(k) - values.RescaleIntercept).astype(np.int16).tobytes() for k in ks)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(d, name)
    del d.RescaleSlope, d.RescaleIntercept
    d.save_as(path)


@pytest.mark.parametrize("ks", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_frames_of_one_file_are_read_in_their_order(tmp_path: Path, ks: tuple[int, ...]) -> None:
    write_frames(tmp_path / "a.dcm", ks)
    for path in (tmp_path, tmp_path / "a.dcm"):
        image, _ = read_itk(path)
        check_places(image, ks)


@pytest.mark.parametrize(
    ("ks", "sentence"),
    [
        ((0, 2, 1, 3), "2 and 3 of 4 are at the same place or out of order"),
        ((0, 1, 3, 4), "2 and 3 of 4 lie 5"),
    ],
)
def test_uneven_frames_are_refused(tmp_path: Path, ks: tuple[int, ...], sentence: str) -> None:
    write_frames(tmp_path / "a.dcm", ks)
    with pytest.raises(ImageError, match=sentence):
        read_itk(tmp_path / "a.dcm")


def test_several_files_of_many_frames_are_refused(tmp_path: Path) -> None:
    for name in ("a.dcm", "b.dcm"):
        write_frames(tmp_path / name, (0, 1))
    with pytest.raises(ImageError, match="several files of many frames"):
        read_itk(tmp_path)


def test_a_film_of_ultrasound_keeps_frames_and_colours(tmp_path: Path) -> None:
    path = tmp_path / "film.dcm"
    OBLIQUE.write(path, plane(0), 0, Modality="US")
    d = pydicom.dcmread(path)
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept"):
        delattr(d, name)
    d.NumberOfFrames, d.FrameTime, d.SamplesPerPixel, d.PlanarConfiguration = 3, 40, 3, 0
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 8, 8, 7, 0
    d.PhotometricInterpretation = "RGB"
    film = np.arange(3 * SHAPE[1] * SHAPE[0] * 3).astype(np.uint8).reshape(3, SHAPE[1], SHAPE[0], 3)
    d.PixelData = film.tobytes()
    d.save_as(path)
    image, modality = read_itk(path)
    assert modality == "US"
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), film)
