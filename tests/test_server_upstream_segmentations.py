"""DICOM segmentations of label maps: what they say of their segments, and where the voxels are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from monailabel_dfqsam.server.gate.guard import Refusal
from monailabel_dfqsam.server.upstream.segmentations import (
    read_image,
    read_segmentation,
    segments,
    write_segmentation,
)
from tests.dicom_series import Series


def told(values: list[int], label_info: list[dict[str, Any]]) -> dict[int, str]:
    return {segment["labelID"]: segment["SegmentLabel"] for segment in segments(values, label_info)}


@pytest.mark.parametrize(
    ("values", "idx", "expected"),
    [
        ([1, 2], [1, 2], {1: "a", 2: "b"}),
        ([2], [1, 2], {2: "b"}),
        ([3, 7], [7, 3], {3: "b", 7: "a"}),
        # Slicer, with a background that it counts and does not send.
        ([1, 2], [2, 3], {1: "a", 2: "b"}),
        ([2], [None, None], {2: "b"}),
        ([5], [None, None], {5: "unknown"}),
    ],
)
def test_values_choose_names(values: list[int], idx: list[int | None], expected: dict[int, str]) -> None:
    info = [{"name": name, **({} if i is None else {"idx": i})} for name, i in zip("ab", idx, strict=True)]
    assert told(values, info) == expected


@pytest.mark.parametrize(
    ("name", "category", "kind"),
    [
        ("Spleen", "Anatomical Structure", "Spleen"),
        ("spinal cord", "Anatomical Structure", "Spinal cord"),
        ("lesion", "Morphologically Abnormal Structure", "Lesion"),
        ("tumour", "Morphologically Abnormal Structure", "Neoplasm"),
        ("organ", "Anatomical Structure", "Organ"),
        ("vessel", "Tissue", "Blood vessel"),
        ("bone", "Tissue", "Bone"),
        ("other", "Tissue", "Tissue"),
        ("hypothesis 7b", "Tissue", "Tissue"),
        ("hip joint", "Tissue", "Tissue"),  # of which DICOM has two
    ],
)
def test_codes_are_those_of_dicom_or_plain_tissue(name: str, category: str, kind: str) -> None:
    (attribute,) = segments([1], [{"name": name, "idx": 1}])
    assert attribute["SegmentLabel"] == name
    assert attribute["SegmentedPropertyCategoryCodeSequence"]["CodeMeaning"] == category
    assert attribute["SegmentedPropertyTypeCodeSequence"]["CodeMeaning"] == kind
    assert attribute["SegmentedPropertyTypeCodeSequence"]["CodingSchemeDesignator"] == "SCT"


@pytest.mark.parametrize(
    ("color", "expected"),
    [
        ("rgb(10, 200, 30)", [10, 200, 30]),
        ("rgba(10,200,30,0.5)", [10, 200, 30]),
        ([10, 200, 30, 255], [10, 200, 30]),
        ([300, -1, 30.7], [255, 0, 30]),
        ("greenish", [241, 214, 145]),
        ([1, 2], [241, 214, 145]),
        (None, [241, 214, 145]),
    ],
)
def test_a_colour_in_words_is_read_and_nonsense_left(color: Any, expected: list[int]) -> None:
    (segment,) = segments([1], [{"name": "bone", "idx": 1, "color": color}])
    assert segment["recommendedDisplayRGBValue"] == expected


def test_what_the_client_says_itself_stands() -> None:
    (segment,) = segments([4], [{"name": "x", "idx": 4, "segmentAttribute": {"SegmentLabel": "own"}}])
    assert segment["SegmentLabel"] == "own"
    assert segment["labelID"] == 4


ROWS, COLUMNS, SLICES = 20, 30, 6
OBLIQUE: dict[str, Any] = {"row_axis": (0.8, 0.6, 0.0), "column_axis": (-0.6, 0.8, 0.0)}
# The normal points to the feet.
DOWN: dict[str, Any] = {"row_axis": (0.8, 0.6, 0.0), "column_axis": (0.6, -0.8, 0.0)}
NAMES = [{"name": "liver", "idx": 2}, {"name": "tumour", "idx": 7, "color": "rgb(10, 200, 30)"}]


def drawn() -> NDArray[np.uint8]:
    """[K, J, I] two values, with empty slices at both ends and between."""
    array = np.zeros((SLICES, ROWS, COLUMNS), np.uint8)
    array[1, 3:9, 4:20] = 2
    array[4, 10:18, 1:6] = 7
    array[4, 2:4, 20:29] = 2
    return array


def written(folder: Path, series: Series, array: NDArray[np.uint8], **tags: Any) -> tuple[Path, Path]:
    """A series' folder with its image beside it, and a segmentation of a label on that."""
    place = folder / series.uid
    place.mkdir()
    # Names in another order than the slices.
    for k in range(len(array)):
        series.write(place / f"{(k * 5) % 7}.dcm", np.full(array.shape[1:], k), k, **tags)
    return place, segmented(place, array)


