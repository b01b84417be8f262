"""OHIF in a real browser, on a real Orthanc and a real server; all of them alone in a network namespace."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dicomweb_scenario import PLUGIN

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "realdata" / "dicom" / "sarcoma_ct" / "image"
CHROMIUM = Path("/usr/bin/chromium")
PICTURES = "DFQSAM_TEST_PICTURES"  # an environment variable: the folder for screenshots
TINY = 1e-3  # millimetres
VOXEL = 0.5  # millimetres: less than half a voxel's diagonal in any slice here

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("Orthanc") is None or not PLUGIN.exists(),
        reason="Orthanc and its DICOMweb plugin are not installed (Debian: orthanc orthanc-dicomweb)",
    ),
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Chromium is not installed (Debian: chromium)"),
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None, reason="playwright is not installed (extra: dev)"
    ),
    pytest.mark.skipif(
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], check=False).returncode != 0,
        reason="network namespaces are not permitted here",
    ),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ohif")
    pictures = Path(os.environ.get(PICTURES) or folder / "pictures").absolute()
    pictures.mkdir(parents=True, exist_ok=True)
    series = str(REAL) if REAL.is_dir() else ""
    play = f"{sys.executable} -m tests.end_to_end.ohif_scenario {folder} {pictures} {series}"
    done = subprocess.run(
        ["unshare", "-rn", "sh", "-c", f"ip link set lo up && exec {play}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr[-5000:]}\nPictures are in {pictures}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(params=["first", "second", "real"])
def run(request: pytest.FixtureRequest, seen: dict[str, Any]) -> dict[str, Any]:
    """One press of Run: before the requantization, after it, and on a real series."""
    if request.param not in seen:
        pytest.skip("no real series: ../shared/realdata is not there")
    found: dict[str, Any] = seen[request.param]
    return found


def test_the_request_holds_the_voxels_clicked(run: dict[str, Any]) -> None:
    sent = run["request"]
    assert (sent["method"], sent["path"]) == ("POST", "/infer/dfqsam")
    assert sent["query"] == {"image": run["series"], "output": "image"}
    assert sent["params"]["foreground"] == run["expected"]["indices"]
    assert sent["params"]["background"] == []
    assert sent["params"]["result_extension"] == ".nrrd"
    assert sent["params"]["result_compress"] is False


def test_the_page_and_the_files_agree_where_a_voxel_is(run: dict[str, Any]) -> None:
    expected = np.array(run["expected"]["worlds"])
    np.testing.assert_allclose(run["worlds"], expected, atol=TINY)
    assert np.linalg.norm(np.array(run["points"]) - expected, axis=1).max() < VOXEL


def test_the_page_shows_the_servers_mask_voxel_by_voxel(run: dict[str, Any]) -> None:
    page, asked = run["mask"], run["asked"]
    assert page["dimensions"] == asked["dimensions"]
    label = run["expected"]["label"]
    value = next(int(number) for number, name in page["names"].items() if name == label)
    assert [n for n, v in zip(page["set"], page["value"], strict=True) if v == value] == asked["set"]
    size_i, size_j, _ = page["dimensions"]
    places = {i + size_i * (j + size_j * k) for i, j, k in run["expected"]["indices"]}
    assert places <= set(asked["set"])
    slices = {n // (size_i * size_j) for n in asked["set"]}
    assert slices == {k for _, _, k in run["expected"]["indices"]}


def test_an_open_page_gets_the_new_model_and_keeps_its_mask(seen: dict[str, Any]) -> None:
    first, second = seen["first"], seen["second"]
    assert "dfqsam" in seen["models"]
    assert first["serving"]["model"].startswith("W4A4")
    assert second["serving"]["key"] not in (None, first["serving"]["key"])
    organ = [n for n, v in zip(first["mask"]["set"], first["mask"]["value"], strict=True) if v]
    assert set(organ) <= set(second["mask"]["set"])
    assert {second["mask"]["names"][str(v)] for v in second["mask"]["value"]} == {"organ", "lesion"}


def test_nothing_went_wrong_in_the_page(seen: dict[str, Any]) -> None:
    # 404 is how MONAI Label says that no training is running.
    assert [error for error in seen["errors"] if "/train/?check_if_running" not in error] == []


def test_the_page_reads_a_submitted_label_from_the_archive(seen: dict[str, Any]) -> None:
    found, expected = seen["archived"]["found"], seen["archived"]["expected"]
    assert found["names"] == {"1": "liver", "2": "tumour"}
    assert len(found["slices"]) == len(expected)
    for one, other in zip(
        *(sorted(slices, key=lambda s: s["position"][2]) for slices in (found["slices"], expected)),
        strict=True,
    ):
        np.testing.assert_allclose(one["position"], other["position"], atol=TINY)
        assert (one["set"], one["value"]) == (other["set"], other["value"])
