"""The server on a real DICOMweb archive: Debian's Orthanc, alone with it in a network namespace."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from tests import dicomweb_scenario as scenario

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("Orthanc") is None or not scenario.PLUGIN.exists(),
        reason="Orthanc and its DICOMweb plugin are not installed (Debian: orthanc orthanc-dicomweb)",
    ),
    pytest.mark.skipif(
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], check=False).returncode != 0,
        reason="network namespaces are not permitted here",
    ),
]

TINY = 1e-4  # millimetres
ROUNDED = 1e-3  # millimetres, of numbers written as text


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dicomweb")
    play = f"ip link set lo up && exec {sys.executable} -m tests.dicomweb_scenario {folder}"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        ["unshare", "-rn", "sh", "-c", play],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_click_on_a_series_is_answered_on_its_grid(seen: dict[str, Any]) -> None:
    assert seen["params"]["slice"] == scenario.CLICK[2]
    assert seen["slices"] == [scenario.CLICK[2]]
    assert seen["size"] == [scenario.COLUMNS, scenario.ROWS, scenario.SLICES]
    np.testing.assert_allclose(seen["spacing"], [0.7, 0.9, 2.5], atol=TINY)
    np.testing.assert_allclose(seen["origin"], [10, -20, 100], atol=TINY)
    axes = np.array(seen["direction"]).reshape(3, 3).T
    np.testing.assert_allclose(
        axes, [scenario.SERIES.row_axis, scenario.SERIES.column_axis, (0, 0, 1)], atol=TINY
    )


def test_a_label_goes_to_the_archive_under_its_names(seen: dict[str, Any]) -> None:
    assert seen["saved"] == [200, ""]
    assert seen["modalities"].count("SEG") == 1
    d = pydicom.dcmread(seen["segmentation"])
    assert d.FrameOfReferenceUID == scenario.SERIES.frame
    assert d.StudyInstanceUID == scenario.SERIES.study
    assert d.ReferencedSeriesSequence[0].SeriesInstanceUID == scenario.SERIES.uid
    # Label, category, type: SNOMED's codes as DICOM lists them.
    found = [
        (
            s.SegmentLabel,
            s.SegmentedPropertyCategoryCodeSequence[0].CodeValue,
            s.SegmentedPropertyTypeCodeSequence[0].CodeValue,
        )
        for s in d.SegmentSequence
    ]
    assert found == [("liver", "123037004", "10200004"), ("lesion", "49755003", "52988006")]


def test_a_label_in_the_archive_lies_where_it_was_drawn(seen: dict[str, Any]) -> None:
    d = pydicom.dcmread(seen["segmentation"])
    frames = np.atleast_3d(d.pixel_array).astype(bool)
    placed: dict[int, list[Any]] = {}
    for frame, groups in zip(frames, d.PerFrameFunctionalGroupsSequence, strict=True):
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        orientation = d.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
        np.testing.assert_allclose(
            orientation.ImageOrientationPatient, [*scenario.SERIES.row_axis, *scenario.SERIES.column_axis]
        )
        if frame.any():
            placed.setdefault(int(number), []).append((position, frame))
    for number, (value, (k, rows, columns)) in enumerate(scenario.BLOCKS.items(), start=1):
        ((position, frame),) = placed[number]
        np.testing.assert_allclose(position, scenario.SERIES.world((0, 0, k)), atol=ROUNDED)
        drawn = scenario.label_array()[k] == value
        np.testing.assert_array_equal(frame, drawn)
        assert drawn[rows, columns].all()


def test_a_label_that_cannot_be_one_is_refused(seen: dict[str, Any]) -> None:
    assert seen["empty"][0] == seen["too_small"][0] == 400
    assert "empty" in seen["empty"][1]
    assert "grid" in seen["too_small"][1]


def test_the_label_is_found_again_by_a_server_that_forgot_it(seen: dict[str, Any]) -> None:
    assert seen["label"] == 200
    again = seen["anew"]
    assert again["stats"]["completed"] == 1
    assert again["next"] == scenario.PROPOSED.uid
    assert again["status"] == 200
    found = sitk.ReadImage(again["label"])
    np.testing.assert_allclose(found.GetOrigin(), seen["origin"], atol=TINY)
    np.testing.assert_allclose(found.GetDirection(), seen["direction"], atol=TINY)
    # An archive numbers its segments anew.
    expected = scenario.label_array()
    expected[expected == 3] = 2
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), expected)
    assert again["info"]["label_info"] == [{"name": "liver", "idx": 1}, {"name": "lesion", "idx": 2}]
    assert again["none"] == 404


def test_fine_tuning_finds_labels_in_the_archive(seen: dict[str, Any]) -> None:
    state, error = seen["anew"]["finetuning"]
    assert state == "failed"
    assert error.startswith("1 of the images has a finished label")


def test_what_is_no_volume_is_refused_and_never_proposed(seen: dict[str, Any]) -> None:
    gap, orientations = seen["broken"]["gap"], seen["broken"]["two orientations"]
    assert gap[0] == orientations[0] == seen["broken_image"] == 400
    assert "slices 2 and 3 of 4 lie 5.00 mm, elsewhere 2.50 mm" in gap[1]
    assert "orientations" in orientations[1]
    assert seen["broken_twice"] == gap
    assert seen["next"] == scenario.PROPOSED.uid


def test_clicks_go_on_while_the_archive_is_away(seen: dict[str, Any]) -> None:
    lost = seen["lost"]
    assert lost["known"] == [200, ""]
    assert lost["info"] == 200
    assert lost["unknown"][0] == lost["proxy"] == 502
    assert "archive" in lost["unknown"][1]
    assert lost["again"] == [200, ""]


def test_the_proxy_passes_the_query_on_and_stays_within(seen: dict[str, Any]) -> None:
    assert (seen["found"], seen["not_found"]) == (1, 0)
    assert seen["above"] == 400


def test_what_the_archive_does_not_have_is_said(seen: dict[str, Any]) -> None:
    assert seen["unknown"][0] == 404
    assert "1.2.3.4" in seen["unknown"][1]
    assert seen["no_uid"][0] == 400


def test_nothing_is_left_in_the_temporary_folder(seen: dict[str, Any]) -> None:
    # MONAI Label's own configuration of its log, one a start.
    assert [name for name in seen["temporary"] if not name.endswith(".json")] == []


def test_the_log_names_neither_series_nor_patient(seen: dict[str, Any]) -> None:
    assert not seen["series_in_log"]
    assert not seen["patient_in_log"]