def segmented(place: Path, array: NDArray[np.uint8]) -> Path:
    image = read_image(place)
    sitk.WriteImage(image, f"{place}.nii.gz")
    mask = sitk.GetImageFromArray(array)
    mask.CopyInformation(image)
    sitk.WriteImage(mask, f"{place}-label.nrrd")
    return write_segmentation(place, Path(f"{place}-label.nrrd"), NAMES)


def frames(segmentation: Path) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.bool_], str]]:
    """Segment number, position (LPS), pixels and source of each frame, by pydicom alone."""
    d = pydicom.dcmread(segmentation)
    pixels = d.pixel_array.reshape(-1, d.Rows, d.Columns).astype(bool)
    for frame, groups in zip(pixels, d.PerFrameFunctionalGroupsSequence, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        yield (
            int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber),
            np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float),
            frame,
            str(source.ReferencedSOPInstanceUID),
        )


@pytest.mark.parametrize("axes", [OBLIQUE, DOWN])
@pytest.mark.parametrize("thickness", [2.5, 1.0, None])
def test_a_segmentation_lies_where_the_label_was_drawn(
    tmp_path: Path, axes: dict[str, Any], thickness: float | None
) -> None:
    series, array = Series(**axes), drawn()
    place, segmentation = written(tmp_path, series, array, SliceThickness=thickness)
    by_place = {
        tuple(map(float, d.ImagePositionPatient)): str(d.SOPInstanceUID)
        for d in map(pydicom.dcmread, place.iterdir())
    }
    seen = np.zeros_like(array)
    for number, position, frame, source in frames(segmentation):
        k = next(k for k in range(SLICES) if np.abs(series.world((0, 0, k)) - position).max() < 1e-3)
        seen[k][frame] = (2, 7)[number - 1]
        assert by_place[tuple(position)] == source
    np.testing.assert_array_equal(seen, array)
    d = pydicom.dcmread(segmentation)
    assert [(int(s.SegmentNumber), s.SegmentLabel) for s in d.SegmentSequence] == [
        (1, "liver"),
        (2, "tumour"),
    ]
    assert d.FrameOfReferenceUID == series.frame
    os.unlink(segmentation)


@pytest.mark.parametrize("axes", [OBLIQUE, DOWN])
@pytest.mark.parametrize("thickness", [2.5, 1.0])
def test_other_readers_find_the_same_voxels(tmp_path: Path, axes: dict[str, Any], thickness: float) -> None:
    array, series = drawn(), Series(**axes)
    place, segmentation = written(tmp_path, series, array, SliceThickness=thickness)
    names = read_segmentation(segmentation, Path(f"{place}.nii.gz"), tmp_path / "back.nii.gz")
    numbers = np.select([array == 2, array == 7], [1, 2])
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "back.nii.gz"))), numbers
    )
    assert names == [{"name": "liver", "idx": 1}, {"name": "tumour", "idx": 2}]
    # dcmqi, by which 3D Slicer reads them.
    program = shutil.which("segimage2itkimage", path=os.pathsep.join([str(Path(sys.executable).parent)]))
    assert program is not None
    line = [program, "--inputDICOM", str(segmentation), "--outputDirectory", str(tmp_path), "-p", "other"]
    subprocess.run([*line, "-t", "nrrd"], check=True, capture_output=True, timeout=60)
    told = json.loads((tmp_path / "other-meta.json").read_text())["segmentAttributes"]
    colours = [entry["recommendedDisplayRGBValue"] for (entry,) in told]
    np.testing.assert_allclose(colours, [(221, 130, 101), (10, 200, 30)], atol=2)
    image = sitk.ReadImage(f"{place}.nii.gz")
    for number in (1, 2):
        other = sitk.ReadImage(str(tmp_path / f"other-{number}.nrrd"))
        on_grid = sitk.Resample(other, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0.0)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(on_grid) > 0, numbers == number)
    os.unlink(segmentation)


@pytest.mark.parametrize(
    "missing",
    [("PatientID", "StudyID", "AccessionNumber"), ("StudyDate", "PatientName"), ("SliceThickness",)],
)
def test_headers_with_less_than_dicom_asks_for_will_do(tmp_path: Path, missing: tuple[str, ...]) -> None:
    place, segmentation = written(tmp_path, Series(), drawn())
    os.unlink(segmentation)
    for path in place.iterdir():
        d = pydicom.dcmread(path)
        for name in missing:
            delattr(d, name)
        d.save_as(path)
    again = segmented(place, drawn())
    assert sum(1 for _ in frames(again)) == 3
    os.unlink(again)


def test_many_frames_in_one_file(tmp_path: Path) -> None:
    """Of which each says its own orientation and pixel size, as some scanners write."""
    series, array = Series(**DOWN), drawn()
    place = tmp_path / series.uid
    place.mkdir()
    series.write(place / "all.dcm", np.zeros((ROWS, COLUMNS), int), 0)
    d = pydicom.dcmread(place / "all.dcm")
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedCTImageStorage
    d.NumberOfFrames, d.PixelData = SLICES, np.zeros((SLICES, ROWS, COLUMNS), np.int16).tobytes()
    groups = []
    for k in range(SLICES):
        group, position, orientation, measures = (pydicom.Dataset() for _ in range(4))
        position.ImagePositionPatient = [round(float(x), 6) for x in series.world((0, 0, k))]
        orientation.ImageOrientationPatient = d.ImageOrientationPatient
        measures.PixelSpacing, measures.SliceThickness = d.PixelSpacing, 2.5
        group.PlanePositionSequence, group.PlaneOrientationSequence = [position], [orientation]
        group.PixelMeasuresSequence = [measures]
        groups.append(group)
    d.PerFrameFunctionalGroupsSequence, d.SharedFunctionalGroupsSequence = groups, [pydicom.Dataset()]
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(d, name)
    d.save_as(place / "all.dcm")
    segmentation = segmented(place, array)
    seen = np.zeros_like(array)
    for number, position, frame, _ in frames(segmentation):
        k = next(k for k in range(SLICES) if np.abs(series.world((0, 0, k)) - position).max() < 1e-3)
        seen[k][frame] = (2, 7)[number - 1]
    np.testing.assert_array_equal(seen, array)
    os.unlink(segmentation)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda array: array * 0, "is empty"),
        (lambda array: array[1:], "does not lie on the grid"),
        (lambda array: array * np.float32(0.3), "whole numbers"),
    ],
)
def test_what_is_no_segmentation(tmp_path: Path, change: Any, sentence: str) -> None:
    place, segmentation = written(tmp_path, Series(), drawn())
    os.unlink(segmentation)
    label = sitk.GetImageFromArray(change(drawn()))
    sitk.WriteImage(label, f"{place}-label.nrrd")
    with pytest.raises(Refusal, match=sentence) as refused:
        write_segmentation(place, Path(f"{place}-label.nrrd"), NAMES)
    assert refused.value.status == 400


def test_another_s_segmentation_need_not_say_how_far_slices_are_apart(tmp_path: Path) -> None:
    place, segmentation = written(tmp_path, Series(**DOWN), drawn(), SliceThickness=1.0)
    d = pydicom.dcmread(segmentation)
    del d.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
    d.save_as(segmentation)
    read_segmentation(segmentation, Path(f"{place}.nii.gz"), tmp_path / "back.nii.gz")
    back = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "back.nii.gz")))
    np.testing.assert_array_equal(back, np.select([drawn() == 2, drawn() == 7], [1, 2]))
    os.unlink(segmentation)


def test_parts_that_overlap_are_no_label(tmp_path: Path) -> None:
    place, segmentation = written(tmp_path, Series(), drawn())
    d = pydicom.dcmread(segmentation)
    everywhere = np.ones((int(d.NumberOfFrames), ROWS, COLUMNS), np.uint8)
    d.PixelData = pydicom.pixel_data_handlers.util.pack_bits(everywhere.ravel())
    d.save_as(segmentation)
    with pytest.raises(Refusal, match="overlapping parts"):
        read_segmentation(segmentation, Path(f"{place}.nii.gz"), tmp_path / "back.nii.gz")
    os.unlink(segmentation)
